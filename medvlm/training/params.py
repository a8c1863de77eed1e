"""Which parameters a stage trains, and at which rate."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from medvlm.recipe_schema import Part, Recipe, Stage

if TYPE_CHECKING:
    from torch import nn

__all__ = ["freeze", "parameter_counts", "parameter_groups", "part_of", "rate_ratio"]

_PREFIXES: dict[str, Part] = {
    "model.vision_tower.": "vision_tower",
    "model.multi_modal_projector.": "projector",
    "model.language_model.": "language_model",
    "lm_head.": "language_model",
}


def part_of(name: str) -> Part:
    """The part of the model that a parameter belongs to.

    Raises:
        KeyError: To none.
    """
    return next(part for prefix, part in _PREFIXES.items() if name.startswith(prefix))


def freeze(model: nn.Module, stage: Stage) -> None:
    """Let gradients reach exactly the parts that the stage trains."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in stage.trains)


def rate_ratio(recipe: Recipe, part: Part) -> float:
    """What a published learning rate is multiplied by for a part of this size; see ``Stage.learning_rate``."""
    tower, decoder = recipe.model.vision_tower, recipe.model.language_model
    if part == "language_model":
        return decoder.reference_width / decoder.hidden_size * math.sqrt(decoder.reference_layers / decoder.layers)
    return tower.reference_width / tower.hidden_size


def parameter_groups(model: nn.Module, recipe: Recipe, stage: Stage) -> list[dict[str, Any]]:
    """Optimiser groups: a part's matrices with weight decay, its biases and norms without."""
    groups: list[dict[str, Any]] = []
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    for part in stage.trains:
        rate = stage.learning_rate * rate_ratio(recipe, part)
        # ZeRO-3 empties a parameter's shape and keeps the real one in ds_shape.
        for decayed in (True, False):
            parameters = [
                parameter
                for name, parameter in named
                if part_of(name) == part and (len(getattr(parameter, "ds_shape", parameter.shape)) > 1) == decayed
            ]
            if parameters:
                decay = stage.weight_decay if decayed else 0.0
                groups.append({"params": parameters, "lr": rate, "weight_decay": decay})
    return groups


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """``parameters`` and ``parameters_trained``."""
    sizes = [(int(getattr(p, "ds_numel", p.numel())), p.requires_grad) for p in model.parameters()]
    return {"parameters": sum(n for n, _ in sizes), "parameters_trained": sum(n for n, trained in sizes if trained)}
