"""The leaderboard: published data that holds together, our rows beside it, unlike never mixed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from vqa_factory import make_prediction

from medvlm.cli import cli
from medvlm.errors import WorkspaceError
from medvlm.evaluation.leaderboard import leaderboard_rows, write_leaderboard
from medvlm.evaluation.metrics import RULES
from medvlm.evaluation.published import chat_table, notebook_runs, published_scores
from medvlm.evaluation.score_step import score_recipe
from medvlm.records import Prediction, VQAItem
from medvlm.store import Workspace, read_json, read_report, write_records

FOREIGN_RULES = {"candidate_set_accuracy", "nltk.bleu", "accuracy"} | {
    f"unpublished.{name}" for name in ("recall", "f1", "closed")
}


@pytest.fixture
def scored(items: list[VQAItem], tmp_path: Path) -> Workspace:
    workspace = Workspace(tmp_path)
    write_records(workspace.items("vqa-rad"), VQAItem, items)
    predictions = [
        make_prediction(item, item.answer if stage == "finetune" and not blind else "no", blind=blind, stage=stage)
        for item in items
        for stage in ("align", "finetune")
        for blind in (False, True)
    ]
    write_records(workspace.predictions("tiny-llava-med", "vqa-rad") / "answers", Prediction, predictions)
    score_recipe(workspace, "tiny-llava-med", "vqa-rad", resamples=50)
    return workspace


def test_every_published_score_names_its_rule_split_and_source() -> None:
    scores = list(published_scores())
    assert len(scores) > 150
    for score in scores:
        assert 0 <= score.value <= 100
        assert score.source
        assert score.train_split
        assert score.rule in RULES[score.answer_type] or score.rule in FOREIGN_RULES
        assert (score.training == "zero-shot") <= (score.epochs is None)
    keys = [
        (s.model, s.training, s.epochs, s.train_split, s.benchmark, s.answer_type, s.rule, s.source) for s in scores
    ]
    assert len(keys) == len(set(keys))


def test_the_papers_epochs_are_those_of_the_notebooks_runs() -> None:
    """Values of LLaVA-Med's table are found among the notebook's runs with the epochs given."""
    runs = [run for run in notebook_runs()["runs"] if not run["options"]]
    recall = notebook_runs()["open_rules"].index("llava_med.recall")
    table = [s for s in published_scores() if s.source.startswith("LLaVA-Med, arXiv") and s.epochs]
    assert len(table) == 20
    for score in table:
        found = {
            run["open"][recall] if score.answer_type == "open" else run["closed"]
            for run in runs
            if run["benchmark"] == score.benchmark and run["epochs"] == score.epochs
        }
        assert any(abs(value - score.value) < 0.011 for value in found), score


def test_the_published_runs_are_those_of_the_notebook(real_data: Path) -> None:
    lines = (real_data / "predictions" / "llava-med_published_runs.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    runs = notebook_runs()["runs"]
    assert len(runs) == len(rows) == 192
    assert [run["closed"] for run in runs] == [row["yes/no accuracy"] for row in rows]
    assert [run["open"][3] for run in runs] == [row["recall"] for row in rows]


def test_the_runs_come_only_when_asked_for(tmp_path: Path) -> None:
    few, many = leaderboard_rows(Workspace(tmp_path)), leaderboard_rows(Workspace(tmp_path), runs=True)
    assert len(many) - len(few) == 192 * 6
    inflated = [row for row in many if "shrank" in row.note]
    assert {row.rule for row in inflated if row.answer_type == "closed"} == {"llava_med_pre35"}
    result = CliRunner().invoke(cli, ["--workspace", str(tmp_path), "leaderboard", "--runs"])
    assert result.exit_code == 0
    assert "every run it prints" in result.stdout


def test_the_chat_table_adds_up() -> None:
    table = chat_table()
    assert table["counts"] == [143, 50, 37, 38, 44, 34, 40, 193]
    for values in table["rows"].values():
        conversation, description, *domains, overall = values
        assert (143 * conversation + 50 * description) / 193 == pytest.approx(overall, abs=0.15)
        by_domain = sum(n * value for n, value in zip(table["counts"][2:7], domains, strict=True)) / 193
        assert by_domain == pytest.approx(overall, abs=0.15)


def test_an_empty_workspace_shows_the_published_rows_and_what_to_run(tmp_path: Path) -> None:
    root = tmp_path / "empty"
    result = CliRunner().invoke(cli, ["--workspace", str(root), "leaderboard"])
    assert result.exit_code == 0
    assert "LLaVA-Med (From LLaVA)" in result.stdout
    assert "make demo" in result.stdout
    assert not root.exists()
    rows = json.loads(CliRunner().invoke(cli, ["--workspace", str(root), "leaderboard", "--json"]).stdout)
    assert {row["kind"] for row in rows} == {"published"}


def test_our_rows_come_first_with_blind_and_gain(scored: Workspace) -> None:
    rows = leaderboard_rows(scored)
    first = next(row for row in rows if row.rule == "whole_word")
    assert rows[0].kind == "ours"
    assert (first.model, first.training, first.value, first.headline) == ("tiny-llava-med", "finetune", 100.0, True)
    assert first.blind == pytest.approx(33.333333)
    assert first.gain == pytest.approx(66.666667)
    assert not any(row.headline for row in rows if row.training == "align")


def test_ours_on_another_test_split_says_that_it_compares_with_nothing(scored: Workspace) -> None:
    ours = [row for row in leaderboard_rows(scored) if row.kind == "ours"]
    assert {row.test_split for row in ours} == {"not the official one"}
    assert all("compares with no published row" in row.note for row in ours)
    table = CliRunner().invoke(cli, ["--workspace", str(scored.root), "leaderboard"]).stdout
    assert "own, 6" in table
    assert "pathvqa" not in table
    assert "zero-shot" in CliRunner().invoke(cli, ["--workspace", str(scored.root), "leaderboard", "--all"]).stdout


def test_the_step_writes_rows_and_metrics(scored: Workspace) -> None:
    report = write_leaderboard(scored)
    assert report.metrics["tiny-llava-med.vqa-rad.closed.whole_word"] == 100
    assert report.counts["ours"] == 16
    assert read_report(scored.leaderboard) == report
    before = (scored.leaderboard / "rows.json").read_bytes()
    result = CliRunner().invoke(cli, ["--workspace", str(scored.root), "leaderboard", "--write", "--json"])
    assert json.loads(result.stdout) == read_json(scored.leaderboard / "rows.json")
    assert (scored.leaderboard / "rows.json").read_bytes() == before


def test_a_damaged_score_file_is_named(scored: Workspace) -> None:
    path = scored.scores("tiny-llava-med", "vqa-rad") / "scores" / "scores.parquet"
    path.write_bytes(b"PAR1 cut off")
    with pytest.raises(WorkspaceError, match="cannot be read"):
        leaderboard_rows(scored)


def test_a_model_that_saw_the_test_images_is_marked_and_its_clean_score_stands_beside(
    items: list[VQAItem], tmp_path: Path
) -> None:
    """The train split holds two of the four test images, as VQA-RAD's own does nearly all of them."""
    workspace = Workspace(tmp_path)
    train = [
        dataclasses.replace(item, item_id=f"train-{item.item_id}", split="train", question=f"{item.question} Why?")
        for item in items
        if item.image_id in ("one.png", "three.png")
    ]
    write_records(workspace.items("vqa-rad"), VQAItem, [*items, *train])
    answers = [make_prediction(item, "no" if item.image_id == "one.png" else item.answer) for item in items]
    write_records(workspace.predictions("tiny-llava-med", "vqa-rad") / "answers", Prediction, answers)
    report = score_recipe(workspace, "tiny-llava-med", "vqa-rad", resamples=50)
    rows = {(row.answer_type, row.rule): row for row in leaderboard_rows(workspace) if row.kind == "ours"}
    closed = rows["closed", "whole_word"]
    # Three closed items: two about image one (one right by chance), and one about image two, which is right.
    assert (closed.leaked, closed.clean) == (2, 100.0) and closed.value == pytest.approx(200 / 3)
    assert "trained on the image of 2 of 3 items" in closed.note
    assert report.details["summary"]["clean"]["closed.whole_word"] == {"value": 100.0, "n": 1}
    table = CliRunner().invoke(cli, ["--workspace", str(tmp_path), "leaderboard"], env={"COLUMNS": "140"}).stdout
    assert "clean" in table and "100.0" in table


def test_foreign_models_claim_no_train_split(items: list[VQAItem], tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    write_records(workspace.items("vqa-rad"), VQAItem, items)
    answers = [dataclasses.replace(make_prediction(i, "no", stage="served"), model="big-served") for i in items]
    write_records(workspace.predictions("big-served", "vqa-rad") / "answers", Prediction, answers)
    score_recipe(workspace, "big-served", "vqa-rad", resamples=50)
    ours = [row for row in leaderboard_rows(workspace) if row.kind == "ours"]
    assert {(row.model, row.training, row.train_split, row.epochs) for row in ours} == {
        ("big-served", "served", "unstated", None)
    }
