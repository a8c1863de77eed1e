"""Linear layers of a model on the CPU with their weights laid out once for oneDNN.

PyTorch multiplies float32 matrices with Intel's MKL, which takes its narrow way on processors of other makers. On an
AMD EPYC with AVX-512, oneDNN is faster from four rows on, and 2.3 times as fast from some thirty on.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["PackedLinears"]

SMALLEST = 2**16
"""Values of a weight below which laying it out is not worth its while."""
AT_MOST_BYTES = 4 * 2**30
"""Of laid-out copies; they stand beside the weights."""
_ROWS = 512
"""oneDNN chooses the layout for about as many rows; it serves any number."""


class PackedLinears(TorchFunctionMode):
    """While entered, linear layers without gradient run through oneDNN; results differ by float32's rounding.

    A weight is laid out when it is first used, and anew when it has changed. On a GPU, in other types than float32,
    and in a PyTorch without oneDNN, nothing is changed. May be entered again and again.

    Args:
        smallest: Values of the smallest weight that is laid out.
        at_most_bytes: Of laid-out weights; those beyond run as they did.
    """

    def __init__(self, *, smallest: int = SMALLEST, at_most_bytes: int = AT_MOST_BYTES) -> None:
        super().__init__()
        self._smallest = smallest
        self._left = at_most_bytes
        self._packed: dict[int, tuple[Tensor, tuple[int, int], Any]] = {}
        operators: Any = torch.ops.mkldnn
        self._there = torch.backends.mkldnn.is_available() and hasattr(operators, "_reorder_linear_weight")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and not kwargs and self._there and not torch.is_grad_enabled():
            given: Any = (*args, None)
            input_, weight, bias = given[:3]
            packed = self._of(weight) if input_.dtype == torch.float32 and input_.numel() else None
            if packed is not None:
                operators: Any = torch.ops.mkldnn
                return operators._linear_pointwise(input_, packed, bias, "none", [], "")
        return func(*args, **(kwargs or {}))

    def _of(self, weight: Tensor) -> Any:
        """The laid-out weight, or None where it stays as it is."""
        known = self._packed.get(id(weight))
        if known is not None and known[1] == (weight._version, weight.data_ptr()) and weight.dtype == torch.float32:
            return known[2]
        # A parameter lives as long as its model; what is made on the way would be laid out at each use.
        if not isinstance(weight, nn.Parameter) or weight.is_inference() or weight.dim() != 2:
            return None
        if weight.dtype != torch.float32 or weight.device.type != "cpu" or weight.numel() < self._smallest:
            return None
        if known is None:
            if weight.nbytes > self._left:
                return None
            self._left -= weight.nbytes
        operators: Any = torch.ops.mkldnn
        packed = operators._reorder_linear_weight(weight.detach(), _ROWS)
        # The weight is kept, so that nothing else gets its id.
        self._packed[id(weight)] = (weight, (weight._version, weight.data_ptr()), packed)
        return packed
