"""What `dvc repro` made outside Dagster shows as fresh, each asset once, and stale where its inputs moved on."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml
from dagster._core.definitions.data_version import CachingStaleStatusResolver, StaleStatus

from medvlm.pipeline import with_items
from medvlm.settings import Settings, write_settings
from medvlm.store import Report, write_report
from orchestration.definitions import defs
from orchestration.launchers import TrainingLauncher
from orchestration.outside import made_of
from orchestration.resources import DvcProject
from orchestration.sensors import dvc_made

RECIPE = "tiny-llava-med"


@pytest.fixture
def project(tmp_path: Path) -> DvcProject:
    write_settings(tmp_path / "params.yaml", with_items(Settings.sample()))
    return DvcProject(root=str(tmp_path), launcher=TrainingLauncher())


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.instance_for_test() as made:
        yield made


def pass_through_dvc(project: DvcProject, **changes: str) -> None:
    """The lock file and folders that a whole `dvc repro` leaves; a change is another hash of a stage's output."""
    stages: dict[str, Any] = {}
    for made in made_of(project.settings, project.workspace):
        made.folder.mkdir(parents=True, exist_ok=True)
        write_report(made.folder, Report(step=made.asset, counts={"rows": 7}), started=0.0)
        for stage in made.stages:
            md5 = changes.get(stage.partition("@")[0], f"{abs(hash(stage)):032x}"[:32])
            stages[stage] = {"deps": [], "outs": [{"path": f"out/{stage}", "md5": md5}]}
    stages[f"stage1@{RECIPE}"]["deps"] = [{"path": "out/alignment", "md5": stages["alignment"]["outs"][0]["md5"]}]
    project.lock_file.write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}))


def tick(project: DvcProject, instance: dg.DagsterInstance, cursor: str | None = None) -> tuple[str, str | None]:
    with dg.build_sensor_context(
        instance=instance, resources={"project": project}, definitions=defs, cursor=cursor
    ) as context:
        result = dvc_made(context)
        assert isinstance(result, dg.SkipReason)
        return result.skip_message or "", context.cursor


def status(instance: dg.DagsterInstance, asset: str, partition: str | None = None) -> StaleStatus:
    """As the UI shows it."""
    from dagster._core.loader import LoadingContextForTest

    graph = defs.resolve_asset_graph()
    resolver = CachingStaleStatusResolver(instance, graph, LoadingContextForTest(instance))
    return resolver.get_status(dg.AssetKey(asset), partition)


def test_all_that_dvc_made_is_fresh(project: DvcProject, instance: dg.DagsterInstance) -> None:
    assert status(instance, "figures") is StaleStatus.MISSING
    pass_through_dvc(project)
    said, _ = tick(project, instance)
    assert said.startswith("reported sample_corpus, figures, benchmark_items")
    assert f"benchmark_scores [slake|{RECIPE}]" in said
    for made in made_of(project.settings, project.workspace):
        assert status(instance, made.asset, made.partition) is StaleStatus.FRESH, made
    event = instance.get_latest_materialization_event(dg.AssetKey("stage1_checkpoint"))
    assert event is not None and event.asset_materialization is not None
    assert event.asset_materialization.partition == RECIPE
    assert event.asset_materialization.metadata["rows"].value == 7, "counts of the report are shown"


def test_each_is_told_once_and_again_when_it_changes(project: DvcProject, instance: dg.DagsterInstance) -> None:
    assert "DVC has made nothing yet" in tick(project, instance)[0]
    pass_through_dvc(project)
    _, cursor = tick(project, instance)
    assert tick(project, instance, cursor)[0] == "dvc.lock is as it was"
    assert tick(project, instance)[0] == "Dagster knows all that DVC has made", "a lost cursor repeats nothing"
    pass_through_dvc(project, leakage="f" * 32)
    assert tick(project, instance, cursor)[0] == "reported leakage_report"
    pass_through_dvc(project, leakage="f" * 32, release="e" * 32)
    assert tick(project, instance)[0] == f"reported model_card [{RECIPE}], release_bundle [{RECIPE}]"


def test_what_is_out_of_date_is_not_told_as_made(project: DvcProject, instance: dg.DagsterInstance) -> None:
    pass_through_dvc(project)
    tick(project, instance)
    locked = yaml.safe_load(project.lock_file.read_text())
    locked["stages"]["alignment"]["outs"][0]["md5"] = "a" * 32
    project.lock_file.write_text(yaml.safe_dump(locked))
    assert tick(project, instance)[0] == "reported alignment_dataset"
    assert status(instance, "alignment_dataset") is StaleStatus.FRESH
    assert status(instance, "stage1_checkpoint", RECIPE) is StaleStatus.STALE, "it was made from the data before"


def test_what_is_in_the_lock_but_not_here_is_not_told(project: DvcProject, instance: dg.DagsterInstance) -> None:
    pass_through_dvc(project)
    shutil.rmtree(project.workspace.figures)
    assert "figures" not in tick(project, instance)[0].split(", ")


def test_versions_are_those_that_a_run_gives(project: DvcProject) -> None:
    project.lock_file.write_text(
        yaml.safe_dump(
            {"stages": {"figures": {"outs": [{"path": "a", "md5": "1" * 32}, {"path": "b/report.json", "md5": "2"}]}}}
        )
    )
    assert project.made_stages() == {"figures": "1" * 12}, "times in a report make nothing new"


def test_a_leaderboard_that_reads_a_folder_of_outputs_is_stale_once_one_of_them_is_made_anew(
    project: DvcProject, instance: dg.DagsterInstance
) -> None:
    pass_through_dvc(project)
    lock = yaml.safe_load(project.lock_file.read_text())
    folder = project.workspace.root / "scores"
    shutil.rmtree(folder)
    scores = folder / "a" / "slake" / "report.json"
    scores.parent.mkdir(parents=True)
    scores.write_text("1")
    inside = hashlib.md5(b"1").hexdigest()
    listed = json.dumps([{"md5": inside, "relpath": "a/slake/report.json"}], sort_keys=True)
    lock["stages"]["score@a-slake"] = {"outs": [{"path": "workspace/scores/a/slake/report.json", "md5": inside}]}
    lock["stages"]["leaderboard"]["deps"] = [
        {"path": "workspace/scores", "md5": hashlib.md5(listed.encode()).hexdigest() + ".dir"}
    ]
    project.lock_file.write_text(yaml.safe_dump(lock))
    assert "leaderboard" in project.made_stages() and project.changed_inputs("leaderboard") == []
    scores.write_text("2")
    assert "leaderboard" not in project.made_stages()
    assert project.changed_inputs("leaderboard") == ["workspace/scores"]
    assert "leaderboard" not in tick(project, instance)[0]


def test_a_part_of_an_output_is_compared_as_dvc_hashes_it(tmp_path: Path) -> None:
    """Against DVC itself: a recipe's file of one stage, and a folder of outputs."""
    from projects import copy_project

    folder = copy_project(tmp_path / "project")
    (folder / "dvc.yaml").write_text(
        "stages:\n"
        "  recipe: {cmd: mkdir -p r/a && echo 1 > r/a/stage1.yaml && echo 1 > r/a/stage2.yaml, outs: [r/a]}\n"
        "  other: {cmd: mkdir -p r/b && echo 1 > r/b/x, outs: [r/b/x]}\n"
        "  one: {cmd: echo 1 > one, deps: [r/a/stage1.yaml], outs: [one]}\n"
        "  all: {cmd: echo 1 > all, deps: [r, r/b], outs: [all]}\n"
    )
    command = [sys.executable, "-m", "dvc", "repro", "-q", "recipe", "other", "one", "all"]
    subprocess.run(command, cwd=folder, check=True, env={**os.environ, "DVC_NO_ANALYTICS": "1"})
    project = DvcProject(root=str(folder), launcher=TrainingLauncher())
    assert project.made_stages().keys() == {"recipe", "other", "one", "all"}
    (folder / "r" / "a" / "stage1.yaml").write_text("2")
    assert project.made_stages().keys() == {"recipe", "other"}
    assert project.changed_inputs("all") == ["r"]
