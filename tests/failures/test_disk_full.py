"""The disk runs full in the middle of a shard and of a checkpoint: what was there stays, and the word is clear."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from failures.reliability import held

from medvlm.config import load_recipe
from medvlm.errors import WorkspaceError
from medvlm.records import Image, PreferencePair
from medvlm.store import read_records, write_records


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of two megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "medvlm", str(disk)]).returncode:
        pytest.skip("mounting a small disk needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def pairs(count: int) -> Iterator[PreferencePair]:
    for number in range(count):
        yield PreferencePair(
            str(number), Image(os.urandom(20_000), "a.png"), "", "", "", "What is seen?", "a", "b", "chat"
        )


def test_a_shard_that_does_not_fit_leaves_the_ones_before(small_disk: Path) -> None:
    folder = small_disk / "samples"
    write_records(folder, PreferencePair, pairs(5))
    with pytest.raises(WorkspaceError, match="the disk is full"):
        write_records(folder, PreferencePair, pairs(200))
    assert len(read_records(folder, PreferencePair)) == 5
    write_records(folder, PreferencePair, pairs(6))
    assert len(read_records(folder, PreferencePair)) == 6, "room was given back"
    held(
        "disk full in the middle of a shard",
        lost="nothing: the dataset before stays whole",
        saw="one error: the disk is full, how much is free, and which option names another",
        rerun="runs through once there is room; nothing half-written is left",
    )


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(small_disk: Path) -> None:
    from medvlm.models.checkpoint import Checkpoint, build_model, save_checkpoint
    from medvlm.models.tokenizer import train_tokenizer
    from medvlm.models.vision import ImageProcessor

    folder = small_disk / "checkpoint"
    folder.mkdir()
    (folder / "metadata.json").write_text("the one before")
    recipe = load_recipe("tiny-llava-med")
    tokenizer = train_tokenizer(recipe, ["a chest x-ray"])
    processor = ImageProcessor.of(recipe.model.vision_tower)
    with pytest.raises(WorkspaceError, match="the disk is full"):
        save_checkpoint(folder, Checkpoint(build_model(recipe, tokenizer), tokenizer, processor, recipe, {}))
    assert (folder / "metadata.json").read_text() == "the one before"
    assert [path.name for path in small_disk.iterdir()] == ["checkpoint"], "nothing half-written is left"
    held(
        "disk full in the middle of a checkpoint",
        lost="the steps since the last checkpoint",
        saw="one error: the disk is full, how much is free, and which option names another",
        rerun="goes on from the last whole checkpoint",
    )
