"""Experts spread over processes: each holds a part of them, and tokens travel to their expert and back.

The exchange is DeepSpeed's (``deepspeed.moe``: all-to-all over an expert-parallel group, gradients of experts kept
out of the data-parallel average by their marks). Its gate is replaced by ours: DeepSpeed's has no bias, and the
published routers have one.

Shape letters: T tokens, D model width, E experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from medvlm.models.moe import FrozenRouter, MoELayer, route

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

__all__ = ["ParallelMoELayer", "gather_experts", "spread_experts"]


class _Gate(nn.Module):
    """What DeepSpeed's exchange asks of a gate, answered by the frozen router; no token is dropped."""

    def __init__(self, router: FrozenRouter) -> None:
        super().__init__()
        self.router = router
        self.group: Any = None
        self.choice_T: Tensor | None = None

    def _set_ep_group(self, group: Any) -> None:
        self.group = group

    def forward(self, x_TD: Tensor, used_token: Any, sparse_routes: bool, use_tutel: bool) -> tuple[Any, ...]:
        """Loss (none), capacity, experts, and expert, place and gate of each token, and how many each expert has."""
        experts = self.router.weight.shape[0]
        choice_T, gate_T = route(self.router(x_TD))
        self.choice_T = choice_T.detach()
        counts_E = torch.bincount(choice_T, minlength=experts)
        # The longest queue of all processes: as many places are sent for each expert.
        capacity = counts_E.max()
        if dist.is_initialized():
            dist.all_reduce(capacity, op=dist.ReduceOp.MAX, group=self.group)
        order = choice_T.argsort(stable=True)
        first_E = counts_E.cumsum(0) - counts_E
        place_T = torch.empty_like(order)
        place_T[order] = torch.arange(len(order), device=order.device) - first_E[choice_T[order]]
        no_loss = torch.zeros((), device=x_TD.device)
        routes = (choice_T.int().unsqueeze(0), place_T.int().unsqueeze(0), gate_T.unsqueeze(0))
        return (no_loss, capacity, experts, *routes, counts_E)


class ParallelMoELayer(nn.Module):
    """A mixture whose experts are spread over ``size`` processes; gives what ``MoELayer`` gives without a capacity.

    Args:
        layer: A mixture with the same weights on every process; this process keeps its part of the experts.
        size: Processes that share the experts; divides their number.

    Raises:
        ValueError: It does not, or the mixture drops tokens.
    """

    is_mixture = True

    def __init__(self, layer: MoELayer, size: int) -> None:
        super().__init__()
        from deepspeed.moe.layer import MoE as DeepSpeedMoE

        experts, width = layer.router.weight.shape
        if experts % size:
            raise ValueError(f"{experts} experts do not spread over {size} processes")
        if layer.capacity is not None:
            raise ValueError("experts with a capacity are not spread: which tokens are dropped would change")
        self.router = layer.router
        self.meta_expert = layer.meta_expert
        self.choice_BL: Tensor | None = None
        self.dropped = 0
        self.spread: Any = DeepSpeedMoE(
            width, layer.experts[0], num_experts=experts, ep_size=size, k=1, drop_tokens=False, use_rts=False
        )
        gate = _Gate(layer.router)
        self.spread.deepspeed_moe.gate = gate
        self.spread.set_deepspeed_parallelism()
        self._gate = [gate]  # in a list: it is a part of the exchange already
        self.group: Any = self.spread.deepspeed_moe.ep_group
        first = len(self.own_experts) * dist.get_rank(self.group)
        for index, expert in enumerate(self.own_experts):
            expert.load_state_dict(layer.experts[first + index].state_dict())

    @property
    def own_experts(self) -> list[nn.Module]:
        """Those of this process."""
        return list(self.spread.deepspeed_moe.experts.deepspeed_experts)

    def forward(self, hidden_BLD: Tensor) -> Tensor:
        """Expert times gate, plus the meta expert: (B, L, D)."""
        routed_BLD, _, _ = self.spread(hidden_BLD)
        choice_T: Any = self._gate[0].choice_T
        self.choice_BL = choice_T.view(hidden_BLD.shape[:-1])
        return routed_BLD if self.meta_expert is None else routed_BLD + self.meta_expert(hidden_BLD)


def gather_experts(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state under the names of the plain mixture, with the experts of all processes. Every process takes part.

    Args:
        model: With mixtures that ``spread_experts`` spread.
        state: Of this process: its own experts, and all else; not changed.
    """
    weights = dict(state)
    for prefix, layer in model.named_modules():
        if not isinstance(layer, ParallelMoELayer):
            continue
        own = f"{prefix}.spread.deepspeed_moe.experts.deepspeed_experts"
        count, size = len(layer.own_experts), dist.get_world_size(layer.group)
        for place in range(size):
            source = dist.get_global_rank(layer.group, place)
            for index in range(count):
                for name, like in layer.own_experts[index].state_dict().items():
                    mine = state.get(f"{own}.{index}.{name}")
                    holds = source == dist.get_rank() and mine is not None
                    value = mine.to(like.device) if holds and mine is not None else torch.empty_like(like)
                    dist.broadcast(value, src=source, group=layer.group)
                    weights[f"{prefix}.experts.{place * count + index}.{name}"] = value.cpu()
        weights = {name: value for name, value in weights.items() if not name.startswith(f"{prefix}.spread.")}
    return weights


def spread_experts(model: nn.Module, size: int) -> int:
    """Spread the experts of every mixture of a model over ``size`` processes, in place.

    Args:
        model: With the same weights on every process; ``torch.distributed`` runs.
        size: Processes that share the experts.

    Returns:
        How many mixtures were spread.

    Raises:
        ValueError: The experts do not spread over so many processes, or have a capacity.
    """
    parents = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, MoELayer)
    ]
    for parent, name, layer in parents:
        setattr(parent, name, ParallelMoELayer(layer, size))
    return len(parents)
