"""Adapters: rates that fit their size, weights that take them up exactly, runs that resume exactly."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from twin_case import fill

from medvlm.config import load_recipe
from medvlm.errors import RecipeError
from medvlm.models.checkpoint import build_model, load_checkpoint
from medvlm.models.tokenizer import train_tokenizer
from medvlm.recipe_schema import Recipe
from medvlm.store import Workspace
from medvlm.training.lora import attach, detach, is_adapter, is_saved, rate_ratio, take_adapter
from medvlm.training.params import freeze, parameter_groups

SMALL = [
    "model.vision_tower.hidden_size=32",
    "model.vision_tower.mlp_size=32",
    "model.vision_tower.layers=3",
    "model.language_model.hidden_size=32",
    "model.language_model.mlp_size=48",
    "model.language_model.layers=2",
    "stages.align.max_steps=2",
    "stages.instruct.max_steps=8",
    "stages.instruct.global_batch=8",
    "stages.instruct.micro_batch=4",
    "stages.instruct.lora.language_model.rank=4",
    "stages.instruct.lora.language_model.alpha=8",
]


SAVED = ["stages.instruct.lora.modules_to_save={modules: [embed_tokens, lm_head], learning_rate: 2e-5}"]
NONE_SAVED = ["stages.instruct.lora.modules_to_save=null"]


def recipe_with(*changes: str) -> Recipe:
    return load_recipe("tiny-stllava-med", [*SMALL, *changes])


def model_with(recipe: Recipe) -> Any:
    return build_model(recipe, train_tokenizer(recipe, ["Is there a lesion?"])).eval()


def logits(model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    image = model.config.image_token_id
    ids = torch.tensor([[1, *[image] * 16, 7, 8, 9]])
    # An adapter that was just attached would drop out.
    model.eval()
    return model(input_ids=ids, pixel_values=torch.randn((1, 3, 96, 96), generator=generator)).logits


def disturbed(model: Any) -> None:
    """Second matrices that are no longer zero, a projector, a table and a head that have moved, as after training."""
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
            if parameter.requires_grad and not is_adapter(name):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def test_a_fresh_adapter_changes_nothing_and_is_drawn_from_the_seed() -> None:
    recipe = recipe_with()
    first, second = model_with(recipe), model_with(recipe)
    before = logits(first)
    attach(first, recipe, recipe.stages[1])
    attach(second, recipe, recipe.stages[1])
    assert torch.equal(logits(first), before)
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize(("changes", "whole"), [(NONE_SAVED, ()), (SAVED, ("embed_tokens", "lm_head"))])
def test_only_adapters_and_what_is_named_beside_them_learn(changes: list[str], whole: tuple[str, ...]) -> None:
    recipe = recipe_with(*changes)
    model = model_with(recipe)
    attach(model, recipe, recipe.stages[1])
    freeze(model, recipe.stages[1])
    for name, parameter in model.named_parameters():
        learns = is_adapter(name) or any(module in name for module in ("multi_modal_projector", *whole))
        assert parameter.requires_grad == learns, name
    logits(model).square().sum().backward()
    for name, parameter in model.named_parameters():
        # The second matrix is zero, so nothing reaches the first one yet; everything else gets a gradient.
        assert not parameter.requires_grad or parameter.grad is not None, name


def test_layers_whose_features_are_not_read_get_no_adapter() -> None:
    recipe = recipe_with()
    model = model_with(recipe)
    attach(model, recipe, recipe.stages[1])
    numbers = {
        name.split(".layers.")[1][0] for name, _ in model.model.vision_tower.named_parameters() if is_adapter(name)
    }
    assert numbers == {"0", "1"}


@pytest.mark.parametrize("changes", [NONE_SAVED, SAVED])
def test_merging_is_exact_and_leaves_the_names_of_a_plain_model(changes: list[str]) -> None:
    recipe = recipe_with(*changes)
    model, plain = model_with(recipe), model_with(recipe)
    attach(model, recipe, recipe.stages[1])
    freeze(model, recipe.stages[1])
    disturbed(model)
    expected = logits(model)
    weights, adapter = take_adapter(model.state_dict(), recipe.stages[1])
    assert adapter is not None and set(weights) == set(plain.state_dict())
    assert not torch.allclose(logits(plain), expected, atol=1e-3)
    plain.load_state_dict(weights)
    torch.testing.assert_close(logits(plain), expected, atol=1e-5, rtol=1e-4)
    detach(model)
    assert set(model.state_dict()) == set(weights)
    start, end = model_with(recipe).state_dict(), model.state_dict()
    # What learned with its own weights has no others to go back to.
    moved = {name for name, value in start.items() if not torch.equal(value, end[name])}
    assert all("projector" in name or is_saved(name, recipe.stages[1]) for name in moved)
    assert len({name for name in moved if is_saved(name, recipe.stages[1])}) == len(recipe.stages[1].saved_modules)


# peft's own: it asks transformers by a name that transformers renames.
PEFT = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"


@pytest.mark.filterwarnings(PEFT)
@pytest.mark.parametrize("changes", [NONE_SAVED, SAVED, ["stages.instruct.lora.modules_to_save.modules=[lm_head]"]])
def test_the_kept_adapter_opens_with_peft_on_the_start(tmp_path: Path, changes: list[str]) -> None:
    """Two ranks and what learned whole in one file: peft gives the merged model's answers."""
    from peft import PeftModel

    recipe = recipe_with(*changes)
    model = model_with(recipe)
    attach(model, recipe, recipe.stages[1])
    freeze(model, recipe.stages[1])
    disturbed(model)
    expected = logits(model)
    _, adapter = take_adapter(model.state_dict(), recipe.stages[1])
    assert adapter is not None
    assert adapter.config["modules_to_save"] == ["multi_modal_projector", *recipe.stages[1].saved_modules]
    adapter.save(tmp_path / "adapter")
    opened = PeftModel.from_pretrained(model_with(recipe), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(logits(opened), expected, atol=1e-5, rtol=1e-4)


def test_a_stage_without_adapters_keeps_its_weights() -> None:
    recipe = load_recipe("tiny-llava-med", SMALL[:6])
    model = model_with(recipe)
    weights, adapter = take_adapter(model.state_dict(), recipe.stages[1])
    assert adapter is None and list(weights) == list(model.state_dict())


def test_rates_at_the_published_size_are_the_published_ones() -> None:
    full = load_recipe("stllava-med")
    instruct, prefer = full.stages[1:]
    for part in ("vision_tower", "language_model"):
        spec = instruct.adapter(part)
        assert (
            spec is not None and rate_ratio(full, part, spec, "lora_A") == rate_ratio(full, part, spec, "lora_B") == 1
        )
    assert [instruct.rate(part) for part in instruct.trains] == [5e-5, 2e-5, 2e-4]
    assert [prefer.rate(part) for part in prefer.trains] == [2e-5, 2e-5, 5e-6]
    # Their language model has learned before: nothing of it but its adapter does here.
    assert [stage.saved_modules for stage in full.stages] == [(), (), ()]


def test_each_matrix_has_its_own_rate() -> None:
    recipe = recipe_with()
    stage = recipe.stages[1]
    model = model_with(recipe)
    attach(model, recipe, stage)
    freeze(model, stage)
    rates: dict[int, float] = {
        id(parameter): group["lr"] for group in parameter_groups(model, recipe, stage) for parameter in group["params"]
    }
    named = {name: rates[id(p)] for name, p in model.named_parameters() if p.requires_grad}
    depth = math.sqrt(32 / 2)
    layer = "model.language_model.layers.0.self_attn.q_proj"
    assert named[f"{layer}.lora_A.default.weight"] == pytest.approx(2e-4 * depth * math.sqrt(4096 / 32))
    assert named[f"{layer}.lora_B.default.weight"] == pytest.approx(2e-4 * depth * 256 / 8)
    assert named["model.multi_modal_projector.linear_1.weight"] == pytest.approx(2e-5 * 1024 / 32)
    tower = next(name for name in named if "vision_tower" in name and "lora_B" in name)
    assert named[tower] == pytest.approx(5e-5 * 64 / 16)
    assert named[tower.replace("lora_B", "lora_A")] == pytest.approx(5e-5 * math.sqrt(1024 / 32))
    # Full weights, at the rate of full weights.
    for module in ("model.language_model.embed_tokens", "lm_head"):
        assert named[f"{module}.weight"] == pytest.approx(2e-5 * depth * 4096 / 32)


def test_an_adapter_of_a_part_that_does_not_train_is_refused() -> None:
    with pytest.raises(RecipeError, match="trains does not name language_model"):
        load_recipe("tiny-stllava-med", ["stages.instruct.trains=[vision_tower, projector]"])


def test_what_is_saved_beside_an_adapter_needs_one_and_has_weights_of_its_own() -> None:
    with pytest.raises(RecipeError, match=r"needs lora\.language_model"):
        recipe_with(*SAVED, "stages.instruct.lora.language_model=null")
    with pytest.raises(RecipeError, match="tied_embeddings makes them one"):
        recipe_with(*SAVED, "model.language_model.tied_embeddings=true")
    with pytest.raises(RecipeError, match="embed_tokens"):
        recipe_with("stages.instruct.lora.modules_to_save.modules=[norm]")


@pytest.fixture
def aligned(tmp_path: Path) -> Workspace:
    from medvlm.training.run import run_stage

    workspace = fill(Workspace(tmp_path / "ws"))
    run_stage(workspace, recipe_with(), 1)
    return workspace


def losses(workspace: Workspace, *changes: str) -> list[float]:
    from medvlm.training.run import run_stage

    report = run_stage(workspace, recipe_with(*changes), 2, fresh=True)
    return [point["loss"] for point in report.details["curves"]["all"]]


@pytest.mark.filterwarnings(PEFT)
def test_a_stage_ends_merged_with_its_adapter_beside_it(aligned: Workspace) -> None:
    from peft import PeftModel

    losses(aligned)
    folder = aligned.checkpoint("tiny-stllava-med", 2)
    start, end = (load_checkpoint(aligned.checkpoint("tiny-stllava-med", n)).model.eval() for n in (1, 2))
    assert not any(".lora_" in name for name in load_file(folder / "model.safetensors"))
    opened = PeftModel.from_pretrained(start, str(folder / "adapter")).eval()
    torch.testing.assert_close(logits(opened), logits(end), atol=1e-4, rtol=1e-3)
    # Features of an image change too: the tower learned. So did table and head.
    pixels = torch.randn((1, 3, 96, 96), generator=torch.Generator().manual_seed(2))
    # Read anew: peft has changed the start.
    start: Any = load_checkpoint(aligned.checkpoint("tiny-stllava-med", 1)).model
    features = [model.model.vision_tower(pixels).last_hidden_state for model in (start, end)]
    assert not torch.equal(*features)
    for module in ("model.language_model.embed_tokens", "lm_head"):
        before, after = (model.get_parameter(f"{module}.weight") for model in (start, end))
        assert not torch.equal(before, after)


def test_all_zero_stages_give_the_same_losses_with_adapters(aligned: Workspace) -> None:
    plain = losses(aligned, "stages.instruct.zero_stage=0")
    assert len(plain) == 8 and len(set(plain)) == 8
    for zero_stage in (2, 3):
        changes = [f"stages.instruct.zero_stage={zero_stage}", "stages.instruct.gradient_checkpointing='on'"]
        assert losses(aligned, *changes) == pytest.approx(plain, abs=1e-4), zero_stage


def test_a_killed_run_resumes_exactly_with_adapters_and_self_questions(
    aligned: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medvlm.training import objectives
    from medvlm.training.run import run_stage

    changes = ["stages.instruct.self_question_ratio=0.5", "checkpoints.every=0.3"]
    unbroken = losses(aligned, *changes)
    shutil.rmtree(aligned.stage("tiny-stllava-med", 2))
    calls: list[int] = []

    def dies(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 11:  # two micro-batches a step: in the sixth step, after the checkpoint of the third
            raise KeyboardInterrupt
        return objectives.answer_loss(*arguments)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setitem(objectives.OBJECTIVES, "answer", dies)
        run_stage(aligned, recipe_with(*changes), 2, fresh=True)
    assert (aligned.scratch("train", "tiny-stllava-med", "stage2", "all") / "checkpoint-3").is_dir()
    report = run_stage(aligned, recipe_with(*changes), 2)
    assert report.details["reused"] == []
    assert [point["loss"] for point in report.details["curves"]["all"]] == pytest.approx(unbroken, abs=1e-6)
