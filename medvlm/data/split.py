"""Splits that never cut through an article or an image."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow.parquet as pq

from medvlm.errors import InputError
from medvlm.records import Split
from medvlm.store import Report, Workspace, fingerprint, shard_paths, write_records, write_report

__all__ = ["SplitRow", "split_dataset", "split_rows"]


def split_rows(
    rows: Iterable[tuple[str, str, str]], *, validation: float, test: float = 0.0, seed: int = 0
) -> dict[str, Split]:
    """A split for each row, the same for all rows that share an article or an image.

    Rows are linked by either, over any number of steps: a figure that two articles print keeps both
    articles together. Which split a linked set gets depends on the seed and on its own ids alone, so
    that new rows do not move old ones, unless they link them.

    Args:
        rows: (row id, group id, SHA-256 of the image).
        validation: Share of the linked sets, 0 to 1; of the rows only on average.
        test: Share of the linked sets.
        seed: Decides which sets go where.

    Returns:
        Row id → split.

    Raises:
        InputError: The shares are negative or exceed 1 together.
    """
    if validation < 0 or test < 0 or validation + test > 1:
        raise InputError(
            f"validation {validation} and test {test} are no shares of one whole",
            where="--validation, --test",
            hint="give shares from 0 to 1 that add up to at most 1",
        )
    parent: dict[str, str] = {}
    listed = [(row_id, f"group {group}", f"image {sha256}") for row_id, group, sha256 in rows]
    for _, group, image in listed:
        first, second = _root(parent, group), _root(parent, image)
        # The smaller name is the root, whatever the order of the rows.
        parent[max(first, second)] = min(first, second)
    return {row_id: _split(_root(parent, group), validation, test, seed) for row_id, group, _ in listed}


def _root(parent: dict[str, str], name: str) -> str:
    root = parent.setdefault(name, name)
    while parent[root] != root:
        root = parent[root]
    while parent[name] != root:
        parent[name], name = root, parent[name]
    return root


def _split(root: str, validation: float, test: float, seed: int) -> Split:
    place = int.from_bytes(hashlib.sha256(f"{seed}\0{root}".encode()).digest()[:8], "big") / 2**64
    if place < test:
        return "test"
    return "validation" if place < test + validation else "train"


@dataclass(frozen=True, slots=True)
class SplitRow:
    """The split of one sample."""

    sample_id: str
    split: Split


def split_dataset(workspace: Workspace, name: str, *, validation: float, test: float = 0.0, seed: int = 0) -> Report:
    """Write ``splits/`` beside the samples of a dataset: one ``SplitRow`` for each sample, in their order.

    Args:
        workspace: Holds the dataset.
        name: ``alignment``, ``instruct`` or ``preference/<recipe>``.
        validation: Share of articles, as in ``split_rows``.
        test: Share of articles.
        seed: Decides which articles go where.

    Raises:
        InputError: The shares are no shares.
        WorkspaceError: The dataset has not been built.
    """
    started = time.monotonic()
    key = "pair_id" if name.startswith("preference/") else "sample_id"
    listed: list[tuple[str, str, str]] = []
    for path in shard_paths(workspace.samples(name)):
        table = pq.read_table(path, columns=[key, "group_id", "image_sha256"])
        listed += zip(*(table[column].to_pylist() for column in table.column_names), strict=True)
    splits = split_rows(listed, validation=validation, test=test, seed=seed)
    folder = workspace.dataset(name) / "splits"
    write_records(folder, SplitRow, (SplitRow(row_id, splits[row_id]) for row_id, _, _ in listed))
    counts = Counter(splits.values())
    report = Report(
        step=f"split {name}",
        counts={"samples": len(listed), **{split: counts[split] for split in sorted(counts)}},
        metrics={"validation_share": validation, "test_share": test},
        seed=seed,
        fingerprint=fingerprint(*shard_paths(folder)),
    )
    return write_report(folder, report, started=started)
