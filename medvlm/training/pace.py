"""How fast a training goes and how much memory it takes, step by step: for people, never for the weights."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence

import psutil
import torch

__all__ = ["Pace", "pace_metrics"]

Point = dict[str, float]


class Pace:
    """Clock and memory of one process's training.

    Args:
        global_batch: Samples of an optimiser step, of all processes together.
    """

    def __init__(self, global_batch: int) -> None:
        self._global_batch = global_batch
        self._last: tuple[int, float] | None = None
        self.points: list[Point] = []
        """``step``, ``samples_per_second`` since the point before, and ``memory_mb`` at that time."""

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
            rate = (step - self._last[0]) * self._global_batch / max(now - self._last[1], 1e-9)
            self.points.append({"step": step, "samples_per_second": round(rate, 3), "memory_mb": round(_memory_mb())})
        self._last = (step, now)


def _memory_mb() -> float:
    """What the GPU's tensors take, or on the CPU the whole process."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / 1e6
    return psutil.Process().memory_info().rss / 1e6


def pace_metrics(paces: Iterable[Sequence[Mapping[str, float]]]) -> dict[str, float]:
    """``samples_per_second`` over all steps of all runs, and ``peak_memory_mb``; empty where none was trained."""
    points = [point for pace in paces for point in pace]
    if not points:
        return {}
    # Steps are equally large, so the rate over all of them is the harmonic mean.
    rate = len(points) / sum(1 / max(point["samples_per_second"], 1e-9) for point in points)
    return {"samples_per_second": round(rate, 3), "peak_memory_mb": max(point["memory_mb"] for point in points)}
