"""How fast a training goes and how much memory it takes, step by step: for people, never for the weights."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import TrainerCallback

from medvlm.store import read_json, write_json

__all__ = ["Pace", "pace_metrics"]

Point = dict[str, float]
_FILE = "pace.json"


class Pace(TrainerCallback):
    """Clock and memory of one process's training; part of each checkpoint, so that a resumed run has all of it.

    Args:
        global_batch: Samples of an optimiser step, of all processes together.
    """

    def __init__(self, global_batch: int) -> None:
        self._global_batch = global_batch
        self._last: tuple[int, float] | None = None
        self._waited_s = 0.0
        self.points: list[Point] = []
        """``step``, ``samples_per_second`` since the point before and the share of that time in which the trainer
        waited for data (``wait_share``), and ``memory_mb`` at that time."""

    @property
    def begun(self) -> bool:
        """Whether the clock runs."""
        return self._last is not None

    def begin(self, step: int) -> None:
        """Start the clock: ``step`` steps are done."""
        self._last = (step, time.monotonic())

    def add(self, step: int) -> None:
        """A point after a step; none where no step was made since the last."""
        now = time.monotonic()
        if self._last is not None and step > self._last[0]:
            passed_s = max(now - self._last[1], 1e-9)
            self.points.append(
                {
                    "step": step,
                    "samples_per_second": round((step - self._last[0]) * self._global_batch / passed_s, 3),
                    "wait_share": round(min(1.0, self._waited_s / passed_s), 4),
                    "memory_mb": round(_memory_mb()),
                }
            )
            self._waited_s = 0.0
        self._last = (step, now)

    @contextmanager
    def waiting(self) -> Generator[None]:
        """What is done inside is waiting for data."""
        began = time.monotonic()
        yield
        self._waited_s += time.monotonic() - began

    def resume(self, checkpoint: Path) -> None:
        """Go on from the points of a checkpoint; the clock stood still meanwhile."""
        if (checkpoint / _FILE).is_file():
            self.points = read_json(checkpoint / _FILE)["points"]

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the points into the checkpoint, those of its steps."""
        self.add(state.global_step)
        if state.is_world_process_zero:
            write_json(Path(args.output_dir) / f"checkpoint-{state.global_step}" / _FILE, {"points": self.points})


def _memory_mb() -> float:
    """What the GPU's tensors take, or on the CPU the whole process."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / 1e6
    return psutil.Process().memory_info().rss / 1e6


def pace_metrics(paces: Iterable[Sequence[Mapping[str, float]]]) -> dict[str, float]:
    """``samples_per_second``, ``data_wait_share`` and ``peak_memory_mb`` over all steps; empty where none was made."""
    steps = time_s = waited_s = memory_mb = 0.0
    for pace in paces:
        before = 0.0
        for point in pace:
            # A step's samples count as one: the batch is the same for all.
            took = (point["step"] - before) / max(point["samples_per_second"], 1e-9)
            steps, time_s = steps + point["step"] - before, time_s + took
            waited_s += took * point.get("wait_share", 0.0)
            memory_mb, before = max(memory_mb, point["memory_mb"]), point["step"]
    if not time_s:
        return {}
    return {
        "samples_per_second": round(steps / time_s, 3),
        "data_wait_share": round(waited_s / time_s, 4),
        "peak_memory_mb": memory_mb,
    }
