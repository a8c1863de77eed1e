"""A recipe learns from the samples in its own language, whatever else lies in the dataset."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import pytest
from twin_case import sample

from medvlm.config import load_recipe
from medvlm.errors import InputError
from medvlm.records import Sample, Turn
from medvlm.store import Workspace, write_records
from medvlm.training.data import read_stage_samples

STAGE = load_recipe("tiny-llava-med").stages[1]


def chinese(index: int) -> Sample:
    turns = (Turn("user", "<image>\n图中显示了什么?"), Turn("assistant", "CT"))
    return dataclasses.replace(sample(index, "instruct"), sample_id=f"s{index}#2", turns=turns, language="zh")


def test_samples_of_another_language_are_left_out_and_rows_keep_their_images(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    mixed = [make(i) for i in range(6) for make in (lambda i: sample(i, "instruct"), chinese)]
    write_records(workspace.samples("instruct"), Sample, mixed)
    folder = workspace.samples("instruct")
    languages: tuple[Literal["en", "zh"], ...] = ("en", "zh")
    for language in languages:
        kept = read_stage_samples([folder], STAGE, 0, language=language)
        wanted = [(i, s) for i, s in enumerate(mixed) if s.language == language]
        assert [(s.row, s.sample_id, s.image_sha256) for s in kept] == [
            (row, s.sample_id, s.image_sha256) for row, s in wanted
        ]
    assert len(read_stage_samples([folder], STAGE, 0)) == len(mixed)


def test_a_dataset_without_the_language_says_so(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    write_records(workspace.samples("instruct"), Sample, [sample(i, "instruct") for i in range(3)])
    with pytest.raises(InputError, match="no training samples in the recipe's language, zh"):
        read_stage_samples([workspace.samples("instruct")], STAGE, 0, language="zh")
