"""Pictures that may name somebody: those with text-like regions in their corners, as rows for review.

A flag drops nothing. Published figures often carry harmless text (a side marker, a panel's letter,
the name of the archive); whether a text identifies somebody is for people to say.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from medvlm.data.corner_text import TextRegion, text_in_corners
from medvlm.data.dicom import deidentify, read_dicom
from medvlm.data.images import decode_image
from medvlm.errors import InputError, WorkspaceError
from medvlm.progress import report_progress
from medvlm.shards import shard_errors
from medvlm.store import Report, Workspace, atomic_path, fingerprint, shard_paths, write_records, write_report

__all__ = ["PrivacyFlag", "deidentify_files", "flag_pictures"]

BATCH_ROWS = 128


@dataclass(frozen=True, slots=True)
class PrivacyFlag:
    """A picture to look at before it is trained on or shown."""

    table: str
    """``figures`` or ``benchmarks/<name>``."""
    row_id: str
    """The first row of the table with this picture."""
    image_sha256: str
    reason: str
    """``text_in_corner``, or ``undecodable`` where nothing could be seen."""
    corner: str
    letters: int
    """Letter-like blobs in the longest line of that corner."""
    left: int
    top: int
    right: int
    bottom: int
    """The line's box in pixels of the picture."""


def flag_pictures(workspace: Workspace) -> Report:
    """Look at every picture of the figures and benchmarks, each distinct one of a table once.

    Writes ``PrivacyFlag`` records and ``report.json`` to the step folder.

    Returns:
        The report: pictures and flagged pictures, in all and by table.

    Raises:
        WorkspaceError: There is nothing to look at, or a shard is damaged.
    """
    started = time.monotonic()
    folders = {"figures": workspace.figure_shards} if workspace.figure_shards.is_dir() else {}
    root = workspace.benchmark("x").parent
    for path in sorted(root.glob("*/items")):
        if not path.parent.name.startswith("."):
            folders[f"benchmarks/{path.parent.name}"] = path
    if not folders:
        raise WorkspaceError(
            "the workspace holds no figures and no benchmarks", where=str(workspace.root), hint="run 'medvlm fetch'"
        )
    flags: list[PrivacyFlag] = []
    by_table: dict[str, dict[str, int]] = {}
    for table, folder in folders.items():
        pictures, found = _look(table, folder)
        flags += found
        by_table[table] = {"pictures": pictures, "flagged": len({flag.image_sha256 for flag in found})}
    write_records(workspace.privacy_flags, PrivacyFlag, flags)
    report = Report(
        step="privacy",
        counts={name: sum(row[name] for row in by_table.values()) for name in ("pictures", "flagged")},
        details={"tables": by_table},
        fingerprint=fingerprint(*shard_paths(workspace.privacy_flags)),
    )
    return write_report(workspace.privacy, report, started=started, packages=("pillow", "scipy"))


def _look(table: str, folder: Path) -> tuple[int, list[PrivacyFlag]]:
    """Number of distinct pictures of a table, and the flags of those that look like they hold text."""
    flags: list[PrivacyFlag] = []
    seen: set[str] = set()
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for batch in _pictures(folder, "figure_id" if table == "figures" else "item_id", seen):
            for (row_id, sha256, _), found in zip(
                batch, pool.map(_regions, [data for _, _, data in batch]), strict=True
            ):
                flags += _flags(table, row_id, sha256, found)
            report_progress({"table": table, "done": len(seen), "flagged": len(flags)})
    return len(seen), flags


def _pictures(folder: Path, id_column: str, seen: set[str]) -> Iterator[list[tuple[str, str, bytes]]]:
    """Row id, SHA-256 and bytes of pictures that were not seen before, one batch in memory."""
    for path in shard_paths(folder):
        sha_column = "sha256" if id_column == "figure_id" else "image_sha256"
        with shard_errors(path), pq.ParquetFile(path) as shard:
            for batch in shard.iter_batches(BATCH_ROWS, columns=[id_column, sha_column, "image"]):
                new: list[tuple[str, str, bytes]] = []
                for row in batch.to_pylist():
                    if row[sha_column] not in seen:
                        seen.add(row[sha_column])
                        new.append((row[id_column], row[sha_column], row["image"]["bytes"]))
                yield new


def _regions(data: bytes) -> list[TextRegion] | None:
    """Text-like corners of an encoded picture; None if it does not decode."""
    try:
        return text_in_corners(decode_image(data))
    except InputError:
        return None


def _flags(table: str, row_id: str, sha256: str, regions: list[TextRegion] | None) -> list[PrivacyFlag]:
    if regions is None:
        return [PrivacyFlag(table, row_id, sha256, "undecodable", "", 0, 0, 0, 0, 0)]
    return [
        PrivacyFlag(table, row_id, sha256, "text_in_corner", region.corner, region.letters, *region.box)
        for region in regions
    ]


def deidentify_files(source: Path, target: Path) -> dict[str, list[str]]:
    """Write de-identified copies of DICOM files; their names are numbers, since file names name people too.

    Args:
        source: A DICOM file, or a folder searched for ``*.dcm`` files.
        target: Folder for ``00000.dcm``, ``00001.dcm``, … in the order of the source names.

    Returns:
        Name of each written file → the tags that were dropped.

    Raises:
        InputError: There is no file, or one is not DICOM or has text burned in. No file is written then.
        WorkspaceError: The target cannot be written.
    """
    paths = [source] if source.is_file() else sorted(source.rglob("*.dcm"))
    if not paths:
        raise InputError("there is no DICOM file", where=str(source), hint="give a .dcm file, or a folder with some")
    # All are read before the first is written, so that a refused file leaves no half-done folder.
    for path in paths:
        deidentify(read_dicom(path))
    dropped: dict[str, list[str]] = {}
    for index, path in enumerate(paths):
        safe = deidentify(read_dicom(path))
        name = f"{index:05d}.dcm"
        with atomic_path(target / name) as temporary:
            safe.dataset.save_as(temporary, enforce_file_format=True)
        dropped[name] = list(safe.dropped)
    return dropped
