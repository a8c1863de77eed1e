"""Every score rule, named: a pure function of one answer and one prediction.

A rule gives a value from 0 to 1, or None where it does not count the item (so a rule's denominator
is the number of items it counted). ``OPEN`` and ``CLOSED`` map the names to the functions.

The headline is ``whole_word`` for closed questions and ``token.recall`` or ``token.f1`` for open
ones. The ``llava_med…`` and ``med_moe`` rules exist to compare with papers, bugs included:

=========================  ====================================================================
``llava_med_run_eval``     closed: "yes" or "no" occurs as a substring, and the answer does
``llava_med_batch``        closed: the answer occurs as a substring (the paper's table)
``llava_med_pre35``        closed: as run_eval before fix #35; wrong answers with a yes or no in
                           them are not counted, so the denominator shrinks
``med_moe``                closed: the raw lower-case answer occurs as a substring
``whole_word``             closed: strict; exactly the right one of yes and no stands there, or
                           the answer stands there as whole words
``exact_match``            the clean words are the answer's, in order
``lmms_eval.exact_match``  lmms-eval's rule for SLAKE
``llava_med.recall`` …     open: token overlap as LLaVA-Med computes it; repeated words inflate it
``llava_med.exact_match``  open: matched answer words / predicted words (a precision, despite its name)
``llava_med.contains``     open: the "open accuracy" of its run_eval_batch, a substring test
``token.recall`` …         open: overlap of bags of clean words, each counted as often as it occurs
                           in both (Chinese: words by jieba)
``char.recall`` …          open, Chinese only: the same by characters
``bleu_1`` … ``bleu_3``    open: sentence BLEU of sacrebleu, mean over items
``rouge_l``                open: ROUGE-L F-measure of rouge-score, mean over items
=========================  ====================================================================

Substring rules are as bad as they look: "no" is found inside "normal", "not" and "nodule".
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

from medvlm.evaluation.normalise import (
    clean_words,
    is_chinese_yes_no,
    llava_med_normalise,
    lmms_eval_slake_normalise,
    polarity,
    without_punctuation,
)
from medvlm.records import AnswerType

__all__ = ["CLOSED", "HEADLINE", "OPEN", "RULES", "Language", "Rule", "apply_rules", "stands_in"]

Language = Literal["en", "zh"]
Rule = Callable[[str, str, Language], float | None]
"""(answer, prediction, language) → 0 to 1, or None where the rule leaves the item out."""

HEADLINE: Mapping[AnswerType, str] = MappingProxyType({"closed": "whole_word", "open": "token.recall"})

# ── Closed questions ────────────────────────────────────────────────────────────────────────────


def whole_word(answer: str, prediction: str, language: Language) -> float:
    """1 if the prediction commits to the answer, in whole words, after the published normalisation.

    For a yes/no answer exactly one of the words yes and no has to stand in the prediction, and be
    the right one. Any other answer has to stand there as whole words in a row. Chinese has no such
    published normalisation: phrases of yes and no count as the words, jieba cuts the rest,
    and an answer right behind a negation ("不健康" for "健康") does not stand there.
    """
    if language == "zh":
        wanted = polarity(without_punctuation(answer), "zh")
        if is_chinese_yes_no(without_punctuation(answer)):
            return float(polarity(without_punctuation(prediction), "zh") == wanted)
        return float(stands_in(clean_words(answer, "zh"), clean_words(prediction, "zh"), _CHINESE_NEGATIONS))
    answer, prediction = _published(answer), _published(prediction)
    if answer in ("yes", "no"):
        return float(polarity(prediction) == frozenset((answer,)))
    return float(stands_in(answer.split(), prediction.split()))


_CHINESE_NEGATIONS = frozenset({"不", "不是", "没", "没有", "无", "非", "并非"})


def stands_in(wanted: Sequence[str], words: Sequence[str], negations: frozenset[str] = frozenset()) -> bool:
    """Whether ``wanted`` is a run of ``words`` that no negation stands before. Nothing never is."""
    size = len(wanted)
    return size > 0 and any(
        list(words[at : at + size]) == list(wanted) and (at == 0 or words[at - 1] not in negations)
        for at in range(len(words) - size + 1)
    )


def llava_med_run_eval(answer: str, prediction: str, language: Language) -> float:
    """1 if "yes" or "no" and the answer are substrings of the prediction (run_eval.py after #35)."""
    answer, prediction = _published(answer), _published(prediction)
    return float(("yes" in prediction or "no" in prediction) and answer in prediction)


def llava_med_batch(answer: str, prediction: str, language: Language) -> float:
    """1 if the answer is a substring of the prediction (run_eval_batch.py: the paper's numbers)."""
    return float(_published(answer) in _published(prediction))


def llava_med_pre35(answer: str, prediction: str, language: Language) -> float | None:
    """As ``llava_med_run_eval``, but None for a wrong answer that contains "yes" or "no".

    Source: run_eval.py before commit b9a98a7 (#35), and run_eval_pvqa.py still at v1.0.0: such
    answers were not appended, so the denominator shrank.
    """
    answer, prediction = _published(answer), _published(prediction)
    if "yes" in prediction or "no" in prediction:
        return 1.0 if answer in prediction else None
    return 0.0


def med_moe(answer: str, prediction: str, language: Language) -> float:
    """1 if the raw lower-case answer is a substring of the raw lower-case prediction (Med-MoE)."""
    return float(answer.lower() in prediction.lower())


def _published(text: str) -> str:
    return llava_med_normalise(text.lower())


# ── Either kind ─────────────────────────────────────────────────────────────────────────────────


def exact_match(answer: str, prediction: str, language: Language) -> float:
    """1 if the prediction's clean words are exactly the answer's."""
    return float(clean_words(answer, language) == clean_words(prediction, language))


def lmms_eval_exact_match(answer: str, prediction: str, language: Language) -> float:
    """1 if both are equal after lmms-eval's normalisation for SLAKE."""
    return float(lmms_eval_slake_normalise(answer) == lmms_eval_slake_normalise(prediction))


# ── Open questions, as LLaVA-Med computes them ──────────────────────────────────────────────────


@functools.lru_cache(maxsize=4)
def _llava_med_overlap(answer: str, prediction: str) -> tuple[float, float, float, float]:
    """(exact_match, f1, precision, recall) by ``calculate_exactmatch`` and ``calculate_f1score``.

    A predicted word that is in the answer counts as often as the *prediction* has it; a missed word
    as often as the answer has it. Hence "the lung lung lung" has a better recall than "lung".
    """
    # Normalised by the caller and again by the functions; the second time can change a text.
    predicted = Counter(llava_med_normalise(_published(prediction)).split())
    wanted = Counter(llava_med_normalise(_published(answer)).split())
    total = predicted.total()
    exact = sum(word in predicted for word in wanted) / total if total else 0.0
    hits = sum(count for word, count in predicted.items() if word in wanted)
    if not hits:
        return exact, 0.0, 0.0, 0.0
    missed = sum(count for word, count in wanted.items() if word not in predicted)
    precision, recall = hits / total, hits / (hits + missed)
    return exact, 2 * precision * recall / (precision + recall), precision, recall


def _llava_med(place: int) -> Rule:
    return lambda answer, prediction, language: _llava_med_overlap(answer, prediction)[place]


def llava_med_contains(answer: str, prediction: str, language: Language) -> float:
    """1 if the answer is a substring of the prediction: "open accuracy" of run_eval_batch.py."""
    return llava_med_batch(answer, prediction, language)


# ── Open questions, clean ───────────────────────────────────────────────────────────────────────


@functools.lru_cache(maxsize=4)
def _bag_overlap(wanted: tuple[str, ...], predicted: tuple[str, ...]) -> tuple[float, float, float]:
    """(f1, precision, recall) of two bags of tokens; all 1 if both are empty, all 0 if one is."""
    if not wanted or not predicted:
        both = float(wanted == predicted)
        return both, both, both
    hits = (Counter(wanted) & Counter(predicted)).total()
    return 2 * hits / (len(wanted) + len(predicted)), hits / len(predicted), hits / len(wanted)


def _tokens(place: int) -> Rule:
    return lambda answer, prediction, language: _bag_overlap(
        clean_words(answer, language), clean_words(prediction, language)
    )[place]


def _characters(place: int) -> Rule:
    def rule(answer: str, prediction: str, language: Language) -> float | None:
        if language != "zh":
            return None
        return _bag_overlap(_without_spaces(answer), _without_spaces(prediction))[place]

    return rule


@functools.lru_cache(maxsize=65536)
def _without_spaces(text: str) -> tuple[str, ...]:
    return tuple(without_punctuation(text).replace(" ", ""))


@functools.lru_cache(maxsize=4)
def _bleu(answer: str, prediction: str, language: Language) -> tuple[float, float, float]:
    """Sentence BLEU up to 1, 2 and 3 grams, 0 to 1, by sacrebleu.

    Settings: lower-cased, tokenised by ``13a`` (Chinese: ``zh``, by characters), exponential
    smoothing, effective order. The papers average nltk's sentence BLEU instead, with other
    smoothing, and name BLEU-2 what looks at bigrams alone.
    """
    from sacrebleu.metrics.bleu import BLEU

    counts = _bleu_counter(language).sentence_score(prediction, [answer])

    def upto(order: int) -> float:
        score = BLEU.compute_bleu(
            correct=list(counts.counts[:order]),
            total=list(counts.totals[:order]),
            sys_len=counts.sys_len,
            ref_len=counts.ref_len,
            smooth_method="exp",
            effective_order=True,
            max_ngram_order=order,
        )
        return min(score.score / 100, 1.0)

    return upto(1), upto(2), upto(3)


@functools.cache
def _bleu_counter(language: Language) -> Any:
    from sacrebleu.metrics.bleu import BLEU

    tokenizer = "zh" if language == "zh" else "13a"
    return BLEU(lowercase=True, tokenize=tokenizer, max_ngram_order=3, effective_order=True)


def _bleu_upto(order: int) -> Rule:
    return lambda answer, prediction, language: _bleu(answer, prediction, language)[order - 1]


def rouge_l(answer: str, prediction: str, language: Language) -> float:
    """ROUGE-L F-measure by rouge-score: its own tokens, no stemmer (Chinese: words by jieba)."""
    return _rouge(language).score(answer, prediction)["rougeL"].fmeasure


class _ChineseTokens:
    """rouge-score's own tokenizer drops every character that is not a-z or 0-9."""

    def tokenize(self, text: str) -> list[str]:
        return list(clean_words(text, "zh"))


@functools.cache
def _rouge(language: Language) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_ChineseTokens() if language == "zh" else None)


OPEN: Mapping[str, Rule] = MappingProxyType(
    {
        "token.recall": _tokens(2),
        "token.precision": _tokens(1),
        "token.f1": _tokens(0),
        "llava_med.recall": _llava_med(3),
        "llava_med.precision": _llava_med(2),
        "llava_med.f1": _llava_med(1),
        "llava_med.exact_match": _llava_med(0),
        "llava_med.contains": llava_med_contains,
        "char.recall": _characters(2),
        "char.precision": _characters(1),
        "char.f1": _characters(0),
        "exact_match": exact_match,
        "lmms_eval.exact_match": lmms_eval_exact_match,
        "bleu_1": _bleu_upto(1),
        "bleu_2": _bleu_upto(2),
        "bleu_3": _bleu_upto(3),
        "rouge_l": rouge_l,
    }
)
CLOSED: Mapping[str, Rule] = MappingProxyType(
    {
        "whole_word": whole_word,
        "llava_med_run_eval": llava_med_run_eval,
        "llava_med_batch": llava_med_batch,
        "llava_med_pre35": llava_med_pre35,
        "med_moe": med_moe,
        "exact_match": exact_match,
        "lmms_eval.exact_match": lmms_eval_exact_match,
    }
)
RULES: Mapping[AnswerType, Mapping[str, Rule]] = MappingProxyType({"open": OPEN, "closed": CLOSED})


def apply_rules(
    answer: str, prediction: str, answer_type: AnswerType, language: Language = "en"
) -> dict[str, float | None]:
    """Every rule of an answer type on one item: name → value from 0 to 1, or None if not counted."""
    return {name: rule(answer, prediction, language) for name, rule in RULES[answer_type].items()}
