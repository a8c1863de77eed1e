"""The loss curve as a table."""

from __future__ import annotations

import csv
from pathlib import Path

from medvlm.training.curve import write_curve


def test_every_point_of_every_target_is_a_row(tmp_path: Path) -> None:
    point = {"step": 1, "loss": 2.5, "lr": 1e-3, "grad_norm": 4.0}
    write_curve(tmp_path, {"vqa-rad": [point, {**point, "step": 2}], "slake": [point]})
    rows = list(csv.DictReader((tmp_path / "curve.csv").read_text().splitlines()))
    assert [(row["target"], row["step"]) for row in rows] == [("vqa-rad", "1"), ("vqa-rad", "2"), ("slake", "1")]
    assert float(rows[0]["lr"]) == 1e-3
