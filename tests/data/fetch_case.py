"""What the tests of the fetch share: small lists, one-row fetches, and readers of the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bucket_server import BucketServer, Fault, article, llava_row, picture

from medvlm.data.figures import fetch_figures
from medvlm.data.objects import StoreLimits
from medvlm.records import FetchOutcome, Figure
from medvlm.store import Report, read_records

QUICK = StoreLimits(timeout_s=30, attempts=3, backoff_s=0.01)
"""Retries at once, but waits as long as a busy machine may need."""
HASTY = StoreLimits(timeout_s=0.4, attempts=3, backoff_s=0.01)
"""For a server that stalls on purpose."""


def write_list(folder: Path, rows: list[str]) -> Path:
    path = folder / "list.jsonl"
    path.write_text("\n".join(rows) + "\n", "utf-8")
    return path


def many(count: int, media: int = 1) -> tuple[dict[str, bytes], list[str]]:
    """Objects and rows of articles with ``media`` figures each."""
    objects: dict[str, bytes] = {}
    rows: list[str] = []
    for n in range(count):
        pmcid = f"PMC{7000 + n * 37}"
        files = {f"fig{k}.jpg": picture(n * media + k) for k in range(media)}
        objects |= article(pmcid, files, pmid=n + 1)
        rows += [llava_row(pmcid, name, f"{n + 1}_F{k + 1}") for k, name in enumerate(files)]
    return objects, rows


def outcomes(out: Path) -> list[FetchOutcome]:
    return read_records(out / "outcomes", FetchOutcome)


def figures(out: Path) -> list[Figure]:
    return read_records(out / "shards", Figure)


def shard_bytes(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (out / "shards").iterdir()}


def fetch_one(
    tmp_path: Path, objects: dict[str, bytes], row: str, *, fault: dict[str, Fault] | None = None, **kwargs: Any
) -> tuple[FetchOutcome, list[Figure]]:
    """The outcome of a list with one row."""
    out = tmp_path / "out"
    stalls = any(one.kind == "stall" for one in (fault or {}).values())
    limits = kwargs.pop("limits", HASTY if stalls else QUICK)
    with BucketServer(objects, faults=fault or {}) as server:
        fetch_figures(write_list(tmp_path, [row]), server.url, out, limits=limits, **kwargs)
    (outcome,) = outcomes(out)
    return outcome, figures(out)


ONE = article("PMC100", {"a.jpg": picture(1)}, pmid=5)
ROW = llava_row("PMC100", "a.jpg", "5_F1")
MEDIA = "PMC100.1/a.jpg"


def report_of(tmp_path: Path, objects: dict[str, bytes], rows: list[str], name: str, **kwargs: Any) -> Report:
    """Fetch a list from a server of its own."""
    with BucketServer(objects) as server:
        return fetch_figures(write_list(tmp_path, rows), server.url, tmp_path / name, limits=QUICK, **kwargs)
