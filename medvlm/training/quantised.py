"""4-bit weights under adapters (QLoRA, Dettmers et al. 2023): layers packed for a stage, by bitsandbytes.

Packed here and not by transformers while it loads, as a stage begins from any start (published weights, a checkpoint,
experts): the same layers, the same bytes. What peft's ``prepare_model_for_kbit_training`` does is done elsewhere for
every stage: all but adapters and projector is frozen, checkpointing is not reentrant, and DeepSpeed sets precision.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from medvlm.errors import TrainingError
from medvlm.recipe_schema import Recipe, Stage

if TYPE_CHECKING:
    from torch import Tensor

    from medvlm.training.engine import Engine

__all__ = ["check_quantisation", "pack", "packed_for_adapters", "unpack", "with_packed_weights"]

_PART = "language_model"
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def check_quantisation(recipe: Recipe, stage: Stage) -> None:
    """Refuse 4-bit weights where bitsandbytes is not there.

    Raises:
        TrainingError: It is not; the command that installs it is said.
    """
    # Where it is installed, peft imports it for any adapter, and on CPUs with bf16 units it then asks for one more
    # package, whose operation would be downloaded from a hub.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    if stage.quantisation is None or importlib.util.find_spec("bitsandbytes"):
        return
    raise TrainingError(
        f"{stage.quantisation} weights need bitsandbytes, which is not installed",
        where=f"recipe {recipe.name}, field stages.{stage.name}.lora.quantisation",
        hint="pip install -c constraints.txt 'medvlm[qlora]', or train without it: "
        f"--set stages.{stage.name}.lora.quantisation=null",
    )


def pack(model: Any, stage: Stage, engine: Engine) -> int:
    """Put 4-bit layers in place of every linear layer of the language model, where the stage has it so.

    The head, the embedding, norms and biases stay as they are, and so do tower and projector.

    Args:
        model: A ``MedVLMForConditionalGeneration`` without adapters. Changed in place.
        stage: Says whether, and how.
        engine: Gives the device, where packed layers are at once, and the precision that they compute in.

    Returns:
        How many layers were packed.
    """
    if stage.quantisation is None:
        return 0
    import torch
    from torch import nn

    from medvlm.training.packed_layer import PackedLinear

    module = model.model.get_submodule(_PART)
    dtype = getattr(torch, _DTYPES[engine.precision])
    names = [name for name, layer in module.named_modules() if type(layer) is nn.Linear]
    for name in names:
        _replace(module, name, PackedLinear.of(module.get_submodule(name), stage.quantisation, dtype, engine.device))
    return len(names)


@contextmanager
def packed_for_adapters(model: Any, stage: Stage) -> Generator[None]:
    """While adapters are attached, peft is told that the layers are packed, as transformers would tell it."""
    if stage.quantisation is None:
        yield
        return
    module = model.model.get_submodule(_PART)
    module.is_loaded_in_4bit = True
    try:
        yield
    finally:
        del module.is_loaded_in_4bit


def with_packed_weights(model: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state with the packed layers' weights in it, which they keep out of every checkpoint of a running stage.

    They are what the adapters learned beside: the values that 4 bits hold, not those from before.

    Args:
        model: With packed layers, under their adapters.
        state: Of that model; not changed.
    """
    found = {f"{name}.weight": layer.values() for name, layer in _packed(model)}
    return {**state, **found}


def unpack(model: Any) -> None:
    """Put plain layers in place of the packed ones, with the values that these hold."""
    for name, layer in _packed(model):
        _replace(model, name, layer.plain())


def _packed(model: Any) -> list[tuple[str, Any]]:
    if not importlib.util.find_spec("bitsandbytes"):
        return []
    return [(name, layer) for name, layer in model.named_modules() if type(layer).__name__ == "PackedLinear"]


def _replace(module: Any, name: str, layer: Any) -> None:
    parent, _, child = name.rpartition(".")
    setattr(module.get_submodule(parent), child, layer)
