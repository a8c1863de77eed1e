"""The vision-language model: vision tower → projector → language model, on transformers' LLaVA classes.

Shape letters: B batch, L sequence, D model width, N images, P placeholders (patches) of an image, V tower width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, LlavaConfig
from transformers.models.llava.modeling_llava import (
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaPreTrainedModel,
)

from medvlm.errors import ImageTokenMismatch
from medvlm.models.projector import PROJECTORS

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["MedVLMConfig", "MedVLMForConditionalGeneration", "MedVLMModel", "merge_image_features"]


class MedVLMConfig(LlavaConfig):
    """LLaVA's configuration with the kind of projector."""

    model_type = "medvlm"
    projector_kind: str = "linear"
    projector_prototypes: int | None = None


class MedVLMModel(LlavaModel):
    """Tower, projector and language model without head."""

    config_class = MedVLMConfig

    def __init__(self, config: Any) -> None:
        # Not LlavaModel's own: it would build a projector that is then thrown away.
        LlavaPreTrainedModel.__init__(self, config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = PROJECTORS[config.projector_kind](config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_placeholder_mask(self, input_ids: Any, inputs_embeds: Any, image_features: Any) -> Any:
        """Where image features go, (B, L, 1).

        Raises:
            ImageTokenMismatch: The batch does not hold exactly N x P placeholders.
        """
        if input_ids is None:
            unknown: Any = None
            return super().get_placeholder_mask(unknown, inputs_embeds, image_features)
        mask_BL = input_ids == self.config.image_token_id
        # Features arrive flattened to (N * P, D) or as (N, P, D).
        _check_placeholders(mask_BL, image_features.numel() // image_features.shape[-1])
        return mask_BL.unsqueeze(-1).to(inputs_embeds.device)


class MedVLMForConditionalGeneration(LlavaForConditionalGeneration):
    """The whole model, with the language model's head."""

    config_class = MedVLMConfig

    def __init__(self, config: Any) -> None:
        from torch import nn

        LlavaPreTrainedModel.__init__(self, config)
        self.model = MedVLMModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()


def merge_image_features(text_BLD: Tensor, image_NPD: Tensor, input_ids_BL: Tensor, *, image_token_id: int) -> Tensor:
    """Write image features over the image placeholders of a batch.

    Args:
        text_BLD: Token embeddings. Not modified.
        image_NPD: Projected patch features, the N images in reading order.
        input_ids_BL: Token ids, int64. Each image owns P placeholders.
        image_token_id: The placeholder's id in this tokenizer.

    Returns:
        Embeddings (B, L, D), with the dtype and device of ``text_BLD``.

    Raises:
        ImageTokenMismatch: The batch does not hold exactly N x P placeholders.
    """
    mask_BL = input_ids_BL == image_token_id
    _check_placeholders(mask_BL, image_NPD.shape[0] * image_NPD.shape[1])
    return text_BLD.masked_scatter(mask_BL.unsqueeze(-1), image_NPD.to(text_BLD))


def _check_placeholders(mask_BL: Any, features: int) -> None:
    placeholders = int(mask_BL.sum())
    if placeholders != features:
        raise ImageTokenMismatch(
            f"the text holds {placeholders} image placeholders, the images give {features} features",
            where=f"a batch of {mask_BL.shape[0]} sequences, {mask_BL.sum(1).tolist()} placeholders each",
            hint="each sequence needs its image's placeholders exactly once; was one cut off or doubled?",
        )


AutoConfig.register("medvlm", MedVLMConfig)
AutoModel.register(MedVLMConfig, MedVLMModel)
AutoModelForImageTextToText.register(MedVLMConfig, MedVLMForConditionalGeneration)
