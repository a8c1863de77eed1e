"""Pixels of a stage's samples, read from their shards when a batch asks for them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq

from medvlm.errors import InputError
from medvlm.models.vision import ImageProcessor

if TYPE_CHECKING:
    from torch import Tensor

    from medvlm.training.data import StageSample

__all__ = ["PixelStore"]

_CACHE_BYTES = 512 * 2**20


class PixelStore:
    """Pixels of samples, read from their shards and kept in memory as far as a budget goes."""

    def __init__(self, processor: ImageProcessor, budget_bytes: int = _CACHE_BYTES) -> None:
        self._processor = processor
        self._budget_bytes = budget_bytes
        self._pixels: dict[str, Tensor] = {}
        # A row group is about 16 MB; a few of them serve neighbours that share one.
        self._row_group = functools.lru_cache(maxsize=4)(_read_row_group)

    def __call__(self, sample: StageSample) -> Tensor:
        """Pixels (3, H, W).

        Raises:
            InputError: The image does not decode; the sample is named, never replaced.
        """
        pixels = self._pixels.get(sample.image_sha256)
        if pixels is not None:
            return pixels
        try:
            pixels = self._processor(self._image(sample))
        except InputError as error:
            raise InputError(
                error.what, where=f"sample {sample.sample_id} in {sample.shard}", hint=error.hint
            ) from error
        if self._budget_bytes >= pixels.nbytes:
            self._budget_bytes -= pixels.nbytes
            self._pixels[sample.image_sha256] = pixels
        return pixels

    def _image(self, sample: StageSample) -> bytes:
        group, offset = _locate(sample.shard, sample.row)
        return self._row_group(sample.shard, group)[offset].as_py()


@functools.lru_cache(maxsize=1024)
def _row_group_ends(path: Path) -> np.ndarray[Any, np.dtype[np.int64]]:
    metadata = pq.read_metadata(path)
    return np.cumsum([metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)])


def _locate(path: Path, row: int) -> tuple[int, int]:
    ends = _row_group_ends(path)
    group = int(np.searchsorted(ends, row, side="right"))
    return group, row - (int(ends[group - 1]) if group else 0)


def _read_row_group(path: Path, group: int) -> Any:
    with pq.ParquetFile(path) as shard:
        return shard.read_row_group(group, columns=["image"])["image"].combine_chunks().field("bytes")
