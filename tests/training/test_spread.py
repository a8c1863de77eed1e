"""Experts spread over two processes train as on one: losses, weights, what is saved, and a run that was stopped."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from moe_case import RECIPE, SMALL, TunedMixture
from progress_trap import train_by_verb
from safetensors.torch import load_file

from medvlm.config import load_recipe
from medvlm.errors import RecipeError, TrainingError
from medvlm.store import Report, Workspace, read_report
from medvlm.training.engine import Engine
from medvlm.training.run import run_stage
from medvlm.training.spread import spread

pytestmark = pytest.mark.timeout(1200)  # two launches, and a machine that may be busy

OVERRIDES = [
    *SMALL,
    "stages.moe_tune.micro_batch=4",
    "stages.moe_tune.zero_stage=2",
    # Below the norm that the gradients have: an expert that were left out of the norm, or doubled, would show.
    "stages.moe_tune.max_grad_norm=0.05",
    "checkpoints.every=0.1",
]
SPREAD = [*OVERRIDES, "stages.moe_tune.expert_parallel=2"]


def train_on_two(workspace: Workspace, trap: str = "") -> subprocess.CompletedProcess[str]:
    return train_by_verb(workspace, RECIPE, "3", SPREAD, trap=trap, processes=2)


def curve(report: Report) -> list[float]:
    return [point["loss"] for point in report.details["curves"]["all"]]


def test_spread_experts_learn_as_one_process_has_them_learn_and_resume(tuned: TunedMixture, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "ws")
    shutil.copytree(tuned.workspace.root, workspace.root, ignore=shutil.ignore_patterns("stage3"))
    plain = run_stage(workspace, load_recipe(RECIPE, OVERRIDES), 3)
    folder = workspace.checkpoint(RECIPE, 3)
    expected = load_file(folder / "model.safetensors")
    shutil.rmtree(workspace.stage(RECIPE, 3))

    stopped = train_on_two(workspace, "3:SIGTERM")
    assert stopped.returncode == 1 and "stopped by a signal (SIGTERM)" in stopped.stderr, stopped.stderr[-3000:]
    done = train_on_two(workspace)
    assert done.returncode == 0 and "going on from step" in done.stderr, done.stderr[-3000:]

    assert "experts of 2 layers spread over 2 processes each" in done.stderr

    report = read_report(workspace.stage(RECIPE, 3))
    assert report is not None and report.details["engine"].startswith("2 processes")
    assert curve(report) == pytest.approx(curve(plain), abs=1e-4)
    for name in ("parameters", "parameters_trained", "parameters_active"):
        assert report.counts[name] == plain.counts[name]
    assert report.details["expert_load"] == plain.details["expert_load"]
    # One file, under the names of the plain mixture, with the experts of both processes.
    weights = load_file(folder / "model.safetensors")
    assert set(weights) == set(expected)
    start = load_file(workspace.checkpoint(RECIPE, 2) / "model.safetensors")
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, atol=2e-4, rtol=1e-3, msg=name)
        assert ".experts." not in name or name not in start


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("stages.moe_tune.expert_parallel=3", "does not divide model.moe.experts 4"),
        ("stages.instruct.expert_parallel=2", "for the stage moe_tune"),
        ("stages.moe_tune.zero_stage=3", "zero_stage 1 or 2"),
        ("model.moe.capacity=1.5", "capacity is set"),
    ],
)
def test_what_cannot_be_spread_is_refused_when_the_recipe_is_read(change: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load_recipe(RECIPE, [*SPREAD, change])


def test_one_process_takes_the_plain_path_and_three_are_refused() -> None:
    recipe = load_recipe(RECIPE, SPREAD)
    engine = Engine("cpu", "fp32", "sdpa", 1, 0, 4, 2, 2, False)
    assert spread(torch.nn.Linear(1, 1), recipe, recipe.stages[2], engine) is False
    three = Engine("cpu", "fp32", "sdpa", 3, 0, 4, 2, 2, False)
    with pytest.raises(TrainingError, match="3 processes do not split into groups of 2") as caught:
        spread(torch.nn.Linear(1, 1), recipe, recipe.stages[2], three)
    assert "expert_parallel" in caught.value.where


def test_the_plan_knows_that_each_process_holds_a_part_of_the_experts() -> None:
    from medvlm.training.footprint import model_shape
    from medvlm.training.hardware import parse_hardware
    from medvlm.training.plan import make_plan

    settings = ["stages.moe_tune.zero_stage=2"]
    whole, part = (
        make_plan(load_recipe("cliva-med-phi2", [*settings, *more]), parse_hardware("8xA100-80G")).stages[2]
        for more in ((), ("stages.moe_tune.expert_parallel=4",))
    )
    recipe = load_recipe("cliva-med-phi2")
    # Three of four experts are idle, and three of four are elsewhere.
    elsewhere = model_shape(recipe, recipe.stages[2]).idle * 2 / 2**30
    assert whole.memory_gib["weights"] - part.memory_gib["weights"] == pytest.approx(elsewhere, abs=0.01)
    assert whole.trained == part.trained and whole.memory_gib["gradients"] == part.memory_gib["gradients"]
