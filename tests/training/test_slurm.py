"""Two nodes of a real Slurm train as one: submitted, streamed, cancelled, resumed; a lost job is said."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from failures.reliability import held
from golden_case import GOLDEN_STEPS, fill_golden, golden_overrides
from slurm_cluster import SlurmCluster, running_slurm

from medvlm.config import load_recipe
from medvlm.store import Workspace, read_report

pytestmark = pytest.mark.timeout(1200)  # three launches, and a machine that may be busy

NAME = "tiny-llava-med"
OVERRIDES = [*golden_overrides(NAME), "checkpoints.every=0.05"]
GOLDEN = Path(__file__).with_name("golden") / f"{NAME}.json"


@pytest.fixture
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with running_slurm(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


def submit(workspace: Workspace, cluster: SlurmCluster, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "medvlm.cli", "--workspace", str(workspace.root), "train"]
    command += ["--recipe", NAME, "--stage", "1"]
    command += [part for text in OVERRIDES for part in ("--set", text)]
    environment = {"MEDVLM_LAUNCHER": "slurm", "MEDVLM_NODES": "2", "OMP_NUM_THREADS": "1", **cluster.environment}
    with log.open("wb") as stream:
        return subprocess.Popen(command, env={**os.environ, **environment}, stdout=stream, stderr=stream)


def complete_steps(workspace: Workspace) -> list[int]:
    scratch = workspace.scratch("train", NAME, "stage1", "all")
    return [int(path.parent.name.split("-")[1]) for path in scratch.glob("checkpoint-*/complete.json")]


def test_two_nodes_train_stop_and_go_on_with_the_losses_of_one_machine(slurm: SlurmCluster, tmp_path: Path) -> None:
    workspace = fill_golden(Workspace(tmp_path / "ws"), load_recipe(NAME, OVERRIDES))
    log = tmp_path / "log"

    running = submit(workspace, slurm, log)
    deadline = time.monotonic() + 300
    while not complete_steps(workspace):
        assert running.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    assert running.wait(120) == 1
    assert "stopped by a signal (SIGTERM)" in log.read_text(), "the nodes' own words are streamed"
    assert slurm.command("squeue", "--noheader") == "", "the queue is empty"
    saved = max(complete_steps(workspace))
    assert saved < GOLDEN_STEPS

    again = submit(workspace, slurm, log)
    assert again.wait(300) == 0, log.read_text()
    assert f"going on from step {saved} of {GOLDEN_STEPS}" in log.read_text()
    report = read_report(workspace.stage(NAME, 1))
    assert report is not None and report.details["engine"].startswith("2 processes")
    losses = [point["loss"] for point in report.details["curves"]["all"]]
    assert losses == pytest.approx(json.loads(GOLDEN.read_text())["align"], abs=1e-4)
    held(
        "a run on two Slurm nodes is terminated",
        lost="nothing: the step is finished and saved",
        saw="stopped by a signal, and which command goes on; the queue is empty",
        rerun="goes on from the step that was saved, with the losses of one machine",
    )


def test_a_job_that_an_administrator_kills_is_said_at_once(slurm: SlurmCluster, tmp_path: Path) -> None:
    workspace = fill_golden(Workspace(tmp_path / "ws"), load_recipe(NAME, OVERRIDES))
    running = submit(workspace, slurm, tmp_path / "log")
    deadline = time.monotonic() + 120
    while "RUNNING" not in slurm.command("squeue", "--noheader", "--format=%T"):
        assert running.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.05)
    slurm.command("scancel", "--signal=KILL", "--full", slurm.command("squeue", "--noheader", "--format=%A"))
    assert running.wait(60) == 1
    # Whether the batch script can still note its exit code is a matter of luck; the way on is said in both cases.
    assert "the same command goes on from" in (tmp_path / "log").read_text()
    held(
        "an administrator kills the Slurm job",
        lost="the steps since the last checkpoint",
        saw="at once: the job ended without an exit code",
        rerun="goes on from the last whole checkpoint",
    )
