"""A recipe's model without memory: shapes and counts of the full size on any machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from medvlm.models.checkpoint import decoder_config, model_config
from medvlm.models.vision import tower_config
from medvlm.recipe_schema import Recipe, Stage

if TYPE_CHECKING:
    from medvlm.models.vlm import MedVLMForConditionalGeneration

__all__ = ["meta_model"]


def meta_model(recipe: Recipe, stage: Stage | None = None) -> MedVLMForConditionalGeneration:
    """The model of a recipe on the ``meta`` device: every shape, no weights, no download.

    Its vocabulary is the published one, so that its parameters count as the published model's do. A model that is
    built to train has a row more in the embedding and in the head for each mark that medvlm adds.

    Args:
        recipe: Where its weights come from does not matter; its sizes do.
        stage: ``moe_tune`` has experts; before it, and without a stage, the model is dense.
    """
    import torch

    from medvlm.models.moe import moe_settings
    from medvlm.models.vlm import MedVLMForConditionalGeneration

    config = model_config(
        recipe,
        vision_config=tower_config(recipe.model.vision_tower),
        text_config=decoder_config(recipe, recipe.model.tokenizer.vocab_size, {}),
        image_id=0,
        marks={},
    )
    if recipe.model.moe is not None and stage is not None and stage.name == "moe_tune":
        config.moe = moe_settings(recipe.model.moe)
    with torch.device("meta"):
        return MedVLMForConditionalGeneration(config)
