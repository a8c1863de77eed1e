"""Several sequences in one row, and several questions behind one image, without one seeing another.

A token sees what stands before it in its own sequence. Where questions share an image, the sequence is a tree: all
of them see the shared beginning, none sees another, and each counts its positions as if it stood there alone. So
the loss is that of separate rows, and neither padding nor a second reading of the image is paid for.

Shape letters: R rows, W tokens of a row, N images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["IGNORED", "Encoded", "Packing", "pack_rows", "packed_batch", "share_prefix"]

Packing = Literal["off", "mask", "blocks", "varlen"]
"""How sequences share a row: not, told apart by a mask, by ``medvlm.models.attention``, or by flash-attention."""

IGNORED = -100
"""Label of a token without loss."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of one sequence, with the image's placeholders in place."""

    ids: list[int]
    labels: list[int]
    cut: int
    """Tokens that the length limit took away."""
    branches: list[int] = field(default_factory=list)
    """Of each token: 0 in the beginning that all branches share, then the branch's number. Empty: no branches."""

    @property
    def positions(self) -> list[int]:
        """Each token's place as its branch counts, 0 first."""
        if not self.branches:
            return list(range(len(self.ids)))
        shared = self.branches.count(0)
        places = list(range(shared))
        for index in range(shared, len(self.branches)):
            begins = self.branches[index] != self.branches[index - 1]
            places.append(shared if begins else places[-1] + 1)
        return places


def share_prefix(sequences: Sequence[Encoded], image_id: int) -> Encoded | None:
    """Sequences of one image as one that holds their common beginning once.

    Args:
        sequences: Each with the image once, and without branches.
        image_id: Id of the image's placeholders.

    Returns:
        None where the image is not part of a common beginning: where the question stands before it.
    """
    first = sequences[0]
    if len(sequences) == 1:
        return first
    ids = [sequence.ids for sequence in sequences]
    # At least one token of each stays for itself, and nothing learned is shared.
    limit = min(next(i for i, label in enumerate(s.labels) if label != IGNORED) for s in sequences) - 1
    shared = next((i for i in range(limit) if len({row[i] for row in ids}) > 1), limit)
    if image_id in first.ids[shared:] or image_id not in first.ids[:shared]:
        return None
    joined = Encoded(list(first.ids[:shared]), [IGNORED] * shared, sum(s.cut for s in sequences), [0] * shared)
    for number, sequence in enumerate(sequences, start=1):
        joined.ids.extend(sequence.ids[shared:])
        joined.labels.extend(sequence.labels[shared:])
        joined.branches.extend([number] * (len(sequence.ids) - shared))
    return joined


def pack_rows(lengths: Sequence[int], packing: Packing) -> list[list[int]]:
    """Which sequences share a row.

    With ``blocks`` and ``varlen`` all do: a sequence costs there what it costs alone. With ``mask`` a row is as long as
    the longest sequence, so that no row costs more attention than one of them does alone: the longest first, each into
    the first row that has room.

    Args:
        lengths: Of the sequences, in tokens.
        packing: ``off``: each has a row of its own.

    Returns:
        Indices for each row; rows, and sequences in a row, in the order of the batch.
    """
    if packing == "off":
        return [[index] for index in range(len(lengths))]
    if packing != "mask":
        return [list(range(len(lengths)))]
    capacity = max(lengths)
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        row = next((r for r, left in enumerate(room) if left >= lengths[index]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(capacity)
        rows[row].append(index)
        room[row] -= lengths[index]
    return sorted(sorted(row) for row in rows)


def packed_batch(rows: Sequence[Sequence[Encoded]], pad_id: int, packing: Packing = "off") -> dict[str, Tensor]:
    """Token ids, labels and, where rows hold more than one plain sequence, positions and a mask.

    Args:
        rows: The sequences of each row, as ``pack_rows`` has them.
        pad_id: Fills; never attended, never learned.
        packing: With ``varlen`` sequences are told apart by their positions, and have no branches. With ``off`` they
            may: a mask says what each token sees.

    Returns:
        ``input_ids``, ``labels`` (R, W); ``attention_mask``, (R, W), (R, 1, W, W), or for ``blocks`` (1, 1, 2, W), see
        ``block_marks``; ``position_ids`` (R, W) where the mask has four dimensions or is not there.
    """
    import torch

    plain = all(len(row) == 1 and not row[0].branches for row in rows)
    width = max(sum(len(sequence.ids) for sequence in row) for row in rows)

    def padded(values: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([v + [fill] * (width - len(v)) for v in values])

    def joined(name: str) -> list[list[int]]:
        return [[value for sequence in row for value in getattr(sequence, name)] for row in rows]

    batch = {"input_ids": padded(joined("ids"), pad_id), "labels": padded(joined("labels"), IGNORED)}
    if plain:
        return {**batch, "attention_mask": padded([[1] * len(row[0].ids) for row in rows], 0)}
    batch["position_ids"] = padded(joined("positions"), 0)
    if packing == "varlen":
        return batch
    if packing == "blocks":
        from medvlm.models.attention import block_marks

        (row,) = rows
        return {**batch, "attention_mask": block_marks([len(s.ids) for s in row], [s.branches for s in row])}
    return {**batch, "attention_mask": _mask(rows, padded)}


def _mask(rows: Sequence[Sequence[Encoded]], padded: Any) -> Tensor:
    """What each token sees, bool (R, 1, W, W)."""
    import torch

    numbers = [[n for n, sequence in enumerate(row, start=1) for _ in sequence.ids] for row in rows]
    branches = [[b for s in row for b in (s.branches or [0] * len(s.ids))] for row in rows]
    sequence_RW, branch_RW = padded(numbers, 0), padded(branches, 0)
    same_RWW = sequence_RW[:, :, None] == sequence_RW[:, None, :]
    # A query (second last) sees keys (last) of the shared beginning and of its own branch.
    seen_RWW = (branch_RW[:, None, :] == 0) | (branch_RW[:, :, None] == branch_RW[:, None, :])
    width = sequence_RW.shape[1]
    before_WW = torch.ones((width, width), dtype=torch.bool).tril()
    # Padding sees the padding before it: a token that sees nothing at all would become NaN.
    return (same_RWW & seen_RWW & before_WW).unsqueeze(1)
