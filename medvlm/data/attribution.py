"""Credit where the figures go: one line a figure, and the notice that PMC asks for."""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from medvlm.store import atomic_path, shard_paths

__all__ = ["ATTRIBUTION_COLUMNS", "LICENCE_URLS", "attribution_rows", "write_attribution"]

ATTRIBUTION_COLUMNS = (
    "figure_id", "pmcid", "version", "file", "article_title", "citation", "licence", "licence_url", "source_url",
    "stored_sha256",
)  # fmt: skip
LICENCE_URLS = {
    "CC0": "https://creativecommons.org/publicdomain/zero/1.0/",
    "CC BY": "https://creativecommons.org/licenses/by/4.0/",
    "CC BY-SA": "https://creativecommons.org/licenses/by-sa/4.0/",
    "CC BY-ND": "https://creativecommons.org/licenses/by-nd/4.0/",
    "CC BY-NC": "https://creativecommons.org/licenses/by-nc/4.0/",
    "CC BY-NC-SA": "https://creativecommons.org/licenses/by-nc-sa/4.0/",
    "CC BY-NC-ND": "https://creativecommons.org/licenses/by-nc-nd/4.0/",
}
"""PMC's metadata names no licence version; the article's own page does."""
NOTICE = """\
Figures and captions from the PubMed Central (PMC) Article Datasets of the National Library of
Medicine (NLM), National Center for Biotechnology Information, https://registry.opendata.aws/ncbi-pmc.
NLM is the source and endorses nothing made from it. Each figure belongs to its authors and is under
the licence given for it in ATTRIBUTION.csv; images may have been resized or converted. Retractions
and licence changes after the fetch are found with 'medvlm recheck'; without it this data may not be
current. Research use only, not for clinical use.
"""


def attribution_rows(shards: Path, *, figure_ids: Collection[str] | None = None) -> Iterator[dict[str, Any]]:
    """Attribution of the figures in a folder of shards, in their order.

    Args:
        shards: Folder of ``Figure`` shards.
        figure_ids: Only these; all if None.
    """
    names = ["figure_id", "pmcid", "version", "key", "article_title", "citation", "licence", "source_url", "sha256"]
    for path in shard_paths(shards):
        for row in pq.read_table(path, columns=names).to_pylist():
            if figure_ids is None or row["figure_id"] in figure_ids:
                row["file"] = row.pop("key").rsplit("/", 1)[-1]
                row["stored_sha256"] = row.pop("sha256")
                row["licence_url"] = LICENCE_URLS.get(row["licence"], "")
                yield row


def write_attribution(shards: Path, folder: Path, *, figure_ids: Collection[str] | None = None) -> int:
    """Write ``ATTRIBUTION.csv`` and ``NOTICE.txt`` for what leaves the house.

    Args:
        shards: Folder of ``Figure`` shards.
        folder: Where the two files go.
        figure_ids: The figures that are exported; all if None.

    Returns:
        The number of figures credited.

    Raises:
        WorkspaceError: The fetch has not run, or the disk is full or read-only.
    """
    count = 0
    with (
        atomic_path(folder / "ATTRIBUTION.csv") as temporary,
        temporary.open("w", encoding="utf-8", newline="") as stream,
    ):
        writer = csv.DictWriter(stream, ATTRIBUTION_COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in attribution_rows(shards, figure_ids=figure_ids):
            writer.writerow({name: _harmless(row[name]) for name in ATTRIBUTION_COLUMNS})
            count += 1
        stream.flush()
    with atomic_path(folder / "NOTICE.txt") as temporary:
        temporary.write_text(NOTICE, "utf-8")
    return count


def _harmless(value: Any) -> Any:
    """A cell that no spreadsheet takes for a formula: titles and citations are foreign text."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value
