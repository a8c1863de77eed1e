"""Training objectives: small functions from a model and a batch to a loss."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from medvlm.recipe_schema import Stage
from medvlm.training.packing import IGNORED

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["OBJECTIVES", "answer_log_probabilities", "answer_loss", "dpo_loss", "dpo_objective", "objective_of"]


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


def answer_log_probabilities(model: Any, batch: dict[str, Any]) -> Tensor:
    """Log-probability of each sequence's learned tokens, summed: (B,), in float32.

    Args:
        model: As for ``answer_loss``.
        batch: As for ``answer_loss``, each sequence in a row of its own.
    """
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "reference")}
    losses_T = model(**inputs, token_labels=batch["labels"]).loss
    row_T = (batch["labels"][:, 1:] != IGNORED).nonzero()[:, 0]
    return losses_T.new_zeros(len(batch["labels"])).index_add(0, row_T, -losses_T)


def dpo_loss(policy_P2: Tensor, reference_P2: Tensor, beta: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Direct preference optimisation: minus the log of how surely the chosen answer is preferred.

    ``-log sigmoid(beta * ((chosen - its reference) - (rejected - its reference)))``, Rafailov et al. 2023,
    equation 7; the sigmoid loss of TRL.

    Args:
        policy_P2: Log-probabilities of the chosen and the rejected answer of P pairs.
        reference_P2: The same under the model that the stage began with.
        beta: How strongly that model holds.

    Returns:
        Losses (P,), and for each pair ``preference_accuracy`` (whether the chosen answer gained more),
        ``reward_margin``, ``reward_chosen`` and ``reward_rejected``, without gradient.
    """
    import torch.nn.functional as F  # noqa: N812

    chosen_P, rejected_P = (beta * (policy_P2 - reference_P2)).unbind(1)
    margin_P = chosen_P - rejected_P
    measures = {
        "preference_accuracy": (margin_P > 0).float(),
        "reward_margin": margin_P,
        "reward_chosen": chosen_P,
        "reward_rejected": rejected_P,
    }
    return -F.logsigmoid(margin_P), {name: value.detach() for name, value in measures.items()}


def dpo_objective(
    model: Any, batch: dict[str, Any], answer_tokens: Any, *, beta: float, step_pairs: int
) -> tuple[Tensor, dict[str, float]]:
    """``dpo_loss`` of a batch of pairs, and the means of what it measures.

    Args:
        model: As for ``answer_loss``.
        batch: As ``collate`` makes it of pairs with their references.
        answer_tokens: None where the batch is a whole step; a step's tokens else, which are not needed here.
        beta: Of ``dpo_loss``.
        step_pairs: Pairs of an optimiser step, over all processes and accumulation.
    """
    policy_P2 = answer_log_probabilities(model, batch).view(-1, 2)
    losses_P, measures = dpo_loss(policy_P2, batch["reference"], beta)
    pairs = len(losses_P) if answer_tokens is None else step_pairs
    return losses_P.sum() / pairs, {name: value.mean().item() for name, value in measures.items()}


OBJECTIVES: dict[str, Callable[[Any, dict[str, Any], Any], Any]] = {"answer": answer_loss}
"""A stage's ``objective`` → its function, where it takes nothing from the stage; see ``objective_of``."""


def objective_of(stage: Stage) -> Callable[[Any, dict[str, Any], Any], Any]:
    """A stage's objective: gives a loss, or a loss and measures for the curve."""
    if stage.objective == "dpo":
        return functools.partial(dpo_objective, beta=stage.preference_beta, step_pairs=stage.global_batch)
    return OBJECTIVES[stage.objective]
