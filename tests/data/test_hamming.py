"""Nearest hashes: the same as comparing every pair in plain Python, whatever the radius."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medvlm.data import hamming
from medvlm.data.hamming import nearest_within, parse_hashes

# Few different values, few bits apart, so that ties, repeats and near pairs are common.
base = st.sampled_from([0, 0xFFFF_FFFF_FFFF_FFFF, 0x0123_4567_89AB_CDEF])
hashes = st.builds(
    lambda value, flips: value ^ sum({1 << f for f in flips}), base, st.lists(st.integers(0, 63), max_size=9)
)


@given(st.lists(hashes, max_size=12), st.lists(hashes, max_size=6), st.integers(0, 12))
def test_it_is_the_comparison_of_every_pair(values: list[int], queries: list[int], radius: int) -> None:
    found = nearest_within(np.array(values, dtype=np.uint64), np.array(queries, dtype=np.uint64), radius)
    for place, query in enumerate(queries):
        near = [(bin(query ^ value).count("1"), i) for i, value in enumerate(values)]
        near = sorted(pair for pair in near if pair[0] <= radius)
        distance, index = near[0] if near else (-1, -1)
        assert (found.distance[place], found.index[place]) == (distance, index)
        assert found.count[place] == len({values[i] for _, i in near})


def test_many_candidates_are_taken_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2**12, 500).astype(np.uint64)
    queries = rng.integers(0, 2**12, 200).astype(np.uint64)
    whole = nearest_within(values, queries, 3)
    monkeypatch.setattr(hamming, "PAIRS_AT_ONCE", 7)
    monkeypatch.setattr(hamming, "BLOCK", 3)
    parts = nearest_within(values, queries, 3)
    monkeypatch.setattr(hamming, "BANDED_RADIUS", 0)
    every = nearest_within(values, queries, 3)
    for other in (parts, every):
        np.testing.assert_array_equal(whole.index, other.index)
        np.testing.assert_array_equal(whole.distance, other.distance)
        np.testing.assert_array_equal(whole.count, other.count)
    assert whole.count.max() > 3


def test_hashes_are_read_as_hex_digits() -> None:
    assert parse_hashes(["0000000000000001", "ffffffffffffffff"]).tolist() == [1, 2**64 - 1]
    assert parse_hashes([]).tolist() == []
    with pytest.raises(ValueError, match="16 hex digits, not 3"):
        parse_hashes(["0123456789abcdef", "abc"])
    with pytest.raises(ValueError, match="non-hexadecimal"):
        parse_hashes(["0123456789abcdeg"])


@pytest.mark.parametrize("radius", [-1, 65])
def test_a_radius_is_a_number_of_bits(radius: int) -> None:
    with pytest.raises(ValueError, match="0 to 64"):
        nearest_within(np.zeros(1, dtype=np.uint64), np.zeros(1, dtype=np.uint64), radius)
