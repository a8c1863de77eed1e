"""Counts and fingerprint of what a fetch has left in its step folder."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pyarrow.parquet as pq

from medvlm.store import Report

__all__ = ["fetch_report", "fingerprint_of_shards", "plain_counts"]


def plain_counts(by_status: Mapping[str, int]) -> dict[str, int]:
    """Counts that are not zero, by name."""
    return {status: count for status, count in sorted(by_status.items()) if count}


def fetch_report(out: Path) -> Report:
    """Counts and fingerprint of the shards and outcomes in a step folder."""
    by_status: Counter[str] = Counter()
    by_licence: Counter[str] = Counter()
    for path in sorted((out / "outcomes").glob("*.parquet")):
        by_status.update(pq.read_table(path, columns=["status"])["status"].to_pylist())
    captions = 0
    for path in sorted((out / "shards").glob("*.parquet")):
        table = pq.read_table(path, columns=["licence", "caption"])
        captions += sum(bool(caption) for caption in table["caption"].to_pylist())
        by_licence.update(table["licence"].to_pylist())
    rows = sum(by_status.values())
    return Report(
        step="fetch",
        counts={"rows": rows, "figures": sum(by_licence.values()), "figures_with_caption": captions},
        metrics={"ok_rate": round(by_status["ok"] / max(1, rows), 4)},
        details={"by_status": plain_counts(by_status), "by_licence": plain_counts(by_licence)},
        fingerprint=fingerprint_of_shards(out),
    )


def fingerprint_of_shards(out: Path) -> str:
    """Changes when and only when a figure, a text or a row's status does; not with times or attempts."""
    digest = hashlib.sha256()
    for folder, names in (
        ("outcomes", ["row", "pair_id", "status", "key", "figures"]),
        ("shards", ["figure_id", "sha256", "licence", "label", "caption", "mentions", "citation", "article_title"]),
    ):
        for path in sorted((out / folder).glob("*.parquet")):
            digest.update(repr(pq.read_table(path, columns=names).to_pydict()).encode())
    return digest.hexdigest()[:16]
