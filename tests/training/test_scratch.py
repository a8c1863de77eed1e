"""What a killed run resumes from, and what it must not."""

from __future__ import annotations

from pathlib import Path

import pytest

from medvlm.errors import TrainingError
from medvlm.training.resume import Scratch


def scratch_with(folder: Path, *steps: int, fingerprint: str = "a", processes: int = 1) -> Scratch:
    scratch = Scratch(folder, fingerprint, processes)
    scratch.open(fresh=False)
    for step in steps:
        (folder / f"checkpoint-{step}").mkdir()
        scratch.mark_complete(step, keep=10)
    return scratch


def test_the_newest_complete_one_by_number(tmp_path: Path) -> None:
    scratch = scratch_with(tmp_path, 9, 10, 100)
    (tmp_path / "checkpoint-200").mkdir()
    assert scratch.latest() == (100, tmp_path / "checkpoint-100")
    assert scratch.open(fresh=False) == ""
    assert not (tmp_path / "checkpoint-200").exists()


def test_only_the_newest_stay(tmp_path: Path) -> None:
    scratch = scratch_with(tmp_path, 1, 2)
    (tmp_path / "checkpoint-3").mkdir()
    scratch.mark_complete(3, keep=2)
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]


def test_another_job_discards_with_a_word(tmp_path: Path) -> None:
    scratch_with(tmp_path, 5)
    other = Scratch(tmp_path, "b", 1)
    assert "discarded" in other.open(fresh=False)
    assert other.latest() is None


def test_fresh_discards_without_asking(tmp_path: Path) -> None:
    scratch = scratch_with(tmp_path, 5)
    assert scratch.open(fresh=True) == ""
    assert scratch.latest() is None


def test_another_number_of_processes_is_refused(tmp_path: Path) -> None:
    scratch_with(tmp_path, 5, processes=2)
    with pytest.raises(TrainingError, match="begun with 2 processes, not 1") as caught:
        Scratch(tmp_path, "a", 1).open(fresh=False)
    assert "--processes 2" in caught.value.hint and (tmp_path / "checkpoint-5").exists()
