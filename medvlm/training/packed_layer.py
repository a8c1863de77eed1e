"""A linear layer whose weight is held in 4 bits and stays out of checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor, dtype

__all__ = ["PackedLinear"]


class PackedLinear(Linear4bit):
    """bitsandbytes' layer, doubly quantised, with a state that holds its bias alone.

    A stage's start is what its packed weights follow from, to the byte, and it begins a resumed run too: an interim
    checkpoint that held them would say the same again, in a form that ``load_state_dict`` does not read.
    """

    @classmethod
    def of(cls, layer: nn.Linear, kind: str, compute: dtype, device: str) -> PackedLinear:
        """The layer packed.

        Args:
            layer: With its weight in float32.
            kind: bitsandbytes' ``quant_type``.
            compute: What it multiplies in.
            device: Where the packed weight is.
        """
        bias = layer.bias is not None  # pyright: ignore[reportUnnecessaryComparison]  # torch's types say it is there
        with torch.device("meta"):
            packed = cls(layer.in_features, layer.out_features, bias, compute, True, kind)
        made: Any = packed
        # bitsandbytes would store the weight in another order for CPUs with bf16 units, as soon as it is not learning.
        made.support_avx512bf16_for_cpu = False
        # Its parameter packs when it is sent to a device. On the CPU too, where the data stands already.
        weight: Any = type(made.weight)(
            layer.weight.detach(), compress_statistics=True, quant_type=kind, module=made, requires_grad=False
        )
        made.weight = weight.to(device)
        made.quant_state = made.weight.quant_state
        if bias:
            packed.bias = nn.Parameter(layer.bias.detach().to(device), requires_grad=False)
        return packed

    def values(self) -> Tensor:
        """What the 4 bits hold, (out, in), on the CPU, in float32."""
        weight: Any = self.weight
        return dequantize_4bit(weight.data, weight.quant_state).float().cpu()

    def plain(self) -> nn.Linear:
        """A linear layer with these values."""
        bias: Any = self.bias
        layer = nn.Linear(self.in_features, self.out_features, bias is not None, device="meta")
        layer.weight = nn.Parameter(self.values())
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().float().cpu())
        return layer

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        bias: Any = self.bias
        if bias is not None:
            destination[f"{prefix}bias"] = bias if keep_vars else bias.detach()

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        weight = self._parameters.pop("weight")
        try:
            nn.Module._load_from_state_dict(self, *arguments, **options)
        finally:
            self._parameters["weight"] = weight
