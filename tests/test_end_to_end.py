"""The whole road of every twin: URLs to scores, killed on the way, then walked again.

One walk serves every test here. It is the slowest thing in the suite, and what the product is.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from projects import copy_project

from medvlm.config import load_recipe, recipe_names
from medvlm.store import Workspace, read_report

pytestmark = pytest.mark.timeout(3000)  # a whole road, twice begun

RECIPE = "tiny-llava-med"
"""The twin that is killed on the way."""
TWINS = [RECIPE, *(name for name in recipe_names() if name.startswith("tiny-") and name != RECIPE)]
GAIN_POINTS = {RECIPE: 25.0} | dict.fromkeys(TWINS[1:], 15.0)
"""Closed accuracy above the blind baseline that each twin has to reach."""
SECRET = "planted-7f3a9c"
"""Stands in the environment of every process; it must be found nowhere afterwards."""


@dataclass(frozen=True)
class Walk:
    folder: Path
    first: subprocess.CompletedProcess[str]
    second: subprocess.CompletedProcess[str]

    @property
    def workspace(self) -> Workspace:
        return Workspace(self.folder / "workspace")

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return run(self.folder, *command)


def environment(folder: Path) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {
        **os.environ,
        "PATH": path,
        "MEDVLM_PROJECT": str(folder),
        "DAGSTER_HOME": str(folder / ".dagster"),
        "DVC_NO_ANALYTICS": "1",
        "MEDVLM_ENDPOINT_KEY": SECRET,
        "MEDVLM_ALERT_WEBHOOK": f"http://127.0.0.1:9/{SECRET}",
        "AWS_SECRET_ACCESS_KEY": SECRET,
    }


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, env=environment(folder), capture_output=True, text=True)


def kill_in_stage_2(folder: Path) -> subprocess.CompletedProcess[str]:
    """Walk, and ``kill -9`` the trainer of stage 2 once it has written a checkpoint to resume from."""
    command = [sys.executable, "-m", "orchestration.walk", "--recipe", RECIPE]
    with (folder / "first.log").open("w+") as log:
        walk = subprocess.Popen(command, cwd=folder, env=environment(folder), stdout=log, stderr=log, text=True)
        scratch = Workspace(folder / "workspace").scratch("train", RECIPE, "stage2")
        deadline = time.monotonic() + 1500
        while not list(scratch.rglob("complete.json")):
            assert walk.poll() is None, (folder / "first.log").read_text()[-4000:]
            assert time.monotonic() < deadline, "stage 2 wrote no checkpoint"
            time.sleep(0.05)
        for process in psutil.Process(walk.pid).children(recursive=True):
            if "--stage 2" in " ".join(process.cmdline()) and "dvc" not in process.cmdline():
                process.send_signal(signal.SIGKILL)
        walk.wait(60)
        log.seek(0)
        return subprocess.CompletedProcess(command, walk.returncode, log.read(), "")


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Walk:
    folder = copy_project(tmp_path_factory.mktemp("road") / "project")
    run(folder, "medvlm", "configure", "--sample", *(word for name in TWINS for word in ("--recipe", name)))
    first = kill_in_stage_2(folder)
    second = run(folder, sys.executable, "-m", "orchestration.walk")
    assert second.returncode == 0, second.stdout[-4000:] + second.stderr[-4000:]
    return Walk(folder, first, second)


def test_a_killed_training_fails_the_run_in_plain_words(walked: Walk) -> None:
    assert walked.first.returncode == 1
    assert "stage2_checkpoint" in walked.first.stdout
    assert "run the same command again" in walked.first.stdout


def test_the_second_walk_goes_on_where_the_first_was_killed(walked: Walk) -> None:
    going_on = re.search(r"going on from step (\d+) of (\d+)", walked.second.stdout)
    assert going_on is not None
    assert 0 < int(going_on[1]) < int(going_on[2])
    report = read_report(walked.workspace.stage(RECIPE, 2))
    assert report is not None
    steps = [point["step"] for point in report.details["curves"]["all"]]
    assert steps == sorted(set(steps)), "the curve has every step once"
    assert steps[0] == 1, "the part before the kill is in the curve"
    assert "Stage 'stage1@tiny-llava-med' didn't change, skipping" in walked.second.stdout


def test_the_time_of_each_step_is_printed(walked: Walk) -> None:
    timed = re.findall(r"^ +\d+\.\d s  (\w+)", walked.second.stdout, re.MULTILINE)
    assert {"figures", "stage1_checkpoint", "stage3_checkpoint", "benchmark_scores", "leaderboard"} <= set(timed)
    assert "Research use only" in walked.second.stdout


@pytest.mark.parametrize(("recipe", "benchmark"), [(name, b) for name in TWINS for b in load_recipe(name).benchmarks])
def test_the_model_looks(walked: Walk, recipe: str, benchmark: str) -> None:
    rows = json.loads(walked.run("medvlm", "leaderboard", "--json").stdout)
    (row,) = [
        r
        for r in rows
        if (r["kind"], r["model"], r["benchmark"], r["rule"]) == ("ours", recipe, benchmark, "whole_word")
        and r["training"] == load_recipe(recipe).stages[-1].name
    ]
    assert row["answer_type"] == "closed"
    assert row["value"] - row["blind"] >= GAIN_POINTS[recipe], row
    assert row["low"] <= row["value"] <= row["high"]


def test_dvc_has_nothing_to_do_after_dagster(walked: Walk) -> None:
    done = walked.run(sys.executable, "-m", "dvc", "repro")
    assert done.returncode == 0, done.stderr
    assert "Running stage" not in done.stdout + done.stderr
    assert "up to date" in done.stdout + done.stderr
    assert "changed" not in walked.run(sys.executable, "-m", "dvc", "status").stdout


def test_dvc_shows_the_scores(walked: Walk) -> None:
    shown = walked.run(sys.executable, "-m", "dvc", "metrics", "show").stdout
    assert "closed.whole_word" in shown
    assert "scores/tiny-llava-med/vqa-rad" in shown


def test_dagster_remembers_every_asset(walked: Walk, monkeypatch: pytest.MonkeyPatch) -> None:
    import dagster as dg

    from orchestration.definitions import defs

    monkeypatch.setenv("DAGSTER_HOME", str(walked.folder / ".dagster"))
    with dg.DagsterInstance.get() as instance:
        unneeded = {dg.AssetKey("figure_parts"), dg.AssetKey("promoted_model")}
        for node in (n for n in defs.resolve_asset_graph().asset_nodes if n.key not in unneeded):
            event = instance.get_latest_materialization_event(node.key)
            assert event is not None, f"{node.key} was never materialised"
            assert event.asset_materialization is not None
            assert event.asset_materialization.metadata, node.key


def test_a_secret_of_the_environment_is_stored_nowhere(walked: Walk) -> None:
    found = subprocess.run(
        ["grep", "-rlF", SECRET, "--exclude-dir=tests", str(walked.folder)], capture_output=True, text=True
    )
    assert found.stdout == ""
    assert SECRET not in walked.first.stdout + walked.second.stdout + walked.second.stderr


def test_a_release_waits_for_a_person(walked: Walk) -> None:
    from medvlm.approval import approve
    from medvlm.release.bundle import verify_release

    refused = walked.run("medvlm", "release", "promote", "--recipe", RECIPE)
    assert refused.returncode == 1
    assert "nobody has approved" in refused.stderr
    assert "is broken" not in refused.stderr
    assert verify_release(walked.workspace.release(RECIPE) / "bundle") == []
    report = read_report(walked.workspace.release(RECIPE))
    assert report is not None
    approve(walked.workspace, RECIPE, report.fingerprint, who="ada")
    promoted = walked.run("medvlm", "release", "promote", "--recipe", RECIPE, "--json")
    assert promoted.returncode == 0, promoted.stderr
    assert json.loads(promoted.stdout)["who"] == "ada"


def test_a_retraction_leaves_the_figures_and_makes_the_datasets_stale(walked: Walk) -> None:
    """What the nightly recheck does, on an article that is retracted after the fetch."""
    from medvlm.records import Figure
    from medvlm.store import iterate_records, write_json

    before = list(iterate_records(walked.workspace.figure_shards, Figure))
    article = f"{before[0].pmcid}.{before[0].version}.json"
    metadata = walked.workspace.corpus / "bucket" / "pmc-oa-opendata" / "metadata" / article
    write_json(metadata, {**json.loads(metadata.read_text("utf-8")), "is_retracted": True})
    code = (
        "import dagster as dg; from orchestration.definitions import defs\n"
        "with dg.DagsterInstance.get() as instance:\n"
        "    defs.resolve_job_def('nightly').execute_in_process(instance=instance)"
    )
    done = walked.run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr[-3000:]
    after = {figure.figure_id for figure in iterate_records(walked.workspace.figure_shards, Figure)}
    gone = {figure.figure_id for figure in before} - after
    assert gone == {figure.figure_id for figure in before if figure.pmcid == before[0].pmcid}
    status = walked.run(sys.executable, "-m", "dvc", "status", "alignment").stdout
    assert "workspace/figures/shards" in status


def test_a_broken_contract_stops_dvc_before_training(walked: Walk) -> None:
    official = walked.workspace.corpus / "alignment" / "llava_med_alignment.json"
    rows = json.loads(official.read_text("utf-8"))
    for row in rows:
        turns = row.get("conversations") or row.get("conversatons")
        turns[1]["value"] = "word " * 20_000
    broken = walked.folder / "broken_alignment.json"
    broken.write_text(json.dumps(rows), "utf-8")
    done = walked.run("medvlm", "configure", "--alignment", str(broken))
    assert done.returncode == 0, done.stderr
    done = walked.run(sys.executable, "-m", "dvc", "repro", f"stage1@{RECIPE}")
    assert done.returncode != 0
    assert "contract-alignment" in done.stdout + done.stderr
    assert f"Running stage 'stage1@{RECIPE}'" not in done.stdout + done.stderr
