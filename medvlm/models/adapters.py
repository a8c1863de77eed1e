"""LoRA adapters of the original's layout, added to the weights that they stand beside."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medvlm.errors import CheckpointError
from medvlm.models.llava_layout import listed
from medvlm.models.weights import read_weight_file
from medvlm.store import read_json

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["StoredAdapter"]

_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_REFUSED = ("use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "modules_to_save", "layers_pattern")


class StoredAdapter:
    """A peft adapter as a folder holds it.

    Args:
        folder: Holds ``adapter_config.json`` and ``adapter_model.safetensors`` or ``.bin``.
        rename: The name of the weight that a key stands beside, in our checkpoint; None where there is none.

    Raises:
        CheckpointError: A file is missing, damaged or unsafe, a pair is incomplete, the configuration has what is not
            plain LoRA, or a key has no place in the model.
    """

    def __init__(self, folder: Path, rename: Callable[[str], str | None]) -> None:
        config: Any = read_json(folder / "adapter_config.json")
        special = [name for name in _REFUSED if config.get(name)]
        if special or config.get("peft_type", "LORA") != "LORA" or config.get("bias", "none") != "none":
            raise CheckpointError(
                f"this is not plain LoRA: {', '.join(special) or config.get('peft_type')}, bias {config.get('bias')}",
                where=str(folder / "adapter_config.json"),
                hint="merge it with peft and import the merged model",
            )
        rank = int(config["r"])
        self._scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
        path = next((folder / name for name in _FILES if (folder / name).is_file()), None)
        if path is None:
            raise CheckpointError("there is no adapter", where=str(folder), hint=f"looked for {' and '.join(_FILES)}")
        self.path = path
        self._pairs: dict[str, dict[str, Tensor]] = {}
        strange: list[str] = []
        for key, tensor in read_weight_file(path).items():
            name, mark, side = key.partition(".lora_")
            target = rename(f"{name}.weight") if mark else None
            if target is None or side.split(".")[0] not in ("A", "B") or tensor.dim() != 2:
                strange.append(key)
            else:
                self._pairs.setdefault(target, {})[side[0]] = tensor
        strange += [name for name, pair in self._pairs.items() if len(pair) != 2]
        if strange:
            raise CheckpointError(
                f"{len(strange)} keys of the adapter have no place in the model: {listed(strange)}",
                where=str(path),
                hint="use the recipe that it was trained with",
            )

    def targets(self) -> set[str]:
        """Names of the weights that it changes."""
        return set(self._pairs)

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """The weight with its adapter added, in the weight's type; as it was where there is none.

        Raises:
            CheckpointError: The adapter is of another size.
        """
        pair = self._pairs.get(name)
        if pair is None:
            return weight
        low, high = pair["A"].float(), pair["B"].float()
        if (high.shape[0], low.shape[1]) != tuple(weight.shape) or high.shape[1] != low.shape[0]:
            raise CheckpointError(
                f"the adapter of {name} is {list(high.shape)} x {list(low.shape)}, the weight {list(weight.shape)}",
                where=str(self.path),
                hint="use the base model that it was trained on",
            )
        return (weight.float() + self._scale * (high @ low)).to(weight.dtype)
