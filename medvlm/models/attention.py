"""Attention of sequences that stand one behind the other in a row: each within itself, nothing computed between them.

A mask over a whole row costs what the row costs squared. Here the row is cut where a sequence ends: what is paid for
is each sequence alone, and, where it has no branches, only the half of it that lies before a token.
"""

from __future__ import annotations

import weakref
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

__all__ = ["BLOCKS", "block_marks", "register_blocks"]

BLOCKS = "medvlm_blocks"
"""Name of the attention for ``set_attn_implementation``, once ``register_blocks`` was called."""


def register_blocks() -> None:
    """Make ``BLOCKS`` known to transformers. A model that has it takes every mask that it took with SDPA, too."""
    AttentionInterface.register(BLOCKS, _attend)
    AttentionMaskInterface.register(BLOCKS, sdpa_mask)


def block_marks(lengths: list[int], branches: list[list[int]]) -> Tensor:
    """What stands for a mask: (1, 1, 2, W), int64; of each token the number of its sequence, and its branch.

    Four dimensions, so that transformers hands it on as it is.

    Args:
        lengths: Of the sequences, W together.
        branches: Of each sequence a number a token: 0 is seen by all that follows, another only by its like. Empty:
            each token sees what stands before it.
    """
    numbers = [number for number, length in enumerate(lengths) for _ in range(length)]
    # A sequence without branches has the mark -1: that its tokens are of one branch need not be found out again.
    of_tokens = [b for length, own in zip(lengths, branches, strict=True) for b in (own or [-1] * length)]
    return torch.tensor([[[numbers, of_tokens]]])


class _Blocks:
    """Lengths and masks of the marks that were read last: every layer of a model asks for the same."""

    def __init__(self) -> None:
        self._marks: weakref.ref[Tensor] | None = None
        self._found: list[tuple[int, Tensor | None]] = []

    def of(self, marks: Tensor) -> list[tuple[int, Tensor | None]]:
        if self._marks is None or self._marks() is not marks:
            self._marks, self._found = weakref.ref(marks), _read(marks)
        return self._found


_LAST = _Blocks()


def _read(marks: Tensor) -> list[tuple[int, Tensor | None]]:
    """Of each sequence its length, and its mask (1, 1, L, L) where it has branches."""
    numbers, branches = marks[0, 0].tolist()
    found: list[tuple[int, Tensor | None]] = []
    place = 0
    for _, tokens in groupby(numbers):
        length = len(list(tokens))
        own = branches[place : place + length]
        found.append((length, None if own[0] < 0 else _tree(own, marks.device)))
        place += length
    return found


def _tree(branches: list[int], device: torch.device) -> Tensor:
    """What each token of a sequence with branches sees: bool (1, 1, L, L)."""
    branch_L = torch.tensor(branches, device=device)
    seen_LL = (branch_L[None, :] == 0) | (branch_L[:, None] == branch_L[None, :])
    return seen_LL.tril()[None, None]


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """SDPA of heads (1, H, W, C), sequence by sequence: (1, W, H, C)."""
    if attention_mask is None or attention_mask.dtype != torch.int64:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    blocks = _LAST.of(attention_mask)
    lengths = [length for length, _ in blocks]
    # Split, not sliced: the gradient of a slice is as large as the whole.
    parts = zip(*(heads.split(lengths, dim=2) for heads in (query, key, value)), blocks, strict=True)
    outputs = [sdpa_attention_forward(module, q, k, v, mask, **options)[0] for q, k, v, (_, mask) in parts]
    return torch.cat(outputs, dim=1), None
