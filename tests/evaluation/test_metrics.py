"""Rules by their names: what each counts, its quirks, and bounds that hold for any text."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medvlm.evaluation.metrics import CLOSED, OPEN, RULES, apply_rules
from medvlm.evaluation.normalise import (
    chinese_words,
    clean_words,
    llava_med_normalise,
    lmms_eval_slake_normalise,
    polarity,
    without_punctuation,
)

TEXTS = st.text(alphabet=st.characters(codec="utf-8"), max_size=40)
WORDS = st.lists(st.sampled_from(["yes", "no", "normal", "lung", "the", "2", "two", "none.", "ct"]), max_size=8).map(
    " ".join
)
HAN = st.text(alphabet="是不有没包含可以肺左侧的图像，。", max_size=10)


def closed(answer: str, prediction: str, language: str = "en") -> dict[str, float | None]:
    return apply_rules(answer, prediction, "closed", "zh" if language == "zh" else "en")


@pytest.mark.parametrize(
    ("answer", "prediction", "expected"),
    [
        ("yes", "Yes.", 1),
        ("Yes ", "yes, there is", 1),
        ("no", "No, it is normal", 1),
        ("no", "This is abnormal", 0),  # "no" inside a word
        ("yes", "yes and no", 0),  # commits to neither
        ("yes", "The image shows it", 0),
        ("yes", "", 0),
        ("MRI", "This is an MRI.", 1),
        ("Left", "the left-sided one", 1),
        ("CT", "infarction", 0),
        ("right side", "on the right side", 1),
        ("right side", "side right", 0),
        ("one", "1", 1),  # the published normalisation writes number words as digits
        ("the", "anything", 0),  # normalises to nothing
    ],
)
def test_whole_word_wants_a_committed_answer(answer: str, prediction: str, expected: float) -> None:
    assert closed(answer, prediction)["whole_word"] == expected


@pytest.mark.parametrize(
    ("answer", "prediction", "expected"),
    [
        ("不包含", "不包含", 1),
        ("不包含", "图中没有肝脏。", 1),
        ("包含", "不包含", 0),  # the positive phrase inside the negative one
        ("是的", "是的，图片中有肝脏", 1),
        ("不是", "不是，是CT", 1),  # "no, it is a CT": the second one is the copula
        ("是的", "不是，是CT", 0),
        ("不是", "这是CT", 0),
        ("是的", "是的。不是。", 0),  # commits to neither
        ("包含", "不包含，图中有肺", 0),
        ("不包含", "不包含，图中有肺", 1),
        ("可以", "无法看到", 0),
        ("不可以", "无法看到", 1),
        ("有", "功能正常", 0),  # jieba: "能" is a part of "function"
        ("不包括", "没有", 1),
        ("肺", "左肺", 0),  # jieba: one word
        ("肝脏", "图中的器官是肝脏。", 1),
        ("T1", "这是T1加权图像", 1),
        ("健康", "不健康", 0),
    ],
)
def test_whole_word_in_chinese(answer: str, prediction: str, expected: float) -> None:
    assert closed(answer, prediction, "zh")["whole_word"] == expected


def test_the_substring_rules_find_no_in_normal() -> None:
    scores = closed("no", "Everything looks normal")
    assert scores["llava_med_batch"] == scores["med_moe"] == scores["llava_med_run_eval"] == 1
    assert scores["whole_word"] == 0


def test_run_eval_needs_yes_or_no_even_for_other_answers() -> None:
    assert closed("MRI", "It is an MRI")["llava_med_run_eval"] == 0
    assert closed("MRI", "It is not a CT but an MRI")["llava_med_run_eval"] == 1


def test_pre35_leaves_out_wrong_answers_with_a_yes_or_no() -> None:
    assert closed("yes", "no")["llava_med_pre35"] is None
    assert closed("yes", "perhaps")["llava_med_pre35"] == 0
    assert closed("yes", "yes")["llava_med_pre35"] == 1


def test_med_moe_does_not_normalise() -> None:
    assert closed("X-ray", "x ray")["med_moe"] == 0
    assert closed("X-ray", "x ray")["llava_med_batch"] == 1


def test_repeated_words_inflate_the_published_recall_only() -> None:
    once = apply_rules("left lung", "lung", "open")
    thrice = apply_rules("left lung", "lung lung lung", "open")
    assert once["llava_med.recall"] == 0.5
    assert thrice["llava_med.recall"] == 0.75
    assert once["token.recall"] == thrice["token.recall"] == 0.5


def test_the_published_exact_match_is_a_precision() -> None:
    scores = apply_rules("lung", "the lung and heart", "open")
    assert scores["llava_med.exact_match"] == pytest.approx(1 / 3)
    assert scores["exact_match"] == 0


def test_number_words_and_articles_do_not_count_against_an_answer() -> None:
    assert apply_rules("The two lungs.", "2 lungs", "open")["exact_match"] == 1


def test_bleu_and_rouge_by_hand() -> None:
    scores = apply_rules("left upper lobe", "left upper lung", "open")
    assert scores["bleu_1"] == pytest.approx(2 / 3)
    assert scores["bleu_2"] == pytest.approx((2 / 3 * 1 / 2) ** 0.5)
    assert scores["rouge_l"] == pytest.approx(2 / 3)


def test_chinese_is_scored_by_words_and_by_characters() -> None:
    scores = apply_rules("左下肺", "左上肺", "open", "zh")
    assert scores["char.f1"] == pytest.approx(2 / 3)
    assert scores["rouge_l"] is not None
    assert apply_rules("核磁共振", "这是核磁共振", "open", "zh")["token.recall"] == 1
    assert apply_rules("左下肺", "左上肺", "open", "en")["char.f1"] is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The lungs, and heart.", "lungs and heart"),
        ("left-sided", "left sided"),
        ("left -sided", "left sided"),
        ("1,000 cells", "1000 cells"),
        ("3.5 cm.", "3.5 cm"),
        ("none", "0"),
        ("Ten", "10"),
        ("it isnt", "it isn't"),
        ("couldnt've couldn'tve", "couldn't've couldn't've"),
        ("somebody'd", "somebodyd"),
        ("." * 40, "." * 8),  # only the first 32 periods go
        ("half/whole", "half whole"),
        ("half/ whole", "half whole"),
    ],
)
def test_the_published_normalisation(text: str, expected: str) -> None:
    assert llava_med_normalise(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes.", "yes"),
        ("X-Ray", "xray"),
        ("Lung (left)", "lung"),
        ("肺（左）。", "肺"),
        ("不包含", "no"),
        ("正常", "yes"),
        ("True!", "yes"),
    ],
)
def test_lmms_eval_normalisation_for_slake(text: str, expected: str) -> None:
    assert lmms_eval_slake_normalise(text) == expected


@given(answer=TEXTS | WORDS | HAN, prediction=TEXTS | WORDS | HAN, language=st.sampled_from(["en", "zh"]))
def test_every_rule_is_between_0_and_1(answer: str, prediction: str, language: str) -> None:
    for answer_type in RULES:
        for rule, value in apply_rules(answer, prediction, answer_type, "zh" if language == "zh" else "en").items():
            assert value is None or 0 <= value <= 1, rule


@given(answer=WORDS)
def test_repeating_the_answer_is_never_wrong_under_the_clean_rules(answer: str) -> None:
    scores = apply_rules(answer, answer, "open")
    assert scores["token.f1"] == scores["exact_match"] == scores["lmms_eval.exact_match"] == 1


@given(
    answer=WORDS, prediction=st.lists(st.sampled_from(["left", "right", "lung", "heart"]), max_size=6), data=st.data()
)
def test_word_order_does_not_matter_to_token_overlap(answer: str, prediction: list[str], data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(prediction))
    first = apply_rules(answer, " ".join(prediction), "open")
    second = apply_rules(answer, " ".join(shuffled), "open")
    for rule in ("token.recall", "token.precision", "token.f1", "llava_med.recall", "llava_med.f1"):
        assert first[rule] == second[rule]


@given(answer=st.sampled_from(["yes", "no"]), prediction=WORDS)
def test_a_strictly_right_yes_or_no_is_right_under_the_lenient_rules(answer: str, prediction: str) -> None:
    scores = closed(answer, prediction)
    if scores["whole_word"]:
        assert scores["llava_med_run_eval"] == scores["llava_med_batch"] == scores["llava_med_pre35"] == 1


@given(text=TEXTS | HAN)
def test_clean_normalisation_is_idempotent(text: str) -> None:
    assert without_punctuation(without_punctuation(text)) == without_punctuation(text)


@given(text=WORDS)
def test_clean_words_are_stable(text: str) -> None:
    assert clean_words(" ".join(clean_words(text))) == clean_words(text)


@given(text=HAN)
def test_jieba_loses_no_character(text: str) -> None:
    assert "".join(chinese_words(text)) == text


def test_polarity_sees_both() -> None:
    assert polarity("yes or no") == {"yes", "no"}
    assert polarity("normal nodule") == frozenset()


def test_rules_are_named_once_for_each_answer_type() -> None:
    assert "whole_word" in CLOSED
    assert "token.recall" in OPEN


def test_importing_the_metrics_is_light_and_jieba_is_silent() -> None:
    code = (
        "import sys, medvlm.evaluation.metrics as m\n"
        "heavy = {'sacrebleu', 'rouge_score', 'jieba', 'torch', 'nltk'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "m.apply_rules('肺', '左肺', 'open', 'zh')\n"
    )
    done = subprocess.run([sys.executable, "-W", "error::SyntaxWarning", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout == ""
