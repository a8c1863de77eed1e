"""QLoRA: the language model in 4 bits, adapters beside it, and a checkpoint that is what was trained."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from twin_case import fill

from medvlm.config import load_recipe
from medvlm.errors import RecipeError, TrainingError
from medvlm.models.checkpoint import build_model, load_checkpoint
from medvlm.models.tokenizer import train_tokenizer
from medvlm.recipe_schema import Recipe
from medvlm.store import Workspace
from medvlm.training.engine import Engine
from medvlm.training.lora import attach, detach, take_adapter
from medvlm.training.params import freeze, parameter_counts
from medvlm.training.quantised import pack, packed_for_adapters, unpack, with_packed_weights

NAME = "tiny-stllava-med"
SMALL = [
    "model.vision_tower.hidden_size=32",
    "model.vision_tower.mlp_size=32",
    "model.vision_tower.layers=3",
    "model.language_model.hidden_size=64",
    "model.language_model.mlp_size=128",
    "model.language_model.layers=2",
    "stages.align.max_steps=2",
    "stages.instruct.max_steps=5",
    "stages.instruct.global_batch=8",
    "stages.instruct.micro_batch=4",
    "stages.instruct.lora.language_model.rank=4",
    "stages.instruct.lora.language_model.alpha=8",
    "stages.instruct.zero_stage=2",
    "checkpoints.every=0.3",
]
QLORA = "stages.instruct.lora.quantisation=nf4"
ENGINE = Engine("cpu", "fp32", "sdpa", 1, 0, 4, 2, 2, False)


def recipe_with(*changes: str) -> Recipe:
    return load_recipe(NAME, [*SMALL, QLORA, *changes])


def logits(model: Any) -> torch.Tensor:
    image = model.config.image_token_id
    ids = torch.tensor([[1, *[image] * 16, 7, 8, 9]])
    pixels = torch.randn((1, 3, 96, 96), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return model.eval()(input_ids=ids, pixel_values=pixels).logits


def packed_model(recipe: Recipe) -> tuple[Any, torch.Tensor]:
    """A model with packed layers and adapters that are not zero, and its logits before packing."""
    model: Any = build_model(recipe, train_tokenizer(recipe, ["Is there a lesion?"]))
    before = logits(model)
    stage = recipe.stages[1]
    assert pack(model, stage, ENGINE) == 2 * 7
    with packed_for_adapters(model, stage):
        attach(model, recipe, stage)
    freeze(model, stage)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model, before


def test_packed_layers_are_small_frozen_and_near_what_they_were() -> None:
    recipe = recipe_with("stages.instruct.lora.vision_tower=null", "stages.instruct.trains=[projector, language_model]")
    model: Any = build_model(recipe, train_tokenizer(recipe, ["Is there a lesion?"]))
    counts, before = parameter_counts(model), logits(model)
    weight = model.model.language_model.layers[0].mlp.up_proj.weight.detach().clone()
    pack(model, recipe.stages[1], ENGINE)
    layer = model.model.language_model.layers[0].mlp.up_proj
    # Two weights a byte; where the published 0.516 bytes come from.
    assert layer.weight.dtype == torch.uint8 and layer.weight.numel() == 64 * 128 // 2
    assert parameter_counts(model)["parameters"] == counts["parameters"]
    after = logits(model)
    assert not torch.equal(after, before)
    # Half the mean gap of NF4's levels (QLoRA, appendix E), for weights from a normal distribution: some 9 %.
    assert 0.05 < (layer.values() - weight).norm() / weight.norm() < 0.12
    unpack(model)
    # What the 4 bits hold, and no third thing.
    torch.testing.assert_close(logits(model), after, atol=1e-4, rtol=1e-4)


def test_the_merged_weights_are_those_that_the_adapters_learned_beside() -> None:
    recipe = recipe_with()
    stage = recipe.stages[1]
    model, _ = packed_model(recipe)
    trained = logits(model)
    plain: Any = build_model(recipe, train_tokenizer(recipe, ["Is there a lesion?"]))
    weights, adapter = take_adapter(with_packed_weights(model, model.state_dict()), stage)
    assert adapter is not None and set(weights) == set(plain.state_dict())
    plain.load_state_dict(weights)
    torch.testing.assert_close(logits(plain), trained, atol=1e-4, rtol=1e-3)
    detach(model)
    unpack(model)
    assert set(model.state_dict()) == set(weights)
    assert not any(type(layer).__name__ == "PackedLinear" for layer in model.modules())


@pytest.fixture
def aligned(tmp_path: Path) -> Workspace:
    from medvlm.training.run import run_stage

    workspace = fill(Workspace(tmp_path / "ws"))
    run_stage(workspace, recipe_with(), 1)
    return workspace


def losses(workspace: Workspace, *changes: str, fresh: bool = True) -> list[float]:
    from medvlm.training.run import run_stage

    report = run_stage(workspace, recipe_with(*changes), 2, fresh=fresh)
    return [point["loss"] for point in report.details["curves"]["all"]]


def test_a_stage_trains_over_4_bits_at_every_zero_stage_it_may_have(aligned: Workspace) -> None:
    plain = losses(aligned, "stages.instruct.zero_stage=0")
    folder = aligned.checkpoint(NAME, 2)
    assert plain[-1] < plain[0] and len(set(plain)) == 5
    end = load_file(folder / "model.safetensors")
    assert set(end) == set(load_file(aligned.checkpoint(NAME, 1) / "model.safetensors"))
    assert all(value.dtype == torch.float32 for value in end.values())
    assert logits(load_checkpoint(folder).model).isfinite().all()
    for zero_stage in (1, 2):
        changes = [f"stages.instruct.zero_stage={zero_stage}", "stages.instruct.gradient_checkpointing='on'"]
        assert losses(aligned, *changes) == pytest.approx(plain, abs=1e-4), zero_stage


def test_a_killed_run_resumes_exactly_with_the_same_4_bits(aligned: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    from medvlm.training import objectives
    from medvlm.training.run import run_stage

    unbroken = losses(aligned)
    whole = load_file(aligned.checkpoint(NAME, 2) / "model.safetensors")
    shutil.rmtree(aligned.stage(NAME, 2))
    calls: list[int] = []

    def dies(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 7:  # two micro-batches a step: in the fourth step, after the checkpoint of the second
            raise KeyboardInterrupt
        return objectives.answer_loss(*arguments)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setitem(objectives.OBJECTIVES, "answer", dies)
        run_stage(aligned, recipe_with(), 2, fresh=True)
    kept = aligned.scratch("train", NAME, "stage2", "all") / "checkpoint-2" / "model.safetensors"
    assert not any(name.endswith("proj.base_layer.weight") for name in load_file(kept) if "language_model" in name)
    assert losses(aligned, fresh=False) == pytest.approx(unbroken, abs=1e-6)
    resumed = load_file(aligned.checkpoint(NAME, 2) / "model.safetensors")
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("stages.instruct.zero_stage=3", "zero_stage 3 exclude each other"),
        ("stages.instruct.lora.language_model=null", "needs lora.language_model"),
        ("stages.instruct.lora.quantisation=int3", "nf4"),
    ],
)
def test_what_4_bits_cannot_do_is_refused_when_the_recipe_is_read(change: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        recipe_with(change)


def test_without_bitsandbytes_the_next_step_is_said(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    from medvlm.training.run import run_stage

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else real(name))
    with pytest.raises(TrainingError, match="bitsandbytes, which is not installed") as caught:
        run_stage(workspace, recipe_with(), 2)
    assert "medvlm[qlora]" in caught.value.hint and "lora.quantisation=null" in caught.value.hint


def test_the_plan_knows_of_4_bits() -> None:
    from medvlm.training.hardware import parse_hardware
    from medvlm.training.plan import make_plan

    hardware = parse_hardware("1xT4")
    settings = ["stages.instruct.zero_stage=2", "stages.instruct.micro_batch=1"]
    plain, packed = (
        make_plan(load_recipe("stllava-med", [*settings, *more]), hardware).stages[1] for more in ((), (QLORA,))
    )
    assert (plain.tuning, packed.tuning) == ("lora", "qlora")
    # 6.5 thousand million weights of Vicuna-7B's layers: 2 bytes each, and 0.516.
    assert plain.memory_gib["weights"] - packed.memory_gib["weights"] == pytest.approx(
        6.476e9 * 1.484 / 2**30, rel=0.01
    )
    assert not plain.fits and packed.fits
    assert all(choice.zero_stage < 3 for choice in packed.choices if choice.tuning == "qlora")
