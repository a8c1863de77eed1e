"""DeepSpeed's ZeRO stages are a matter of size, not of mathematics: the losses are the same."""

from __future__ import annotations

import pytest
from twin_case import TINY

from medvlm.config import load_recipe
from medvlm.store import Workspace


def losses(workspace: Workspace, zero_stage: int) -> list[float]:
    from medvlm.training.run import run_stage

    # The language model learns too: the projector alone would leave nothing of it to split.
    parts = ["stages.align.trains=[projector, language_model]", "stages.align.learning_rate=2e-5"]
    steps = ["stages.align.max_steps=4", f"stages.align.zero_stage={zero_stage}", *parts]
    report = run_stage(workspace, load_recipe("tiny-llava-med", [*TINY, *steps]), 1)
    return [point["loss"] for point in report.details["curves"]["all"]]


def test_all_zero_stages_give_the_same_losses(workspace: Workspace) -> None:
    plain = losses(workspace, 0)
    assert len(plain) == 4
    for zero_stage in (1, 2, 3):
        assert losses(workspace, zero_stage) == pytest.approx(plain, abs=1e-5), zero_stage
