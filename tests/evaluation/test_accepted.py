"""Scores that are accepted, and the check that later ones have not fallen below them."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from vqa_factory import make_item, make_prediction

from medvlm.cli import cli
from medvlm.errors import WorkspaceError
from medvlm.evaluation.accepted import accept_scores, fallen_scores
from medvlm.evaluation.score_step import score_recipe
from medvlm.records import Prediction, VQAItem
from medvlm.store import Workspace, fingerprint, write_records


def scored(root: Path, right: int, of: int = 40) -> Workspace:
    """A workspace whose model answers ``right`` of its questions, each on an image of its own."""
    workspace = Workspace(root)
    items = [make_item(str(n), "Is it?", "yes", "closed", "CHEST", f"{n}.png") for n in range(of)]
    write_records(workspace.items("vqa-rad"), VQAItem, items)
    answers = [make_prediction(item, "yes" if n < right else "no") for n, item in enumerate(items)]
    write_records(workspace.predictions("tiny-llava-med", "vqa-rad") / "answers", Prediction, answers)
    score_recipe(workspace, "tiny-llava-med", "vqa-rad")
    return workspace


def test_a_fall_within_the_interval_passes_and_one_beyond_it_does_not(tmp_path: Path) -> None:
    assert fallen_scores(scored(tmp_path, 30), "tiny-llava-med", "vqa-rad") == []  # nothing accepted yet
    accepted = accept_scores(scored(tmp_path, 30), "tiny-llava-med", "vqa-rad")
    assert [(score.rule, score.value) for score in accepted] == [("whole_word", 75.0)]
    assert fallen_scores(scored(tmp_path, 28), "tiny-llava-med", "vqa-rad") == []
    assert fallen_scores(scored(tmp_path, 40), "tiny-llava-med", "vqa-rad") == []
    fallen = fallen_scores(scored(tmp_path, 10), "tiny-llava-med", "vqa-rad")
    assert [(fall.rule, fall.value, fall.accepted) for fall in fallen] == [("whole_word", 25.0, 75.0)]
    assert "closed whole_word is 25.0" in str(fallen[0])


def test_another_test_set_compares_with_nothing(tmp_path: Path) -> None:
    accept_scores(scored(tmp_path, 30), "tiny-llava-med", "vqa-rad")
    assert fallen_scores(scored(tmp_path, 1, of=50), "tiny-llava-med", "vqa-rad") == []


def test_accepting_leaves_the_steps_data_as_it_is(tmp_path: Path) -> None:
    workspace = scored(tmp_path, 30)
    data = workspace.scores("tiny-llava-med", "vqa-rad") / "scores" / "scores.parquet"
    before = fingerprint(data)
    arguments = ["--workspace", str(tmp_path), "score", "--recipe", "tiny-llava-med", "--benchmark", "vqa-rad"]
    assert CliRunner().invoke(cli, [*arguments, "--accept"]).exit_code == 0
    assert fingerprint(data) == before
    assert [path.name for path in data.parent.iterdir() if path.suffix == ".json"] == []
    assert fallen_scores(scored(tmp_path, 5), "tiny-llava-med", "vqa-rad")


def test_nothing_to_accept_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError, match="cannot be read"):
        accept_scores(Workspace(tmp_path), "tiny-llava-med", "vqa-rad")
    assert CliRunner().invoke(cli, ["score", "--benchmark", "vqa-rad", "--accept"]).exit_code == 2
