"""The leaderboard: our scores beside the published ones, with everything that makes them unlike."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from medvlm.config import load_recipe, recipe_names
from medvlm.evaluation.accepted import read_scores
from medvlm.evaluation.published import PublishedScore, notebook_scores, published_scores
from medvlm.evaluation.score_step import REPORTED, stage_order
from medvlm.records import AnswerType
from medvlm.store import Report, Workspace, fingerprint, read_report, write_json, write_report

__all__ = ["LeaderboardRow", "leaderboard_rows", "write_leaderboard"]


_OF_CLASSES = ("accuracy", "macro_f1")
"""Rules of classification benchmarks."""


@dataclass(frozen=True, slots=True)
class LeaderboardRow:
    """One score of one model. Two rows compare only if benchmark, test split, answer type and rule agree."""

    kind: Literal["ours", "published"]
    model: str
    training: str
    """Ours: the stage. Published: ``fine-tuned`` or ``zero-shot``."""
    epochs: float | None
    train_split: str
    benchmark: str
    test_split: str
    """``official``, or what ours was scored on instead."""
    answer_type: AnswerType
    rule: str
    value: float
    """Per cent."""
    low: float | None
    high: float | None
    n: int | None
    blind: float | None
    """The same model without the image."""
    gain: float | None
    """``value`` less ``blind``, in points."""
    leaked: int | None
    """Items of this answer type whose very image the model was trained on; None where it is not known."""
    clean: float | None
    """The value on the other items; None where all of them are leaked, or none is."""
    source: str
    url: str
    note: str
    second_hand: bool
    headline: bool
    """Whether the table shows it unasked."""


def leaderboard_rows(workspace: Workspace, *, runs: bool = False) -> list[LeaderboardRow]:
    """Every score of the workspace and every published one, ours first, by benchmark.

    Args:
        workspace: Need not exist.
        runs: Also the 192 runs of LLaVA-Med's notebook, with other epochs, data and models.

    Raises:
        WorkspaceError: A score file is damaged.
    """
    ours = [row for folder in _score_folders(workspace) for row in _our_rows(folder)]
    theirs = [_published_row(score) for score in (*published_scores(), *(notebook_scores() if runs else ()))]
    return ours + sorted(theirs, key=lambda row: row.benchmark)


def write_leaderboard(workspace: Workspace) -> Report:
    """Write ``rows.json`` and ``report.json`` into the leaderboard's folder.

    Returns:
        The report. Its metrics are the headline scores of our last stages, by
        ``<model>.<benchmark>.<answer type>.<rule>``, and their ``.blind`` and ``.gain``.
    """
    started = time.monotonic()
    rows = leaderboard_rows(workspace)
    path = workspace.leaderboard / "rows.json"
    write_json(path, [dataclasses.asdict(row) for row in rows])
    metrics: dict[str, float] = {}
    for row in rows:
        if row.kind == "ours" and row.headline:
            name = f"{row.model}.{row.benchmark}.{row.answer_type}.{row.rule}"
            values = {name: row.value, f"{name}.blind": row.blind, f"{name}.gain": row.gain}
            metrics |= {key: value for key, value in values.items() if value is not None}
    counts = {kind: sum(row.kind == kind for row in rows) for kind in ("ours", "published")}
    report = Report(step="leaderboard", counts=counts, metrics=metrics, fingerprint=fingerprint(path))
    return write_report(workspace.leaderboard, report, started=started)


def _score_folders(workspace: Workspace) -> list[Path]:
    # Recipes and benchmarks are folder names; the workspace gives the place of any two of them.
    root = workspace.scores("any", "any").parents[1]
    return sorted(path.parents[1] for path in root.glob("*/*/scores/scores.parquet"))


def _our_rows(folder: Path) -> Iterable[LeaderboardRow]:
    scores = [score for score in read_scores(folder / "scores" / "scores.parquet") if score.slice == "all"]
    report = read_report(folder)
    official = report is not None and report.details.get("official_test_split") is True
    slices = {
        (score.stage, score.answer_type, score.rule, score.slice): score
        for score in read_scores(folder / "scores" / "scores.parquet")
        if not score.blind and score.slice.startswith("leaked=")
    }
    blind = {(score.stage, score.answer_type, score.rule): score.value for score in scores if score.blind}
    stages = sorted({score.stage for score in scores}, key=stage_order)
    # Without a training set in the workspace there was nothing to compare with.
    searched = report is not None and bool(report.details.get("leaked_items"))
    for score in sorted(scores, key=lambda score: -stages.index(score.stage)):
        if score.blind or ((score.answer_type, score.rule) not in REPORTED and score.rule not in _OF_CLASSES):
            continue
        key = (score.stage, score.answer_type, score.rule)
        leaked, clean = slices.get((*key, "leaked=true")), slices.get((*key, "leaked=false"))
        notes = [] if official else ["compares with no published row: another test split"]
        if leaked:
            notes.append(f"the model was trained on the image of {leaked.n} of {score.n} items")
        without = blind.get((score.stage, score.answer_type, score.rule))
        yield LeaderboardRow(
            kind="ours",
            model=score.model,
            training=score.stage,
            epochs=_epochs(score.model, score.stage),
            train_split=_train_split(score.model, score.stage),
            benchmark=score.benchmark,
            test_split="official" if official else "not the official one",
            answer_type=score.answer_type,
            rule=score.rule,
            value=score.value,
            low=score.low,
            high=score.high,
            n=score.n,
            blind=without,
            gain=round(score.value - without, 6) if without is not None else None,
            leaked=leaked.n if leaked else 0 if searched else None,
            clean=clean.value if clean else None,
            source="this workspace",
            url="",
            note="; ".join(notes),
            second_hand=False,
            headline=score.stage == stages[-1],
        )


def _train_split(model: str, stage: str) -> str:
    if model not in recipe_names():
        return "unstated"
    return "none" if stage in ("align", "instruct") else "train split of the same release"


def _epochs(recipe: str, stage: str) -> float | None:
    """Epochs of a recipe's stage, or None where a number of steps ends it, or no such recipe exists."""
    if recipe not in recipe_names():
        return None
    known = {found.name: found for found in load_recipe(recipe).stages}
    return known[stage].epochs if stage in known and known[stage].max_steps is None else None


def _published_row(score: PublishedScore) -> LeaderboardRow:
    return LeaderboardRow(
        kind="published",
        test_split="official",
        low=None,
        high=None,
        blind=None,
        gain=None,
        leaked=None,
        clean=None,
        **dataclasses.asdict(score),
    )
