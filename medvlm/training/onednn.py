"""Linear layers that learn in float32 on the CPU, all three of their products through oneDNN.

PyTorch multiplies float32 matrices with Intel's MKL, which takes its narrow way on processors of other makers: on an
AMD EPYC with AVX-512 a core gives 113 GFLOP/s through MKL and 250 through oneDNN, forward and backward. ``packed.py``
is the same for a model that only answers; there weights stay, so they are laid out once.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["onednn_serves", "use_onednn"]

SMALLEST = 2**21
"""Multiplications of one product below which the call costs more than it saves (measured: even at 2**20 to 2**21)."""


def onednn_serves() -> bool:
    """Whether this PyTorch has the operator."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def use_onednn(model: nn.Module) -> int:
    """Let a model's linear layers run through oneDNN where their product is large enough; says how many there are.

    Results differ by float32's rounding. Other types than float32, other devices than the CPU and small products run
    as they did. Layers of a subclass (4-bit ones, adapters' own) are left alone; what they wrap is not.
    """
    layers = [module for module in model.modules() if type(module) is nn.Linear]
    for layer in layers:
        layer.forward = MethodType(_forward, layer)
    return len(layers)


def _forward(layer: nn.Linear, input: Tensor) -> Tensor:
    weight = layer.weight
    large = input.numel() * layer.out_features >= SMALLEST
    if not large or not (input.dtype == weight.dtype == torch.float32) or input.device.type != "cpu":
        return F.linear(input, weight, layer.bias)
    return _Linear.apply(input, weight, layer.bias)  # pyright: ignore[reportReturnType]  # apply is typed as anything


class _Linear(torch.autograd.Function):
    """``x W^T + b`` of x (..., I), W (O, I) and b (O,)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]  # as torch documents it
        ctx.save_for_backward(x, weight_OI)
        return _product(x, weight_OI, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]  # as torch documents it
        x, weight_OI = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        grad_TO = grad.reshape(-1, grad.shape[-1])
        return (
            _product(grad, weight_OI.t()) if of_x else None,
            _product(grad_TO.t(), x.reshape(-1, x.shape[-1]).t()) if of_weight else None,
            grad_TO.sum(0) if of_bias else None,
        )


def _product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """``left right^T + bias``; either may be a transposed view."""
    operators: Any = torch.ops.mkldnn
    return operators._linear_pointwise(left, right, bias, "none", [], "")
