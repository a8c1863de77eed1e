"""Training objectives: small functions from a model and a batch to a loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["OBJECTIVES", "answer_loss"]


def answer_loss(model: Any, batch: dict[str, Any], answer_tokens: Tensor | int | None) -> Tensor:
    """Cross-entropy of the answers' tokens.

    Args:
        model: Called with the batch but its labels; the logits of learned tokens only are computed.
        batch: As ``collate`` makes it, without ``sample_ids``.
        answer_tokens: What the sum is divided by: the learned tokens of the whole optimiser step, so that
            a split into micro-batches does not change the loss. None: those of this batch.

    Returns:
        A scalar, in float32.
    """
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    losses_T = model(**inputs, token_labels=batch["labels"]).loss
    return losses_T.sum() / (max(1, len(losses_T)) if answer_tokens is None else answer_tokens)


OBJECTIVES: dict[str, Callable[[Any, dict[str, Any], Any], Any]] = {"answer": answer_loss}
"""A stage's ``objective`` → its function."""
