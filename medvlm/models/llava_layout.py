"""The original LLaVA's names and settings, in ours.

The original saves one flat state dict: the language model under ``model.`` and ``lm_head.``, the projector under
``model.mm_projector.``, and from v1.5 on sometimes the tower under ``model.vision_tower.vision_tower.``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from medvlm.errors import CheckpointError
from medvlm.recipe_schema import Recipe

__all__ = ["COMPUTED", "listed", "our_name", "plain_name", "settings_that_differ", "text_settings", "tower_name"]

COMPUTED = re.compile(r"(rotary_emb\.inv_freq|embeddings\.position_ids|mm_projector\.ln_1\.(weight|bias))$")
"""Buffers that old versions of transformers stored and every version computes, and the layer norm that the ``cluster``
projector of STLLaVA-Med stores and never reads."""

_PREFIXES = ("module.", "base_model.model.")
_PROJECTORS = {
    "linear": {"weight": "linear.weight", "bias": "linear.bias"},
    "mlp2x_gelu": {
        "0.weight": "linear_1.weight",
        "0.bias": "linear_1.bias",
        "2.weight": "linear_2.weight",
        "2.bias": "linear_2.bias",
    },
    # What STLLaVA-Med's and SQ-LLaVA's code calls its parts: their ``Clustering``.
    "cluster_pooled": {
        "sim_alpha": "likeness_scale",
        "sim_beta": "likeness_shift",
        **{
            f"{theirs}.{kind}": f"{ours}.{kind}"
            for theirs, ours in {
                "c": "centre",
                "v": "key",
                "f": "value",
                "mlp.0": "linear_1",
                "mlp.2": "linear_2",
            }.items()
            for kind in ("weight", "bias")
        },
    },
}
_PROJECTOR_KINDS = {"cluster": "cluster_pooled"}
"""The originals' name of a projector → ours, where they differ."""
_TOWER = "model.vision_tower.vision_tower."
_TEXT_SETTINGS = (
    "hidden_act",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "max_position_embeddings",
    "attention_bias",
    "head_dim",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
_SIZES = {
    "hidden_size": "hidden_size",
    "intermediate_size": "mlp_size",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
}
_ARCHITECTURES = {"llava": "llama", "llava_llama": "llama", "llama": "llama", "llava_mistral": "mistral"}


def plain_name(name: str) -> str:
    """A key without what peft, DDP or a saved trainer put before it."""
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    # non_lora_trainables.bin: base_model.model.model.mm_projector…
    return name.removeprefix("model.") if name.startswith("model.model.") else name


def our_name(name: str, recipe: Recipe) -> str | None:
    """Our key of an original one; None where the recipe's model has no place for it."""
    if name.startswith("lm_head."):
        return name
    if name.startswith("model.mm_projector."):
        ours = _PROJECTORS.get(recipe.model.projector.kind, {}).get(name.removeprefix("model.mm_projector."))
        return f"model.multi_modal_projector.{ours}" if ours else None
    if name.startswith(_TOWER):
        return tower_name(name.removeprefix(_TOWER))
    if name.startswith(("model.layers.", "model.embed_tokens.", "model.norm.")):
        return f"model.language_model.{name.removeprefix('model.')}"
    return None


def tower_name(name: str) -> str | None:
    """Our key of one of a CLIP folder; None for what is not the vision half."""
    if not name.startswith(("vision_model.", "embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.")):
        return None
    return f"model.vision_tower.{name.removeprefix('vision_model.')}"


def text_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of the original's ``config.json`` belongs to the language model, but for its sizes."""
    settings = {name: config[name] for name in _TEXT_SETTINGS if config.get(name) is not None}
    # null says something: Mistral-7B-Instruct-v0.2 has no window, and transformers' default has one.
    return settings | ({"sliding_window": config["sliding_window"]} if "sliding_window" in config else {})


def settings_that_differ(config: Mapping[str, Any], recipe: Recipe, source: str) -> None:
    """Refuse a checkpoint that was made with other settings than the recipe says.

    Raises:
        CheckpointError: With every difference, and the ``--set`` that takes it away where there is one.
    """
    model = recipe.model
    decoder, tower = model.language_model, model.vision_tower
    found: list[tuple[str, Any, str, Any]] = [
        (theirs, config.get(theirs), f"model.language_model.{ours}", getattr(decoder, ours))
        for theirs, ours in _SIZES.items()
    ]
    kind = config.get("model_type")
    found.append(
        ("model_type", _ARCHITECTURES.get(str(kind), kind), "model.language_model.architecture", decoder.architecture)
    )
    found += [
        ("mm_hidden_size", config.get("mm_hidden_size"), "model.vision_tower.hidden_size", tower.hidden_size),
        (
            "mm_projector_type",
            _projector_kind(config),
            "model.projector.kind",
            model.projector.kind,
        ),
        (
            "mm_vision_select_layer",
            config.get("mm_vision_select_layer"),
            "model.vision_tower.feature_layer",
            tower.feature_layer,
        ),
        (
            "mm_vision_select_feature",
            {"patch": "patch", "cls_patch": "all"}.get(str(config.get("mm_vision_select_feature"))),
            "model.vision_tower.feature_select",
            tower.feature_select,
        ),
        (
            "mm_use_im_start_end",
            config.get("mm_use_im_start_end"),
            "model.mm_use_im_start_end",
            model.mm_use_im_start_end,
        ),
        (
            "image_aspect_ratio",
            {"pad": "pad", "square": "crop"}.get(str(config.get("image_aspect_ratio"))),
            "model.vision_tower.image_fit",
            tower.image_fit,
        ),
    ]
    wrong = [(t, v, field, ours) for t, v, field, ours in found if v is not None and v != ours]
    if wrong:
        told = "; ".join(f"{t} is {v!r}, the recipe's {field} is {ours!r}" for t, v, field, ours in wrong)
        changes = " ".join(f"--set {field}={_yaml(v)}" for _, v, field, _ in wrong)
        raise CheckpointError(told, where=source, hint=f"use the recipe that it was trained with, or {changes}")


def _projector_kind(config: Mapping[str, Any]) -> str | None:
    """Our name of a checkpoint's projector; v1 has one kind and does not say it. None: not a LLaVA model."""
    kind = config.get("mm_projector_type", "linear" if "mm_hidden_size" in config else None)
    return _PROJECTOR_KINDS.get(str(kind), kind)


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def listed(names: Iterable[str], shown: int = 12) -> str:
    """Names for an error: the first few and how many more."""
    names = sorted(names)
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
