"""The blocks of a list: which rows are done, and the shards that finished blocks become.

A list is cut into blocks of rows. Results arrive in any order and are appended to their block's
journal at once; a block whose rows are all there becomes one outcome file and its figure shards,
in the order of the list.
"""

from __future__ import annotations

import bisect
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from medvlm.data.articles import RowResult
from medvlm.data.journal import Entry, Journal
from medvlm.errors import WorkspaceError
from medvlm.records import FetchOutcome, Figure, schema_of
from medvlm.shards import ROW_GROUP_BYTES, SHARD_BYTES
from medvlm.store import atomic_path

__all__ = ["BLOCK_ROWS", "TRANSIENT", "Blocks"]

BLOCK_ROWS = 2048
"""At about 100 KB a figure, a block's shard has some 200 MB."""
TRANSIENT = frozenset({"timeout", "store_error"})
"""Statuses that another run may mend."""


class Blocks:
    """The blocks of a list: which rows are done, and the files that finished blocks become.

    Args:
        folder: Scratch folder of this list, store and policy.
        rows: Line numbers of all rows of the list, ascending.
        part: Ordinals ``[begin, end)`` of the rows that this process fetches.
        earlier: Folder of an earlier finished run on the same list, store and policy, or None.
        block_rows: Rows of a block.
    """

    def __init__(
        self,
        folder: Path,
        rows: npt.NDArray[np.int64],
        part: tuple[int, int],
        *,
        earlier: Path | None = None,
        block_rows: int = BLOCK_ROWS,
    ) -> None:
        self.folder, self.rows, self.earlier, self.block_rows = folder, rows, earlier, block_rows
        self.by_status: Counter[str] = Counter()
        self.done: npt.NDArray[np.bool_] = np.zeros(len(rows), np.bool_)
        self.kept: npt.NDArray[np.bool_] = np.zeros(len(rows), np.bool_)
        for kind in ("journal", "outcomes", "shards"):
            (folder / kind).mkdir(parents=True, exist_ok=True)
        begin, end = part
        self.numbers = range(begin // block_rows, -(-end // block_rows))
        self.left = {block: min(end, (block + 1) * block_rows) - block * block_rows for block in self.numbers}
        for block in self.numbers:
            self._recover(block)

    def _recover(self, block: int) -> None:
        finished = self._outcome_path(block)
        if finished.exists():
            self.by_status.update(pq.read_table(finished, columns=["status"])["status"].to_pylist())
            self.done[self._ordinals(block)] = True
            self.left[block] = 0
            self._journal(block).path.unlink(missing_ok=True)
        elif self._journal(block).path.exists():
            last = {value["outcome"]["row"]: value["outcome"] for value, _ in self._journal(block).entries()}
            for outcome in last.values():
                # What failed for a passing reason is tried anew; its next result counts.
                if outcome["status"] not in TRANSIENT:
                    self._count(outcome["row"], outcome["status"])

    def _count(self, row: int, status: str) -> int:
        ordinal = self.ordinal(row)
        block = ordinal // self.block_rows
        self.done[ordinal] = True
        self.left[block] -= 1
        self.by_status[status] += 1
        return block

    def ordinal(self, row: int) -> int:
        """Position of a row among the rows of the list."""
        # Without blank lines the two are the same. numpy's search lets go of the interpreter lock,
        # and the event loop would wait for it at every row.
        if row < len(self.rows) and self._line(row) == row:
            return row
        return bisect.bisect_left(self.rows, row)

    def _line(self, ordinal: int) -> int:
        return int(self.rows[ordinal])

    def is_done(self, row: int) -> bool:
        """Whether a row has its result already."""
        return bool(self.done[self.ordinal(row)])

    def add(self, result: RowResult) -> int | None:
        """Keep a result; the number of its block if it was the last one missing there.

        Raises:
            WorkspaceError: The disk is full or read-only.
        """
        block = self.ordinal(result.outcome.row) // self.block_rows
        self._journal(block).append(result)
        self._count(result.outcome.row, result.outcome.status)
        return None if self.left[block] else block

    def keep(self, row: int, status: str) -> int | None:
        """Take a row's result over from the earlier run; returns as ``add``."""
        self.kept[self.ordinal(row)] = True
        block = self._count(row, status)
        return None if self.left[block] else block

    def unfinished(self) -> list[int]:
        """Blocks whose rows are all there but whose files are not yet written."""
        return [block for block in self.numbers if not self.left[block] and not self._outcome_path(block).exists()]

    def _ordinals(self, block: int) -> slice:
        return slice(block * self.block_rows, min((block + 1) * self.block_rows, len(self.rows)))

    def _outcome_path(self, block: int, root: Path | None = None) -> Path:
        return (root or self.folder) / "outcomes" / f"part-{block:05d}.parquet"

    def _journal(self, block: int) -> Journal:
        return Journal(self.folder / "journal" / f"{block:05d}.journal")

    def finish(self, block: int) -> None:
        """Write a block's figure shards, then its outcomes, which mark it as finished.

        Raises:
            WorkspaceError: The disk is full or read-only; the journal is then still there.
        """
        try:
            self._finish(block)
        except OSError as error:
            raise WorkspaceError(
                f"a shard cannot be written: {error.strerror or error}",
                where=str(self.folder),
                hint="free some space and run the same command again; it goes on where it stopped",
            ) from error

    def _finish(self, block: int) -> None:
        if self.earlier is not None and self.kept[self._ordinals(block)].all():
            self._link(block, self.earlier)
            return
        journal = self._journal(block)
        entries: dict[int, tuple[dict[str, Any], Entry]] = {}
        if journal.path.exists():
            entries = {value["outcome"]["row"]: (value["outcome"], entry) for value, entry in journal.entries()}
        earlier = self._earlier_outcomes(block)
        rows = [int(row) for row in self.rows[self._ordinals(block)]]
        outcomes = [entries[row][0] if row in entries else earlier[row] for row in rows]
        self._write_shards(block, self._figures(block, journal, entries, list(earlier.values())))
        with atomic_path(self._outcome_path(block)) as temporary:
            schema = schema_of(FetchOutcome)
            pq.write_table(pa.Table.from_pylist(outcomes, schema=schema), temporary, compression="zstd")
        journal.path.unlink(missing_ok=True)

    def _link(self, block: int, earlier: Path) -> None:
        """Take over the files of a block in which nothing has changed, without copying where that is possible."""
        for old in (
            *sorted((earlier / "shards").glob(f"part-{block:05d}-*.parquet")),
            self._outcome_path(block, earlier),
        ):
            new = self.folder / old.parent.name / old.name
            new.unlink(missing_ok=True)
            try:
                os.link(old, new)
            except OSError:
                shutil.copyfile(old, new)

    def _earlier_outcomes(self, block: int) -> dict[int, dict[str, Any]]:
        if self.earlier is None or not self.kept[self._ordinals(block)].any():
            return {}
        table = pq.read_table(self._outcome_path(block, self.earlier), schema=schema_of(FetchOutcome))
        return {row["row"]: row for row in table.to_pylist()}

    def _figures(
        self,
        block: int,
        journal: Journal,
        entries: dict[int, tuple[dict[str, Any], Entry]],
        earlier: list[dict[str, Any]],
    ) -> Iterator[dict[str, Any]]:
        """Figures of a block in the order of the list, new ones and kept ones."""
        kept = _earlier_figures(self.earlier, block) if earlier and self.earlier else iter(())
        if not earlier:
            for row in sorted(entries):
                yield from journal.figures(entries[row][1])
            return
        for outcome in earlier:
            old = [next(kept) for _ in range(outcome["figures"])]
            yield from journal.figures(entries[outcome["row"]][1]) if outcome["row"] in entries else old

    def _write_shards(self, block: int, figures: Iterator[dict[str, Any]]) -> None:
        """Write a block's shards. Until its outcomes are there too, nobody reads them."""
        schema = schema_of(Figure)
        for old in (self.folder / "shards").glob(f"part-{block:05d}-*.parquet"):
            old.unlink()
        writer: pq.ParquetWriter | None = None
        index, room = 0, 0
        with ExitStack() as shard:
            for group in _row_groups(figures):
                if writer is None or room <= 0:
                    shard.close()
                    path = self.folder / "shards" / f"part-{block:05d}-{index:03d}.parquet"
                    writer = shard.enter_context(pq.ParquetWriter(path, schema, compression="zstd"))
                    index, room = index + 1, SHARD_BYTES - ROW_GROUP_BYTES
                writer.write_table(pa.Table.from_pylist(group, schema=schema))
                room -= sum(len(row["image"]["bytes"]) for row in group)


def _row_groups(figures: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    group: list[dict[str, Any]] = []
    size = 0
    for row in figures:
        group.append(row)
        size += len(row["image"]["bytes"])
        if size >= ROW_GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _earlier_figures(folder: Path, block: int) -> Iterator[dict[str, Any]]:
    for path in sorted((folder / "shards").glob(f"part-{block:05d}-*.parquet")):
        with pq.ParquetFile(path) as shard:
            for batch in shard.iter_batches(batch_size=64):
                yield from batch.to_pylist()
