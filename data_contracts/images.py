"""Picture checks: is each one there, the one it says it is, and decodable to its last pixel?"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from data_contracts.contract import ImageRules
from data_contracts.result import Broken, Check
from medvlm.data.images import decode_image
from medvlm.errors import InputError

__all__ = ["check_images"]

EVERY_IMAGE_UP_TO = 10_000
"""Rows up to which every picture is decoded: about a minute of figures on two cores."""
SAMPLED_IMAGES = 2_000
"""Above, at least this many are decoded, in whole row groups chosen by the seed."""
BATCH_ROWS = 256


@dataclass(frozen=True)
class _Picture:
    """A row's picture, and what the row says about it."""

    row_id: str
    image: bytes
    path: str
    stated_sha256: str
    stated_size: tuple[int, int] | None
    sha256: str


_Decoded = tuple[int, int] | str
"""Width and height, or why it does not decode."""


def check_images(shards: Sequence[Path], rules: ImageRules, *, seed: int, label: str = "") -> list[Check]:
    """Decode the pictures of a table's shards, each distinct one once.

    Args:
        shards: Parquet files with an ``image`` column of bytes and path.
        rules: Which columns say what about the picture.
        seed: Chooses the row groups where there are too many pictures for all of them.
        label: Stands before row ids and check names; empty or ending in a separator.
    """
    groups = _row_groups(shards)
    chosen = _choose(groups, seed)
    decoded: dict[str, _Decoded] = {}
    broken: dict[str, list[Broken]] = {name: [] for name in _TEXTS if name != "image_size" or rules.size_columns}
    looked = 0
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        for batch in _batches(chosen, rules, label):
            looked += len(batch)
            _decode_new(batch, decoded, pool)
            for picture in batch:
                _judge(picture, decoded, broken)
    total = sum(rows for _, _, rows in groups)
    return [_verdict(name, rows, looked, total, rules) for name, rows in broken.items()]


_TEXTS = {
    "image_present": "the picture is there",
    "image_decodable": "the picture decodes to its last pixel",
    "image_is_the_one_named": "the picture's bytes have the SHA-256 that the row states",
    "image_size": "the picture has the width and height that the row states",
}


def _row_groups(shards: Sequence[Path]) -> list[tuple[Path, int, int]]:
    """Shard, number and rows of every row group, in order."""
    groups: list[tuple[Path, int, int]] = []
    for path in shards:
        with pq.ParquetFile(path) as shard:
            groups += [(path, i, shard.metadata.row_group(i).num_rows) for i in range(shard.num_row_groups)]
    return groups


def _choose(groups: list[tuple[Path, int, int]], seed: int) -> list[tuple[Path, int, int]]:
    if sum(rows for _, _, rows in groups) <= EVERY_IMAGE_UP_TO:
        return groups
    order = list(range(len(groups)))
    random.Random(seed).shuffle(order)  # noqa: S311  # a sample, not a secret
    chosen: list[int] = []
    rows = 0
    for index in order:
        if rows >= SAMPLED_IMAGES:
            break
        chosen.append(index)
        rows += groups[index][2]
    return [groups[index] for index in sorted(chosen)]


def _batches(groups: list[tuple[Path, int, int]], rules: ImageRules, label: str) -> Iterator[list[_Picture]]:
    """Pictures of the chosen row groups, with one batch in memory."""
    columns = ["image", rules.id_column, rules.sha_column, *(rules.size_columns or ())]
    by_shard: dict[Path, list[int]] = {}
    for path, index, _ in groups:
        by_shard.setdefault(path, []).append(index)
    for path, indices in by_shard.items():
        with pq.ParquetFile(path) as shard:
            for batch in shard.iter_batches(batch_size=BATCH_ROWS, row_groups=indices, columns=columns):
                yield [_picture(row, rules, label) for row in batch.to_pylist()]


def _picture(row: dict[str, object], rules: ImageRules, label: str) -> _Picture:
    image = row["image"]
    data, path = (image.get("bytes") or b"", image.get("path") or "") if isinstance(image, dict) else (b"", "")
    size = None
    if rules.size_columns:
        width, height = (row[column] for column in rules.size_columns)
        size = (width, height) if isinstance(width, int) and isinstance(height, int) else None
    return _Picture(
        row_id=f"{label}{row[rules.id_column]}",
        image=data,
        path=path,
        stated_sha256=str(row[rules.sha_column]),
        stated_size=size,
        sha256=hashlib.sha256(data).hexdigest(),
    )


def _decode_new(batch: list[_Picture], decoded: dict[str, _Decoded], pool: Executor) -> None:
    """Decode the batch's pictures that were not decoded before; Pillow lets threads run meanwhile."""
    new = {picture.sha256: picture.image for picture in batch if picture.image and picture.sha256 not in decoded}
    decoded.update(zip(new, pool.map(_decode, new.values()), strict=True))


def _decode(data: bytes) -> _Decoded:
    try:
        return decode_image(data).size
    except InputError as error:
        return error.what


def _judge(picture: _Picture, decoded: dict[str, _Decoded], broken: dict[str, list[Broken]]) -> None:
    name = picture.path or "no name"
    if not picture.image:
        broken["image_present"].append(Broken(picture.row_id, name))
        return
    if picture.sha256 != picture.stated_sha256:
        broken["image_is_the_one_named"].append(
            Broken(picture.row_id, f"{name}: {picture.sha256[:12]}…, stated {picture.stated_sha256[:12]}…")
        )
    size = decoded[picture.sha256]
    if isinstance(size, str):
        broken["image_decodable"].append(Broken(picture.row_id, f"{name}: {size}"))
    elif picture.stated_size is not None and size != picture.stated_size:
        broken["image_size"].append(Broken(picture.row_id, f"{name}: {size}, stated {picture.stated_size}"))


def _verdict(name: str, broken: list[Broken], looked: int, total: int, rules: ImageRules) -> Check:
    tolerated = rules.tolerated_missing if name == "image_present" else 0.0
    sampled = "" if looked == total else f" (a seeded sample of {total:,})"
    return Check(
        name=name,
        rule=_TEXTS[name],
        success=len(broken) <= tolerated * looked,
        severity="fail",
        observed=f"{len(broken):,} of {looked:,} rows break it{sampled}",
        expected=f"at most {tolerated:.1%} of rows break it" if tolerated else "no row breaks it",
        broken=tuple(broken),
    )
