"""Experts spread over two processes give what the plain mixture gives."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

CASE = Path(__file__).with_name("expert_parallel_case.py")


def test_two_processes_agree_with_one_in_outputs_and_gradients() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "DEEPSPEED_LOG_LEVEL": "warning"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(CASE)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    for rank, process in enumerate(processes):
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err[-3000:]
        assert f"rank {rank} agrees" in out


def test_what_cannot_be_spread_is_refused() -> None:
    from torch import nn

    from medvlm.models.expert_parallel import ParallelMoELayer
    from medvlm.models.moe import MoELayer

    def layer(capacity: float | None) -> MoELayer:
        return MoELayer(nn.Linear(4, 4), 4, experts=4, meta_expert=True, capacity=capacity)

    with pytest.raises(ValueError, match="4 experts do not spread over 3"):
        ParallelMoELayer(layer(None), 3)
    with pytest.raises(ValueError, match="capacity"):
        ParallelMoELayer(layer(1.0), 2)
