"""Leakage: which test items of a benchmark are touched by which training set, and how.

Five ways are looked at. ``bytes`` and ``image_id`` mean that the very image was trained on: such an
item is *leaked*, and what is left is the clean slice. ``phash`` is a picture within a few bits of the
perceptual hash, ``case_id`` another picture of the same article or patient, and ``question`` the
same words asked of some image: these are reported beside it, since each can be right by chance. In
SLAKE, pairs of different images within 4 bits correlate with a median of 0.96: neighbouring slices.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow.parquet as pq

from medvlm.data.card import renew_cards
from medvlm.data.hamming import nearest_within, parse_hashes
from medvlm.data.traces import Traces, read_release, split_traces, training_sets, workspace_benchmarks
from medvlm.errors import InputError, WorkspaceError
from medvlm.store import Report, Workspace, fingerprint, shard_paths, write_records, write_report

__all__ = [
    "NEAR_RADIUS",
    "SAME_IMAGE",
    "Comparison",
    "ImagesUnderTest",
    "LeakedItem",
    "Way",
    "compare",
    "compare_releases",
    "compare_workspace",
    "leaked_images",
    "leaked_item_ids",
]

Way = Literal["bytes", "image_id", "case_id", "phash", "question"]
SAME_IMAGE: tuple[Way, ...] = ("bytes", "image_id")
"""The ways that make an item leaked: its very image was trained on."""
NEAR_RADIUS = 4
"""Bits of the 64-bit perceptual hash within which a picture counts as near."""
EXAMPLES = 10


@dataclass(frozen=True, slots=True)
class LeakedItem:
    """One way in which one training set touches one test item."""

    benchmark: str
    item_id: str
    image_id: str
    training_set: str
    """``alignment``, ``instruct``, ``preference/<recipe>``, or ``<benchmark>:<split>``."""
    way: Way
    example: str
    """Id of a training row that touches it."""
    distance: int | None
    """Differing bits, for ``phash``."""


@dataclass(frozen=True)
class Comparison:
    """What one training set shares with one benchmark's test items."""

    train: str
    test: str
    train_images: int
    test_images: int
    leaked_images: int
    """Test images whose very bytes, or whose image id, are in the training set."""
    near_images: int
    """Further test images within the radius of a training image's perceptual hash."""
    test_items: int
    leaked_items: int
    clean_items: int
    ways: dict[str, dict[str, int]]
    """For each way the test images and items that it touches."""
    radius: int
    examples: list[str]
    """The first leaked test images."""


def compare(train: Traces, test: Traces, *, radius: int = NEAR_RADIUS) -> tuple[Comparison, list[LeakedItem]]:
    """What of a test set is in a training set.

    Args:
        train: The training set.
        test: The benchmark's test items.
        radius: Bits of the perceptual hash.

    Returns:
        The counts, and a row for each test item and way.

    Raises:
        InputError: A hash is not 16 hex digits.
    """
    benchmark = test.name.split(":")[0]
    touched: list[LeakedItem] = []

    def add(place: int, way: Way, example: str, distance: int | None = None) -> None:
        touched.append(
            LeakedItem(benchmark, test.row_id[place], test.image_id[place], train.name, way, example, distance)
        )

    keyed: list[tuple[Way, Sequence[str], Sequence[str]]] = [("bytes", train.sha256, test.sha256)]
    if train.family == test.family:
        keyed.append(("image_id", train.image_id, test.image_id))
    keyed.append(("case_id", train.case_id, test.case_id))
    for way, ours, theirs in keyed:
        first: dict[str, str] = {}
        for key, row_id in zip(ours, train.row_id, strict=True):
            first.setdefault(key, row_id)
        for place, key in enumerate(theirs):
            if key and key in first:
                add(place, way, first[key])
    for place, example, distance in _near(train, test, radius):
        add(place, "phash", example, distance)
    for place, question in enumerate(test.question):
        if question in train.asked:
            add(place, "question", train.asked[question])
    return _count(train, test, touched, radius), touched


def _near(train: Traces, test: Traces, radius: int) -> list[tuple[int, str, int]]:
    """Test rows within the radius: position, a training row, bits."""
    try:
        hashes, queries = parse_hashes(train.phash), parse_hashes(test.phash)
    except ValueError as error:
        raise InputError(str(error), where=f"{train.name} or {test.name}", hint="build the set again") from error
    nearest = nearest_within(hashes, queries, radius)
    return [
        (int(place), train.row_id[int(nearest.index[place])], int(nearest.distance[place]))
        for place in np.flatnonzero(nearest.count)
    ]


def _count(train: Traces, test: Traces, touched: Sequence[LeakedItem], radius: int) -> Comparison:
    image_of = dict(zip(test.row_id, test.sha256, strict=True))
    items: dict[str, set[str]] = {way: set() for way in ("bytes", "image_id", "case_id", "phash", "question")}
    for row in touched:
        items[row.way].add(row.item_id)
    leaked = items["bytes"] | items["image_id"]
    leaked_images = {image_of[item] for item in leaked}
    near_images = {image_of[item] for item in items["phash"]} - leaked_images
    examples = sorted({row.image_id for row in touched if row.way in SAME_IMAGE})[:EXAMPLES]
    return Comparison(
        train=train.name,
        test=test.name,
        train_images=train.images,
        test_images=test.images,
        leaked_images=len(leaked_images),
        near_images=len(near_images),
        test_items=len(test),
        leaked_items=len(leaked),
        clean_items=len(test) - len(leaked),
        ways={way: {"images": len({image_of[i] for i in ids}), "items": len(ids)} for way, ids in items.items()},
        radius=radius,
        examples=examples,
    )


def compare_releases(train: str, test: str, root: Path, *, radius: int = NEAR_RADIUS) -> Comparison:
    """Compare two splits of official releases, image by image.

    Args:
        train: ``<benchmark>:<split>`` or ``<benchmark>:<split>:<language>``, such as ``slake:train:en``.
        test: Likewise.
        root: The release's folder, or one with a sub-folder for each release.
        radius: Bits of the perceptual hash.

    Raises:
        InputError: No such benchmark, split or language, or the release is not complete.
    """
    return compare(read_release(train, root), read_release(test, root), radius=radius)[0]


def compare_workspace(workspace: Workspace, *, radius: int = NEAR_RADIUS) -> Report:
    """Compare every training set of a workspace with every benchmark's test items.

    Training sets are ``alignment``, ``instruct`` and each recipe's preference pairs where they exist,
    and each benchmark's train split. Writes ``LeakedItem`` records and ``report.json`` to the step folder,
    and what was found into the cards of all sets.

    Returns:
        The report; ``details["comparisons"]`` holds one ``Comparison`` for each pair.

    Raises:
        WorkspaceError: There is no benchmark, or no training set.
    """
    started = time.monotonic()
    names = workspace_benchmarks(workspace)
    tests = [split_traces(workspace, name, "test") for name in names]
    comparisons: list[Comparison] = []
    touched: list[LeakedItem] = []
    for train in training_sets(workspace):
        for test in tests:
            comparison, rows = compare(train, test, radius=radius)
            comparisons.append(comparison)
            touched += rows
    if not comparisons:
        raise WorkspaceError(
            "the workspace holds no training set", where=str(workspace.root), hint="run 'medvlm dataset build' first"
        )
    touched.sort(key=lambda row: (row.benchmark, row.item_id, row.training_set, row.way))
    write_records(workspace.leaked_items, LeakedItem, touched)
    leaked = {(row.benchmark, row.item_id) for row in touched if row.way in SAME_IMAGE}
    report = Report(
        step="leakage",
        counts={
            "test_items": sum(len(test) for test in tests),
            "leaked_items": len(leaked),
            "touched_items": len({(row.benchmark, row.item_id) for row in touched}),
            "comparisons": len(comparisons),
        },
        details={"comparisons": [asdict(comparison) for comparison in comparisons]},
        fingerprint=fingerprint(*shard_paths(workspace.leaked_items)),
    )
    report = write_report(workspace.leakage, report, started=started, packages=("numpy", "duckdb"))
    sets = {name.split(":")[0] for row in comparisons for name in (row.train, row.test)}
    renew_cards(workspace, sorted(sets))
    return report


def leaked_item_ids(
    workspace: Workspace, benchmark: str, *, ways: Sequence[Way] = SAME_IMAGE, radius: int = NEAR_RADIUS
) -> dict[str, set[str]]:
    """Test items of a benchmark that each training set touches; the rest is its clean slice.

    Computed from the workspace as it is now, so that it is never older than the data.

    Args:
        workspace: With the benchmark's items.
        benchmark: Its name.
        ways: Which ways count; the very image by default.
        radius: Bits, where ``phash`` counts.

    Returns:
        Training set → item ids, a possibly empty set for each training set that exists.

    Raises:
        WorkspaceError: The benchmark has not been built.
    """
    test = split_traces(workspace, benchmark, "test")
    return {
        train.name: {row.item_id for row in compare(train, test, radius=radius)[1] if row.way in ways}
        for train in training_sets(workspace)
    }


class ImagesUnderTest:
    """The test images of a workspace's benchmarks, by bytes and by look: what builders of training sets drop.

    Args:
        workspace: With or without benchmarks.
        radius: Bits of the perceptual hash within which a picture is the same to the eye.
    """

    def __init__(self, workspace: Workspace, *, radius: int = NEAR_RADIUS) -> None:
        self._radius = radius
        self._benchmark_of: dict[str, str] = {}
        by_hash: dict[str, str] = {}
        for name in workspace_benchmarks(workspace, none_is_fine=True):
            traces = split_traces(workspace, name, "test")
            for sha256, phash in zip(traces.sha256, traces.phash, strict=True):
                self._benchmark_of.setdefault(sha256, name)
                by_hash.setdefault(phash, name)
        self._hashes = parse_hashes(list(by_hash))
        self._names = list(by_hash.values())

    def touched(self, sha256: str, phash: str) -> tuple[str, Literal["leaked", "leaked_near"]] | None:
        """A benchmark that tests with the image, or with one that looks like it, and which of both; else None.

        Raises:
            InputError: The hash is not 16 hex digits.
        """
        if sha256 in self._benchmark_of:
            return self._benchmark_of[sha256], "leaked"
        if not self._names:
            return None
        try:
            (value,) = parse_hashes([phash])
        except ValueError as error:
            raise InputError(str(error), where=f"image {sha256[:16]}…", hint="build the set again") from error
        distances = np.bitwise_count(self._hashes ^ value)
        nearest = int(distances.argmin())
        return (self._names[nearest], "leaked_near") if distances[nearest] <= self._radius else None


def leaked_images(workspace: Workspace, folders: Sequence[Path], *, radius: int = NEAR_RADIUS) -> frozenset[str]:
    """SHA-256 of the images in some shards that a benchmark of the workspace tests with, by bytes or by look.

    Raises:
        WorkspaceError: A step has not run.
    """
    tested = ImagesUnderTest(workspace, radius=radius)
    images: set[tuple[str, str]] = set()
    for path in (path for folder in folders for path in shard_paths(folder)):
        table = pq.read_table(path, columns=["image_sha256", "image_phash"])
        images.update(zip(*(table[name].to_pylist() for name in table.column_names), strict=True))
    return frozenset(sha256 for sha256, phash in images if tested.touched(sha256, phash))
