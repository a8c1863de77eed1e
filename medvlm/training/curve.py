"""The loss curve as a flat CSV table, for `dvc plots` and spreadsheets; report.json holds the same points."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medvlm.store import atomic_path

__all__ = ["write_curve"]

COLUMNS = ("target", "step", "loss", "lr")


def write_curve(folder: Path, curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write ``curve.csv`` into a stage's step folder: one row a logged step of each target.

    Args:
        folder: Of the step.
        curves: Target → points with ``step``, ``loss`` and ``lr``.

    Raises:
        WorkspaceError: The disk is full or read-only.
    """
    with atomic_path(folder / "curve.csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(COLUMNS)
        for target, points in curves.items():
            writer.writerows([target, *(point.get(name, "") for name in COLUMNS[1:])] for point in points)
