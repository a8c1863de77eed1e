"""One flipped bit in a shard and in a checkpoint: found by hash, named, and repaired from the store."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from failures.reliability import held

from medvlm.config import load_recipe
from medvlm.errors import CheckpointError, WorkspaceError
from medvlm.models.checkpoint import Checkpoint, build_model, load_checkpoint, save_checkpoint
from medvlm.models.tokenizer import train_tokenizer
from medvlm.models.vision import ImageProcessor
from medvlm.records import Image, PreferencePair
from medvlm.store import read_records, write_records

DVC_YAML = """
stages:
  samples:
    cmd: cp -r source out
    deps: [source]
    outs: [out]
"""


def dvc(folder: Path, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *words],
        cwd=folder,
        env={**os.environ, "DVC_NO_ANALYTICS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def flip_a_bit(path: Path) -> bytes:
    """Flip one bit of the content; the bytes as they were. Size and time stay, as when a disk decays."""
    before, times = path.read_bytes(), path.stat()
    changed = bytearray(before)
    changed[len(changed) // 3] ^= 1
    path.write_bytes(changed)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    return before


def kept(folder: Path) -> Path:
    """A project whose stage put ``source`` into the store; the output's folder."""
    (folder / "dvc.yaml").write_text(DVC_YAML)
    dvc(folder, "init", "--no-scm", "-q")
    dvc(folder, "repro")
    return folder / "out"


def repaired(folder: Path) -> None:
    shutil.rmtree(folder / "out")
    dvc(folder, "checkout")
    assert "up to date" in dvc(folder, "repro")


def pairs() -> Iterator[PreferencePair]:
    for number in range(50):
        yield PreferencePair(str(number), Image(os.urandom(500), "a"), "", "", "", "q", "a", "b", "chat")


def test_a_flipped_bit_in_a_shard_is_named_and_repaired(tmp_path: Path) -> None:
    write_records(tmp_path / "source", PreferencePair, pairs())
    folder = kept(tmp_path)
    good = flip_a_bit(folder / "part-00000.parquet")
    with pytest.raises(WorkspaceError, match=r"part-00000\.parquet") as caught:
        read_records(folder, PreferencePair)
    assert "dvc checkout" in caught.value.hint
    repaired(tmp_path)
    assert (folder / "part-00000.parquet").read_bytes() == good
    held(
        "one bit of a shard flipped",
        lost="nothing",
        saw="the step that reads it names the shard: its pages carry checksums",
        rerun="delete it, then `dvc checkout` or `dvc pull`; without a store `dvc repro` makes it anew",
    )


def test_a_flipped_bit_in_a_checkpoint_is_named_and_repaired(tmp_path: Path) -> None:
    recipe = load_recipe("tiny-llava-med")
    tokenizer = train_tokenizer(recipe, ["a chest x-ray"])
    processor = ImageProcessor.of(recipe.model.vision_tower)
    model = build_model(recipe, tokenizer)
    save_checkpoint(tmp_path / "source", Checkpoint(model, tokenizer, processor, recipe, {}))
    folder = kept(tmp_path)
    flip_a_bit(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_checkpoint(folder)
    repaired(tmp_path)
    assert load_checkpoint(folder).recipe == recipe
    held(
        "one bit of a checkpoint flipped",
        lost="nothing",
        saw="whoever opens it is told the file: the metadata holds its SHA-256",
        rerun="delete it, then `dvc checkout` or `dvc pull`; without a store `dvc repro` trains it anew",
    )


def test_a_truncated_shard_is_an_error_that_names_it(tmp_path: Path) -> None:
    write_records(tmp_path / "s", PreferencePair, pairs())
    path = tmp_path / "s" / "part-00000.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(WorkspaceError, match=r"part-00000\.parquet"):
        read_records(tmp_path / "s", PreferencePair)
