"""A projector that starts with the words said of images: what counts as said, and what the fit changes."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from twin_case import fill

from medvlm.config import load_recipe
from medvlm.errors import InputError, RecipeError
from medvlm.models.checkpoint import build_model, load_checkpoint
from medvlm.models.tokenizer import train_tokenizer
from medvlm.recipe_schema import WordStart
from medvlm.records import Turn
from medvlm.store import Workspace
from medvlm.training.data import StageSample
from medvlm.training.words import RARE, fit_words, image_words, word_facts

START = WordStart(epochs=30, learning_rate=3e-3)
ORGANS = ("liver", "lung")


def asked(image: str, question: str, answer: str) -> StageSample:
    turns = (Turn("user", f"{question}\n<image>"), Turn("assistant", answer))
    return StageSample(f"{image}-{question}", image, turns, Path("shard"), 0)


def samples() -> list[StageSample]:
    """Even images show a liver in a CT, odd ones a lung in an X-ray."""
    found: list[StageSample] = []
    for index in range(60):
        image = f"i{index}"
        organ = ORGANS[index % 2]
        found += [
            asked(image, "Is there a liver?", "Yes" if organ == "liver" else "No"),
            asked(image, "Is there a lung?", "no." if organ == "liver" else "yes"),
            asked(image, "What modality is it?", "CT" if organ == "liver" else "X-Ray"),
        ]
    return found


@functools.cache
def parts() -> tuple[Any, Any]:
    recipe = load_recipe("tiny-llava-med")
    tokenizer = train_tokenizer(recipe, [turn.text for sample in samples() for turn in sample.turns] * 3)
    return build_model(recipe, tokenizer), tokenizer


def features(sample: StageSample, *, shape: tuple[int, int]) -> torch.Tensor:
    """Noise; a few channels carry the parity of the image's number."""
    index = int(sample.image_sha256[1:])
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(index))
    drawn[:, :8] += 1.0 if index % 2 else -1.0
    return drawn


def fitted(seed: int = 0) -> tuple[dict[str, Any], dict[str, float]]:
    """The weights of a model that was fitted from the same start, and what the fit tells."""
    model, tokenizer = parts()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tower = model.config.vision_config
    images = functools.partial(features, shape=((tower.image_size // tower.patch_size) ** 2, tower.hidden_size))
    told = fit_words(model, tokenizer, samples(), images, START, seed=seed)
    after = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(before)
    return after, told


def test_a_question_answered_with_yes_says_its_words_and_one_answered_with_no_denies_them() -> None:
    facts = list(
        word_facts([asked("a", "Is there a large Mass in the liver?", "Yes"), asked("b", "Is it a CT?", "No.")])
    )
    assert facts == [("a", "large", True), ("a", "liver", True), ("a", "mass", True), ("b", "ct", False)]


def test_an_answer_denies_what_others_answer_to_the_same_question() -> None:
    facts = list(
        word_facts(
            [
                asked("a", "Which organ is it?", "Liver"),
                asked("b", "which organ is it?", "left lung"),
                asked("c", "Where?", "Chest"),
            ]
        )
    )
    assert facts == [
        ("a", "left", False),
        ("a", "liver", True),
        ("a", "lung", False),
        ("b", "left", True),
        ("b", "liver", False),
        ("b", "lung", True),
        ("c", "chest", True),
    ]


def test_facts_are_gathered_by_image_and_rare_words_left_out() -> None:
    many = [asked(f"i{i}", "Is it a lung?", "Yes" if i else "No") for i in range(RARE)]
    said = image_words([*many, asked("i0", "A lung?", "Yes"), asked("i1", "A rib?", "Yes")])
    assert said.words == ["lung"]
    assert said.images == [f"i{i}" for i in range(RARE)]
    assert said.truth[:, 0].tolist() == [0.5, *[1.0] * (RARE - 1)]
    assert said.weight[:, 0].tolist() == [2.0, *[1.0] * (RARE - 1)]
    assert said.base.sigmoid().item() == pytest.approx(RARE / (RARE + 1))


def test_nothing_to_say_is_refused() -> None:
    with pytest.raises(InputError, match="no word is said"):
        image_words([asked("a", "肝脏正常吗?", "是")] * RARE)


def test_the_fit_says_what_is_in_the_images_and_changes_the_projector_alone() -> None:
    model, _ = parts()
    after, told = fitted()
    assert told["words"] == len({"liver", "lung", "ct", "x", "ray"})
    assert (told["images"], told["steps"]) == (60, 60)
    assert told["loss_before"] == pytest.approx(0.6931, abs=1e-3)
    assert told["loss"] < 0.2
    for name, value in model.state_dict().items():
        assert torch.equal(value, after[name]) == (".multi_modal_projector." not in name), name
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_the_fit_is_repeatable_and_follows_its_seed() -> None:
    (one, told), (two, again), (other, _) = fitted(), fitted(), fitted(seed=1)
    weight = "model.multi_modal_projector.linear.weight"
    assert told == again
    assert torch.equal(one[weight], two[weight])
    assert not torch.equal(one[weight], other[weight])


@pytest.mark.parametrize("change", ["stages.instruct", "stages.finetune.trains=[language_model]"])
def test_it_belongs_to_a_projector_that_learns_from_benchmarks(change: str) -> None:
    stage = "instruct" if change == "stages.instruct" else "finetune"
    start = f"stages.{stage}.word_start={{epochs: 2, learning_rate: 1e-3}}"
    with pytest.raises(RecipeError, match="word_start needs"):
        load_recipe("tiny-llava-med", [start, *([change] if "=" in change else [])])


def test_a_stage_begins_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from medvlm.training.run import run_stage

    workspace = fill(Workspace(tmp_path / "ws"))
    steps = [f"stages.{name}.max_steps=1" for name in ("align", "instruct", "finetune")]
    recipe = load_recipe(
        "tiny-llava-med",
        [*steps, "benchmarks=[slake]", "stages.finetune.word_start={epochs: 4, learning_rate: 1e-3}"],
    )
    for number in (1, 2, 3):
        run_stage(workspace, recipe, number)
    assert "the projector says" in capsys.readouterr().err
    plain = load_recipe("tiny-llava-med", [*steps, "benchmarks=[slake]"])
    with_words = load_checkpoint(workspace.checkpoint("tiny-llava-med", 3, "slake")).model
    run_stage(workspace, plain, 3)
    without = load_checkpoint(workspace.checkpoint("tiny-llava-med", 3, "slake")).model
    pair = [dict(model.named_parameters()) for model in (with_words, without)]
    name = "model.multi_modal_projector.linear.weight"
    assert not torch.equal(pair[0][name], pair[1][name])
