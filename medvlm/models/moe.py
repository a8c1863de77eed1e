"""Mixture of experts: a feed-forward module becomes four routed experts beside the module itself (Med-MoE).

What a layer computes for a token x, after Med-MoE (Jiang et al. 2024, arXiv 2404.10237; jiangsongtao/Med-MoE,
moe/layer.py): ``gate(x) * expert(x) + meta_expert(x)``, where the expert is the router's first choice and the gate
that choice's probability, both in float32 from a router that never trains. The meta expert is the dense module
that was there before, for every token.

**What the upcycled model owes to the dense one.** Published experts are copies of the dense module, so a layer
begins with ``(1 + gate(x)) * dense(x)``, not with ``dense(x)``: the model after upcycling is meant to differ, and only
two things must agree, exactly: the layer with that formula, and the model without its routed branch (the meta path
alone) with the dense model. With ``expert_start: silent`` the experts' output projections begin with zeros; then the
whole model begins as the dense one. tests/models/test_moe.py holds all three.

Shape letters: B batch, L sequence, T tokens (B * L), D model width, E experts.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from medvlm.recipe_schema import MoE

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "FrozenRouter",
    "MoELayer",
    "dispatch",
    "install_experts",
    "moe_layers",
    "moe_settings",
    "route",
    "upcycle",
]

_OUTPUT_PROJECTIONS = ("down_proj", "fc2")


def route(logits_TE: Tensor) -> tuple[Tensor, Tensor]:
    """First choice and its probability.

    Args:
        logits_TE: Of the router.

    Returns:
        Expert of each token (T,), int64, and its gate (T,), the softmax's probability in float32.
    """
    gates_TE = logits_TE.float().softmax(-1)
    gate_T, choice_T = gates_TE.max(-1)
    return choice_T, gate_T


def dispatch(choice_T: Tensor, experts: int, capacity: float | None) -> tuple[Tensor, list[int]]:
    """The order in which tokens stand side by side with the others of their expert.

    Args:
        choice_T: Expert of each token.
        experts: How many there are.
        capacity: An expert takes at most ``ceil(capacity * T / E)`` tokens, the first ones; None takes all.

    Returns:
        Indices of the tokens that are taken, expert by expert and in their order, and how many each expert has.
    """
    order = choice_T.argsort(stable=True)
    counts_E = torch.bincount(choice_T, minlength=experts)
    if capacity is not None:
        limit = math.ceil(capacity * len(choice_T) / experts)
        first_E = counts_E.cumsum(0) - counts_E
        place_T = torch.arange(len(order), device=order.device) - first_E[choice_T[order]]
        order = order[place_T < limit]
        counts_E = counts_E.clamp(max=limit)
    return order, counts_E.tolist()


class FrozenRouter(nn.Module):
    """One linear layer, float32, that no optimiser and no cast reaches: its weights are buffers."""

    weight: Tensor
    bias: Tensor

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros((experts, width), dtype=torch.float32))
        self.register_buffer("bias", torch.zeros(experts, dtype=torch.float32))

    def forward(self, x_TD: Tensor) -> Tensor:
        """Logits (T, E) in float32, whatever the precision around it."""
        with torch.autocast(x_TD.device.type, enabled=False):
            return nn.functional.linear(x_TD.float(), self.weight, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenRouter:
        # ``model.bfloat16()`` and DeepSpeed's casts come through here: follow the device, not the precision.
        exact = {name: buffer for name, buffer in self.named_buffers()}
        super()._apply(fn, recurse)
        for name, before in exact.items():
            after = getattr(self, name)
            if after.dtype != torch.float32:
                setattr(self, name, before.to(after.device))
        return self


class MoELayer(nn.Module):
    """Stands where a feed-forward module stood.

    Args:
        dense: That module; it becomes the meta expert, and the experts begin as its copies.
        width: Of the model.
        experts: Routed experts.
        meta_expert: Whether the dense module stays, for every token.
        capacity: See ``dispatch``.
    """

    is_mixture = True

    def __init__(
        self, dense: nn.Module, width: int, *, experts: int, meta_expert: bool, capacity: float | None
    ) -> None:
        super().__init__()
        self.router = FrozenRouter(width, experts)
        self.experts = nn.ModuleList(copy.deepcopy(dense) for _ in range(experts))
        self.meta_expert = dense if meta_expert else None
        self.capacity = capacity
        self.routed = True
        """False leaves the routed branch out: what is left is the dense model, where there is a meta expert."""
        self.choice_BL: Tensor | None = None
        """Of the last call, for statistics: the expert of each token, dropped ones included."""
        self.dropped = 0
        """Tokens of the last call that found their expert full."""

    def forward(self, hidden_BLD: Tensor) -> Tensor:
        """Expert times gate, plus the meta expert: (B, L, D)."""
        x_TD = hidden_BLD.reshape(-1, hidden_BLD.shape[-1])
        out_TD = torch.zeros_like(x_TD) if self.meta_expert is None else self.meta_expert(x_TD)
        if self.routed:
            choice_T, gate_T = route(self.router(x_TD))
            order, counts = dispatch(choice_T, self.router.weight.shape[0], self.capacity)
            routed = self.run_experts(x_TD[order], counts) * gate_T[order].to(x_TD.dtype).unsqueeze(-1)
            out_TD = out_TD.index_add(0, order, routed.to(out_TD.dtype))
            self.choice_BL = choice_T.detach().view(hidden_BLD.shape[:-1])
            self.dropped = len(choice_T) - len(order)
        return out_TD.view(hidden_BLD.shape)

    def run_experts(self, sorted_TD: Tensor, counts: Sequence[int]) -> Tensor:
        """Each expert on its stretch of tokens: one matmul a projection and expert, no padding, no one-hot.

        An expert without tokens runs on none: its gradients are zeros and not missing, which is what ZeRO waits for.
        """
        stretches = sorted_TD.split(list(counts))
        return torch.cat([expert(part) for expert, part in zip(self.experts, stretches, strict=True)])


def install_experts(decoder: nn.Module, moe: dict[str, Any]) -> None:
    """Replace every ``moe["every"]``-th feed-forward module of a decoder by a mixture, the first layer's first.

    Args:
        decoder: A transformers decoder with ``layers``; changed in place.
        moe: See ``moe_settings``.
    """
    layers: Any = decoder.layers
    width = int(getattr(decoder.config, "hidden_size"))  # noqa: B009  # a config is typed as anything
    for layer in list(layers)[:: moe["every"]]:
        layer.mlp = MoELayer(
            layer.mlp, width, experts=moe["experts"], meta_expert=moe["meta_expert"], capacity=moe["capacity"]
        )


def moe_settings(moe: MoE) -> dict[str, Any]:
    """What a model's configuration keeps of a recipe's experts."""
    return {
        "experts": moe.experts,
        "every": moe.every,
        "meta_expert": moe.meta_expert,
        "capacity": moe.capacity,
        "domains": [list(domain) for domain in moe.domains],
    }


def upcycle(model: Any, moe: MoE, weight_ED: Tensor, bias_E: Tensor) -> None:
    """Turn a dense vision-language model into a mixture of experts, in place.

    Args:
        model: A ``MedVLMForConditionalGeneration`` without experts.
        moe: Of the recipe.
        weight_ED: Of the router, one row an expert; every layer gets the same.
        bias_E: Of the router.

    Raises:
        ValueError: The model has experts already, or the router is of another shape.
    """
    width = model.config.text_config.hidden_size
    if model.config.moe is not None:
        raise ValueError("the model has experts already")
    if tuple(weight_ED.shape) != (moe.experts, width) or tuple(bias_E.shape) != (moe.experts,):
        raise ValueError(
            f"the router is {tuple(weight_ED.shape)} with {tuple(bias_E.shape)} biases, "
            f"the model needs ({moe.experts}, {width})"
        )
    model.config.moe = moe_settings(moe)
    install_experts(model.model.language_model, model.config.moe)
    for _, layer in moe_layers(model):
        layer.router.weight.copy_(weight_ED)
        layer.router.bias.copy_(bias_E)
        if moe.expert_start == "silent":
            for expert in layer.experts:
                _silence(expert)


def _silence(expert: nn.Module) -> None:
    projection: Any = next(getattr(expert, name) for name in _OUTPUT_PROJECTIONS if hasattr(expert, name))
    with torch.no_grad():
        for parameter in projection.parameters():
            parameter.zero_()


def moe_layers(model: nn.Module) -> Iterator[tuple[int, MoELayer]]:
    """Index and mixture of every upcycled layer, from below; also of one that is spread over processes."""
    for name, module in model.named_modules():
        if getattr(module, "is_mixture", False):
            layer: Any = module
            yield int(name.split(".layers.")[1].split(".")[0]), layer
