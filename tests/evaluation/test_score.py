"""Scoring of files and of a recipe: golden values on the real file, joins, bad input, the step's output."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vqa_factory import make_item, make_prediction

from medvlm.cli import cli
from medvlm.data.benchmarks import read_benchmark
from medvlm.errors import InputError, PredictionMismatch, WorkspaceError
from medvlm.evaluation.answers import join_answers, read_predictions
from medvlm.evaluation.bootstrap import Resamples, interval
from medvlm.evaluation.score import (
    OFFICIAL_TEST_SIZES,
    is_official,
    items_of_split,
    score_files,
    score_rows,
    summary,
    tabulate,
)
from medvlm.evaluation.score_step import score_recipe
from medvlm.records import Prediction, Score, VQAItem, WrongAnswer, from_row
from medvlm.store import Workspace, read_report, write_records

GOLDEN = {
    ("open", "llava_med.exact_match"): 1.2917,
    ("open", "llava_med.f1"): 2.8002,
    ("open", "llava_med.recall"): 12.0411,
    ("closed", "llava_med_run_eval"): 28.6765,
    ("closed", "llava_med_batch"): 30.1471,
    ("closed", "med_moe"): 30.1471,
    ("closed", "whole_word"): 23.1618,
}


@pytest.fixture(scope="module")
def vqa_rad(real_data: Path) -> Path:
    return real_data / "vqa-rad" / "VQA_RAD Dataset Public.json"


@pytest.fixture(scope="module")
def zero_shot(real_data: Path) -> Path:
    return real_data / "predictions" / "answer-file-llava-zeorshot.jsonl"


def run_json(*arguments: str | Path) -> dict[str, Any]:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exception is None, result.exception
    return json.loads(result.stdout)


# ── The published file ──────────────────────────────────────────────────────────────────────────


def test_golden_values_of_the_published_predictions(vqa_rad: Path, zero_shot: Path) -> None:
    scores = run_json("score", "--benchmark", "vqa-rad", "--items", vqa_rad, "--predictions", zero_shot, "--json")
    assert (scores["n"], scores["open"]["n"], scores["closed"]["n"]) == (451, 179, 272)
    assert {key: round(scores[key[0]][key[1]], 4) for key in GOLDEN} == GOLDEN
    assert scores["closed"]["llava_med_pre35"] == {"value": pytest.approx(34.9776, abs=5e-5), "denominator": 223}
    for answer_type in ("open", "closed"):
        for rule, (low, high) in scores["intervals"][answer_type].items():
            value = scores[answer_type][rule]
            assert low <= (value["value"] if isinstance(value, dict) else value) <= high


def test_order_bom_crlf_and_float_ids_change_nothing(vqa_rad: Path, zero_shot: Path, tmp_path: Path) -> None:
    lines = zero_shot.read_text("utf-8").splitlines()
    random.Random(0).shuffle(lines)
    rows = [json.loads(line) for line in lines]
    for row in rows[:9]:
        row["question_id"] = float(row["question_id"])
    foreign = tmp_path / "foreign.jsonl"
    foreign.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(json.dumps(row) for row in rows).encode() + b"\r\n\r\n")
    assert score_files("vqa-rad", vqa_rad, foreign) == score_files("vqa-rad", vqa_rad, zero_shot)


def test_another_benchmarks_items_are_refused(real_data: Path, zero_shot: Path) -> None:
    with pytest.raises(PredictionMismatch, match="another benchmark's file"):
        score_files("slake", real_data / "slake" / "Slake1.0", zero_shot, missing="wrong", resamples=10)


def test_another_numbering_is_refused_by_its_prompts(vqa_rad: Path, zero_shot: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in zero_shot.read_text("utf-8").splitlines()]
    ids = [row["question_id"] for row in rows]
    for row, other in zip(rows, ids[1:] + ids[:1], strict=True):
        row["question_id"] = other
    shifted = tmp_path / "shifted.jsonl"
    shifted.write_text("\n".join(json.dumps(row) for row in rows), "utf-8")
    with pytest.raises(PredictionMismatch, match="prompts do not hold the question"):
        score_files("vqa-rad", vqa_rad, shifted, missing="wrong", resamples=10)


def test_missing_answers_are_listed_or_wrong(vqa_rad: Path, zero_shot: Path, tmp_path: Path) -> None:
    lines = zero_shot.read_text("utf-8").splitlines()
    short = tmp_path / "short.jsonl"
    short.write_text("\n".join(lines[3:] + lines[-1:]), "utf-8")
    result = CliRunner().invoke(
        cli, ["score", "--benchmark", "vqa-rad", "--items", str(vqa_rad), "--predictions", str(short)]
    )
    assert isinstance(result.exception, PredictionMismatch)
    missing = [str(json.loads(line)["question_id"]) for line in lines[:3]]
    assert all(item_id in str(result.exception) for item_id in missing)
    scores = score_files("vqa-rad", vqa_rad, short, missing="wrong", resamples=10)
    assert scores["n"] == 451
    assert sorted(scores["missing"]) == sorted(missing)
    assert scores["repeated"] == [str(json.loads(lines[-1])["question_id"])]
    assert scores["closed"]["llava_med_batch"] <= 30.1471
    stranger = json.dumps({"question_id": 99999, "text": "yes"})
    short.write_text("\n".join([*lines[3:], lines[-1], stranger]), "utf-8")
    arguments = ["score", "--benchmark", "vqa-rad", "--items", str(vqa_rad), "--predictions", str(short)]
    printed = CliRunner().invoke(cli, [*arguments, "--missing", "wrong"]).stdout
    assert all(line in printed for line in ("missing: 3 ids", "repeated: 1 ids", "unknown: 1 ids"))


@pytest.mark.parametrize(
    ("benchmark", "folder", "sizes"),
    [
        ("vqa-rad", "vqa-rad", (179, 272)),
        ("slake", "slake", (645, 416)),
        ("slake-zh", "slake", (613, 420)),
        ("pathvqa", "pathvqa", (3370, 3391)),
    ],
)
def test_the_right_answers_are_right_under_every_clean_rule(
    real_data: Path, benchmark: str, folder: str, sizes: tuple[int, int]
) -> None:
    items = items_of_split(read_benchmark(benchmark, real_data / folder, images=False), where=folder)
    table = tabulate(join_answers(items, [make_prediction(item, item.answer) for item in items], where="gold"))
    clean = [("closed", "whole_word"), ("closed", "exact_match"), ("open", "exact_match"), ("open", "token.f1")]
    clean += [("open", "bleu_1"), ("open", "rouge_l"), ("open", "lmms_eval.exact_match")]
    for answer_type, rule in clean:
        values = table.column("closed" if answer_type == "closed" else "open", rule)
        counted = values[~np.isnan(values)]
        assert len(counted) == sizes[answer_type == "closed"]
        assert counted.min() == pytest.approx(1), (benchmark, answer_type, rule)
    assert OFFICIAL_TEST_SIZES[benchmark] == sizes
    assert is_official(benchmark, items)


# ── Reading ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no predictions"),
        (b"\n\n", "holds no predictions"),
        (b'{"question_id": 1, "text": "a"}\n{"question_id": 2, "te', "last line is cut off"),
        (b'{"question_id": 1, "text": "a"\n{"question_id": 2, "text": "b"}', "not JSON"),
        (b'[1, "a"]', "not an object but list"),
        (b'{"question_id": 1, "text": 5}', "it is 5"),
        (b'{"question_id": 1, "text": null}', "it is null"),
        (b'{"question_id": 1, "answer": "a"}', "there is none"),
        (b'{"text": "a"}', "id has to be"),
        (b'{"question_id": true, "text": "a"}', "it is true"),
        (b'{"question_id": 1.5, "text": "a"}', "it is 1.5"),
        (b'{"question_id": "", "text": "a"}', "id has to be"),
        (b'\xff\xfe{"question_id": 1}', "not UTF-8"),
    ],
)
def test_bad_prediction_files_are_refused_with_the_place(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_predictions(path, benchmark="vqa-rad")
    assert str(path) in caught.value.where


def test_a_missing_file_and_a_false_parquet_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_predictions(tmp_path / "none.jsonl", benchmark="vqa-rad")
    with pytest.raises(InputError, match="does not exist"):
        read_predictions(tmp_path / "none.parquet", benchmark="vqa-rad")
    (tmp_path / "false.parquet").write_text("not parquet")
    with pytest.raises(InputError, match="no Parquet file"):
        read_predictions(tmp_path / "false.parquet", benchmark="vqa-rad")


def test_an_answer_may_hold_a_line_separator(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text('{"question_id": 1, "text": "one\u2028two"}\n', "utf-8")
    assert read_predictions(path, benchmark="vqa-rad")[0].text == "one\u2028two"


def test_our_parquet_folder_is_read(items: list[VQAItem], tmp_path: Path) -> None:
    predictions = [make_prediction(item, item.answer) for item in items]
    write_records(tmp_path / "answers", Prediction, predictions)
    assert read_predictions(tmp_path / "answers", benchmark="vqa-rad") == predictions
    assert read_predictions(tmp_path / "answers" / "part-00000.parquet", benchmark="vqa-rad") == predictions


# ── Joining and tabulating ──────────────────────────────────────────────────────────────────────


def scores_of(items: list[VQAItem], predictions: list[Prediction], **join: Any) -> dict[str, Any]:
    draws = Resamples.draw([item.image_id for item in items], resamples=20)
    table = tabulate(join_answers(items, predictions, where="test", **join))
    return summary(list(score_rows(table, draws, model="m", stage="s", blind=False)))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(
    order=st.permutations(range(6)),
    texts=st.lists(st.sampled_from(["yes", "no", "MRI", "brain", ""]), min_size=6, max_size=6),
)
def test_the_order_of_predictions_does_not_matter(items: list[VQAItem], order: list[int], texts: list[str]) -> None:
    predictions = [make_prediction(item, text) for item, text in zip(items, texts, strict=True)]
    assert scores_of(items, predictions) == scores_of(items, [predictions[place] for place in order])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(kept=st.sets(st.integers(0, 5), min_size=3), twice=st.sets(st.integers(0, 5)))
def test_the_denominator_never_shrinks(items: list[VQAItem], kept: set[int], twice: set[int]) -> None:
    predictions = [make_prediction(items[place], items[place].answer) for place in [*sorted(kept), *sorted(twice)]]
    joined = join_answers(items, predictions, missing="wrong", where="test")
    assert joined.items == tuple(items)
    right = {place for place in kept ^ twice}
    assert [prediction is not None for prediction in joined.predictions] == [place in right for place in range(6)]
    scores = scores_of(items, predictions, missing="wrong")
    assert (scores["open"]["n"], scores["closed"]["n"]) == (3, 3)
    assert scores["closed"]["whole_word"] == pytest.approx(100 * len(right & {0, 1, 2}) / 3, abs=1e-5)


def test_mismatches_name_every_kind(items: list[VQAItem]) -> None:
    predictions = [make_prediction(item, "yes") for item in [*items[1:], items[2]]]
    stranger = dataclasses.replace(predictions[0], item_id="999")
    with pytest.raises(PredictionMismatch) as caught:
        join_answers(items, [*predictions, stranger], where="test")
    for part in ("1 items have no prediction: 10", "1 ids have several predictions: 12", "test split: 999"):
        assert part in caught.value.what
    assert "--missing wrong" in caught.value.hint


def test_a_long_list_of_ids_is_cut(items: list[VQAItem]) -> None:
    many = [dataclasses.replace(items[0], item_id=str(number)) for number in range(30)]
    with pytest.raises(PredictionMismatch, match="and 20 more"):
        join_answers(many, [], where="test")


def test_a_missing_answer_gains_nothing_where_the_answer_normalises_to_nothing() -> None:
    item = make_item("1", "Which letter?", "a", "closed", "CHEST", "one.png")
    present = scores_of([item], [make_prediction(item, "")])
    absent = scores_of([item], [], missing="wrong")
    assert present["closed"]["llava_med_batch"] == 100  # the quirk of the substring rule
    assert absent["closed"]["llava_med_batch"] == 0


def test_empty_answers_are_wrong_and_counted(items: list[VQAItem]) -> None:
    scores = scores_of(items, [make_prediction(item, "") for item in items])
    assert scores["closed"]["n"] == 3
    assert {scores["closed"]["whole_word"], scores["open"]["token.f1"], scores["open"]["llava_med.recall"]} == {0.0}


# ── Intervals ───────────────────────────────────────────────────────────────────────────────────


def test_the_interval_of_questions_on_one_image_is_as_wide_as_of_one_question() -> None:
    """Ten questions on each image add nothing if they stand or fall together."""
    hit = np.random.default_rng(1).random(100) < 0.5
    alone = Resamples.draw([str(image) for image in range(100)], seed=3)
    tenfold = Resamples.draw([str(image) for image in range(100) for _ in range(10)], seed=3)
    one = interval(alone.means(hit[:, None].astype(float))[:, 0])
    ten = interval(tenfold.means(np.repeat(hit, 10)[:, None].astype(float))[:, 0])
    assert one is not None
    assert one == pytest.approx(ten)
    assert 0.15 < one[1] - one[0] < 0.25  # the binomial's is 0.196


def test_intervals_depend_on_the_seed_and_not_on_the_order() -> None:
    images = [str(image) for image in range(30)]
    values = np.arange(30.0)[:, None] / 30
    first = Resamples.draw(images, seed=1).means(values)
    backwards = Resamples.draw(images[::-1], seed=1).means(values[::-1])
    assert np.allclose(first, backwards)
    assert not np.allclose(first, Resamples.draw(images, seed=2).means(values))


def test_one_image_has_no_interval(items: list[VQAItem]) -> None:
    draws = Resamples.draw([item.image_id for item in items], resamples=20)
    joined = join_answers(items, [make_prediction(item, "yes") for item in items], where="test")
    rows = list(score_rows(tabulate(joined), draws, model="m", stage="s", blind=False))
    head = [row for row in rows if row.slice == "organ=HEAD"]
    assert head
    assert all(row.low is None and row.high is None for row in head)
    assert all(row.low is not None for row in rows if row.slice == "all" and row.n == 3)


# ── The step ────────────────────────────────────────────────────────────────────────────────────


def build_workspace(root: Path, items: list[VQAItem]) -> Workspace:
    workspace = Workspace(root)
    train = dataclasses.replace(items[0], item_id="99", split="train")  # shares the image one.png
    write_records(workspace.items("vqa-rad"), VQAItem, [train, *items])
    predictions = [make_prediction(item, item.answer) for item in items[:5]] + [make_prediction(items[5], "three")]
    predictions += [make_prediction(item, "yes", blind=True) for item in items]
    predictions += [make_prediction(item, "no", stage="align") for item in items]
    write_records(workspace.predictions("tiny-llava-med", "vqa-rad") / "answers", Prediction, predictions)
    return workspace


def test_the_step_writes_scores_wrong_answers_and_metrics(items: list[VQAItem], tmp_path: Path) -> None:
    workspace = build_workspace(tmp_path, items)
    report = score_recipe(workspace, "tiny-llava-med", "vqa-rad")
    folder = workspace.scores("tiny-llava-med", "vqa-rad")
    assert read_report(folder) == report
    assert report.metrics["closed.whole_word"] == 100
    assert report.metrics["closed.whole_word.blind"] == pytest.approx(33.333333)
    assert report.metrics["closed.whole_word.gain"] == pytest.approx(66.666667)
    assert report.metrics["align.closed.whole_word"] == pytest.approx(33.333333)
    assert report.metrics["open.llava_med.recall"] == pytest.approx(66.666667)
    assert report.details["official_test_split"] is False
    scores = [from_row(Score, row) for row in pq.read_table(folder / "scores" / "scores.parquet").to_pylist()]
    assert {(score.stage, score.blind) for score in scores} == {
        ("align", False),
        ("finetune", False),
        ("finetune", True),
    }
    assert {score.slice for score in scores} == {
        "all", "language=en", "leaked=false", "leaked=true", "modality=CT", "organ=CHEST", "organ=HEAD",
        "question_type=PRES",
    }  # fmt: skip
    leaked = next(s for s in scores if s.slice == "leaked=true" and s.rule == "whole_word" and s.stage == "align")
    assert (leaked.n, leaked.value) == (2, 50.0)
    wrong = [
        from_row(WrongAnswer, row) for row in pq.read_table(folder / "scores" / "wrong_answers.parquet").to_pylist()
    ]
    assert [(answer.item_id, answer.prediction, answer.blind_prediction) for answer in wrong] == [
        ("15", "three", "yes")
    ]
    assert wrong[0].image.bytes == b"four.png"


def test_the_step_is_deterministic(items: list[VQAItem], tmp_path: Path) -> None:
    content: list[bytes] = []
    for name in ("first", "second"):
        workspace = build_workspace(tmp_path / name, items)
        score_recipe(workspace, "tiny-llava-med", "vqa-rad")
        folder = workspace.scores("tiny-llava-med", "vqa-rad") / "scores"
        content.append(b"".join(path.read_bytes() for path in sorted(folder.iterdir())))
    assert content[0] == content[1]


def test_the_verb_scores_a_recipe(items: list[VQAItem], tmp_path: Path) -> None:
    build_workspace(tmp_path, items)
    arguments = ["--workspace", str(tmp_path), "score", "--recipe", "tiny-llava-med", "--benchmark", "vqa-rad"]
    printed = run_json(*arguments, "--json")
    assert printed["closed"]["whole_word"] == 100
    assert printed["blind"]["closed"]["whole_word"] == pytest.approx(33.333333)
    table = CliRunner().invoke(cli, arguments)
    assert table.exit_code == 0
    assert "whole_word" in table.stdout


def test_a_short_test_set_fails_the_step(items: list[VQAItem], tmp_path: Path) -> None:
    workspace = build_workspace(tmp_path, items)
    answers = workspace.predictions("tiny-llava-med", "vqa-rad") / "answers"
    write_records(answers, Prediction, [make_prediction(item, "yes") for item in items[:-1]])
    with pytest.raises(PredictionMismatch, match="1 items have no prediction: 15"):
        score_recipe(workspace, "tiny-llava-med", "vqa-rad")
    assert not workspace.scores("tiny-llava-med", "vqa-rad").exists()


def test_a_step_without_its_input_says_what_to_run(items: list[VQAItem], tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError, match="no output yet"):
        score_recipe(Workspace(tmp_path), "tiny-llava-med", "vqa-rad")
    workspace = build_workspace(tmp_path, items)
    write_records(workspace.predictions("tiny-llava-med", "vqa-rad") / "answers", Prediction, [])
    with pytest.raises(InputError, match="there are no predictions"):
        score_recipe(workspace, "tiny-llava-med", "vqa-rad")


def test_the_verb_refuses_half_of_the_options() -> None:
    for arguments in ([], ["--items", "a.json"], ["--recipe", "r", "--items", "a.json"]):
        result = CliRunner().invoke(cli, ["score", "--benchmark", "vqa-rad", *arguments])
        assert result.exit_code == 2
