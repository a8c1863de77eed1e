"""Attention sequence by sequence: the outputs and gradients of one mask over the whole row."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from medvlm.models import attention
from medvlm.models.attention import BLOCKS, block_marks, register_blocks

HEADS, KEY_HEADS, CHANNELS = 4, 2, 8
MODULE: Any = SimpleNamespace(num_key_value_groups=HEADS // KEY_HEADS, is_causal=True)
trees = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(
    lambda lengths: [number for number, length in enumerate(lengths) for _ in range(length)]
)
plain = st.integers(1, 6)


def drawn(heads: int, width: int) -> Tensor:
    seed = torch.Generator().manual_seed(heads + 10 * width)
    return torch.randn((1, heads, width, CHANNELS), generator=seed).requires_grad_()


def outputs(mask: Tensor | None, width: int, *, name: str = BLOCKS) -> list[Tensor]:
    """The output, and the gradients of query, key and value."""
    register_blocks()
    forward: Any = AttentionInterface()[name]
    query, key, value = given_heads = [drawn(HEADS, width), drawn(KEY_HEADS, width), drawn(KEY_HEADS, width)]
    output = forward(MODULE, query, key, value, mask, dropout=0.0, scaling=0.3)[0]
    weights = torch.arange(output.numel()).view(output.shape).cos()
    return [output, *torch.autograd.grad((output * weights).sum(), given_heads)]


def seen(sequences: list[int | list[int]]) -> Tensor:
    """What each token of a row sees, said token by token."""
    tokens = [
        (number, place, 0 if isinstance(one, int) else one[place])
        for number, one in enumerate(sequences)
        for place in range(one if isinstance(one, int) else len(one))
    ]
    return torch.tensor([
        [s == t and p >= q and (c == 0 or b == c) for t, q, c in tokens] for s, p, b in tokens
    ])[None, None]  # fmt: skip


@settings(max_examples=40)
@given(st.lists(plain | trees, min_size=1, max_size=4))
def test_the_results_are_those_of_one_mask(sequences: list[int | list[int]]) -> None:
    lengths = [one if isinstance(one, int) else len(one) for one in sequences]
    marks = block_marks(lengths, [[] if isinstance(one, int) else one for one in sequences])
    assert marks.shape == (1, 1, 2, sum(lengths))
    found, expected = outputs(marks, sum(lengths)), outputs(seen(sequences), sum(lengths), name="sdpa")
    for mine, its in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mask", [None, seen([3, 2]), seen([3, 2]).float().log()], ids=["none", "bool", "float"])
def test_other_masks_go_on_to_sdpa(mask: Tensor | None) -> None:
    for mine, its in zip(outputs(mask, 5), outputs(mask, 5, name="sdpa"), strict=True):
        assert torch.equal(mine, its)
    assert BLOCKS in AttentionMaskInterface()


def test_marks_are_read_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Tensor] = []
    original = attention._read
    monkeypatch.setattr(attention, "_read", lambda marks: (read.append(marks), original(marks))[1])
    marks = block_marks([2, 3], [[], [0, 1, 2]])
    for _ in range(3):
        outputs(marks, 5)
    outputs(block_marks([5], [[]]), 5)
    assert len(read) == 2 and read[0] is marks
