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
from medvlm.store import Report, Workspace, write_records, write_report
from medvlm.training.data import data_fingerprint, leaked_rows, quarantined_rows, read_stage_samples
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


def test_an_official_train_split_is_kept_unless_the_recipe_says_otherwise(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    folder = workspace.items("vqa-rad")
    rows = [dataclasses.replace(item(index, "vqa-rad"), image_phash=f"{index // 2:016x}") for index in range(40)]
    shared = [dataclasses.replace(rows[index], item_id=f"t{index}", split="test") for index in (0, 39)]
    far = [dataclasses.replace(row, image_phash=f"{(2**64 - 1) ^ int(row.image_phash, 16):016x}") for row in rows[2:39]]
    write_records(folder, VQAItem, [*rows[:2], *far, rows[39], *shared])
    assert leaked_rows(workspace, FINETUNE, [folder]) == frozenset()
    strict = FINETUNE.model_copy(update={"keep_leaked": False})
    leaked = leaked_rows(workspace, strict, [folder])
    assert leaked == {row.image_sha256 for row in shared}
    left_out: Counter[str] = Counter()
    kept = read_stage_samples([folder], strict, 0, leaked=leaked, left_out=left_out)
    assert {one.sample_id for one in kept} == {f"vqa-rad-{index}" for index in range(2, 38)}
    assert left_out == Counter(leaked=4)


def test_a_dataset_that_kept_test_images_trains_on_them_only_where_the_recipe_keeps_them_too(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    folder = workspace.samples("alignment")
    write_records(folder, Sample, [sample(index, "alignment") for index in range(3)])
    test = dataclasses.replace(
        item(50, "vqa-rad"), image_sha256=sample(1, "alignment").image_sha256, image_phash="f" * 16
    )
    write_records(workspace.items("vqa-rad"), VQAItem, [test])
    assert leaked_rows(workspace, ALIGN, [folder]) == frozenset()
    write_report(workspace.dataset("alignment"), Report("build", details={"keep_leaked": True}), started=0.0)
    assert leaked_rows(workspace, ALIGN, [folder]) == {test.image_sha256}
    assert leaked_rows(workspace, ALIGN.model_copy(update={"keep_leaked": True}), [folder]) == frozenset()
