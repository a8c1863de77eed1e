"""How answers are made comparable before a rule looks at them: the published ways, and a clean one."""

from __future__ import annotations

import functools
import re
import string
import unicodedata
from collections.abc import Callable
from typing import Literal

__all__ = [
    "chinese_words",
    "clean_words",
    "is_chinese_yes_no",
    "llava_med_normalise",
    "lmms_eval_slake_normalise",
    "polarity",
    "without_punctuation",
]

# ── LLaVA-Med's normalisation, quirks included ──────────────────────────────────────────────────

_DIGIT_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_PERIODS_STRIPPED = 32  # the original passes re.UNICODE (= 32) where re.sub expects a count
_PUNCTUATION = ';/[]"{}()=+\\_->' + "<@`,?!"
_ARTICLES = frozenset({"a", "an", "the"})
_COUNT_WORDS = "zero one two three four five six seven eight nine ten"
_COUNTS = {word: str(number) for number, word in enumerate(_COUNT_WORDS.split())}
_NUMBERS = {**_COUNTS, "none": "0"}

# The contractions that VQA v2's evaluation restores. Each is found by its spelling with exactly one
# apostrophe left out ("couldnt've" and "couldn'tve" for "couldn't've").
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
    he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't
    must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've
    somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've
    something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas
    wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've
    who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've
    you'd you'd've you'll you're you've
"""


def _contraction_table() -> dict[str, str]:
    table = {
        full[:place] + full[place + 1 :]: full
        for full in _CONTRACTIONS.split()
        for place in (match.start() for match in re.finditer("'", full))
    }
    table["somebody'd"] = "somebodyd"  # the original's table has this one the wrong way round
    return table


_RESTORED = _contraction_table()


@functools.lru_cache(maxsize=65536)
def llava_med_normalise(text: str) -> str:
    """A text as LLaVA-Med's evaluation normalises it, the VQA v2 way with its slips.

    Lower case; punctuation becomes a space, or nothing if it touches a space anywhere in the text
    (or the text holds a number such as 1,000); the first 32 periods that no digit follows go;
    number words become digits ("none" too becomes "0"); articles go; contractions get their
    apostrophe back. Not idempotent, and LLaVA-Med applies it twice before it counts tokens.

    Source: ``normalize_word`` in llava/eval/eval_metrics/glossary.py of LLaVA-Med v1.0.0, written
    anew from reading it; the table of contractions is that of the VQA v2 evaluation.
    """
    digit_comma = _DIGIT_COMMA.search(text) is not None
    spaced = text
    for mark in _PUNCTUATION:
        touches_space = mark + " " in text or " " + mark in text
        spaced = spaced.replace(mark, "" if touches_space or digit_comma else " ")
    words = (_NUMBERS.get(word, word) for word in _PERIOD.sub("", spaced, count=_PERIODS_STRIPPED).lower().split())
    return " ".join(_RESTORED.get(word, word) for word in words if word not in _ARTICLES)


# ── lmms-eval's normalisation for SLAKE ─────────────────────────────────────────────────────────

_CHINESE_MARKS = "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～、《》【】"
_MARKS_TO_SPACE = str.maketrans(dict.fromkeys(string.punctuation + _CHINESE_MARKS, " "))
_BRACKETED = re.compile(r"\([^)]*\)|（[^）]*）")
_SLAKE_SYNONYMS = {
    "x ray": "xray",
    **dict.fromkeys(("yeah", "yep", "true"), "yes"),
    **dict.fromkeys(("nope", "false"), "no"),
    **dict.fromkeys(("是", "是的", "有", "包含", "可以", "能", "会", "正常"), "yes"),
    **dict.fromkeys(("否", "不是", "没有", "无", "不包含", "不能", "不会", "不可以", "不正常", "异常"), "no"),
}


@functools.lru_cache(maxsize=65536)
def lmms_eval_slake_normalise(text: str) -> str:
    """A text as lmms-eval's ``slake`` task normalises it: brackets and marks go, synonyms merge.

    Note what it merges: a Chinese "normal" counts as yes and "abnormal" as no.

    Source: ``normalize_answer`` in lmms_eval/tasks/slake/utils.py of EvolvingLMMs-Lab/lmms-eval
    (MIT), written anew from reading it.
    """
    plain = " ".join(_BRACKETED.sub(" ", text.strip().lower()).translate(_MARKS_TO_SPACE).split())
    return _SLAKE_SYNONYMS.get(plain, plain)


# ── The clean way ───────────────────────────────────────────────────────────────────────────────


@functools.lru_cache(maxsize=65536)
def clean_words(text: str, language: Literal["en", "zh"] = "en") -> tuple[str, ...]:
    """Words of a text: NFKC, lower case, no punctuation, no English articles, "two" as "2".

    A point or comma between digits stays ("1.5"), and so does an apostrophe inside a word. "None"
    stays a word. Chinese is cut by jieba.
    """
    plain = without_punctuation(text)
    words = chinese_words(plain) if language == "zh" else plain.split()
    return tuple(_COUNTS.get(word, word) for word in words if word not in _ARTICLES)


def without_punctuation(text: str) -> str:
    """A text in NFKC and lower case whose punctuation and symbols are spaces."""
    lowered = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).lower())
    last = len(lowered) - 1
    kept = [
        char
        if unicodedata.category(char)[0] not in "PSCZ"
        or (char in ".," and 0 < place < last and lowered[place - 1].isdigit() and lowered[place + 1].isdigit())
        or (char == "'" and 0 < place < last and lowered[place - 1].isalpha() and lowered[place + 1].isalpha())
        else " "
        for place, char in enumerate(lowered)
    ]
    return " ".join("".join(kept).split())


def chinese_words(text: str) -> list[str]:
    """Words of a Chinese text, cut by jieba in its precise mode with its own dictionary."""
    return [word for word in _jieba_cut()(text) if word.strip()]


@functools.cache
def _jieba_cut() -> Callable[[str], list[str]]:
    import warnings

    with warnings.catch_warnings():
        # Where setuptools still has pkg_resources, jieba imports it and so warns of its end.
        warnings.simplefilter("ignore")
        import jieba  # pyright: ignore[reportMissingTypeStubs]

    tokenizer = jieba.Tokenizer()
    # As its initialize() does, but without the messages and without the cache in /tmp, which any
    # user of the machine could have written.
    tokenizer.FREQ, tokenizer.total = tokenizer.gen_pfdict(tokenizer.get_dict_file())
    tokenizer.initialized = True
    return tokenizer.lcut


# ── Yes or no ───────────────────────────────────────────────────────────────────────────────────

_CHINESE_NEGATIONS = frozenset(["不", "不是", "不能", "不会", "不对", "没", "没有", "无", "无法", "否", "非", "并非"])
_CHINESE_AFFIRMATIONS = frozenset(["有", "包含", "包括", "存在", "可以", "能", "会"])
# A clause that says nothing but yes or no: what SLAKE answers with, and its near forms.
_CHINESE_CLAUSE = re.compile(
    "(?P<no>不是|不包含|不包括|不可以|不存在|不能|不会|不对|没有|没|否|无|不)(的|了)?"
    "|(?P<yes>是|包含|包括|可以|存在|能|会|对|有)(的|了)?"
)


def polarity(text: str, language: Literal["en", "zh"] = "en") -> frozenset[str]:
    """Which of yes and no stand in a normalised text: neither, one, or both.

    English looks for the words. Chinese first looks for clauses that are nothing but a yes or no in the
    forms that SLAKE answers with: where there is one, what stands around it explains it ("不是，这是CT" is a no).
    Else the words of the sentence count, cut by jieba, and a negation takes the next word with it ("不包含" is a
    no, not also a yes). The copula in a sentence ("这是CT") is neither.
    """
    if language == "zh":
        clauses = [match for clause in text.split() if (match := _CHINESE_CLAUSE.fullmatch(clause))]
        if clauses:
            return _both(yes=any(m["yes"] for m in clauses), no=any(m["no"] for m in clauses))
        return _chinese_sentence_polarity(text)
    words = text.split()
    return _both(yes="yes" in words, no="no" in words)


def is_chinese_yes_no(text: str) -> bool:
    """Whether a text without punctuation is a Chinese yes or no and nothing else."""
    return _CHINESE_CLAUSE.fullmatch(text) is not None


def _chinese_sentence_polarity(text: str) -> frozenset[str]:
    yes = no = negated = False
    for word in chinese_words(text):
        negation = word in _CHINESE_NEGATIONS
        yes = yes or (word in _CHINESE_AFFIRMATIONS and not negated)
        no = no or negation
        negated = negation
    return _both(yes=yes, no=no)


def _both(*, yes: bool, no: bool) -> frozenset[str]:
    return frozenset(word for word, stands in (("yes", yes), ("no", no)) if stands)
