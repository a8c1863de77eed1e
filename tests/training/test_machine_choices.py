"""What a stage runs on is chosen for the machine, and said; a GPU is played, as none is here."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import medvlm.models.vlm  # noqa: F401  # transformers looks for packages when it is imported: before one is played
from medvlm.config import load_recipe
from medvlm.models.checkpoint import attention_implementation
from medvlm.training.engine import choose_engine

RECIPE = load_recipe("tiny-llava-med")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A GPU of a compute capability, with or without the package flash-attn, and its memory in GiB."""

    def put(capability: int, *, flash: bool, gib: float = 80) -> None:
        real = importlib.util.find_spec
        found = {"flash_attn": real("torch") if flash else None}
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (capability, 0))
        memory = SimpleNamespace(total_memory=int(gib * 2**30))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: capability >= 8)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: found[name] if name in found else real(name))

    return put


@pytest.mark.parametrize(
    ("capability", "flash", "attention", "precision"),
    [
        (8, True, "flash_attention_2", "bf16"),
        (9, True, "flash_attention_2", "bf16"),
        (8, False, "sdpa", "bf16"),
        (7, True, "sdpa", "fp16"),
    ],
)
def test_flash_attention_where_it_is_installed_and_runs_else_sdpa(
    gpu: Any, capability: int, flash: bool, attention: str, precision: str
) -> None:
    gpu(capability, flash=flash)
    engine = choose_engine(RECIPE, RECIPE.stages[0])
    assert (engine.device, engine.attention, engine.precision) == ("cuda", attention, precision)
    said = str(engine)
    assert all(word in said for word in (attention, precision, "on cuda", "ZeRO-2"))


def test_activations_are_made_again_where_a_gpu_is_too_small_for_them(gpu: Any) -> None:
    recipe = load_recipe("llava-med")
    for gib, again in ((24, True), (40, True), (80, False)):
        gpu(8, flash=False, gib=gib)
        engine = choose_engine(recipe, recipe.stages[0])
        assert engine.gradient_checkpointing is again and ("gradient checkpointing" in str(engine)) is again


def test_the_cpu_has_sdpa_in_full_precision_without_checkpointing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    engine = choose_engine(RECIPE, RECIPE.stages[0])
    assert attention_implementation() == engine.attention == "sdpa"
    assert (engine.device, engine.precision, engine.gradient_checkpointing) == ("cpu", "fp32", False)
    assert str(engine).startswith("1 process on cpu, fp32, sdpa attention")
