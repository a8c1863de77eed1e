"""A DVC stage through Dagster: run once, then skipped; live progress; a failure with the command's words."""

import sys
from pathlib import Path
from types import SimpleNamespace

import dagster as dg
import pytest

from medvlm.pipeline import with_items
from medvlm.settings import Settings, write_settings
from orchestration.launchers import TrainingLauncher
from orchestration.resources import DvcProject, StageRun, _is_cancelled, _observe

DVC_YAML = """
stages:
  plain:
    cmd: python -c "open('plain.txt', 'w').write('1')"
    outs: [plain.txt]
  watched:
    cmd: python job.py
    deps: [plain.txt, job.py]
    outs: [watched.txt]
  broken:
    cmd: python -c "import sys; print('the words of the command'); sys.exit(3)"
"""

JOB = """
from medvlm.progress import report_progress
for step in (1, 2, 3):
    report_progress({"step": step, "loss": 1 / step, "ignored": [1]})
open("watched.txt", "w").write("done")
"""


@pytest.fixture
def project(tmp_path: Path) -> DvcProject:
    import subprocess

    (tmp_path / "dvc.yaml").write_text(DVC_YAML)
    (tmp_path / "job.py").write_text(JOB)
    write_settings(tmp_path / "params.yaml", with_items(Settings.sample()))
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "-q"], cwd=tmp_path, check=True)
    return DvcProject(root=str(tmp_path), launcher=TrainingLauncher())


def reproduce(project: DvcProject, stage: str, *, watch: bool = False) -> tuple[dg.ExecuteInProcessResult, StageRun]:
    runs: list[StageRun] = []

    @dg.asset
    def step(context: dg.AssetExecutionContext, project: DvcProject) -> dg.MaterializeResult:
        runs.append(project.reproduce(context, stage, watch=watch))
        return dg.MaterializeResult()

    result = dg.materialize([step], resources={"project": project}, raise_on_error=False)
    return result, runs[0] if runs else StageRun(stage, False, "")


def test_a_stage_runs_once_and_its_version_is_dvcs_hash(project: DvcProject) -> None:
    _, first = reproduce(project, "plain")
    _, again = reproduce(project, "plain")
    assert (first.ran, again.ran) == (True, False)
    assert first.data_version == again.data_version == "c4ca4238a0b9"  # MD5 of "1"


def test_progress_is_seen_as_observations_of_the_asset(project: DvcProject) -> None:
    reproduce(project, "plain")
    result, run = reproduce(project, "watched", watch=True)
    assert result.success and run.ran
    losses = [
        e.asset_observation_data.asset_observation.metadata["loss"].value for e in result.get_asset_observation_events()
    ]
    assert losses == [1, 1 / 2, 1 / 3]


def test_a_failed_stage_speaks_with_the_commands_words(project: DvcProject) -> None:
    result, _ = reproduce(project, "broken")
    assert not result.success
    (failure,) = [e for e in result.all_events if e.event_type_value == "STEP_FAILURE"]
    assert "the words of the command" in str(failure.step_failure_data.user_failure_data.description)


def test_changed_inputs_are_read_from_the_lock(project: DvcProject) -> None:
    reproduce(project, "plain")
    reproduce(project, "watched", watch=True)
    assert project.changed_inputs("watched") == []
    text = (Path(project.root) / "dvc.yaml").read_text()
    (Path(project.root) / "dvc.yaml").write_text(text.replace("write('1')", "write('2')"))
    reproduce(project, "plain")
    assert project.changed_inputs("watched") == ["plain.txt"]
    assert project.changed_inputs("never-run") == []


def test_a_database_that_is_away_ends_no_job_and_gets_its_progress_later(capsys: pytest.CaptureFixture[str]) -> None:
    from sqlalchemy.exc import OperationalError

    told: list[int] = []
    away = [True, False]

    def log_event(event: dg.AssetObservation) -> None:
        if len(told) == 1 and away.pop(0):
            raise OperationalError("INSERT", {}, Exception("connection refused"))
        told.append(event.metadata["step"].value)  # type: ignore[arg-type]

    context = SimpleNamespace(
        log_event=log_event, has_partition_key=False, selected_asset_keys=[dg.AssetKey("training")]
    )
    messages = [{"progress": {"step": step}} for step in (1, 2, 3)]
    session = SimpleNamespace(get_custom_messages=lambda: messages)
    seen = _observe(context, session, 0)  # type: ignore[arg-type]
    assert (seen, told) == (1, [1])
    assert "the job goes on" in capsys.readouterr().err
    assert _observe(context, session, seen) == 3  # type: ignore[arg-type]
    assert told == [1, 2, 3]


@pytest.mark.parametrize(("executor", "ended"), [("celery", True), ("multiprocess", False)])
def test_a_step_on_a_celery_worker_asks_whether_its_run_was_terminated(executor: str, ended: bool) -> None:
    @dg.job
    def nothing() -> None: ...

    with dg.instance_for_test() as instance:
        run = instance.create_run_for_job(nothing)
        definition = SimpleNamespace(executor_def=SimpleNamespace(name=executor))
        context = SimpleNamespace(job_def=definition, instance=instance, run=run)
        assert not _is_cancelled(context)
        instance.report_run_canceling(run)
        # Elsewhere Dagster itself ends the step's process, pod or job.
        assert _is_cancelled(context) is ended
