"""Classification by prompts: which class an answer names, and the metrics by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_factory import RECIPE, tiny_checkpoint
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from medvlm.cli import cli
from medvlm.errors import InputError
from medvlm.evaluation.classify import chosen_label, classification
from medvlm.evaluation.leaderboard import leaderboard_rows
from medvlm.evaluation.plots import score_plots
from medvlm.models.checkpoint import save_checkpoint
from medvlm.records import Prediction
from medvlm.store import Workspace, read_records, read_report

ORGANS = ("left lung", "right lung", "lung", "liver", "smooth muscle")


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("The liver.", "liver"),
        ("Left lung", "left lung"),
        ("It is the lung", "lung"),
        ("liver or lung", None),
        ("left lung and right lung", None),
        ("delivery", None),
        ("", None),
        ("SMOOTH-MUSCLE tissue", "smooth muscle"),
    ],
)
def test_an_answer_names_one_class_or_none(text: str, label: str | None) -> None:
    assert chosen_label(text, ORGANS) == label


def test_metrics_by_hand() -> None:
    truth = ["liver", "liver", "liver", "lung", "lung", "left lung"]
    answers = ["liver", "the liver", "lung", "lung", "nothing", "liver"]
    found = classification(truth, answers, ORGANS)
    assert found.accuracy == pytest.approx(50)
    # liver: precision 2/3, recall 2/3; lung: precision 1/2, recall 1/2; left lung: 0
    assert found.macro_f1 == pytest.approx(100 * (2 / 3 + 1 / 2 + 0) / 3, abs=1e-5)
    assert found.unanswered == 1
    assert found.confusion[ORGANS.index("liver")] == (0, 0, 1, 2, 0, 0)
    assert found.confusion[ORGANS.index("lung")] == (0, 0, 1, 0, 0, 1)
    assert found.by_label["liver"]["support"] == 3


@given(pairs=st.lists(st.tuples(st.sampled_from(ORGANS), st.sampled_from((*ORGANS, "unsure"))), min_size=1))
def test_the_confusion_holds_every_item(pairs: list[tuple[str, str]]) -> None:
    truth, answers = [list(column) for column in zip(*pairs, strict=True)]
    found = classification(truth, answers, ORGANS)
    assert sum(map(sum, found.confusion)) == found.n == len(pairs)
    assert found.accuracy == pytest.approx(100 * sum(t == a for t, a in pairs) / len(pairs), abs=1e-5)
    assert 0 <= found.macro_f1 <= 100


def test_an_unknown_class_is_refused() -> None:
    with pytest.raises(InputError, match="classes spleen are not in the set"):
        classification(["spleen"], ["spleen"], ORGANS)
    with pytest.raises(InputError, match="no items"):
        classification([], [], ORGANS)


def test_medmnist_is_scored_from_its_archive(tmp_path: Path) -> None:
    path = tmp_path / "pneumoniamnist.npz"
    images = np.zeros((4, 28, 28), dtype=np.uint8)
    labels = np.array([[0], [1], [1], [1]])
    arrays = {f"{part}_images": images for part in ("train", "val", "test")}
    np.savez(path, **arrays, **{f"{part}_labels": labels for part in ("train", "val", "test")})
    answers = tmp_path / "answers.jsonl"
    texts = ["normal", "pneumonia", "It shows pneumonia.", "normal"]
    answers.write_text(
        "\n".join(json.dumps({"question_id": f"test-{n}", "text": text}) for n, text in enumerate(texts))
    )
    arguments = ["score", "--benchmark", "pneumoniamnist", "--items", str(path), "--predictions", str(answers)]
    printed = json.loads(CliRunner().invoke(cli, [*arguments, "--json"]).stdout)
    assert printed["classification"]["accuracy"] == 75
    assert printed["classification"]["confusion"] == [[1, 0, 0], [1, 2, 0]]
    assert "macro-F1" in CliRunner().invoke(cli, arguments).stdout


def test_medmnist_goes_the_way_of_every_benchmark(tmp_path: Path) -> None:
    """Archive → items → answers of a model → accuracy, macro-F1, confusion and its picture, beside the published."""
    archive = tmp_path / "pneumoniamnist.npz"
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (6, 28, 28), dtype=np.uint8)
    arrays: dict[str, Any] = {f"{part}_images": images + place for place, part in enumerate(("train", "val", "test"))}
    labels = {f"{part}_labels": np.array([[0], [1], [1], [0], [1], [1]]) for part in ("train", "val", "test")}
    np.savez(archive, **arrays, **labels)
    workspace = Workspace(tmp_path / "workspace")
    save_checkpoint(workspace.checkpoint(RECIPE.name, 3, RECIPE.benchmarks[0]), tiny_checkpoint())
    base = ["--workspace", str(workspace.root)]
    for verb in (
        ["dataset", "build-benchmark", "pneumoniamnist", "--source", str(archive.parent)],
        ["predict", "--recipe", RECIPE.name, "--benchmark", "pneumoniamnist"],
        ["score", "--recipe", RECIPE.name, "--benchmark", "pneumoniamnist", "--json"],
    ):
        result = CliRunner().invoke(cli, [*base, *verb])
        assert result.exception is None, (verb, result.exception)
    answers = read_records(workspace.predictions(RECIPE.name, "pneumoniamnist") / "answers", Prediction)
    assert len(answers) == 12 and all("options: [normal, pneumonia]" in answer.prompt for answer in answers)
    report = read_report(workspace.scores(RECIPE.name, "pneumoniamnist"))
    assert report is not None
    found = report.details["classification"]["finetune"]
    assert sum(map(sum, found["confusion"])) == found["n"] == 6
    assert report.metrics["classification.accuracy"] == found["accuracy"]
    assert report.details["calibration"]["finetune"]["n"] == 6
    assert "confusion" in score_plots(workspace, RECIPE.name, "pneumoniamnist")
    rows = [row for row in leaderboard_rows(workspace) if (row.benchmark, row.rule) == ("pneumoniamnist", "accuracy")]
    assert rows[0].kind == "ours" and rows[0].value == found["accuracy"]
    assert any(row.value == 91.4 for row in rows)  # Med-MoE (Phi2), as published
