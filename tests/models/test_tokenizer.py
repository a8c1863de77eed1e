"""The trained tokenizer: any text comes back, the template is cheap, same texts give the same tokenizer."""

from __future__ import annotations

import functools
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from medvlm.config import load_recipe
from medvlm.models.template import TEMPLATES, fixed_phrases
from medvlm.models.tokenizer import special_marks, train_tokenizer

TEXTS = ["The lesion is on the left side.", "病变在左侧。", "MRI of the head"] * 4


@functools.cache
def tokenizer() -> Any:
    return train_tokenizer(load_recipe("tiny-llava-med"), TEXTS)


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cs"])))
def test_any_text_comes_back(text: str) -> None:
    ids = tokenizer()(text, add_special_tokens=False)["input_ids"]
    assert tokenizer().decode(ids) == text
    assert all(0 <= token < load_recipe("tiny-llava-med").model.tokenizer.vocab_size for token in ids)


def test_marks_and_template_phrases_are_one_token_each() -> None:
    for text in [*special_marks(load_recipe("tiny-llava-med")), *fixed_phrases(TEMPLATES["vicuna_v1"])]:
        assert len(tokenizer()(text, add_special_tokens=False)["input_ids"]) == 1, text


def test_words_of_the_text_are_learned() -> None:
    assert len(tokenizer()(" The lesion is on the left side.", add_special_tokens=False)["input_ids"]) <= 9


def test_the_same_texts_give_the_same_tokenizer() -> None:
    again = train_tokenizer(load_recipe("tiny-llava-med"), TEXTS)
    assert again.backend_tokenizer.to_str() == tokenizer().backend_tokenizer.to_str()


def test_the_vocabulary_is_no_larger_than_asked() -> None:
    recipe = load_recipe("tiny-llava-med", ["model.tokenizer.vocab_size=300"])
    long_text = [f"word{i} other{i * 7}" for i in range(500)]
    assert len(train_tokenizer(recipe, long_text)) <= 300
