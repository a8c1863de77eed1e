"""A job of two processes: the losses of one, its stops and kills, and a number of processes that changes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from failures.reliability import held
from golden_case import GOLDEN_STEPS, fill_golden, golden_overrides
from progress_trap import train_by_verb

from medvlm.config import load_recipe
from medvlm.errors import TrainingError
from medvlm.store import Workspace, read_report

pytestmark = pytest.mark.timeout(1200)  # three launches, and a machine that may be busy

NAME = "tiny-llava-med"
# ZeRO-3 splits weights, gradients and optimiser state over the two; the stored losses are of one process and ZeRO-2.
OVERRIDES = [*golden_overrides(NAME), "checkpoints.every=0.05", "stages.align.zero_stage=3"]
GOLDEN = Path(__file__).with_name("golden") / f"{NAME}.json"


def train_on_two(workspace: Workspace, trap: str = "") -> subprocess.CompletedProcess[str]:
    """Stage 1 as two processes; the first of them gets a signal at a step."""
    return train_by_verb(workspace, NAME, "1", OVERRIDES, trap=trap, processes=2)


def complete_steps(workspace: Workspace) -> list[int]:
    scratch = workspace.scratch("train", NAME, "stage1", "all")
    return [int(path.parent.name.split("-")[1]) for path in scratch.glob("checkpoint-*/complete.json")]


def test_two_processes_stopped_and_killed_give_the_losses_of_one(tmp_path: Path) -> None:
    from medvlm.training.run import run_stage

    recipe = load_recipe(NAME, OVERRIDES)
    workspace = fill_golden(Workspace(tmp_path / "ws"), recipe)

    # A signal that one process gets stops both, after one and the same step.
    stopped = train_on_two(workspace, "3:SIGTERM")
    assert stopped.returncode == 1, stopped.stderr
    assert "stopped by a signal (SIGTERM)" in stopped.stderr and "2 processes on cpu" in stopped.stderr
    first = max(complete_steps(workspace))
    assert 3 <= first < GOLDEN_STEPS

    # The optimiser's state is sharded over the processes: another number of them is refused, nothing is lost.
    with pytest.raises(TrainingError, match="begun with 2 processes, not 1") as caught:
        run_stage(workspace, recipe, 1)
    assert "--processes 2" in caught.value.hint and max(complete_steps(workspace)) == first

    # Where one process is killed, the other does not wait for it forever.
    killed = train_on_two(workspace, f"{first + 2}:SIGKILL")
    assert killed.returncode == 1, killed.stderr
    assert f"going on from step {first} of {GOLDEN_STEPS}" in killed.stderr
    assert "a process of the job ended with code" in killed.stderr

    done = train_on_two(workspace)
    assert done.returncode == 0, done.stderr
    report = read_report(workspace.stage(NAME, 1))
    assert report is not None and report.details["engine"].startswith("2 processes")
    losses = [point["loss"] for point in report.details["curves"]["all"]]
    assert losses == pytest.approx(json.loads(GOLDEN.read_text())["align"], abs=1e-4)
    assert not complete_steps(workspace)
    held(
        "kill -9 of one rank of two",
        lost="the steps since the last checkpoint",
        saw="a process of the job ended, with its code; the other is ended too and does not wait for ever",
        rerun="goes on from the last whole checkpoint with the losses of an unbroken run",
    )


def test_a_workspace_may_be_the_current_folder(tmp_path: Path) -> None:
    # Its datasets/ has the name of a library that the Trainer asks for.
    fill_golden(Workspace(tmp_path), load_recipe(NAME, OVERRIDES))
    (tmp_path / "datasets" / "__init__.py").write_text("raise RuntimeError('this is no library')")
    command = [sys.executable, "-m", "medvlm.training.run", "--workspace", ".", "--recipe", NAME, "--stage", "1"]
    command += [part for text in [*OVERRIDES, "stages.align.max_steps=1"] for part in ("--set", text)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert Workspace(tmp_path).checkpoint(NAME, 1).is_dir()
