"""The order of a run: complete, repeatable, the same for any number of processes."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from medvlm.config import load_recipe
from medvlm.records import Turn
from medvlm.training.data import StagePlan, StageSample

BASE = load_recipe("tiny-llava-med").stages[2]


def stage_with(**changes: object) -> object:
    return BASE.model_copy(update=changes)


def samples_of(images: list[int]) -> list[StageSample]:
    turns = (Turn("user", "<image>"), Turn("assistant", "x"))
    return [
        StageSample(f"s{image}-{n}", f"i{image}", turns * (n + 1), Path("x"), 0)
        for image, count in enumerate(images)
        for n in range(count)
    ]


@given(st.lists(st.integers(1, 7), min_size=1, max_size=12), st.integers(1, 5), st.integers(0, 3))
def test_each_epoch_holds_every_sample_once_and_never_mixes_images(images: list[int], per: int, seed: int) -> None:
    samples = samples_of(images)
    plan = StagePlan(samples, stage_with(samples_per_image=per, global_batch=2, epochs=50.0, max_steps=None), seed)  # type: ignore[arg-type]
    size = plan.sequences_per_epoch
    for epoch in range(min(2, len(plan) // size)):
        sequences = [plan[epoch * size + i] for i in range(size)]
        assert sorted(i for sequence in sequences for i in sequence) == list(range(len(samples)))
        assert all(len(s) <= per and len({samples[i].image_sha256 for i in s}) == 1 for s in sequences)


def test_the_same_seed_gives_the_same_order_and_epochs_differ() -> None:
    samples = samples_of([3] * 40)
    stage = stage_with(samples_per_image=2, global_batch=4, epochs=3.0, max_steps=None)
    one, two, other = (StagePlan(samples, stage, seed) for seed in (1, 1, 2))  # type: ignore[arg-type]
    orders = [[plan[i] for i in range(len(plan))] for plan in (one, two, other)]
    assert orders[0] == orders[1] != orders[2]
    size = one.sequences_per_epoch
    assert orders[0][:size] != orders[0][size : 2 * size]


def test_steps_follow_from_epochs_unless_cut() -> None:
    samples = samples_of([1] * 100)
    assert StagePlan(samples, stage_with(global_batch=10, epochs=3.0, max_steps=None), 0).steps == 30  # type: ignore[arg-type]
    assert StagePlan(samples, stage_with(global_batch=10, epochs=3.0, max_steps=7), 0).steps == 7  # type: ignore[arg-type]
