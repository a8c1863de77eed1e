"""The course of training runs, finished ones from their reports and unfinished ones from their scratch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from medvlm.store import Report, Workspace, read_json, read_report

__all__ = ["Curve", "curves_of"]


@dataclass(frozen=True)
class Curve:
    """The course of one training run."""

    recipe: str
    stage: int
    target: str
    """The benchmark a stage was run for; empty where it makes one model for all."""
    finished: bool
    report: Report
    """Of the whole stage; without times and metrics where it has not finished."""
    points: pd.DataFrame
    """``step``, ``loss`` and ``lr``, and whatever else the run wrote down."""

    @property
    def name(self) -> str:
        """The run's label on every page."""
        parts = [self.recipe, f"stage {self.stage}", self.target, "" if self.finished else "unfinished"]
        return " · ".join(part for part in parts if part)


def curves_of(workspace: Workspace, recipe: str) -> Iterator[Curve]:
    """Every run of a recipe that has a loss curve, by stage and target.

    An unfinished run, going on or killed, is known up to its last checkpoint.

    Raises:
        InputError: A report is damaged.
    """
    for stage in (1, 2, 3):
        report = read_report(workspace.stage(recipe, stage))
        curves: dict[str, list[dict[str, float]]] = report.details.get("curves", {}) if report else {}
        for target, points in curves.items():
            if report and points:
                pace: list[dict[str, float]] = report.details.get("pace", {}).get(target, [])
                yield Curve(recipe, stage, _shown(target), True, report, _with_pace(points, pace))
        yield from _unfinished(workspace, recipe, stage)


def _with_pace(points: list[dict[str, float]], pace: list[dict[str, float]]) -> pd.DataFrame:
    """Points with throughput and memory beside the loss, where they were measured."""
    table = pd.DataFrame(points)
    return table.merge(pd.DataFrame(pace), on="step", how="left") if pace else table


def _unfinished(workspace: Workspace, recipe: str, stage: int) -> Iterator[Curve]:
    root = workspace.scratch("train", recipe, f"stage{stage}")
    for folder in sorted(root.glob("*")):
        # complete.json is written last: without it a checkpoint may be half there.
        complete = [path.parent for path in folder.glob("checkpoint-*/complete.json")]
        state = max(complete, key=_step, default=folder) / "trainer_state.json"
        if not state.is_file():
            continue
        history: list[dict[str, float]] = read_json(state).get("log_history", [])
        points = [
            {"step": entry["step"], "loss": entry["loss"], "lr": entry.get("learning_rate", 0.0)}
            for entry in history
            if "loss" in entry
        ]
        if points:
            yield Curve(recipe, stage, _shown(folder.name), False, Report(step="train"), pd.DataFrame(points))


def _step(checkpoint: Path) -> int:
    number = checkpoint.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else -1


def _shown(target: str) -> str:
    return "" if target == "all" else target
