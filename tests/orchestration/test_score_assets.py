"""Scores in the lineage: their plots are metadata, and one that has fallen ends the run before the leaderboard."""

from __future__ import annotations

import base64
import math
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from medvlm.evaluation.accepted import accept_scores
from medvlm.evaluation.leaderboard import write_leaderboard
from medvlm.evaluation.score_step import score_recipe
from medvlm.pipeline import with_items
from medvlm.records import Image, Prediction, VQAItem
from medvlm.settings import Settings, write_settings
from medvlm.store import Workspace, write_records
from orchestration.assets.benchmarks import benchmark_scores, leaderboard
from orchestration.checks import scores_hold
from orchestration.launchers import TrainingLauncher
from orchestration.resources import DvcProject, StageRun

RECIPE, BENCHMARK = "tiny-llava-med", "vqa-rad"
PNG = "data:image/png;base64,"


class WithoutDvc(DvcProject):
    """A project that calls the stages' functions itself."""

    def reproduce(self, context: Any, stage: str, *, watch: bool = False) -> StageRun:
        if stage == "leaderboard":
            write_leaderboard(self.workspace)
        else:
            assert stage == f"score@{RECIPE}-{BENCHMARK}"
            score_recipe(self.workspace, RECIPE, BENCHMARK)
        return StageRun(stage, ran=True, data_version="abc")


def item(number: int) -> VQAItem:
    """Twenty yes-or-no questions and four open ones, each about an image of its own."""
    closed = number < 20
    return VQAItem(
        f"q{number}", BENCHMARK, "test", Image(b"%d" % number, f"{number}.png"), f"i{number}", f"sha{number}", "0" * 16,
        "Is there air?" if closed else "Which organ?", "yes" if closed else "lung", "closed" if closed else "open",
        False, "PRES", "CT", "CHEST", "en",
    )  # fmt: skip


def write_answers(workspace: Workspace, *, right: bool) -> None:
    sure = (math.log(0.9), math.log(0.1))
    answers = [
        Prediction(
            one.item_id, BENCHMARK, RECIPE, "finetune", blind, one.question,
            one.answer if right and not blind else "no",
            *((("yes", "no"), sure if right else sure[::-1]) if one.answer_type == "closed" else ((), ())),
        )
        for blind in (False, True)
        for one in map(item, range(24))
    ]  # fmt: skip
    write_records(workspace.predictions(RECIPE, BENCHMARK) / "answers", Prediction, answers)


@pytest.fixture
def project(tmp_path: Path) -> WithoutDvc:
    write_settings(tmp_path / "params.yaml", with_items(Settings.sample()))
    made = WithoutDvc(root=str(tmp_path), launcher=TrainingLauncher())
    write_records(made.workspace.items(BENCHMARK), VQAItem, map(item, range(24)))
    write_answers(made.workspace, right=True)
    return made


def run(project: WithoutDvc) -> dg.ExecuteInProcessResult:
    return dg.materialize(
        [benchmark_scores, leaderboard, scores_hold],
        partition_key=dg.MultiPartitionKey({"recipe": RECIPE, "benchmark": BENCHMARK}),
        resources={"project": project},
        raise_on_error=False,
    )


def test_scores_bring_their_plots_and_the_leaderboard_its_table(project: WithoutDvc) -> None:
    result = run(project)
    assert result.success
    shown = {
        event.asset_key.to_user_string(): event.step_materialization_data.materialization.metadata
        for event in result.get_asset_materialization_events()
        if event.asset_key is not None
    }
    scores = shown["benchmark_scores"]
    assert scores["closed.whole_word"].value == 100 and scores["closed.whole_word.gain"].value == 100
    for title in ("accuracy by slice", "open answers by slice", "calibration"):
        text = str(scores[title].value)
        assert text.startswith(f"![{title}]({PNG}")
        assert base64.b64decode(text.partition(PNG)[2].rstrip(")")).startswith(b"\x89PNG")
    table = str(shown["leaderboard"]["scores"].value)
    assert "whole_word" in table and RECIPE in table and "blind" in table


def test_a_fallen_score_ends_the_run_before_the_leaderboard(project: WithoutDvc) -> None:
    assert run(project).success
    accept_scores(project.workspace, RECIPE, BENCHMARK)
    (project.workspace.leaderboard / "rows.json").unlink()
    write_answers(project.workspace, right=False)
    result = run(project)
    assert not result.success
    (check,) = result.get_asset_check_evaluations()
    assert not check.passed
    assert "closed whole_word is 0.0; the accepted 100.0" in (check.description or "")
    assert not (project.workspace.leaderboard / "rows.json").exists()
    write_answers(project.workspace, right=True)
    assert run(project).success
