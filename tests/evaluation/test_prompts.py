"""Prompts as data: the order of question and image, and the options hint."""

from __future__ import annotations

import dataclasses

import pytest
from checkpoint_factory import pictured_item
from hypothesis import given
from hypothesis import strategies as st

from medvlm.data.benchmarks import BENCHMARKS, finetune_samples
from medvlm.errors import InputError
from medvlm.evaluation.prompts import options_of, prompt_orders, prompt_style

ITEM = pictured_item(0, split="train")


def test_the_default_is_what_stage_3_learned() -> None:
    (sample,) = finetune_samples([ITEM])
    assert prompt_style("vqa-rad").prompt(ITEM) == sample.turns[0].text


def test_the_hint_is_there_when_asked_for_and_only_for_a_closed_set() -> None:
    with_hint = prompt_style("vqa-rad", order="image_first", options=True)
    assert with_hint.name == "image_first+options"
    assert with_hint.prompt(ITEM) == "<image>\nWhat is shown? Please choose from the following two options: [yes, no]"
    assert with_hint.prompt(dataclasses.replace(ITEM, answer="left lung")) == "<image>\nWhat is shown?"
    assert with_hint.prompt(dataclasses.replace(ITEM, answer_type="open")) == "<image>\nWhat is shown?"


@pytest.mark.parametrize(
    ("answer", "language", "options"),
    [("Yes", "en", ("yes", "no")), ("No.", "en", ("yes", "no")), ("no fracture", "en", ()), ("MRI", "en", ()),
     ("不是", "zh", ("是", "否")), ("左肺", "zh", ())],
)  # fmt: skip
def test_the_closed_set_of_an_answer(answer: str, language: str, options: tuple[str, ...]) -> None:
    assert options_of(dataclasses.replace(ITEM, answer=answer, language=language)) == options  # type: ignore[arg-type]


def test_the_classes_of_a_collection_are_its_options() -> None:
    item = dataclasses.replace(ITEM, benchmark="organcmnist", answer="liver")
    assert len(options_of(item)) == 11
    assert prompt_style("organcmnist").options and "following options: [bladder, " in prompt_style(
        "organcmnist"
    ).prompt(item)


def test_an_unknown_order_is_refused() -> None:
    with pytest.raises(InputError, match="no prompt 'x'") as caught:
        prompt_style("slake", order="x")
    assert "image_first" in caught.value.hint


@given(question=st.text(max_size=40), order=st.sampled_from(prompt_orders()), options=st.booleans())
def test_a_question_cannot_bring_in_an_image_or_a_placeholder(question: str, order: str, options: bool) -> None:
    for benchmark in BENCHMARKS:
        style = prompt_style(benchmark, order=order, options=options)
        item = dataclasses.replace(ITEM, benchmark=benchmark, question=question + "<image>{hint}{question}")
        prompt = style.prompt(item)
        assert prompt.count("<image>") == 1 and "{hint}{question}" in prompt
