"""The rules for Chinese, held to every answer of the real SLAKE."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from medvlm.data.benchmarks import read_benchmark
from medvlm.evaluation.metrics import RULES, apply_rules
from medvlm.evaluation.normalise import is_chinese_yes_no, polarity
from medvlm.records import VQAItem

YES, NO = frozenset({"yes"}), frozenset({"no"})


@pytest.fixture(scope="module")
def items(real_data: Path) -> list[VQAItem]:
    return list(read_benchmark("slake-zh", real_data / "slake", images=False))


def test_each_real_answer_is_right_about_itself(items: list[VQAItem]) -> None:
    for answer, answer_type in {(item.answer, item.answer_type) for item in items}:
        values = apply_rules(answer, answer, answer_type, "zh")
        rule = "whole_word" if answer_type == "closed" else "token.f1"
        assert values[rule] == values["exact_match"] == 1, answer
        if answer_type == "open":
            assert values["char.recall"] == pytest.approx(1), answer


def test_real_yes_and_no_forms_agree_within_and_differ_across(items: list[VQAItem]) -> None:
    closed = Counter(item.answer for item in items if item.answer_type == "closed")
    forms = {answer for answer in closed if is_chinese_yes_no(answer)}
    yes = {answer for answer in forms if polarity(answer, "zh") == YES}
    no = {answer for answer in forms if polarity(answer, "zh") == NO}
    assert yes == {"是", "是的", "有", "存在", "包含", "包括", "可以"}
    assert no == {"否", "不是", "没有", "不存在", "不包含", "不包括", "不可以"}
    for answer in forms:
        for said in forms:
            value = apply_rules(answer, said, "closed", "zh")["whole_word"]
            assert value == ((answer in yes) == (said in yes)), (answer, said)
            # As a model says it that explains itself.
            assert apply_rules(answer, f"{said}，图中是CT。", "closed", "zh")["whole_word"] == value


def test_five_in_six_closed_answers_are_a_yes_or_no(items: list[VQAItem]) -> None:
    test = [item for item in items if item.answer_type == "closed" and item.split == "test"]
    assert len(test) == 420
    assert sum(is_chinese_yes_no(item.answer) for item in test) == 347


def test_every_rule_names_a_value_for_every_real_answer(items: list[VQAItem]) -> None:
    for item in items[::29]:
        values = apply_rules(item.answer, "图中有肺，是CT。", item.answer_type, item.language)
        assert set(values) == set(RULES[item.answer_type])
        assert all(value is None or 0 <= value <= 1 for value in values.values())
