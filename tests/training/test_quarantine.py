"""Rows that break a row-level rule within its tolerance stay in the dataset and out of training."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import pytest
from twin_case import TINY, item, sample

from data_contracts.run import run_contract
from medvlm.config import load_recipe
from medvlm.errors import InputError
from medvlm.records import Sample, VQAItem
from medvlm.store import Workspace, write_records
from medvlm.training.data import data_fingerprint, quarantined_rows, read_stage_samples
from medvlm.training.run import run_stage

ALIGN, _, FINETUNE = load_recipe("tiny-llava-med").stages


def repeated(workspace: Workspace) -> Workspace:
    """101 samples, one of which repeats another: the contract tolerates one in a hundred."""
    rows = [sample(index, "alignment") for index in range(100)]
    distinct = [
        dataclasses.replace(row, turns=(row.turns[0], dataclasses.replace(row.turns[1], text=f"Disc {index}.")))
        for index, row in enumerate(rows)
    ]
    write_records(workspace.samples("alignment"), Sample, [*distinct, dataclasses.replace(distinct[7], sample_id="r")])
    return workspace


def test_a_tolerated_row_does_not_train_and_is_counted(tmp_path: Path) -> None:
    workspace = repeated(Workspace(tmp_path))
    folder = workspace.samples("alignment")
    assert quarantined_rows(workspace, ALIGN) == frozenset()
    assert run_contract(workspace, "alignment").success
    rows = quarantined_rows(workspace, ALIGN)
    assert rows == {"s7"}
    left_out: Counter[str] = Counter()
    kept = read_stage_samples([folder], ALIGN, 0, quarantined=rows, left_out=left_out)
    assert (len(kept), left_out) == (100, Counter(quarantined=1))
    assert rows.isdisjoint({one.sample_id for one in kept})
    assert data_fingerprint([folder], rows) != data_fingerprint([folder])


def test_what_a_warning_finds_trains(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    rows = [item(index, "vqa-rad") for index in range(52)]
    asked_again = dataclasses.replace(rows[0], item_id="99", split="test")
    write_records(workspace.items("vqa-rad"), VQAItem, [*rows, asked_again])
    result = run_contract(workspace, "benchmark-items")
    assert "vqa-rad:test_question_in_train" in {check.name for check in result.warnings}
    assert quarantined_rows(workspace, FINETUNE) == frozenset()


def test_an_item_is_quarantined_by_its_benchmark_and_id(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    write_records(workspace.items("vqa-rad"), VQAItem, [item(index, "vqa-rad") for index in range(10)])
    kept = read_stage_samples([workspace.items("vqa-rad")], FINETUNE, 0, quarantined={"vqa-rad/3", "slake/4"})
    assert [one.sample_id for one in kept] == [f"vqa-rad-{index}" for index in range(10) if index != 3]
    with pytest.raises(InputError, match="10 quarantined"):
        read_stage_samples(
            [workspace.items("vqa-rad")], FINETUNE, 0, quarantined={f"vqa-rad/{index}" for index in range(10)}
        )


def test_the_report_of_a_stage_counts_them(tmp_path: Path) -> None:
    workspace = repeated(Workspace(tmp_path))
    run_contract(workspace, "alignment")
    recipe = load_recipe("tiny-llava-med", [*TINY, "stages.align.max_steps=1"])
    counts = run_stage(workspace, recipe, 1).counts
    assert (counts["samples"], counts["quarantined"], counts["other_language"]) == (100, 1, 0)
