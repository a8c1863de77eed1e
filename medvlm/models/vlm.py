"""The vision-language model: vision tower → projector → language model, on transformers' LLaVA classes.

Shape letters: B batch, L sequence, D model width, N images, P placeholders (patches) of an image, V tower width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, LlavaConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import (
    LlavaCausalLMOutputWithPast,
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaPreTrainedModel,
)

from medvlm.errors import ImageTokenMismatch
from medvlm.models.efficientnet import EfficientNetLiteModel
from medvlm.models.moe import install_experts
from medvlm.models.projector import PROJECTORS

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "EfficientNetLiteModel",  # importing it registers the tower, so that a checkpoint with one opens
    "MedVLMConfig",
    "MedVLMForConditionalGeneration",
    "MedVLMModel",
    "merge_image_features",
]


UNLEARNED = -100
HEAD_TOKENS = 1024


class MedVLMConfig(LlavaConfig):
    """LLaVA's configuration with the kind of projector, and the experts of a model that has them."""

    model_type = "medvlm"
    projector_kind: str = "linear"
    projector_prototypes: int | None = None
    projector_standardised: bool = False
    moe: dict[str, Any] | None = None
    """``experts``, ``every``, ``meta_expert``, ``capacity`` and ``domains``; see ``medvlm.models.moe.moe_settings``."""


class MedVLMModel(LlavaModel):
    """Tower, projector and language model without head."""

    config_class = MedVLMConfig

    def __init__(self, config: Any) -> None:
        # Not LlavaModel's own: it would build a projector that is then thrown away.
        LlavaPreTrainedModel.__init__(self, config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = PROJECTORS[config.projector_kind](config)
        self.language_model = AutoModel.from_config(config.text_config)
        if config.moe is not None:
            install_experts(self.language_model, config.moe)
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
    head_tokens: int | None = HEAD_TOKENS
    """Learned tokens whose logits are held at once. None: the logits of every token, learned or not."""
    _keep_in_fp32_modules_strict = ["router"]  # noqa: RUF012  # transformers names the type

    def __init__(self, config: Any) -> None:
        from torch import nn

        LlavaPreTrainedModel.__init__(self, config)
        self.model = MedVLMModel(config)
        text = config.text_config
        # Phi's head has a bias, the others' have none.
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=text.model_type == "phi")
        # How many tokens an expert gets is known only when it runs.
        self._can_compile_fullgraph = config.moe is None
        self.post_init()

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  # called by name only, as transformers does
        self,
        input_ids: Any = None,
        pixel_values: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Any = None,
        labels: Any = None,
        logits_to_keep: Any = 0,
        image_features: Any = None,
        token_labels: Any = None,
        **options: Any,
    ) -> Any:
        """What LLaVA's does, and two things more.

        Args:
            input_ids: This and what follows, up to ``logits_to_keep``, as in transformers.
            pixel_values: See there.
            attention_mask: See there.
            position_ids: See there.
            past_key_values: See there.
            inputs_embeds: See there.
            labels: See there.
            logits_to_keep: See there.
            image_features: The tower's features (N, P, V), in place of the pixels.
            token_labels: Labels (B, L), -100 where nothing is learned. The output's ``loss`` is then a loss for each
                learned token, in reading order, and it has no logits.
            options: See there.
        """
        if image_features is not None:
            weight = next(self.model.multi_modal_projector.parameters())
            projected = self.model.multi_modal_projector(image_features.to(weight.dtype))
            outputs: Any = BaseModelOutputWithPooling
            options["mm_encoder_outputs"] = {"image": outputs(pooler_output=list(projected))}
        inputs = {
            "input_ids": input_ids,
            "pixel_values": pixel_values,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            **options,
        }
        if token_labels is None:
            return super().forward(labels=labels, logits_to_keep=logits_to_keep, **inputs)
        hidden_BLD = self.model(**inputs)[0]
        made: Any = LlavaCausalLMOutputWithPast
        return made(loss=self._token_losses(hidden_BLD[:, :-1], token_labels[:, 1:]))

    def _token_losses(self, hidden_BLD: Tensor, labels_BL: Tensor) -> Tensor:
        """Cross-entropy of each learned token, (T,), float32."""
        import torch

        learned_BL = labels_BL != UNLEARNED
        labels_T = labels_BL[learned_BL]
        if self.head_tokens is None:
            return _cross_entropy(self.lm_head(hidden_BLD)[learned_BL], labels_T)
        hidden_TD = hidden_BLD[learned_BL]
        if len(labels_T) <= self.head_tokens:
            return _cross_entropy(self.lm_head(hidden_TD), labels_T)
        # Logits of one part at a time, made again for the backward pass: memory does not grow with the text.
        parts = zip(hidden_TD.split(self.head_tokens), labels_T.split(self.head_tokens), strict=True)
        losses = [checkpoint(self._part_losses, *part, use_reentrant=False) for part in parts]
        return torch.cat(losses)

    def _part_losses(self, hidden_TD: Tensor, labels_T: Tensor) -> Tensor:
        return _cross_entropy(self.lm_head(hidden_TD), labels_T)


def _cross_entropy(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    import torch.nn.functional as F  # noqa: N812

    return F.cross_entropy(logits_TV.float(), labels_T, reduction="none")


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
