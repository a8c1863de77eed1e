"""A checkpoint that asks: seeded sampling, in any batch, and a refusal where the role is not known."""

from __future__ import annotations

import functools
import io

import pytest
from PIL import Image

from medvlm.config import load_recipe
from medvlm.data.preference import GenerationRequest
from medvlm.errors import InputError
from medvlm.evaluation.self_question import DESCRIBE, SelfQuestioner, ask
from medvlm.models.checkpoint import Checkpoint, build_model
from medvlm.models.tokenizer import train_tokenizer
from medvlm.models.vision import ImageProcessor
from medvlm.records import Turn

SIZES = [
    "model.vision_tower.hidden_size=32",
    "model.vision_tower.mlp_size=32",
    "model.language_model.hidden_size=32",
    "model.language_model.mlp_size=32",
    "model.language_model.layers=2",
]
ASKS = ["stages.instruct.template=vicuna_v1_sq", "stages.instruct.self_question_ratio=0.5"]


@functools.cache
def checkpoint(*changes: str) -> Checkpoint:
    recipe = load_recipe("tiny-llava-med", [*SIZES, *changes])
    tokenizer = train_tokenizer(recipe, ["Is there a lesion?", DESCRIBE])
    processor = ImageProcessor.of(recipe.model.vision_tower)
    return Checkpoint(build_model(recipe, tokenizer), tokenizer, processor, recipe, {"stage": "instruct"})


def picture(shade: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (40, 40), (shade, 10, 200)).save(stream, "PNG")
    return stream.getvalue()


IMAGES = [picture(0), picture(120), picture(240)]


def test_a_question_an_image_in_their_order_whatever_the_batch() -> None:
    together = ask(checkpoint(*ASKS), IMAGES, seeds=[1, 2, 3])
    assert len(together) == 3 and len(set(together)) == 3
    assert ask(checkpoint(*ASKS), IMAGES[1:2], seeds=[2]) == together[1:2]
    assert ask(checkpoint(*ASKS), IMAGES, seeds=[1, 2, 4])[2] != together[2]


def test_answers_follow_their_seed_and_a_temperature_of_zero_is_greedy() -> None:
    requests = [GenerationRequest(IMAGES[0], "<image>\nIs there a lesion?", seed) for seed in (1, 2, 1)]
    first, second, third = SelfQuestioner(checkpoint(*ASKS), temperature=1.0, max_new_tokens=8).answer(requests)
    assert first == third != second
    greedy = SelfQuestioner(checkpoint(*ASKS), temperature=0.0, max_new_tokens=8).answer(requests)
    assert len(set(greedy)) == 1


def test_sampling_follows_the_probabilities() -> None:
    import torch

    from medvlm.evaluation.self_question import _seeded_noise  # pyright: ignore[reportPrivateUsage]

    scores = torch.tensor([0.2, 0.5, 0.3]).log().expand(4000, 3)
    taken = _seeded_noise(range(4000))(torch.zeros(4000, 1), scores).argmax(-1)
    shares = torch.bincount(taken, minlength=3) / 4000
    torch.testing.assert_close(shares, torch.tensor([0.2, 0.5, 0.3]), atol=0.03, rtol=0)


def test_the_model_describes_before_it_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    writer = SelfQuestioner(checkpoint(*ASKS))
    seen: list[list[list[int]]] = []

    def written(requests: object, prompts: list[list[int]], *_: object) -> list[str]:
        seen.append(prompts)
        return ["It is round."]

    monkeypatch.setattr(writer, "_written", written)
    writer.ask([GenerationRequest(IMAGES[0], "", 0)])
    encoder = writer._encoder  # pyright: ignore[reportPrivateUsage]
    opening = Turn("user", f"<image>\n{DESCRIBE}")
    assert seen == [
        [encoder.prompt(opening.text)],
        [encoder.asking_prompt([opening, Turn("assistant", "It is round.")])],
    ]


def test_a_model_that_was_not_taught_to_ask_refuses() -> None:
    with pytest.raises(InputError, match="not taught to ask") as caught:
        ask(checkpoint(), IMAGES)
    assert "self_question_ratio" in caught.value.hint


def test_a_model_without_the_role_is_asked_as_a_user_would() -> None:
    writer = SelfQuestioner(checkpoint(), temperature=1.0, max_new_tokens=8)
    requests = [GenerationRequest(IMAGES[0], "<image>\nWrite a question.", 5)]
    assert not writer.can_ask and writer.ask(requests) == writer.answer(requests)
