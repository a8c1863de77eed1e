"""Nearest neighbours among 64-bit hashes: 600,000 against 10,000 in seconds, exactly.

Two hashes that differ in at most r bits agree in at least one of r + 1 bands of bits (pigeonhole).
So for small radii only pairs that share a band are compared (multi-index hashing, Norouzi et al.,
CVPR 2012); for large radii bands are too short to help, and every pair is compared.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Nearest", "nearest_within", "parse_hashes"]

Hashes = NDArray[np.uint64]

BITS = 64
BANDED_RADIUS = 6
"""Up to this radius bands are compared. Above, bands of 8 bits and less let most pairs through."""
PAIRS_AT_ONCE = 4_000_000
"""Candidate pairs in memory at a time: about 100 MB."""
BLOCK = 1 << 15
"""Hashes of a block in the full comparison: with one query, 256 KB, so that it stays in the cache."""


@dataclass(frozen=True)
class Nearest:
    """For each query, what lies within the radius."""

    index: NDArray[np.int64]
    """Position of the nearest hash, the first of equals; -1 where none is within the radius."""
    distance: NDArray[np.int64]
    """Differing bits to it; -1 where none is within the radius."""
    count: NDArray[np.int64]
    """How many different hash values lie within the radius."""


def parse_hashes(digits: Sequence[str]) -> Hashes:
    """Hashes of 16 hex digits each as one array.

    Raises:
        ValueError: An entry is not 16 hex digits.
    """
    joined = "".join(digits)
    if len(joined) != 16 * len(digits) or any(len(entry) != 16 for entry in digits):
        wrong = next(entry for entry in digits if len(entry) != 16)
        raise ValueError(f"a perceptual hash has 16 hex digits, not {len(wrong)}: {wrong!r}")
    return np.frombuffer(bytes.fromhex(joined), dtype=">u8").astype(np.uint64)


def nearest_within(hashes: Hashes, queries: Hashes, radius: int) -> Nearest:
    """The nearest hash to each query, if one differs in at most ``radius`` bits.

    Args:
        hashes: Shape (N,), uint64. Repeated values are compared once.
        queries: Shape (M,), uint64.
        radius: 0 to 64 bits.

    Returns:
        Arrays of shape (M,).

    Raises:
        ValueError: The radius is out of range.
    """
    if not 0 <= radius <= BITS:
        raise ValueError(f"the radius is a number of bits, 0 to {BITS}, not {radius}")
    values, first = np.unique(hashes, return_index=True)
    wanted, inverse = np.unique(queries, return_inverse=True)
    best = np.full(len(wanted), np.iinfo(np.int64).max, dtype=np.int64)
    count = np.zeros(len(wanted), dtype=np.int64)
    if len(values) and len(wanted):
        search = _banded if radius <= BANDED_RADIUS else _every
        for query, key, seen in search(values, first, wanted, radius):
            np.minimum.at(best, query, key)
            np.add.at(count, query, seen)
    found = count > 0
    index = np.where(found, best & ((1 << 40) - 1), -1)
    distance = np.where(found, best >> 40, -1)
    return Nearest(index[inverse], distance[inverse], count[inverse])


Positions = NDArray[np.int64]
Found = tuple[Positions, NDArray[np.int64], NDArray[np.int64]]
"""Positions of queries, a key for what is near each, and how many values that key stands for."""


def _key(distance: NDArray[np.uint8], position: Positions) -> NDArray[np.int64]:
    """One number that orders by distance, then by position, so that ties go to the first."""
    return distance.astype(np.int64) << 40 | position


def _bands(radius: int) -> list[tuple[int, int]]:
    """Shift and width of ``radius + 1`` bands that cover all bits."""
    edges = np.linspace(0, BITS, radius + 2).round().astype(int).tolist()
    return [(low, high - low) for low, high in itertools.pairwise(edges)]


def _banded(values: Hashes, first: Positions, queries: Hashes, radius: int) -> Iterator[Found]:
    """Pairs within the radius, each once: in the first band in which it agrees."""
    earlier: list[np.uint64] = []
    for shift, width in _bands(radius):
        mask = np.uint64(((1 << width) - 1) << shift)
        keys = values & mask
        order = np.argsort(keys, kind="stable")
        sorted_keys = keys[order]
        low = np.searchsorted(sorted_keys, queries & mask, side="left")
        high = np.searchsorted(sorted_keys, queries & mask, side="right")
        for query, place in _expand(low, high):
            value = order[place]
            difference = values[value] ^ queries[query]
            distance = np.bitwise_count(difference)
            keep = distance <= radius
            for other in earlier:
                keep &= (difference & other) != 0
            if keep.any():
                key = _key(distance[keep], first[value[keep]])
                yield query[keep], key, np.ones(len(key), dtype=np.int64)
        earlier.append(mask)


def _expand(low: Positions, high: Positions) -> Iterator[tuple[Positions, Positions]]:
    """Ranges ``low[i]:high[i]`` as pairs (i, position), a bounded number at a time."""
    size = high - low
    start, stop_at = 0, np.cumsum(size)
    while start < len(size):
        before = int(stop_at[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(stop_at, before + PAIRS_AT_ONCE, side="right")))
        here = size[start:stop]
        total = int(here.sum())
        query = np.repeat(np.arange(start, stop), here)
        within = np.arange(total) - np.repeat(np.cumsum(here) - here, here)
        yield query, np.repeat(low[start:stop], here) + within
        start = stop


def _every(values: Hashes, first: Positions, queries: Hashes, radius: int) -> Iterator[Found]:
    """The nearest value to each query by comparing all, block by block, on every core."""

    def compare(query: int) -> Found:
        best, count = np.iinfo(np.int64).max, 0
        for start in range(0, len(values), BLOCK):
            distance = np.bitwise_count(values[start : start + BLOCK] ^ queries[query])
            nearest = distance.min()
            if nearest <= radius:
                count += np.count_nonzero(distance <= radius)
                if int(nearest) <= best >> 40:
                    (places,) = np.nonzero(distance == nearest)
                    best = min(best, int(_key(distance[places], first[places + start]).min()))
        return np.array([query]), np.array([best]), np.array([count])

    # The comparisons run outside the interpreter's lock.
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        yield from pool.map(compare, range(len(queries)))
