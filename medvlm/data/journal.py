"""What a running fetch has finished so far, in files that are only ever appended to.

A process killed at any moment leaves whole results and at most one torn
one at a journal's end, which the next run finds by its checksum and drops.
"""

from __future__ import annotations

import dataclasses
import json
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from medvlm.data.articles import RowResult
from medvlm.errors import WorkspaceError
from medvlm.records import FetchOutcome, Figure

__all__ = ["Entry", "Journal"]

_HEADER = struct.Struct("<III")
"""Length of the JSON part, length of all, CRC-32 of all."""


_OUTCOME_FIELDS = tuple(f.name for f in dataclasses.fields(FetchOutcome))
_FIGURE_FIELDS = tuple(f.name for f in dataclasses.fields(Figure) if f.name != "image")


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a result stands in its journal."""

    offset: int
    json_bytes: int
    total_bytes: int


class Journal:
    """An append-only file of row results, image bytes and all."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, result: RowResult) -> None:
        """Write one result. On failure the file is as it was before.

        Raises:
            WorkspaceError: The disk is full or read-only.
        """
        images = [figure.image.bytes for figure in result.figures]
        figures = [
            {name: getattr(figure, name) for name in _FIGURE_FIELDS}
            | {"image": {"path": figure.image.path, "bytes": len(figure.image.bytes)}}
            for figure in result.figures
        ]
        outcome = {name: getattr(result.outcome, name) for name in _OUTCOME_FIELDS}
        text = json.dumps({"outcome": outcome, "figures": figures}, ensure_ascii=False)
        # Half a surrogate pair, which JSON can escape and Parquet cannot hold, becomes a question mark.
        meta = text.encode("utf-8", "replace")
        body = b"".join((meta, *images))
        record = _HEADER.pack(len(meta), len(body), zlib.crc32(body)) + body
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                size = os.fstat(descriptor).st_size
                self._write(descriptor, record, size)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise WorkspaceError(
                f"a finished figure cannot be kept: {error.strerror}",
                where=str(self.path.parent),
                hint="free some space and run the same command again; it goes on where it stopped",
            ) from error

    @staticmethod
    def _write(descriptor: int, record: bytes, size: int) -> None:
        view = memoryview(record)
        try:
            while view:
                view = view[os.write(descriptor, view) :]
        except OSError:
            os.ftruncate(descriptor, size)
            raise

    def entries(self) -> Iterator[tuple[dict[str, Any], Entry]]:
        """Whole results in the order of writing; a torn end is cut off.

        Image bytes are checked but not kept.
        """
        good = 0
        with self.path.open("rb") as stream:
            while header := stream.read(_HEADER.size):
                if len(header) < _HEADER.size:
                    break
                json_bytes, total, checksum = _HEADER.unpack(header)
                body = stream.read(total)
                if len(body) < total or json_bytes > total or zlib.crc32(body) != checksum:
                    break
                yield json.loads(body[:json_bytes]), Entry(good + _HEADER.size, json_bytes, total)
                good += _HEADER.size + total
        if good < self.path.stat().st_size:
            os.truncate(self.path, good)

    def figures(self, entry: Entry) -> list[dict[str, Any]]:
        """The figures of one result, with their image bytes."""
        with self.path.open("rb") as stream:
            stream.seek(entry.offset)
            body = stream.read(entry.total_bytes)
        figures = cast("list[dict[str, Any]]", json.loads(body[: entry.json_bytes])["figures"])
        place = entry.json_bytes
        for row in figures:
            size = row["image"]["bytes"]
            row["image"]["bytes"] = body[place : place + size]
            place += size
        return figures
