"""Calibration by hand: confidence of the likeliest option, its bins, and the expected error."""

from __future__ import annotations

import dataclasses
import io
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from vqa_factory import make_item, make_prediction

from medvlm.errors import WorkspaceError
from medvlm.evaluation.answers import Joined
from medvlm.evaluation.calibration import calibrate, is_option
from medvlm.evaluation.plots import score_plots, write_plots
from medvlm.evaluation.score_step import score_recipe
from medvlm.records import Prediction, VQAItem
from medvlm.store import Workspace, write_records


def weighed(number: int, answer: str, share_of_yes: float) -> tuple[VQAItem, Prediction]:
    item = make_item(str(number), "Is it?", answer, "closed", "CHEST", f"{number}.png")
    logprobs = (math.log(share_of_yes) - 3, math.log(1 - share_of_yes) - 3)
    return item, dataclasses.replace(make_prediction(item, "yes"), options=("yes", "no"), option_logprobs=logprobs)


def joined(pairs: list[tuple[VQAItem, Prediction]]) -> Joined:
    return Joined(tuple(item for item, _ in pairs), tuple(prediction for _, prediction in pairs))


def test_the_error_by_hand() -> None:
    pairs = [weighed(0, "Yes", 0.95), weighed(1, "No", 0.95), weighed(2, "no", 0.3), weighed(3, "yes", 0.7)]
    found = calibrate(joined(pairs))
    assert found is not None and found.n == 4
    assert found.accuracy == 75 and found.confidence == pytest.approx(100 * (0.95 + 0.95 + 0.7 + 0.7) / 4)
    assert [(one.low, one.high, one.n, one.accuracy) for one in found.bins] == [(0.6, 0.7, 2, 1.0), (0.9, 1.0, 2, 0.5)]
    assert found.ece == pytest.approx(100 * (2 * 0.3 + 2 * 0.45) / 4)


def test_without_options_there_is_nothing_to_say() -> None:
    item = make_item("1", "Is it?", "yes", "closed", "CHEST", "1.png")
    assert calibrate(Joined((item,), (make_prediction(item, "yes"),))) is None
    assert calibrate(Joined((item,), (None,))) is None


@given(st.lists(st.tuples(st.sampled_from(("yes", "no")), st.floats(0.001, 0.999)), min_size=1, max_size=30))
def test_every_weighed_item_is_in_one_bin(rows: list[tuple[str, float]]) -> None:
    found = calibrate(joined([weighed(n, answer, share) for n, (answer, share) in enumerate(rows)]))
    assert found is not None and sum(one.n for one in found.bins) == found.n == len(rows)
    assert 0 <= found.ece <= 100 and all(one.low - 1e-6 <= one.confidence <= one.high + 1e-6 for one in found.bins)


@pytest.mark.parametrize(
    ("option", "answer", "language", "same"),
    [("yes", "Yes.", "en", True), ("no", "yes", "en", False), ("left lung", "Left Lung", "en", True),
     ("是", "是的", "zh", True), ("否", "不是", "zh", True), ("是", "不是", "zh", False)],
)  # fmt: skip
def test_an_option_is_what_an_answer_says(option: str, answer: str, language: str, same: bool) -> None:
    item = dataclasses.replace(make_item("1", "?", answer, "closed", "CHEST", "1.png"), language=language)  # type: ignore[arg-type]
    assert is_option(option, answer, item) is same


@pytest.fixture
def scored(tmp_path: Path, items: list[VQAItem]) -> Workspace:
    workspace = Workspace(tmp_path)
    pairs = [weighed(n, "yes" if n % 2 else "no", 0.2 + (n - 100) / 20) for n in range(100, 112)]
    everything = [*items, *(item for item, _ in pairs)]
    write_records(workspace.items("vqa-rad"), VQAItem, everything)
    answers = [*(make_prediction(item, "yes") for item in items), *(prediction for _, prediction in pairs)]
    blind = [make_prediction(item, "no", blind=True) for item in everything]
    write_records(workspace.predictions("tiny-llava-med", "vqa-rad") / "answers", Prediction, [*answers, *blind])
    return workspace


def test_the_step_reports_it_and_the_plots_are_pictures(scored: Workspace, tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError, match="no scores yet"):
        score_plots(scored, "tiny-llava-med", "vqa-rad")
    report = score_recipe(scored, "tiny-llava-med", "vqa-rad")
    assert report.details["calibration"]["finetune"]["n"] == 12
    assert report.metrics["calibration.ece"] == report.details["calibration"]["finetune"]["ece"]
    plots = score_plots(scored, "tiny-llava-med", "vqa-rad")
    assert list(plots) == ["accuracy by slice", "open answers by slice", "calibration"]
    for path in write_plots(plots, tmp_path / "plots"):
        with Image.open(io.BytesIO(path.read_bytes())) as picture:
            assert picture.format == "PNG" and picture.width > 300 and len(set(picture.convert("L").tobytes())) > 2
    assert score_plots(scored, "tiny-llava-med", "vqa-rad") == plots
