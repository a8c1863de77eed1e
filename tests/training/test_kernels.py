"""Which kernels a stage runs with, chosen without a GPU; what compiling and sharing memory leave as it is."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from medvlm.config import load_recipe
from medvlm.models import checkpoint
from medvlm.recipe_schema import Recipe, Stage
from medvlm.training.engine import choose_engine
from medvlm.training.kernels import compile_layers, liger_serves, prepare_kernels


def stage_of(*overrides: str, name: str = "tiny-llava-med") -> tuple[Recipe, Stage]:
    recipe = load_recipe(name, overrides)
    return recipe, recipe.stages[1]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Packages that are there, whatever this machine has."""
    found: set[str] = {"liger_kernel", "triton"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: object() if name in found else None)
    return found


def test_liger_serves_where_it_is_installed_and_a_gpu_runs_it(installed: set[str]) -> None:
    recipe, stage = stage_of()
    assert liger_serves(recipe, stage, cuda=True)
    assert not liger_serves(recipe, stage, cuda=False)
    assert not liger_serves(*stage_of("stages.instruct.speed.liger=false"), cuda=True)
    assert not liger_serves(*stage_of(name="tiny-cliva-med-phi2"), cuda=True)
    installed.remove("triton")
    assert not liger_serves(recipe, stage, cuda=True)


@pytest.mark.parametrize("moe", [None, {"experts": 4}])
def test_liger_gets_the_language_model_and_leaves_mixtures_alone(
    monkeypatch: pytest.MonkeyPatch, moe: dict[str, int] | None
) -> None:
    recipe, stage = stage_of()
    chosen = dataclasses.replace(choose_engine(recipe, stage), liger=True, onednn=False, packing="off")
    asked: dict[str, Any] = {}
    module: Any = ModuleType("liger_kernel.transformers")
    module._apply_liger_kernel_to_instance = asked.update
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", module)
    decoder = object()
    config = SimpleNamespace(moe=moe, _attn_implementation="sdpa")
    model: Any = SimpleNamespace(model=SimpleNamespace(language_model=decoder), config=config, head_tokens=8)
    prepare_kernels(model, stage, chosen)
    assert asked["model"] is decoder and asked["rms_norm"] and asked["swiglu"] is (moe is None)
    assert not asked["cross_entropy"] and not asked["fused_linear_cross_entropy"] and model.head_tokens == 8


def test_the_engine_says_how_rows_are_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "rows packed (blocks)" in str(choose_engine(*stage_of()))
    assert "rows packed (mask)" in str(choose_engine(*stage_of("stages.instruct.speed.compile=true")))
    assert "packed" not in str(choose_engine(*stage_of("stages.instruct.speed.packing=false")))
    monkeypatch.setattr(checkpoint, "attention_implementation", lambda: "flash_attention_2")
    assert "rows packed (varlen)" in str(choose_engine(*stage_of("stages.instruct.precision=bf16")))
    # Flash-attention has no kernel for float32: a stage in it would crash.
    assert choose_engine(*stage_of("stages.instruct.precision=fp32")).attention == "sdpa"


def test_linear_layers_go_through_onednn_in_float32_on_a_cpu() -> None:
    assert "oneDNN linear layers" in str(choose_engine(*stage_of()))
    for off in ("speed.onednn=false", "speed.compile=true", "precision=bf16"):
        assert "oneDNN" not in str(choose_engine(*stage_of(f"stages.instruct.{off}")))


def test_activations_are_recomputed_where_memory_is_short_without(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not choose_engine(*stage_of()).gradient_checkpointing
    assert choose_engine(*stage_of("stages.instruct.gradient_checkpointing=on")).gradient_checkpointing
    memory = SimpleNamespace(total=2**30)
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    large = stage_of(name="smol-llava-med")
    assert choose_engine(*large).gradient_checkpointing
    memory.total = 2**40
    assert not choose_engine(*large).gradient_checkpointing


def test_layers_with_experts_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from torch import nn

    from medvlm.models.moe import MoELayer

    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **_: compiled.append(self))
    dense, mixed = nn.Module(), nn.Module()
    dense.mlp, mixed.mlp = nn.Linear(2, 2), torch.nn.Module.__new__(MoELayer)
    nn.Module.__init__(mixed.mlp)
    model = SimpleNamespace(model=SimpleNamespace(language_model=SimpleNamespace(layers=[dense, mixed])))
    assert compile_layers(model) == 1 and compiled == [dense]
