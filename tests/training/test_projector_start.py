"""A projector that starts from the images at hand: how long its embeddings are, and what it leaves alone."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from twin_case import fill

from medvlm.config import load_recipe
from medvlm.errors import RecipeError
from medvlm.models.checkpoint import build_model, load_checkpoint
from medvlm.models.tokenizer import train_tokenizer
from medvlm.records import Turn
from medvlm.store import Workspace
from medvlm.training.data import StageSample
from medvlm.training.projector_start import FLOOR, start_projector

IMAGES = 40
SHAPE = (16, 48)


def samples() -> list[StageSample]:
    turns = (Turn("user", "<image>\nWhat is it?"), Turn("assistant", "A liver."))
    return [StageSample(f"s{index}", f"i{index % IMAGES}", turns, Path("shard"), 0) for index in range(2 * IMAGES)]


def features(sample: StageSample, *, shape: tuple[int, int]) -> torch.Tensor:
    """Rectified noise with a large common part, channels of very different spread, one of them always 0."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(int(sample.image_sha256[1:])))
    spread = torch.logspace(-1.5, 0.5, shape[1])
    raw = (drawn * spread + 2 * spread).clamp(min=0)
    raw[:, 3] = 0.0
    return raw


@functools.cache
def parts() -> tuple[Any, Any]:
    recipe = load_recipe("tiny-qilin-med-vl", ["model.projector.standardised=true"])
    tokenizer = train_tokenizer(recipe, [turn.text for sample in samples() for turn in sample.turns] * 3)
    return recipe, build_model(recipe, tokenizer)


def started(seed: int = 0) -> tuple[Any, dict[str, float], torch.Tensor]:
    """The model's weights after the start, what it tells, and the embeddings of all images."""
    _, model = parts()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tower = model.config.vision_config
    images = functools.partial(features, shape=((tower.image_size // tower.patch_size) ** 2, tower.hidden_size))
    told = start_projector(model, samples(), images, seed=seed)
    after = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        seen = model.model.multi_modal_projector(torch.stack([images(s) for s in samples()[:IMAGES]]))
    model.load_state_dict(before)
    return after, told, seen


def test_embeddings_are_as_long_as_a_words_and_have_nothing_in_common() -> None:
    _, model = parts()
    word = model.get_input_embeddings().weight.norm(dim=1).mean().item()
    _, told, seen_NPD = started()
    assert told["images"] == IMAGES
    assert told["word"] == pytest.approx(word, rel=1e-5)
    assert told["common"] > 0.5 * told["norm"]  # as they are drawn, images hardly differ
    assert seen_NPD.norm(dim=-1).mean().item() == pytest.approx(word, rel=1e-4)
    assert seen_NPD.mean((0, 1)).norm().item() < 1e-4 * word
    assert seen_NPD.isfinite().all()


def test_channels_are_standardised_and_one_that_never_moves_is_not_blown_up() -> None:
    after, _, _ = started()
    mean_V, spread_V = (after[f"model.multi_modal_projector.{name}"] for name in ("mean", "spread"))
    _, model = parts()
    tower = model.config.vision_config
    shape = ((tower.image_size // tower.patch_size) ** 2, tower.hidden_size)
    rows_RV = torch.cat([features(sample, shape=shape) for sample in samples()[:IMAGES]])
    torch.testing.assert_close(mean_V, rows_RV.mean(0))
    floor = FLOOR * rows_RV.std(0, correction=0).mean()
    torch.testing.assert_close(spread_V, rows_RV.std(0, correction=0) + floor)
    assert spread_V[3] == pytest.approx(floor.item(), rel=1e-4)


def test_it_changes_the_projector_alone_and_is_repeatable() -> None:
    _, model = parts()
    (one, told, _), (two, again, _), (other, _, _) = started(), started(), started(seed=1)
    assert told == again
    name = "model.multi_modal_projector.linear_1.weight"
    assert torch.equal(one[name], two[name])
    assert not torch.equal(one[name], other[name])
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, one[name])}
    parts_changed = ("mean", "spread", "linear_1.weight", "linear_2.weight", "linear_2.bias")
    assert changed == {f"model.multi_modal_projector.{part}" for part in parts_changed}


def test_pixels_go_through_the_tower() -> None:
    _, model = parts()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    size = model.config.vision_config.image_size

    def pixels(sample: StageSample) -> torch.Tensor:
        return torch.randn((3, size, size), generator=torch.Generator().manual_seed(int(sample.image_sha256[1:])))

    told = start_projector(model, samples(), pixels, seed=0)
    model.load_state_dict(before)
    assert told["images"] == IMAGES
    assert told["norm"] > 0


def test_it_belongs_to_two_linear_layers() -> None:
    with pytest.raises(RecipeError, match="standardised belongs to kind 'mlp2x_gelu'"):
        load_recipe("tiny-llava-med", ["model.projector.kind=linear", "model.projector.standardised=true"])


def test_the_first_stage_begins_with_it_and_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from medvlm.training.run import run_stage

    workspace = fill(Workspace(tmp_path / "ws"))
    steps = [f"stages.{name}.max_steps=1" for name in ("align", "instruct")]
    recipe = load_recipe(
        "tiny-llava-med", [*steps, "model.projector.kind=mlp2x_gelu", "model.projector.standardised=true"]
    )
    run_stage(workspace, recipe, 1)
    assert "the projector starts from" in capsys.readouterr().err
    model: Any = load_checkpoint(workspace.checkpoint("tiny-llava-med", 1)).model
    assert model.model.multi_modal_projector.mean.abs().max() > 0.1
    run_stage(workspace, recipe, 2)
    assert "the projector starts from" not in capsys.readouterr().err


def test_weights_of_half_the_precision_read_float_statistics() -> None:
    _, model = parts()
    projector = copy.deepcopy(model.model.multi_modal_projector)
    tower = model.config.vision_config
    seen_NPV = torch.randn(2, 4, tower.hidden_size)
    exact_NPD = projector(seen_NPV)
    for layer in (projector.linear_1, projector.linear_2):
        layer.bfloat16()
    half_NPD = projector(seen_NPV.bfloat16())
    assert half_NPD.dtype == torch.bfloat16
    torch.testing.assert_close(half_NPD.float(), exact_NPD, rtol=0.05, atol=0.02)
