"""Contracts of predictions and scores: complete, unique, honest; each wrong row breaks its rule."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sound_records

from data_contracts.contract import Selection
from data_contracts.run import run_contract
from medvlm.errors import WorkspaceError
from medvlm.evaluation.score_step import score_recipe
from medvlm.records import Prediction, Score, schema_of, to_row
from medvlm.store import Workspace, write_records

RECIPE, BENCHMARK = "tiny-llava-med", "vqa-rad"


def predictions() -> list[Prediction]:
    return [
        Prediction(
            item_id=f"q{index}",
            benchmark=BENCHMARK,
            model=RECIPE,
            stage="finetune",
            blind=blind,
            prompt="<image>\nIs the heart enlarged?",
            text="no" if index % 2 else "yes",
        )
        for index in range(6)
        for blind in (False, True)
    ]


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """Six test items, one of them leaked, with answers and scores."""
    workspace = Workspace(tmp_path)
    leaked = dataclasses.replace(sound_records.item(5, "train"), item_id="q99", question="Is it large?")
    sound_records.write(workspace, "benchmark-items", [*sound_records.sound("benchmark-items", 6), leaked])
    write_predictions(workspace, predictions())
    return workspace


def write_predictions(workspace: Workspace, rows: list[Prediction]) -> None:
    write_records(workspace.predictions(RECIPE, BENCHMARK) / "answers", Prediction, rows)


def broken(workspace: Workspace, contract: str) -> dict[str, str]:
    """Names of broken checks without their target, and the first row of each."""
    result = run_contract(workspace, contract)
    return {
        check.name.removeprefix(f"{RECIPE}/{BENCHMARK}:"): check.broken[0].row_id if check.broken else ""
        for check in result.checks
        if not check.success
    }


def test_predictions_and_the_scores_made_of_them_hold(workspace: Workspace) -> None:
    score_recipe(workspace, RECIPE, BENCHMARK)
    assert broken(workspace, "predictions") == {}
    assert broken(workspace, "scores") == {}


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"item_id": "q0"}, "answered_once"),
        ({"item_id": "q77"}, "known_items"),
        ({"item_id": "q77"}, "every_item_answered"),
        ({"benchmark": "slake"}, "known_items"),
        ({"model": ""}, "model_stated"),
        ({"stage": ""}, "stage_stated"),
        ({"prompt": ""}, "prompt_length"),
        ({"text": " "}, "answer_not_empty"),
        ({"text": "yes " * 5001}, "answer_length"),
        ({"text": "yes</s>"}, "no_special_tokens"),
        ({"text": "<|im_end|>"}, "no_special_tokens"),
    ],
)
def test_a_wrong_prediction_breaks_its_rule(workspace: Workspace, change: dict[str, Any], rule: str) -> None:
    rows = predictions()
    rows[2] = dataclasses.replace(rows[2], **change)
    write_predictions(workspace, rows)
    assert rule in broken(workspace, "predictions")


def test_a_missing_answer_is_named(workspace: Workspace) -> None:
    write_predictions(workspace, [row for row in predictions() if (row.item_id, row.blind) != ("q3", True)])
    assert broken(workspace, "predictions") == {
        "every_item_answered": f"{RECIPE}/{BENCHMARK}/q3/{RECIPE}/finetune/blind"
    }


def test_a_model_that_always_says_the_same_warns(workspace: Workspace) -> None:
    write_predictions(workspace, [dataclasses.replace(row, text="no") for row in predictions() if not row.blind])
    result = run_contract(workspace, "predictions")
    assert result.success
    assert [check.name.split(":")[1] for check in result.warnings] == ["blind_baseline", "same_answer_percent"]


def scores(workspace: Workspace) -> list[Score]:
    score_recipe(workspace, RECIPE, BENCHMARK)
    table = pq.read_table(workspace.scores(RECIPE, BENCHMARK) / "scores" / "scores.parquet")
    return [Score(**row) for row in table.to_pylist()]


def write_scores(workspace: Workspace, rows: list[Score]) -> None:
    table = pa.Table.from_pylist([to_row(row) for row in rows], schema=schema_of(Score))
    pq.write_table(table, workspace.scores(RECIPE, BENCHMARK) / "scores" / "scores.parquet")


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"value": 101.0, "high": 101.0}, "per_cent"),
        ({"value": float("nan")}, "number"),
        ({"n": 0}, "items"),
        ({"answer_type": "CLOSED"}, "answer_type"),
        ({"slice": "modality"}, "slice"),
        ({"rule": ""}, "rule"),
        ({"low": None}, "interval"),
        ({"low": 90.0}, "interval"),
        ({"high": 100.5}, "interval"),
        ({"rule": "exact_match"}, "one_value"),
        ({"n": 5}, "clean_slice"),
    ],
)
def test_a_wrong_score_breaks_its_rule(workspace: Workspace, change: dict[str, Any], rule: str) -> None:
    rows = scores(workspace)
    assert rows[0].rule == "whole_word"
    rows[0] = dataclasses.replace(rows[0], **change)
    write_scores(workspace, rows)
    assert rule in broken(workspace, "scores")


def test_a_score_over_half_the_test_split_is_no_score_of_it(workspace: Workspace) -> None:
    rows = [row for row in scores(workspace) if not row.slice.startswith("leaked=")]
    write_scores(workspace, [dataclasses.replace(row, n=3) for row in rows])
    assert list(broken(workspace, "scores")) == ["whole_benchmark"]


def test_scores_without_blind_ones_warn(workspace: Workspace) -> None:
    write_scores(workspace, [row for row in scores(workspace) if not row.blind])
    result = run_contract(workspace, "scores")
    assert result.success
    assert [check.name.split(":")[1] for check in result.warnings] == ["blind_baseline"]


def test_no_scores_at_all_break_the_contract(workspace: Workspace) -> None:
    scores(workspace)
    write_scores(workspace, [])
    assert list(broken(workspace, "scores")) == ["not_empty"]
    write_predictions(workspace, [])
    assert list(broken(workspace, "predictions")) == ["not_empty"]


def test_one_recipe_and_benchmark_can_be_asked_for(workspace: Workspace) -> None:
    selection = Selection(recipe=RECIPE, benchmark=BENCHMARK)
    assert run_contract(workspace, "predictions", selection=selection).targets == (f"{RECIPE}/{BENCHMARK}",)
    assert (workspace.contract("predictions") / RECIPE / BENCHMARK / "result.json").exists()
    with pytest.raises(WorkspaceError, match="no predictions of other"):
        run_contract(workspace, "predictions", selection=Selection(recipe="other"))
    with pytest.raises(WorkspaceError, match="no scores"):
        run_contract(workspace, "scores")
