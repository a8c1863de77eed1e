"""Records as Parquet shards: written whole or not at all, read one row group at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from medvlm.atomic import atomic_folder
from medvlm.errors import WorkspaceError
from medvlm.records import from_row, schema_of, to_row

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

__all__ = ["iterate_records", "read_records", "shard_errors", "shard_paths", "write_records"]

T = TypeVar("T")

ROW_GROUP_BYTES = 16 * 2**20
"""Row groups of about 16 MB keep a look-up by id at milliseconds (measured, see benchmarks)."""
SHARD_BYTES = 256 * 2**20


def write_records(folder: Path, kind: type[T], records: Iterable[T], *, shard_bytes: int = SHARD_BYTES) -> int:
    """Write records as zstd Parquet shards ``part-00000.parquet``, … and replace ``folder`` whole.

    Args:
        folder: Takes its place only after the last record was written.
        kind: The record type; its schema is used even when there are no records.
        records: Consumed once, in order. Memory stays near one row group.
        shard_bytes: A new shard begins after about this many bytes.

    Returns:
        The number of records written.

    Raises:
        WorkspaceError: The disk is full or read-only; the old content is then still in place.
    """
    import pyarrow as pa  # a quarter of a second that whoever only asks for a path shall not pay

    schema = schema_of(kind)
    count = 0
    with atomic_folder(folder) as temporary, ExitStack() as open_shard:
        shards, room = 0, 0
        writer: pq.ParquetWriter | None = None
        for rows in _row_groups(records):
            if writer is None or room <= 0:
                open_shard.close()
                writer = open_shard.enter_context(_shard_writer(temporary, shards, schema))
                shards, room = shards + 1, shard_bytes
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
            count += len(rows)
            room -= sum(_row_bytes(row) for row in rows)
        if writer is None:
            # No records is a result too: readers find an empty table with the right columns.
            open_shard.enter_context(_shard_writer(temporary, 0, schema))
    return count


def _shard_writer(folder: Path, index: int, schema: pa.Schema) -> pq.ParquetWriter:
    import pyarrow.parquet as pq

    # With checksums a bit that flips on the disk is an error, not another caption.
    path = folder / f"part-{index:05d}.parquet"
    return pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True)


def _row_groups(records: Iterable[Any]) -> Iterator[list[dict[str, Any]]]:
    group: list[dict[str, Any]] = []
    size = 0
    for record in records:
        row = to_row(record)
        group.append(row)
        size += _row_bytes(row)
        if size >= ROW_GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _row_bytes(row: dict[str, Any]) -> int:
    image = row.get("image")
    return 256 + (len(image["bytes"]) if image else 0)


def shard_paths(folder: Path) -> list[Path]:
    """The Parquet shards of a step, in order; half-written ones have other names.

    Raises:
        WorkspaceError: The step has not run yet.
    """
    if not folder.is_dir():
        raise WorkspaceError(
            "this step has no output yet",
            where=str(folder),
            hint="run the step that makes it first: 'dvc repro' runs all that is missing",
        )
    return sorted(folder.glob("*.parquet"))


@contextmanager
def shard_errors(path: Path) -> Generator[None]:
    """Say in our words that a shard is damaged.

    Raises:
        WorkspaceError: What ran inside could not read it.
    """
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowInvalid, OSError) as error:
        raise WorkspaceError(
            f"the shard cannot be read: {error}",
            where=str(path),
            hint="delete it, then restore it with 'dvc checkout' or 'dvc pull', or make it anew with 'dvc repro'",
        ) from error


def iterate_records(folder: Path, kind: type[T]) -> Iterator[T]:
    """Records of a step's shards, in order, with about one row group in memory.

    Raises:
        WorkspaceError: The step has not run yet, or a shard is damaged.
    """
    import pyarrow.parquet as pq

    names = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for path in shard_paths(folder):
        with shard_errors(path), pq.ParquetFile(path, page_checksum_verification=True) as shard:
            for batch in shard.iter_batches(batch_size=512, columns=names):
                for row in batch.to_pylist():
                    yield from_row(kind, row)


def read_records(folder: Path, kind: type[T]) -> list[T]:
    """All records of a step's shards. For what fits in memory; else ``iterate_records``.

    Raises:
        WorkspaceError: The step has not run yet, or a shard is damaged.
    """
    return list(iterate_records(folder, kind))
