"""The table of docs/reliability.md: every failure that matters is in it, and each row's test is still there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from failures.reliability import HEADER, write_table

TESTS = Path(__file__).resolve().parents[1]
DOCUMENT = TESTS.parent / "docs" / "reliability.md"
ROWS = DOCUMENT.read_text("utf-8").removeprefix(HEADER).splitlines()

NAMED = [
    "kill -9 of the fetcher",
    "kill -9 of the trainer",
    "kill -9 of one rank",
    "kill -9 of Dagster's run worker",
    "kill -9 of Dagster's daemon",
    "disk full in the middle of a checkpoint",
    "disk full in the middle of a shard",
    "one bit of a shard flipped",
    "one bit of a checkpoint flipped",
    "two pipelines on one workspace",
    "the clock jumps",
    "SIGTERM to all of `dvc repro`",
    "PostgreSQL crashes and restarts under a run",
    "one host of two is cut off and killed",
]


@pytest.mark.parametrize("done", NAMED)
def test_a_failure_that_was_promised_is_a_row(done: str) -> None:
    assert any(row.startswith(f"| {done}") for row in ROWS)


def test_each_row_names_a_test_that_is_there() -> None:
    for row in ROWS:
        file, name = row.split(" | ")[-1].strip("| `").split("::")
        assert f"def {name.split('[')[0]}(" in (TESTS / file).read_text("utf-8"), row


def test_rows_of_some_tests_leave_the_others_as_they_are(tmp_path: Path) -> None:
    def row(done: str, test: str) -> str:
        return json.dumps({"done": done, "lost": "l", "saw": "s", "rerun": "r", "test": test}) + "\n"

    rows, document = tmp_path / "rows", tmp_path / "table.md"
    rows.write_text(row("first", "a.py::test_a") + row("second", "b.py::test_b"))
    write_table(rows, document)
    rows.write_text(row("second, better said", "b.py::test_b"))
    write_table(rows, document, keep=True)
    text = document.read_text("utf-8")
    assert "| first | l | s | r | `a.py::test_a` |" in text
    assert "second, better said" in text and "| second |" not in text
    write_table(rows, document)
    assert "first" not in document.read_text("utf-8")
