"""The checks beside the contracts: leakage, fallen scores, unused experts."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import dagster as dg
import pytest

from medvlm.pipeline import with_items
from medvlm.settings import Settings, write_settings
from medvlm.store import Report, write_json, write_report
from orchestration.assets.datasets import COMPARED
from orchestration.checks import experts_balance, licences_are_recent, no_leaked_images, router_tells_apart, scores_hold
from orchestration.launchers import TrainingLauncher
from orchestration.resources import DvcProject

RECIPE = "tiny-llava-med"


@pytest.fixture
def project(tmp_path: Path) -> DvcProject:
    write_settings(tmp_path / "params.yaml", with_items(Settings.sample()))
    return DvcProject(root=str(tmp_path), launcher=TrainingLauncher())


def run(check: dg.AssetChecksDefinition, project: DvcProject) -> dg.AssetCheckEvaluation:
    """The check alone, as from the UI."""
    (asset,) = {key.asset_key for key in check.check_keys}
    job = dg.define_asset_job("checks", dg.AssetSelection.checks(check))
    defs = dg.Definitions(
        assets=[dg.AssetSpec(asset)], asset_checks=[check], jobs=[job], resources={"project": project}
    )
    result = defs.resolve_job_def("checks").execute_in_process(raise_on_error=False)
    (evaluation,) = result.get_asset_check_evaluations()
    return evaluation


def leakage(project: DvcProject, rows: list[tuple[str, int]]) -> None:
    comparisons = [
        {**dict.fromkeys(COMPARED, 0), "train": train, "test": "vqa-rad:test", "leaked_images": leaked}
        for train, leaked in rows
    ]
    write_report(project.workspace.leakage, Report(step="leakage", details={"comparisons": comparisons}), started=0.0)


def test_a_test_image_in_a_built_training_set_fails_and_one_in_a_published_split_does_not(project: DvcProject) -> None:
    leakage(project, [("alignment", 0), ("instruct", 0), ("vqa-rad:train", 202)])
    assert run(no_leaked_images, project).passed
    leakage(project, [("alignment", 0), ("instruct", 3), ("vqa-rad:train", 202)])
    assert not run(no_leaked_images, project).passed


def test_experts_that_are_hardly_used_are_a_warning(project: DvcProject) -> None:
    stage = project.workspace.stage(RECIPE, 3)
    write_report(stage, Report(step="train", metrics={"loss": 1.0}), started=0.0)
    assert run(experts_balance, project).passed, "a dense model has nothing to balance"
    write_report(stage, Report(step="train", metrics={"expert_balance": 0.1}), started=0.0)
    found = run(experts_balance, project)
    assert not found.passed
    assert found.severity is dg.AssetCheckSeverity.WARN


def test_a_fallen_score_fails_with_its_numbers(project: DvcProject, monkeypatch: pytest.MonkeyPatch) -> None:
    from medvlm.evaluation import accepted

    for benchmark in ("vqa-rad", "slake"):
        project.workspace.scores(RECIPE, benchmark).mkdir(parents=True)
    fallen = accepted.Fallen("closed", "whole_word", 61.0, 80.0, 75.0)
    monkeypatch.setattr(accepted, "fallen_scores", lambda _, recipe, name: [fallen] if name == "slake" else [])
    found = run(scores_hold, project)
    assert not found.passed
    assert found.description.startswith("tiny-llava-med-slake: closed whole_word is 61.0")
    assert found.metadata["scored"].value == 2, "what was never scored is no failure"
    monkeypatch.setattr(accepted, "fallen_scores", lambda *_: [])
    assert run(scores_hold, project).passed


def test_a_poor_router_is_a_warning_that_names_its_recipe(tmp_path: Path) -> None:
    settings = Settings.sample().model_copy(update={"recipes": ["tiny-cliva-med-phi2", RECIPE]})
    write_settings(tmp_path / "params.yaml", with_items(settings))
    project = DvcProject(root=str(tmp_path), launcher=TrainingLauncher())
    nothing = run(router_tells_apart, project)
    assert nothing.passed
    assert nothing.description == "no router here"
    router = project.workspace.router("tiny-cliva-med-phi2")
    write_report(router, Report(step="train-router", metrics={"accuracy": 0.41}), started=0.0)
    found = run(router_tells_apart, project)
    assert (found.passed, found.severity) == (False, dg.AssetCheckSeverity.WARN)
    assert found.description == "below 0.6: tiny-cliva-med-phi2"
    write_report(router, Report(step="train-router", metrics={"accuracy": 0.97}), started=0.0)
    assert run(router_tells_apart, project).passed


@pytest.mark.parametrize(
    ("days", "passed", "severity"), [(29, True, "WARN"), (31, False, "WARN"), (61, False, "ERROR")]
)
def test_licences_that_nobody_looked_at_for_long_are_said(
    project: DvcProject, days: int, passed: bool, severity: str
) -> None:
    when = (datetime.now(UTC) - timedelta(days=days)).isoformat()
    write_json(project.workspace.figures / "report.json", {"step": "fetch", "created_at": when})
    told = run(licences_are_recent, project)
    assert (told.passed, told.severity.value, told.metadata["days ago"].value) == (passed, severity, days)
    write_report(project.workspace.figures / "recheck", Report(step="recheck"), started=0.0)
    assert run(licences_are_recent, project).passed, "a recheck renews them"
