"""Self-questioning: which turns the model learns to ask, and what of them carries loss."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medvlm.config import load_recipe
from medvlm.errors import RecipeError
from medvlm.models.template import _SELF_QUESTIONING, TEMPLATES, fixed_phrases  # pyright: ignore[reportPrivateUsage]
from medvlm.models.tokenizer import train_tokenizer
from medvlm.records import Turn
from medvlm.training.collate import ConversationEncoder, self_questions
from medvlm.training.packing import IGNORED

CHANGES = ["stages.instruct.template=vicuna_v1_sq", "stages.instruct.self_question_ratio=0.5"]
TURNS = (
    Turn("user", "<image>\nIs there a lesion?"),
    Turn("assistant", "Yes."),
    Turn("user", "On which side?"),
    Turn("assistant", "On the left."),
    Turn("user", "How many?"),
    Turn("assistant", "Two."),
)


@functools.cache
def encoder(max_length: int = 512) -> ConversationEncoder:
    recipe = load_recipe("tiny-llava-med", CHANGES)
    tokenizer = train_tokenizer(recipe, [turn.text for turn in TURNS] * 2)
    return ConversationEncoder(recipe, tokenizer, "vicuna_v1_sq", max_length)


def text(ids: list[int]) -> str:
    shown: Any = encoder().tokenizer
    whole = shown.decode([i for i in ids if i != encoder().image_id])
    return whole.replace("<im_start><im_end>", "<image>")


def test_a_question_to_be_asked_is_learned_under_its_own_role() -> None:
    """The reference is written by hand, after SQ-LLaVA's format."""
    encoded = encoder().encode(TURNS, "s", asked={2})
    head = f"<s>{_SELF_QUESTIONING} USER: <image>\nIs there a lesion? ASSISTANT:"
    pieces = [
        (head, False),
        (" Yes.</s>", True),
        ("VUSER:", False),
        (" On which side?</s>", True),
        (" ASSISTANT:", False),
        (" On the left.</s>", True),
        ("USER: How many? ASSISTANT:", False),
        (" Two.</s>", True),
    ]
    assert text(encoded.ids) == "".join(piece for piece, _ in pieces)
    runs: list[tuple[list[int], bool]] = []
    for token, label in zip(encoded.ids, encoded.labels, strict=True):
        learned = label != IGNORED
        assert not learned or label == token
        if not runs or runs[-1][1] != learned:
            runs.append(([], learned))
        runs[-1][0].append(token)
    assert [(text(ids), learned) for ids, learned in runs] == pieces


def test_without_asked_turns_only_answers_are_learned() -> None:
    labels = [label for label in encoder().encode(TURNS, "s").labels if label != IGNORED]
    assert text(labels) == " Yes.</s> On the left.</s> Two.</s>"


def test_the_first_turn_brings_the_image_and_is_never_asked() -> None:
    assert encoder().encode(TURNS, "s", asked={0, 2}) == encoder().encode(TURNS, "s", asked={2})


def test_a_turn_that_becomes_the_first_is_no_longer_asked() -> None:
    short = encoder(len(encoder().encode(TURNS, "s", asked={2, 4}).ids) - 1)
    cut = short.encode(TURNS, "s", asked={2, 4})
    later = (Turn("user", "<image>\nOn which side?"), *TURNS[3:])
    assert cut.cut > 0 and cut.ids == encoder().encode(later, "s", asked={2}).ids


def test_the_prompt_that_asks_is_the_beginning_of_a_training_sequence() -> None:
    prompt = encoder().asking_prompt(TURNS[:2])
    encoded = encoder().encode(TURNS, "s", asked={2})
    assert encoded.ids[: len(prompt)] == prompt and text(prompt).endswith(" Yes.</s>VUSER:")
    assert encoded.labels[len(prompt) - 1] == IGNORED != encoded.labels[len(prompt)]


def test_a_template_without_the_role_cannot_learn_to_ask() -> None:
    with pytest.raises(RecipeError, match="has no role for it"):
        load_recipe("tiny-llava-med", CHANGES[1:])


def test_the_role_is_one_token_of_a_learned_tokenizer() -> None:
    assert "VUSER:" in fixed_phrases(TEMPLATES["vicuna_v1_sq"])
    assert encoder().tokenizer.tokenize("VUSER:") == ["VUSER:"]


@given(st.integers(0, 20), st.text(max_size=8), st.integers(0, 9), st.floats(0, 1), st.integers(0, 9))
def test_the_draw_is_a_function_of_its_inputs(rounds: int, name: str, epoch: int, ratio: float, seed: int) -> None:
    drawn = self_questions(2 * rounds, name, epoch, ratio=ratio, seed=seed)
    assert drawn == self_questions(2 * rounds, name, epoch, ratio=ratio, seed=seed)
    assert drawn <= set(range(2, 2 * rounds, 2))
    assert self_questions(2 * rounds, name, epoch, ratio=0, seed=seed) == frozenset()
    assert self_questions(2 * rounds, name, epoch, ratio=1, seed=seed) == frozenset(range(2, 2 * rounds, 2))


def test_half_of_the_turns_are_drawn_and_epochs_differ() -> None:
    draws = [self_questions(6, f"s{i}", epoch, ratio=0.5, seed=0) for i in range(1000) for epoch in (0, 1)]
    assert sum(map(len, draws)) == pytest.approx(2000, abs=100)
    same = sum(first == second for first, second in zip(draws[::2], draws[1::2], strict=True))
    assert same == pytest.approx(250, abs=60)
