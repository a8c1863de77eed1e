"""The table of docs/reliability.md: rows that tests say once their asserts hold."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

VARIABLE = "MEDVLM_RELIABILITY"
"""A file that rows are appended to; `make reliability` sets it and turns it into the table."""

HEADER = """\
# Reliability

What goes wrong in real weeks of training, done on purpose. Each row is written by the test it names, after its asserts
held, by `make reliability`; do not edit the table by hand.

| what was done | what was lost | what the user saw | how the rerun went | test |
| --- | --- | --- | --- | --- |
"""


@dataclass(frozen=True)
class Row:
    """One failure, tried."""

    done: str
    lost: str
    saw: str
    rerun: str


def held(done: str, *, lost: str, saw: str, rerun: str) -> None:
    """Say that a failure was tried and went as described; written only where the table is being made."""
    path = os.environ.get(VARIABLE)
    if path:
        name = os.environ["PYTEST_CURRENT_TEST"].split(" ")[0].removeprefix("tests/")
        with Path(path).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({**asdict(Row(done, lost, saw, rerun)), "test": name}) + "\n")


def write_table(rows: Path, document: Path, *, keep: bool = False) -> None:
    """Turn the rows into the document; with ``keep``, rows of tests that did not run now stay as they are."""
    found = [json.loads(line) for line in rows.read_text("utf-8").splitlines()]
    ran = {row["test"] for row in found}
    before = [row for row in _rows_of(document) if row["test"] not in ran] if keep else []
    unique = {row["done"]: row for row in (*before, *found)}
    lines = [
        f"| {row['done']} | {row['lost']} | {row['saw']} | {row['rerun']} | `{row['test']}` |"
        for row in sorted(unique.values(), key=lambda row: row["done"])
    ]
    document.write_text(HEADER + "\n".join(lines) + "\n", "utf-8")


def _rows_of(document: Path) -> list[dict[str, str]]:
    names = ("done", "lost", "saw", "rerun", "test")
    lines = document.read_text("utf-8").removeprefix(HEADER).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [dict(zip(names, row, strict=True)) | {"test": row[-1].strip("`")} for row in cells]


if __name__ == "__main__":
    import sys

    write_table(Path(sys.argv[1]), Path(sys.argv[2]), keep="--keep" in sys.argv)
