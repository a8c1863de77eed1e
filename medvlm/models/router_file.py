"""Files of a domain router: ours, and the published ``phi_router.pth`` and ``stablelm_router.pth``."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medvlm.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FILE_NAME", "read_router", "write_router"]

FILE_NAME = "router.safetensors"
_WEIGHT, _BIAS = "fc1.weight", "fc1.bias"
"""Names in the published files; ours have the same."""
_HINT = "a router file holds fc1.weight (experts x width) and fc1.bias (experts), as phi_router.pth does"


def read_router(path: Path, *, experts: int, width: int) -> tuple[Tensor, Tensor]:
    """Weight (E, D) and bias (E,) of a router file, float32.

    Args:
        path: ``.safetensors``, or a ``.pth`` of tensors alone: nothing in it is ever executed.
        experts: That the model has.
        width: Of the language model.

    Raises:
        CheckpointError: The file is missing or damaged, holds more or less than a router, objects instead of
            tensors, values that are not finite, or a router of another shape.
    """
    tensors = _tensors(path)
    if set(tensors) != {_WEIGHT, _BIAS}:
        _refuse(f"the file holds {', '.join(sorted(map(str, tensors))) or 'nothing'}", path)
    import torch

    weight, bias = tensors[_WEIGHT], tensors[_BIAS]
    if not isinstance(weight, torch.Tensor) or not isinstance(bias, torch.Tensor):
        _refuse("the file holds something else than tensors", path)
    if tuple(weight.shape) != (experts, width) or tuple(bias.shape) != (experts,):
        raise CheckpointError(
            f"the router is for {_sizes(weight, bias)}, the model has {experts} experts and a width of {width}",
            where=str(path),
            hint="take the router of this language model: phi_router.pth is 2560 wide, stablelm_router.pth 2048",
        )
    weight, bias = weight.float(), bias.float()
    if not (weight.isfinite().all() and bias.isfinite().all()):
        _refuse("the router holds values that are not finite", path)
    return weight, bias


def _tensors(path: Path) -> Mapping[str, Any]:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError("the router file does not exist", where=str(path), hint="check the path") from error
    except (pickle.UnpicklingError, zipfile.BadZipFile, SafetensorError, RuntimeError, EOFError, OSError) as error:
        first_line = str(error).partition("\n")[0]
        raise CheckpointError(
            f"the router file cannot be read safely: {first_line}", where=str(path), hint=_HINT
        ) from error
    if not isinstance(loaded, Mapping):
        _refuse(f"the file holds a {type(loaded).__name__}", path)
    return loaded


def _sizes(weight: Any, bias: Any) -> str:
    if weight.ndim == 2 and bias.ndim == 1:
        return f"{weight.shape[0]} experts and a width of {weight.shape[1]} (with {bias.shape[0]} biases)"
    return f"tensors of shape {tuple(weight.shape)} and {tuple(bias.shape)}"


def _refuse(what: str, path: Path) -> None:
    raise CheckpointError(what, where=str(path), hint=_HINT)


def write_router(folder: Path, weight_ED: Tensor, bias_E: Tensor) -> None:
    """Write ``router.safetensors`` into a folder."""
    from safetensors.torch import save_file

    tensors = {_WEIGHT: weight_ED.contiguous(), _BIAS: bias_E.contiguous()}
    save_file(tensors, folder / FILE_NAME, metadata={"format": "pt"})
