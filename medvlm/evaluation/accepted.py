"""The last accepted scores of a recipe, and whether the present ones have fallen below them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from medvlm.errors import WorkspaceError
from medvlm.evaluation.metrics import HEADLINE
from medvlm.evaluation.score_step import stage_order
from medvlm.records import Score, from_row
from medvlm.store import Workspace, read_json, write_json

__all__ = ["Fallen", "accept_scores", "accepted_path", "fallen_scores", "headline_scores", "read_scores"]


@dataclass(frozen=True, slots=True)
class Fallen:
    """A headline score that is below the accepted one by more than the accepted one's interval."""

    answer_type: str
    rule: str
    value: float
    accepted: float
    accepted_low: float
    """Lower end of the accepted score's 95 % interval."""

    def __str__(self) -> str:
        return (
            f"{self.answer_type} {self.rule} is {self.value:.1f}; the accepted {self.accepted:.1f} "
            f"has an interval that ends at {self.accepted_low:.1f}"
        )


def read_scores(path: Path) -> list[Score]:
    """Every score of a ``scores.parquet``.

    Raises:
        WorkspaceError: The file is absent or damaged.
    """
    try:
        return [from_row(Score, row) for row in pq.read_table(path).to_pylist()]
    except (pa.ArrowInvalid, TypeError, OSError) as error:
        raise WorkspaceError(
            f"the scores cannot be read: {error}",
            where=str(path),
            hint="run 'medvlm score' first; restore a damaged file with 'dvc checkout'",
        ) from error


def headline_scores(scores: list[Score]) -> list[Score]:
    """The headline rules of the last stage, with the image, on all items."""
    last = max((score.stage for score in scores), key=stage_order, default="")
    return [
        score
        for score in scores
        if score.stage == last
        and not score.blind
        and score.slice == "all"
        and HEADLINE[score.answer_type] == score.rule
    ]


def accepted_path(workspace: Workspace, recipe: str, benchmark: str) -> Path:
    """Where the accepted scores lie: beside the step's data, so that accepting makes nothing stale."""
    return workspace.scores(recipe, benchmark) / "accepted.json"


def accept_scores(workspace: Workspace, recipe: str, benchmark: str) -> list[Score]:
    """Make the present headline scores the accepted ones.

    Returns:
        The scores accepted.

    Raises:
        WorkspaceError: There are no scores yet.
    """
    scores = headline_scores(_present(workspace, recipe, benchmark))
    fields = ("stage", "answer_type", "rule", "value", "low", "high", "n")
    rows = [{name: getattr(score, name) for name in fields} for score in scores]
    write_json(accepted_path(workspace, recipe, benchmark), rows)
    return scores


def fallen_scores(workspace: Workspace, recipe: str, benchmark: str) -> list[Fallen]:
    """The headline scores that have fallen; empty where none has, or where none was ever accepted.

    A score on another number of items is of another test set, and compares with nothing.

    Raises:
        WorkspaceError: There are no scores yet.
        InputError: The accepted scores are damaged.
    """
    path = accepted_path(workspace, recipe, benchmark)
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = read_json(path)
    accepted = {(row["answer_type"], row["rule"]): row for row in rows}
    fallen: list[Fallen] = []
    for score in headline_scores(_present(workspace, recipe, benchmark)):
        before = accepted.get((score.answer_type, score.rule))
        if before is None or before["n"] != score.n:
            continue
        low = before["value"] if before["low"] is None else before["low"]
        if score.value < low:
            fallen.append(Fallen(score.answer_type, score.rule, score.value, before["value"], low))
    return fallen


def _present(workspace: Workspace, recipe: str, benchmark: str) -> list[Score]:
    return read_scores(workspace.scores(recipe, benchmark) / "scores" / "scores.parquet")
