"""Tables of pictures with text: counts and pages of rows, by DuckDB over the Parquet files.

A page of a 600,000-row dataset costs a look at the footers and one or two row groups; never are
more images held than one page shows. Used through ``medvlm.results``.
"""

# ruff: noqa: S608  # values are bound; only column names of our own records enter an SQL text

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from medvlm.data.images import decode_image
from medvlm.errors import WorkspaceError

__all__ = ["Page", "Profile", "Source", "SourceKind", "dicts", "number", "open_source", "query", "thumbnail"]

SourceKind = Literal["figures", "samples", "pairs", "items"]
Where = Mapping[str, Sequence[str]]
"""Column → allowed values; every column is among the source's facets."""

# What each kind of table is known by, what can be chosen, and the text that a search looks through.
_KEY: dict[SourceKind, str] = {
    "figures": "figure_id",
    "samples": "sample_id",
    "pairs": "pair_id",
    "items": "item_id",
}
_FACETS: dict[SourceKind, tuple[str, ...]] = {
    "figures": ("licence", "retracted"),
    "samples": ("modality", "language", "source", "licence"),
    "pairs": ("source",),
    "items": ("split", "answer_type", "modality", "organ", "question_type", "language"),
}
_TEXT: dict[SourceKind, str] = {
    "figures": "caption",
    "samples": "array_to_string(list_transform(turns, lambda t: t.text), ' ')",
    "pairs": "concat_ws(' ', question, chosen, rejected)",
    "items": "concat_ws(' ', question, answer)",
}


@dataclass(frozen=True)
class Page:
    """Some rows of a table and how many there are in all."""

    total: int
    rows: list[dict[str, Any]]


@dataclass(frozen=True)
class Profile:
    """What the rows of a table are like."""

    facets: dict[str, pd.DataFrame]
    """Facet → ``value`` and ``rows``, the most frequent first, 200 at most."""
    lengths: pd.DataFrame
    """Histogram of text lengths: ``characters`` (lower edge of the bin), ``width`` and ``rows``."""


@dataclass(frozen=True)
class Source:
    """A table of pictures with text that can be browsed and reviewed.

    Every method raises ``WorkspaceError`` where a shard is damaged or was written by another version.
    """

    name: str
    """``figures``, a dataset's name, or ``benchmark/<name>``."""
    kind: SourceKind
    folder: Path
    rows: int
    bytes: int

    @property
    def key(self) -> str:
        """The column that identifies a row."""
        return _KEY[self.kind]

    @property
    def facets(self) -> tuple[str, ...]:
        """The columns by which rows can be chosen."""
        return _FACETS[self.kind]

    def page(self, *, where: Where | None = None, search: str = "", offset: int = 0, limit: int = 24) -> Page:
        """Rows with their images, in the order of the files.

        Args:
            where: Column → allowed values; no values allow all.
            search: Text that must occur, without regard to case.
            offset: Rows to pass over.
            limit: Rows at most.
        """
        clause, values = self._condition(where or {}, search)
        if not clause:
            # Nothing is looked for: the footers say where the rows are, and those behind the page stay closed.
            return Page(self.rows, _rows_at(_places(self.folder, offset, limit)))
        total = number(self.folder, f"SELECT count(*) FROM rows {clause}", values)
        return Page(
            total, self._whole(f"{clause} LIMIT $limit OFFSET $offset", {**values, "limit": limit, "offset": offset})
        )

    def by_id(self, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Rows with their images by id; ids that do not exist are absent."""
        rows = self._whole(f"WHERE list_contains($ids, {self.key})", {"ids": list(ids)}) if ids else []
        return {str(row[self.key]): row for row in rows}

    def ids(self, *, where: Where | None = None, seed: int = 0, limit: int = 100_000) -> list[str]:
        """The ids of rows in an order drawn with ``seed``: the same for everyone who asks with it."""
        clause, values = self._condition(where or {}, "")
        sql = f"SELECT {self.key} AS id FROM rows {clause} ORDER BY md5(concat({self.key}, $seed)), id LIMIT $limit"
        return [str(row) for row in query(self.folder, sql, {**values, "seed": str(seed), "limit": limit})["id"]]

    def profile(self, *, bins: int = 30) -> Profile:
        """How many rows each value of each facet has, and how long the texts are: one scan of the narrow columns.

        Args:
            bins: Of the histogram, before the one that the longest hundredth of the texts shares.
        """
        columns = ", ".join(f'"{column}"' for column in self.facets)
        casts = ", ".join(f'"{column}"::VARCHAR AS "{column}"' for column in self.facets)
        sql = (
            f"SELECT {columns}, n, grouping({columns}, n) AS absent, count(*) AS rows "
            f"FROM (SELECT {casts}, length({_TEXT[self.kind]}) AS n FROM rows) GROUP BY GROUPING SETS ({columns}, n)"
        )
        found: Any = query(self.folder, sql)
        names = (*self.facets, "n")
        # One bit a column, the first the highest: set where the row is not about that column.
        about = {name: (1 << len(names)) - 1 - (1 << (len(names) - 1 - place)) for place, name in enumerate(names)}
        parts: dict[str, Any] = {name: found[found["absent"] == bits][[name, "rows"]] for name, bits in about.items()}
        facets = {
            name: parts[name]
            .rename(columns={name: "value"})
            .sort_values(["rows", "value"], ascending=[False, True])
            .head(200)
            .reset_index(drop=True)
            for name in self.facets
        }
        return Profile(facets, _histogram(parts["n"], bins))

    def _condition(self, where: Where, search: str) -> tuple[str, dict[str, Any]]:
        """A WHERE clause and its bound values."""
        terms: list[str] = []
        values: dict[str, Any] = {}
        for column, allowed in where.items():
            if column not in self.facets:
                raise ValueError(f"{column!r} is not one of {self.facets}")
            if allowed:
                terms.append(f'list_contains(${column}, "{column}"::VARCHAR)')
                values[column] = list(allowed)
        if search.strip():
            terms.append(f"contains(lower({_TEXT[self.kind]}), lower($search))")
            values["search"] = search.strip()
        return ("WHERE " + " AND ".join(terms) if terms else ""), values

    def _whole(self, clause: str, values: Mapping[str, Any]) -> list[dict[str, Any]]:
        # The narrow query finds the places; only then are the few row groups with images read.
        places = query(self.folder, f"SELECT filename, file_row_number FROM rows {clause}", values)
        wanted = [
            (str(path), int(row)) for path, row in zip(places["filename"], places["file_row_number"], strict=True)
        ]
        return _rows_at(wanted)


def open_source(name: str, folder: Path) -> Source | None:
    """The table in a folder of shards; None if it has none, or not of a kind with pictures.

    Raises:
        WorkspaceError: A shard's footer is damaged.
    """
    shards = sorted(folder.glob("*.parquet"))
    if not shards:
        return None
    try:
        rows = sum(pq.read_metadata(path).num_rows for path in shards)
        columns = pq.read_schema(shards[0]).names
    except (pa.ArrowInvalid, OSError) as error:
        raise _damaged(folder, error) from error
    kind: SourceKind | None = next((kind for kind, key in _KEY.items() if key in columns), None)
    if kind is None:
        return None
    return Source(name, kind, folder, rows, sum(path.stat().st_size for path in shards))


def _histogram(lengths: Any, bins: int) -> pd.DataFrame:
    """Bins of (``n``, ``rows``) pairs; rows without a length are left out."""
    counted: Any = lengths.dropna().sort_values("n").astype("int64")
    if counted.empty:
        return pd.DataFrame(columns=["characters", "width", "rows"])
    below = counted["rows"].cumsum()
    # The longest hundredth shares the last bin: a few very long texts would flatten all others.
    most = int(counted["n"][below >= 0.99 * below.iloc[-1]].iloc[0])
    width = max(1, -(-most // bins))
    edges: Any = (counted["n"] // width).clip(upper=bins) * width
    table = counted.groupby(edges.rename("characters"))["rows"].sum().reset_index()
    return table.assign(width=width)[["characters", "width", "rows"]]


def query(where: Path | list[Path], sql: str, values: Mapping[str, Any] | None = None) -> pd.DataFrame:
    """The answer to ``sql`` over ``rows``: a shard folder, a file, or a list of files.

    ``rows`` has the files' columns and ``filename`` and ``file_row_number``.

    Raises:
        WorkspaceError: A file is damaged, or lacks a column.
    """
    files = where if isinstance(where, list) else sorted(where.glob("*.parquet")) if where.is_dir() else [where]
    relation = "read_parquet($files, filename = true, file_row_number = true, union_by_name = true)"
    bound = {**(values or {}), "files": [str(path) for path in files]}
    try:
        with duckdb.connect(config={"threads": os.cpu_count() or 1, "autoinstall_known_extensions": "false"}) as db:
            return db.execute(f"WITH rows AS (FROM {relation}) {sql}", bound).df()
    except (duckdb.IOException, duckdb.InvalidInputException, duckdb.BinderException) as error:
        raise _damaged(where if isinstance(where, Path) else files[0], error) from error


def number(where: Path, sql: str, values: Mapping[str, Any] | None = None) -> int:
    """The single whole number that ``sql`` asks for."""
    return int(next(iter(dicts(query(where, sql, values))[0].values())))


def dicts(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table as dictionaries."""
    return [{str(k): v for k, v in row.items()} for row in table.to_dict("records")]


def _damaged(where: Path, error: Exception) -> WorkspaceError:
    return WorkspaceError(
        f"the table cannot be read: {str(error).splitlines()[0]}",
        where=str(where),
        hint="restore it with 'dvc checkout', or run its step again with this version of medvlm",
    )


def _places(folder: Path, offset: int, limit: int) -> list[tuple[str, int]]:
    """File and row number of ``limit`` rows from ``offset`` on, in the order of the files."""
    found: list[tuple[str, int]] = []
    for path in sorted(folder.glob("*.parquet")):
        if len(found) == limit:
            break
        try:
            rows = pq.read_metadata(path).num_rows
        except (pa.ArrowInvalid, OSError) as error:
            raise _damaged(path, error) from error
        found += [(str(path), row) for row in range(offset, min(rows, offset + limit - len(found)))]
        offset = max(0, offset - rows)
    return found


def _rows_at(places: Sequence[tuple[str, int]]) -> list[dict[str, Any]]:
    """Whole rows, images included, by file and row number; reads only the row groups they lie in."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for path in dict.fromkeys(path for path, _ in places):
        wanted = sorted(row for other, row in places if other == path)
        try:
            with pq.ParquetFile(path) as shard:
                first = 0
                for group in range(shard.num_row_groups):
                    end = first + shard.metadata.row_group(group).num_rows
                    inside = [row for row in wanted if first <= row < end]
                    if inside:
                        rows = shard.read_row_group(group).take([row - first for row in inside]).to_pylist()
                        found.update({(path, row): value for row, value in zip(inside, rows, strict=True)})
                    first = end
        except (pa.ArrowInvalid, OSError) as error:
            raise _damaged(Path(path), error) from error
    return [found[place] for place in places]


def thumbnail(data: bytes, *, max_px: int = 448, zoom: float = 1.0, centre: tuple[float, float] = (0.5, 0.5)) -> bytes:
    """A foreign image as a JPEG that fits a square of ``max_px``.

    Args:
        data: Encoded.
        max_px: Longest side of the result.
        zoom: 2 shows half the width and half the height.
        centre: Of the part that is shown, as shares of width and height; moved in where it lies at an edge.

    Raises:
        InputError: The bytes are no image, are truncated, or hold too many pixels.
    """
    picture = decode_image(data)
    if picture.mode.startswith("I"):
        # 16-bit greys are scaled to 8 bits; a plain conversion would cut everything above 255 off.
        picture = picture.point(lambda value: value / 256).convert("L")
    if zoom > 1:
        width, height = max(1, round(picture.width / zoom)), max(1, round(picture.height / zoom))
        left = min(max(0, round(centre[0] * picture.width - width / 2)), picture.width - width)
        top = min(max(0, round(centre[1] * picture.height - height / 2)), picture.height - height)
        picture = picture.crop((left, top, left + width, top + height))
        # So that pixels can be seen as they are, a small part is drawn larger.
        scale = max_px / max(width, height)
        if scale > 1:
            picture = picture.convert("RGB").resize((max(1, round(width * scale)), max(1, round(height * scale))))
    picture = picture.convert("RGB")
    picture.thumbnail((max_px, max_px))
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=90)
    return out.getvalue()
