"""Faster kernels: Liger's on a GPU, oneDNN's on a CPU, and ``torch.compile`` where a stage asks for it."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from medvlm.recipe_schema import Recipe, Stage

if TYPE_CHECKING:
    from medvlm.training.engine import Engine

__all__ = ["compile_layers", "liger_serves", "prepare_kernels", "use_liger"]


def liger_serves(recipe: Recipe, stage: Stage, *, cuda: bool) -> bool:
    """Whether Liger's Triton kernels run: on a GPU, installed, for an architecture that they know.

    Their norms, rotary positions and feed-forward modules are those of LLaMA; Phi's and StableLM's are others. The
    vocabulary's part of the loss is ours in any case: Liger's does not leave out what is not learned.
    """
    installed = all(importlib.util.find_spec(name) for name in ("liger_kernel", "triton"))
    return cuda and stage.speed.liger and installed and recipe.model.language_model.architecture == "llama"


def prepare_kernels(model: Any, stage: Stage, engine: Engine) -> None:
    """Put into a model what the engine chose, and the stage's way to reckon logits."""
    if model.config._attn_implementation != engine.attention:
        model.set_attn_implementation(engine.attention)
    if engine.packing == "blocks":
        from medvlm.models.attention import BLOCKS, register_blocks

        register_blocks()
        model.set_attn_implementation({"text_config": BLOCKS})
    if not stage.speed.loss_at_labels:
        model.head_tokens = None
    if engine.liger:
        use_liger(model)
    if engine.onednn:
        from medvlm.training.onednn import use_onednn

        use_onednn(model)
    if engine.compiled:
        compile_layers(model)


def use_liger(model: Any) -> None:
    """Put Liger's kernels into a model's language model.

    Args:
        model: The whole one, with a language model that ``liger_serves``.
    """
    from liger_kernel.transformers import (  # pyright: ignore[reportMissingImports]  # an extra, for GPUs
        _apply_liger_kernel_to_instance as apply,  # pyright: ignore[reportUnknownVariableType]
    )

    apply(
        model=model.model.language_model,
        rope=True,
        rms_norm=True,
        # An upcycled layer's feed-forward module is a mixture with a forward of its own.
        swiglu=model.config.moe is None,
        cross_entropy=False,
        fused_linear_cross_entropy=False,
    )


def compile_layers(model: Any) -> int:
    """Compile the language model's layers, one graph for all of one kind; says how many there are.

    Layers with experts are left as they are: how many tokens an expert gets is known only when it runs.
    """
    from medvlm.models.moe import MoELayer

    layers = [
        layer
        for layer in model.model.language_model.layers
        if not any(isinstance(module, MoELayer) for module in layer.modules())
    ]
    for layer in layers:
        layer.compile(dynamic=True)
    return len(layers)
