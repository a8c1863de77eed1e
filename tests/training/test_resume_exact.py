"""A run that was stopped and killed gives, once resumed, the losses of the unbroken run."""

from __future__ import annotations

import subprocess

from failures.reliability import held
from progress_trap import train_by_verb
from twin_case import STEPS, TINY, TrainedTwin

from medvlm.store import read_json
from medvlm.training.run import run_stage


def train_until(twin: TrainedTwin, trap: str) -> subprocess.CompletedProcess[str]:
    """A training process of its own that gets a signal at a step."""
    overrides = ["checkpoints.every=0.05", *TINY]
    return train_by_verb(twin.workspace, "tiny-llava-med", "instruct", overrides, trap=trap)


def test_sigterm_then_kill_then_resume_is_exact(trained: TrainedTwin) -> None:
    checkpoint = trained.workspace.checkpoint("tiny-llava-med", 2)
    unbroken = read_json(checkpoint / "metadata.json")
    aside = checkpoint.rename(checkpoint.with_name("unbroken"))
    scratch = trained.workspace.scratch("train", "tiny-llava-med", "stage2", "all")

    stopped = train_until(trained, "3:SIGTERM")
    assert stopped.returncode == 1, stopped.stderr
    assert "stopped by a signal (SIGTERM)" in stopped.stderr and "it is saved" in stopped.stderr
    first = max(int(p.name.split("-")[1]) for p in scratch.glob("checkpoint-*"))
    assert 3 <= first < STEPS

    killed = train_until(trained, f"{first + 2}:SIGKILL")
    assert killed.returncode == -9, killed.stderr
    assert f"going on from step {first} of {STEPS}" in killed.stderr
    complete = [int(p.parent.name.split("-")[1]) for p in scratch.glob("checkpoint-*/complete.json")]
    assert len(complete) <= trained.recipe.checkpoints.keep and max(complete) > first
    assert not checkpoint.exists()
    # What a kill in the middle of a save leaves: newest of all, and not whole.
    (scratch / f"checkpoint-{STEPS + 1}").mkdir()

    report = run_stage(trained.workspace, trained.recipe, 2)
    assert report.details["curves"]["all"] == unbroken["curve"]
    resumed, whole = ((folder / "model.safetensors").read_bytes() for folder in (checkpoint, aside))
    assert resumed == whole
    assert not list(scratch.glob("*"))
    held(
        "kill -9 of the trainer",
        lost="the steps since the last checkpoint",
        saw="the run fails with the exit code; nothing is put in place of a checkpoint",
        rerun="goes on from the last whole checkpoint; weights are those of an unbroken run, bit for bit",
    )
