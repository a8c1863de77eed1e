"""One of two processes: a mixture whose experts are spread, beside the plain one. Run by test_expert_parallel.py."""

from __future__ import annotations

import copy
import os
import sys

os.environ["DS_ACCELERATOR"] = "cpu"
import deepspeed
import torch
import torch.distributed as dist

from medvlm.models.moe import MoELayer
from medvlm.training.engine import quiet_libraries

WIDTH, EXPERTS = 16, 4


def main() -> None:
    quiet_libraries()  # else DeepSpeed compiles an extension for minutes
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    from medvlm.models.expert_parallel import ParallelMoELayer, spread_experts

    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    dense = torch.nn.Sequential(torch.nn.Linear(WIDTH, 24), torch.nn.GELU(), torch.nn.Linear(24, WIDTH))
    plain = MoELayer(dense, WIDTH, experts=EXPERTS, meta_expert=True, capacity=None)
    for parameter in plain.experts.parameters():
        torch.nn.init.normal_(parameter)
    plain.router.weight.normal_()
    plain.router.bias.normal_()
    model = torch.nn.ModuleDict({"mlp": copy.deepcopy(plain)})
    assert spread_experts(model, size) == 1
    spread = model["mlp"]
    assert isinstance(spread, ParallelMoELayer)
    # Each process has tokens of its own, and not the same number for each expert.
    torch.manual_seed(10 + rank)
    x = torch.randn(2, 5 + 4 * rank, WIDTH)
    expected, out = plain(x), spread(x)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert plain.choice_BL is not None and spread.choice_BL is not None
    assert torch.equal(plain.choice_BL, spread.choice_BL)
    expected.square().sum().backward()
    out.square().sum().backward()
    own = EXPERTS // size
    for index in range(EXPERTS):
        for place, theirs in enumerate(plain.experts[index].parameters()):
            assert theirs.grad is not None
            # An expert here has learned from the tokens of all processes.
            dist.all_reduce(theirs.grad)
            if index // own == rank:
                local = spread.spread.deepspeed_moe.experts.deepspeed_experts[index - own * rank]
                ours = list(local.parameters())[place]
                assert ours.grad is not None and ours.allreduce is False
                torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-4)
    local_weights = sum(p.numel() for p in spread.spread.parameters())
    assert local_weights * size == sum(p.numel() for p in plain.experts.parameters())
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.write(f"rank {rank} agrees\n")


if __name__ == "__main__":
    main()
