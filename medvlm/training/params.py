"""Which parameters a stage trains, and at which rate."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from medvlm.recipe_schema import Part, Recipe, Stage
from medvlm.training import lora
from medvlm.training.lora import is_adapter, is_saved
from medvlm.training.marks import is_mark_rows

if TYPE_CHECKING:
    from torch import nn

__all__ = ["freeze", "is_feed_forward", "learned_part", "parameter_counts", "parameter_groups", "part_of", "rate_ratio"]

_PREFIXES: dict[str, Part] = {
    "model.vision_tower.": "vision_tower",
    "model.multi_modal_projector.": "projector",
    "model.language_model.": "language_model",
    "lm_head.": "language_model",
}

# Dense feed-forward modules, experts and meta experts of a language model: ``layers.N.mlp.``.
_FEED_FORWARD = ".mlp."


def part_of(name: str) -> Part:
    """The part of the model that a parameter belongs to; never ``feed_forward``, which is part of another.

    Raises:
        KeyError: To none.
    """
    found: list[Part] = [part for prefix, part in _PREFIXES.items() if name.startswith(prefix)]
    if not found:
        raise KeyError(name)
    return found[0]


def learned_part(name: str, stage: Stage) -> Part:
    """The part that a parameter belongs to, as the stage names parts.

    A feed-forward module of the language model is ``feed_forward`` where the stage trains that alone.
    """
    if is_mark_rows(name):
        return "image_marks"
    part = part_of(name)
    alone = "feed_forward" in stage.trains and part == "language_model" and is_feed_forward(name)
    return "feed_forward" if alone else part


def is_feed_forward(name: str) -> bool:
    """Whether a parameter belongs to a feed-forward module of the language model, dense or of a mixture."""
    return part_of(name) == "language_model" and _FEED_FORWARD in name


def freeze(model: nn.Module, stage: Stage) -> None:
    """Let gradients reach exactly the parts that the stage trains, or their adapters and what learns beside these."""
    for name, parameter in model.named_parameters():
        part = learned_part(name, stage)
        through_adapter = stage.adapter(part) is not None
        learns = is_adapter(name) == through_adapter or is_saved(name, stage)
        parameter.requires_grad_(part in stage.trains and learns)


def rate_ratio(recipe: Recipe, part: Part) -> float:
    """What a published learning rate is multiplied by for a part of this size; see ``Stage.learning_rate``."""
    tower, decoder = recipe.model.vision_tower, recipe.model.language_model
    if part in ("language_model", "feed_forward"):
        return decoder.reference_width / decoder.hidden_size * math.sqrt(decoder.reference_layers / decoder.layers)
    if part == "image_marks":
        return 1.0
    return tower.reference_width / tower.hidden_size


def _rate(name: str, part: Part, recipe: Recipe, stage: Stage) -> float:
    """The rate of one parameter at this size."""
    adapter = stage.adapter(part)
    if stage.lora is not None and stage.lora.modules_to_save is not None and is_saved(name, stage):
        return stage.lora.modules_to_save.learning_rate * rate_ratio(recipe, part)
    if adapter is None:
        return stage.rate(part) * rate_ratio(recipe, part)
    matrix = "lora_A" if ".lora_A." in name else "lora_B"
    return stage.rate(part) * lora.rate_ratio(recipe, part, adapter, matrix)


def parameter_groups(model: nn.Module, recipe: Recipe, stage: Stage) -> list[dict[str, Any]]:
    """Optimiser groups: a part's matrices with weight decay, its biases and norms without.

    An adapter's two matrices have a group each, as their rates differ (``medvlm.training.lora.rate_ratio``).
    """
    groups: list[dict[str, Any]] = []
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    for part in stage.trains:
        members = [(name, parameter) for name, parameter in named if learned_part(name, stage) == part]
        for rate in dict.fromkeys(_rate(name, part, recipe, stage) for name, _ in members):
            # ZeRO-3 empties a parameter's shape and keeps the real one in ds_shape.
            for decayed in (True, False):
                parameters = [
                    parameter
                    for name, parameter in members
                    if _rate(name, part, recipe, stage) == rate
                    and (len(getattr(parameter, "ds_shape", parameter.shape)) > 1) == decayed
                ]
                if parameters:
                    decay = stage.weight_decay if decayed else 0.0
                    groups.append({"params": parameters, "lr": rate, "weight_decay": decay})
    return groups


def _size(parameter: Any) -> int:
    """How many numbers a parameter stands for, also where ZeRO-3 has emptied it or 4 bits hold each of them."""
    packed = getattr(parameter, "quant_state", None)
    return math.prod(packed.shape) if packed is not None else int(getattr(parameter, "ds_numel", parameter.numel()))


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """``parameters`` and ``parameters_trained``; with experts also ``parameters_active``: those that a token meets."""
    sizes = {name: _size(parameter) for name, parameter in model.named_parameters()}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    # The marks' rows stand in the table too, where they go back to.
    total = sum(size for name, size in sizes.items() if not is_mark_rows(name))
    counts = {"parameters": total, "parameters_trained": sum(sizes[name] for name in trained)}
    # Of a layer's experts one works at a time, and all have the size of the first.
    idle = sum(size for name, size in sizes.items() if ".mlp.experts." in name and ".mlp.experts.0." not in name)
    return {**counts, "parameters_active": counts["parameters"] - idle} if idle else counts
