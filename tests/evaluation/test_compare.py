"""Paired comparison: McNemar's test, the paired bootstrap, and the names a model can be called by."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from vqa_factory import make_item, make_prediction

from medvlm.cli import cli
from medvlm.errors import InputError, PredictionMismatch
from medvlm.evaluation.compare import compare_answers, compare_models, mcnemar
from medvlm.records import Prediction, VQAItem
from medvlm.store import Workspace, write_records


def test_mcnemar_by_hand() -> None:
    assert mcnemar(0, 0) == 1
    assert mcnemar(0, 5) == pytest.approx(2 * 0.5**5)
    assert mcnemar(1, 7) == pytest.approx(2 * (1 + 8) * 0.5**8)
    assert mcnemar(4, 4) == 1


@given(first=st.integers(0, 60), second=st.integers(0, 60))
def test_mcnemar_is_symmetric_and_a_probability(first: int, second: int) -> None:
    assert mcnemar(first, second) == pytest.approx(mcnemar(second, first))
    assert 0 < mcnemar(first, second) <= 1


def yes_items(count: int, per_image: int = 1) -> list[VQAItem]:
    return [make_item(str(n), "Is it?", "yes", "closed", "CHEST", f"{n // per_image}.png") for n in range(count)]


def test_a_paired_difference_is_clear_where_unpaired_intervals_overlap() -> None:
    """Both right on the same 50 of 100, and the second on 8 more: far within either one's interval."""
    items = yes_items(100)
    first = [make_prediction(item, "yes" if n < 50 else "no") for n, item in enumerate(items)]
    second = [make_prediction(item, "yes" if n < 58 else "no") for n, item in enumerate(items)]
    found = {row.rule: row for row in compare_answers(items, first, second)}["whole_word"]
    assert (found.first, found.second, found.difference) == (50, 58, 8)
    assert (found.only_first, found.only_second) == (0, 8)
    assert found.p_value == pytest.approx(2 * 0.5**8)
    assert found.low is not None
    assert found.high is not None
    assert 2 < found.low < 8 < found.high < 15


def test_questions_on_one_image_widen_the_interval() -> None:
    def width(per_image: int) -> float:
        items = yes_items(120, per_image)
        first = [make_prediction(item, "no") for item in items]
        second = [make_prediction(item, "yes" if int(item.image_id[:-4]) % 2 else "no") for item in items]
        row = next(row for row in compare_answers(items, first, second) if row.rule == "whole_word")
        assert row.low is not None
        assert row.high is not None
        return row.high - row.low

    assert width(12) > 2 * width(1)


def test_swapping_the_models_turns_the_sign(items: list[VQAItem]) -> None:
    first = [make_prediction(item, "yes") for item in items]
    second = [make_prediction(item, item.answer) for item in items]
    there = compare_answers(items, first, second, resamples=200)
    back = compare_answers(items, second, first, resamples=200)
    for one, other in zip(there, back, strict=True):
        assert one.difference == pytest.approx(-other.difference)
        assert one.p_value == other.p_value
        if one.low is not None and other.high is not None:
            assert one.low == pytest.approx(-other.high)


def test_partial_marks_have_no_mcnemar(items: list[VQAItem]) -> None:
    half = [make_prediction(item, "left lobe") for item in items]
    right = [make_prediction(item, item.answer) for item in items]
    rows = {row.rule: row for row in compare_answers(items, half, right, resamples=20)}
    assert rows["token.recall"].p_value is None
    assert rows["whole_word"].p_value is not None


@pytest.fixture
def workspace(items: list[VQAItem], tmp_path: Path) -> Workspace:
    place = Workspace(tmp_path)
    write_records(place.items("vqa-rad"), VQAItem, items)
    answers = [
        make_prediction(item, item.answer if stage == "finetune" and not blind else "no", stage=stage, blind=blind)
        for item in items
        for stage, blind in (("align", False), ("finetune", False), ("finetune", True))
    ]
    write_records(place.predictions("tiny-llava-med", "vqa-rad") / "answers", Prediction, answers)
    return place


@pytest.mark.parametrize(
    ("first", "expected"), [("tiny-llava-med:align", 2), ("tiny-llava-med:blind", 2), ("tiny-llava-med:finetune", 0)]
)
def test_a_model_is_named_by_recipe_stage_and_blindness(workspace: Workspace, first: str, expected: int) -> None:
    rows = compare_models(workspace, "vqa-rad", first, "tiny-llava-med", resamples=20)
    assert next(row.only_second for row in rows if row.rule == "whole_word") == expected


def test_an_unknown_stage_lists_the_known(workspace: Workspace) -> None:
    with pytest.raises(InputError, match="no answers of 'tiny-llava-med:prefer'") as caught:
        compare_models(workspace, "vqa-rad", "tiny-llava-med:prefer", "tiny-llava-med")
    assert "align, finetune" in caught.value.hint


def test_the_verb_compares_files(workspace: Workspace, items: list[VQAItem], tmp_path: Path) -> None:
    files = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    for path, text in zip(files, ("yes", "no"), strict=True):
        path.write_text("\n".join(json.dumps({"question_id": int(item.item_id), "text": text}) for item in items))
    arguments = ["--workspace", str(tmp_path), "compare", *map(str, files), "--benchmark", "vqa-rad"]
    printed = json.loads(CliRunner().invoke(cli, [*arguments, "--json"]).stdout)
    row = next(row for row in printed["differences"] if row["rule"] == "whole_word")
    assert (row["only_first"], row["only_second"], row["n"]) == (1, 1, 3)
    table = CliRunner().invoke(cli, arguments)
    assert table.exit_code == 0
    assert "McNemar" in table.stdout
    files[0].write_text(files[0].read_text().splitlines()[0])
    assert isinstance(CliRunner().invoke(cli, arguments).exception, PredictionMismatch)
