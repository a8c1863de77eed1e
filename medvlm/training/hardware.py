"""Accelerators as data: what a plan reckons with."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass

from medvlm.errors import InputError

__all__ = ["DEVICES", "Device", "Hardware", "parse_hardware"]


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator. Peaks are nominal: dense, without sparsity, in the precision that it trains in."""

    name: str
    tflops: float
    """10^12 floating-point operations a second: bf16 (fp16 where it has no bf16), on a CPU fp32."""
    gib: float
    """Its memory."""
    link_gb_s: float
    """10^9 bytes a second that one device sends to the others: NVLink where its servers have it, else PCIe."""
    precision: str
    """What ``precision: auto`` chooses there."""

    @property
    def is_gpu(self) -> bool:
        """Whether it is a GPU."""
        return self.precision != "fp32"


# NVIDIA's data sheets: tensor cores with fp32 accumulation, dense; memory as sold; NVLink one way, PCIe x16 one way.
_TABLE = (
    Device("A100-40G", 312, 40, 300, "bf16"),
    Device("A100-80G", 312, 80, 300, "bf16"),
    Device("H100-80G", 989, 80, 450, "bf16"),
    Device("H200-141G", 989, 141, 450, "bf16"),
    Device("L40S-48G", 362, 48, 32, "bf16"),
    Device("A6000-48G", 155, 48, 32, "bf16"),
    Device("A10G-24G", 70, 24, 32, "bf16"),
    Device("4090-24G", 165, 24, 32, "bf16"),
    Device("3090-24G", 71, 24, 32, "bf16"),
    Device("V100-32G", 125, 32, 150, "fp16"),
    Device("V100-16G", 125, 16, 150, "fp16"),
    Device("T4-16G", 65, 16, 16, "fp16"),
)
DEVICES = {device.name: device for device in _TABLE}
"""By name; a name may be given without its memory where one size is in the table (H100, 3090, RTX4090)."""

_CPU_CORE_TFLOPS = 0.08
"""AVX2 at 2.5 GHz: 2 fused multiply-adds x 8 lanes x 2 operations."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """So many of one device."""

    count: int
    device: Device

    def __str__(self) -> str:
        return f"{self.count}x{self.device.name}"


def parse_hardware(text: str) -> Hardware:
    """``8xA100-40G``, ``1x3090``, ``H100`` or ``CPU`` (this machine's cores and memory, one process).

    Raises:
        InputError: There is no such device in the table, or the count is not a positive number.
    """
    match = re.fullmatch(r"(?:(\d+)\s*[x×*]\s*)?(?:nvidia[ -]?)?(?:rtx[ -]?)?([a-z0-9-]+)", text.strip().lower())
    if not match or match[1] == "0" or (match[1] and int(match[1]) > 100_000):
        raise InputError(f"{text!r} is not hardware", where="--hardware", hint="write it as 8xA100-40G")
    count, name = int(match[1] or 1), match[2].upper()
    if name == "CPU":
        return Hardware(count, _this_cpu())
    found = [d for d in _TABLE if name in (d.name, d.name.removesuffix("G"))] or [
        d for d in _TABLE if d.name.startswith(f"{name}-")
    ]
    if len(found) == 1:
        return Hardware(count, found[0])
    known = ", ".join([*DEVICES, "CPU"])
    if found:
        raise InputError(
            f"{name} comes with different memories", where=f"--hardware {text}", hint=" or ".join(d.name for d in found)
        )
    close = difflib.get_close_matches(name, DEVICES, n=1)
    guess = f"; did you mean {close[0]}?" if close else ""
    raise InputError(f"there is no device {name} in the table{guess}", where=f"--hardware {text}", hint=known)


def _this_cpu() -> Device:
    import psutil

    cores = len(os.sched_getaffinity(0))
    gib = round(psutil.virtual_memory().total / 2**30, 1)
    return Device("CPU", cores * _CPU_CORE_TFLOPS, gib, 10, "fp32")
