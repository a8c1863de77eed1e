"""What a job runs on: device, precision, attention, ZeRO stage, batch split. Chosen here, and said aloud."""

from __future__ import annotations

import importlib.util
import logging
import os
import socket
import sys
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from medvlm.errors import TrainingError
from medvlm.recipe_schema import Recipe, Stage
from medvlm.training.packing import Packing

__all__ = [
    "Engine",
    "choose_engine",
    "deepspeed_config",
    "free_port",
    "prepared_environment",
    "quiet_libraries",
    "split_batch",
]


@dataclass(frozen=True, slots=True)
class Engine:
    """The choices of one training job."""

    device: str
    """``cpu`` or ``cuda``."""
    precision: str
    """``fp32``, ``bf16`` or ``fp16``."""
    attention: str
    processes: int
    rank: int
    micro_batch: int
    """Sequences a process holds at once."""
    accumulation: int
    """Micro-batches an optimiser step."""
    zero_stage: int
    gradient_checkpointing: bool
    packing: Packing = "off"
    """``varlen`` with flash-attention, ``mask`` with compiled layers, ``blocks`` elsewhere, or ``off``."""
    liger: bool = False
    onednn: bool = False
    compiled: bool = False

    def __str__(self) -> str:
        plural = "process" if self.processes == 1 else "processes"
        more = {
            f", rows packed ({self.packing})": self.packing != "off",
            ", gradient checkpointing": self.gradient_checkpointing,
            ", Liger kernels": self.liger,
            ", oneDNN linear layers": self.onednn,
            ", compiled layers": self.compiled,
        }
        return (
            f"{self.processes} {plural} on {self.device}, {self.precision}, {self.attention} attention, "
            f"ZeRO-{self.zero_stage}, micro-batch {self.micro_batch} x {self.accumulation}"
            f"{''.join(words for words, on in more.items() if on)}"
        )


@contextmanager
def prepared_environment() -> Generator[None]:
    """What DeepSpeed reads from the environment, set before it is imported; a launcher's values are kept.

    A single process is its own launcher, which saves the launcher's start. Its rank and port are taken away
    at the end: a process that it starts later is not a rank of this job.
    """
    # Before torch is imported: its threads shall sleep while they wait, not spin. Where another process
    # wants the cores too, spinning made the twin's stages up to ten times slower (measured).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # What accelerate would choose, with a warning.
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
    own = {} if "RANK" in os.environ else _single_rank()
    os.environ.update(own)
    # DeepSpeed's tuner imports mlflow where it is installed: a second of each start that only a tracked run needs.
    hidden = "mlflow" not in sys.modules and not any(name.startswith("MLFLOW_") for name in os.environ)
    if hidden:
        sys.modules["mlflow"] = None  # type: ignore[assignment]  # as Python has it: an import of it fails
    try:
        yield
    finally:
        if hidden:
            del sys.modules["mlflow"]
        for name in own:
            os.environ.pop(name, None)


def free_port() -> int:
    """A port of this host that nobody listens on: two jobs must not meet on one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _single_rank() -> dict[str, str]:
    return {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }


def choose_engine(recipe: Recipe, stage: Stage) -> Engine:
    """The choices for a stage on this machine.

    Raises:
        TrainingError: The global batch does not split over the processes, or the precision is not there.
    """
    import torch

    from medvlm.models.checkpoint import attention_implementation
    from medvlm.training.kernels import liger_serves
    from medvlm.training.onednn import onednn_serves

    cuda = torch.cuda.is_available()
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    micro_batch, accumulation = split_batch(recipe, stage, processes)
    precision = _precision(recipe, stage, cuda)
    # Flash-attention has no kernel for float32.
    attention = "sdpa" if precision == "fp32" else attention_implementation()
    # A pair's two answers stand side by side, each in a row of its own.
    packed = stage.speed.packing and stage.objective != "dpo"
    return Engine(
        device="cuda" if cuda else "cpu",
        precision=precision,
        attention=attention,
        processes=processes,
        rank=int(os.environ.get("RANK", "0")),
        micro_batch=micro_batch,
        accumulation=accumulation,
        zero_stage=stage.zero_stage,
        gradient_checkpointing=_checkpointing(recipe, stage, cuda, processes, micro_batch),
        packing=_packing(stage, attention) if packed else "off",
        liger=liger_serves(recipe, stage, cuda=cuda),
        # A compiled layer chooses its own products.
        onednn=stage.speed.onednn and precision == "fp32" and not (cuda or stage.speed.compile) and onednn_serves(),
        compiled=stage.speed.compile,
    )


def _packing(stage: Stage, attention: str) -> Packing:
    if attention == "flash_attention_2":
        return "varlen"
    # Every batch has other lengths, and a compiled layer would be compiled anew for each.
    return "mask" if stage.speed.compile else "blocks"


def _checkpointing(recipe: Recipe, stage: Stage, cuda: bool, processes: int, micro_batch: int) -> bool:
    """As ``medvlm plan`` has it for this machine's device; processes of one host without GPUs share its memory."""
    if stage.gradient_checkpointing != "auto":
        return stage.gradient_checkpointing == "on"
    import torch

    from medvlm.training.footprint import Setup, model_shape, own_tuning, recomputes
    from medvlm.training.hardware import Device, parse_hardware

    if cuda:
        gib = torch.cuda.get_device_properties(int(os.environ.get("LOCAL_RANK", "0"))).total_memory / 2**30
        device = Device("this GPU", 0, gib, 0, _precision(recipe, stage, cuda))
    else:
        device = parse_hardware("CPU").device
        device = replace(device, gib=device.gib / int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    setup = Setup(
        device=device,
        processes=processes,
        micro_batch=micro_batch,
        zero_stage=stage.zero_stage,
        tuning=own_tuning(stage),
        gradient_checkpointing=False,
        offload_optimizer=stage.offload_optimizer,
    )
    return recomputes(recipe, stage, model_shape(recipe, stage), setup)


def split_batch(recipe: Recipe, stage: Stage, processes: int) -> tuple[int, int]:
    """Sequences that a process holds at once, and micro-batches of an optimiser step.

    Raises:
        TrainingError: The global batch does not split over the processes.
    """
    if stage.global_batch % processes:
        raise TrainingError(
            f"global_batch {stage.global_batch} does not split over {processes} processes",
            where=f"recipe {recipe.name}, field stages.{stage.name}.global_batch",
            hint=f"use a number of processes that divides {stage.global_batch}",
        )
    share = stage.global_batch // processes
    micro_batch = next(size for size in range(min(stage.micro_batch, share), 0, -1) if share % size == 0)
    return micro_batch, share // micro_batch


def _precision(recipe: Recipe, stage: Stage, cuda: bool) -> str:
    import torch

    if stage.precision == "auto":
        # On a CPU without bf16 units autocast is some 35 times slower than fp32 (measured).
        return ("bf16" if torch.cuda.is_bf16_supported() else "fp16") if cuda else "fp32"
    if stage.precision == "fp16" and not cuda:
        raise TrainingError(
            "fp16 training needs a GPU",
            where=f"recipe {recipe.name}, field stages.{stage.name}.precision",
            hint="use auto or fp32",
        )
    return stage.precision


def deepspeed_config(stage: Stage, engine: Engine) -> dict[str, Any]:
    """DeepSpeed's settings; what the Trainer knows too is left to it (``auto``)."""
    zero: dict[str, Any] = {"stage": engine.zero_stage}
    if engine.zero_stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    if stage.offload_optimizer and engine.device == "cuda":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "steps_per_print": 10**9,
    }


def quiet_libraries() -> None:
    """Send the libraries' logs to standard error, warnings only, and avoid a compile that no run needs."""
    for name in ("deepspeed", "DeepSpeed", "transformers", "accelerate"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.WARNING)
        for handler in logger.handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream in (sys.stdout, sys.__stdout__):
                handler.setStream(sys.stderr)
    # DeepSpeed calls collectives by names that torch renames; the warning comes anew at every step.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    if importlib.util.find_spec("deepspeed"):
        from deepspeed.ops import __compatible_ops__ as compatible

        # The shared-memory all-reduce of CPU processes: minutes of g++ at the first run, and gloo does it too.
        compatible["deepspeed_shm_comm"] = False
