"""A mixture's forward and backward pass: ours, DeepSpeed's, and a dense module of as many active parameters.

    python benchmarks/moe.py [--tokens 2048] [--width 512] [--mlp 2048] [--trials 9]

Three modules do the same arithmetic for a token: the first choice of four experts beside a module that every token
visits. Ours sorts tokens by expert and multiplies each stretch once. ``deepspeed.moe`` pads each expert's queue to
the longest one, without dropping tokens, as Med-MoE runs it. The dense module is twice as wide: the lower limit. Each
is measured with tokens that spread evenly, and with tokens of which most want one expert.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")

import torch
from torch import nn

from medvlm.models.moe import MoELayer, route
from medvlm.training.engine import prepared_environment, quiet_libraries

EXPERTS = 4
# Share of tokens that want the first expert.
SPREADS = {"even": 0.25, "skewed": 0.7}


class FeedForward(nn.Module):
    """Two linear layers, as of Phi."""

    def __init__(self, width: int, mlp: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, mlp), nn.GELU(approximate="tanh"), nn.Linear(mlp, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What the layers make of tokens."""
        return self.fc2(self.act(self.fc1(x)))


class DeepSpeedMixture(nn.Module):
    """DeepSpeed's layer with our weights, and the meta expert beside it."""

    def __init__(self, ours: MoELayer, width: int) -> None:
        super().__init__()
        from deepspeed.moe.layer import MoE

        self.spread: Any = MoE(
            width, ours.experts[0], num_experts=EXPERTS, k=1, drop_tokens=False, use_rts=False, min_capacity=0
        )
        self.spread.set_deepspeed_parallelism()
        for theirs, expert in zip(self.spread.deepspeed_moe.experts.deepspeed_experts, ours.experts, strict=True):
            theirs.load_state_dict(expert.state_dict())
        self.spread.deepspeed_moe.gate.wg.weight.data.copy_(ours.router.weight)
        self.meta_expert = copy.deepcopy(ours.meta_expert)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What ours gives, where the router has no bias."""
        assert self.meta_expert is not None
        return self.spread(x)[0] + self.meta_expert(x)


def main() -> None:
    """Print seconds of each module and, trial by trial, theirs over ours."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("tokens", 2048), ("width", 512), ("mlp", 2048), ("trials", 9)):
        parser.add_argument(f"--{name}", type=int, default=value)
    arguments = parser.parse_args()
    with prepared_environment():
        import deepspeed

        quiet_libraries()
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
        print(
            f"{arguments.tokens} tokens, width {arguments.width}, feed-forward {arguments.mlp}, {EXPERTS} experts, "
            f"forward and backward, {torch.get_num_threads()} threads, torch {torch.__version__}, "
            f"deepspeed {deepspeed.__version__}"
        )
        for name, share in SPREADS.items():
            measure(name, share, arguments)
        torch.distributed.destroy_process_group()


def measure(name: str, share: float, arguments: argparse.Namespace) -> None:
    """One spread of tokens: a line a module."""
    torch.manual_seed(0)
    width = arguments.width
    ours = MoELayer(FeedForward(width, arguments.mlp), width, experts=EXPERTS, meta_expert=True, capacity=None)
    ours.router.weight[:, :EXPERTS] = 8 * torch.eye(EXPERTS)
    x = torch.randn(1, arguments.tokens, width)
    wanted = torch.multinomial(torch.tensor([share, *[(1 - share) / 3] * 3]), arguments.tokens, replacement=True)
    x[0, :, :EXPERTS] = nn.functional.one_hot(wanted, EXPERTS).float()
    counts = route(ours.router(x[0]))[0].bincount(minlength=EXPERTS).tolist()
    theirs = DeepSpeedMixture(ours, width)
    torch.testing.assert_close(theirs(x), ours(x), atol=1e-4, rtol=1e-4)
    modules = {"ours": ours, "deepspeed.moe": theirs, "dense, as many active": FeedForward(width, 2 * arguments.mlp)}
    seconds: dict[str, list[float]] = {label: [] for label in modules}
    for trial in range(arguments.trials + 1):
        for label, module in modules.items():
            spent = step(module, x)
            if trial:  # the first warms up
                seconds[label].append(spent)
    print(f"  {name}: tokens by expert {counts}; same outputs")
    for label, times in seconds.items():
        ratios = sorted(spent / own for spent, own in zip(times, seconds["ours"], strict=True))
        print(
            f"    {label:22} {statistics.median(times) * 1e3:7.1f} ms   this / ours: "
            f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )


def step(module: nn.Module, x: torch.Tensor) -> float:
    """Seconds of a forward and a backward pass."""
    leaf = x.clone().requires_grad_()
    module.zero_grad()
    started = time.perf_counter()
    module(leaf).square().mean().backward()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
