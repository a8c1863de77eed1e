"""What can be asked and said about a phantom, in English and Chinese, with balanced answers.

Every closed question is asked as often where the answer is yes as where it is no. A model that does not
look at the picture is therefore right half of the time, whatever it makes of the question's wording.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from medvlm.data.phantoms import Finding
from medvlm.records import AnswerType

__all__ = ["CLOSED", "OPEN", "Asked", "Language", "Question", "ask", "caption", "sentence", "word"]

Language = Literal["en", "zh"]

_WORDS: dict[str, tuple[str, str]] = {
    "chest_xray": ("chest X-ray", "胸部X光片"),
    "ct": ("CT", "CT"),
    "mri": ("MRI", "MRI"),
    "histology": ("histology", "组织切片"),
    "gross": ("gross specimen", "大体标本"),
    "chest": ("chest", "胸部"),
    "head": ("head", "头部"),
    "abdomen": ("abdomen", "腹部"),
    "skin": ("skin", "皮肤"),
    "liver": ("liver", "肝脏"),
    "kidney": ("kidney", "肾脏"),
    "left": ("left", "左侧"),
    "right": ("right", "右侧"),
    "small": ("small", "小"),
    "large": ("large", "大"),
    "1": ("one", "一个"),
    "2": ("two", "两个"),
    "3": ("three", "三个"),
    "yes": ("yes", "是"),
    "no": ("no", "否"),
}

# The forms that most closed answers of SLAKE have, by the verb of the question; the first that fits.
_CHINESE_YES_NO: dict[str, tuple[str, str]] = {
    "包含": ("包含", "不包含"),
    "存在": ("存在", "不存在"),
    "有": ("有", "没有"),
    "": ("是的", "不是"),
}

_PICTURES: dict[str, tuple[str, str]] = {
    "chest_xray": ("chest X-ray", "胸部X光片"),
    "ct": ("CT image", "CT图像"),
    "mri": ("MRI image", "MRI图像"),
    "histology": ("histology image", "组织切片"),
    "gross": ("gross specimen", "大体标本"),
}


@dataclass(frozen=True, slots=True)
class Question:
    """A question that fits many pictures."""

    key: str
    """``<subject>`` or ``<subject>:<value>``, such as ``side:left``."""
    wordings: tuple[tuple[str, str], ...]
    """Each in English and in Chinese."""
    answer: Callable[[Finding], str | None]
    """Key of the answer's word; None where the question must not be asked of the picture."""

    @property
    def subject(self) -> str:
        """What is asked after: ``lesion``, ``side``, ``size``, ``count``, ``modality`` or ``organ``."""
        return self.key.partition(":")[0]


@dataclass(frozen=True, slots=True)
class Asked:
    """A question put to one picture, with the right answer."""

    picture: int
    """Index into the findings that were given."""
    question: Question
    wording: int
    answer: str
    """Key of the answer's word."""
    answer_type: AnswerType

    def text(self, language: Language) -> str:
        """The question in one language."""
        return self.question.wordings[self.wording][_column(language)]

    def short_answer(self, language: Language) -> str:
        """The answer in one language; a Chinese yes or no takes up the question's verb, as SLAKE's do."""
        if language == "zh" and self.answer_type == "closed":
            question = self.text("zh")
            yes, no = next(forms for verb, forms in _CHINESE_YES_NO.items() if verb in question)
            return yes if self.answer == "yes" else no
        return word(self.answer, language)


def word(key: str, language: Language) -> str:
    """The word of an answer key such as ``chest_xray``, ``left``, ``2`` or ``yes``."""
    return _WORDS[key][_column(language)]


def _column(language: Language) -> int:
    return 0 if language == "en" else 1


def _yes_if(condition: bool) -> str:
    return "yes" if condition else "no"


def _is(attribute: str, value: str) -> Callable[[Finding], str | None]:
    return lambda finding: _yes_if(getattr(finding, attribute) == value)


def _single(answer: Callable[[Finding], str | None]) -> Callable[[Finding], str | None]:
    # "The lesion" is one: with two or three of them the question would not be plain.
    return lambda finding: answer(finding) if finding.count == 1 else None


# One polarity a subject: "Is it large?" and never "Is it small?". Asking both makes the answer an
# exclusive-or of wording and picture, which a tiny model does not learn in a minute (measured: closed
# accuracy 54 % with both, 95 % with one, same model, same steps). Other wordings keep it from rote.
CLOSED: tuple[Question, ...] = (
    Question(
        "lesion",
        (("Is there a lesion?", "图中有病变吗?"), ("Does the image show a lesion?", "图像中存在病变吗?")),
        lambda f: _yes_if(f.count > 0),
    ),
    Question(
        "count:many",
        (("Is there more than one lesion?", "病变多于一个吗?"), ("Are there several lesions?", "有多个病变吗?")),
        lambda f: _yes_if(f.count > 1) if f.count else None,
    ),
    Question(
        "side:left",
        (("Is the lesion on the left side?", "病变在左侧吗?"), ("Is the lesion on the left?", "病变位于左侧吗?")),
        _single(_is("side", "left")),
    ),
    Question(
        "size:large",
        (("Is the lesion large?", "病变大吗?"), ("Is this a large lesion?", "这是大病变吗?")),
        _single(_is("size", "large")),
    ),
    Question("modality:chest_xray", (("Is this a chest X-ray?", "这是胸部X光片吗?"),), _is("modality", "chest_xray")),
    Question("modality:ct", (("Is this a CT image?", "这是CT图像吗?"),), _is("modality", "ct")),
    Question("modality:mri", (("Is this an MRI image?", "这是MRI图像吗?"),), _is("modality", "mri")),
    Question("modality:gross", (("Is this a gross specimen?", "这是大体标本吗?"),), _is("modality", "gross")),
    Question("organ:head", (("Is the head shown?", "图片中包含头部吗?"),), _is("organ", "head")),
    Question("organ:liver", (("Is the liver shown?", "图片中包含肝脏吗?"),), _is("organ", "liver")),
)
"""Questions answered by yes or no."""

OPEN: tuple[Question, ...] = (
    Question("side", (("Which side is the lesion on?", "病变在哪一侧?"),), _single(lambda f: f.side)),
    Question("size", (("What is the size of the lesion?", "病变的大小如何?"),), _single(lambda f: f.size)),
    Question("count", (("How many lesions are there?", "有几个病变?"),), lambda f: str(f.count) if f.count else None),
    Question("modality", (("What modality is shown?", "这是什么成像方式?"),), lambda f: f.modality),
    Question("organ", (("Which organ is shown?", "图中显示的是哪个部位?"),), lambda f: f.organ),
)
"""Questions answered by a word."""


def ask(rng: random.Random, findings: Sequence[Finding], *, closed: float, open_: int) -> list[Asked]:
    """Questions about pictures, sorted by picture.

    Every wording of a closed question gets as many pictures with the answer yes as with no, exactly.

    Args:
        rng: Decides which pictures a question is put to.
        findings: One for each picture.
        closed: Closed questions a picture, on average; fewer where a question finds too few pictures.
        open_: Open questions a picture, at most; a picture without a lesion may have fewer.
    """
    asked: list[Asked] = []
    pools = [(question, _by_answer(rng, question, findings)) for question in CLOSED]
    pools = [(question, pool) for question, pool in pools if pool["yes"] and pool["no"]]
    pairs = max(1, round(len(findings) * closed / (2 * max(1, len(pools)))))
    for question, pool in pools:
        each = min(pairs, len(pool["yes"]), len(pool["no"]))
        for index, pair in enumerate(zip(pool["yes"][:each], pool["no"][:each], strict=True)):
            wording = index % len(question.wordings)
            for picture, answer in zip(pair, ("yes", "no"), strict=True):
                asked.append(Asked(picture, question, wording, answer, "closed"))
    for picture, finding in enumerate(findings):
        fitting = [(q, a) for q in OPEN if (a := q.answer(finding)) is not None]
        for question, answer in rng.sample(fitting, min(open_, len(fitting))):
            asked.append(Asked(picture, question, 0, answer, "open"))
    return sorted(asked, key=lambda a: (a.picture, a.answer_type, a.question.key))


def _by_answer(rng: random.Random, question: Question, findings: Sequence[Finding]) -> dict[str, list[int]]:
    pool: dict[str, list[int]] = {"yes": [], "no": []}
    for picture, finding in enumerate(findings):
        answer = question.answer(finding)
        if answer is not None:
            pool[answer].append(picture)
    for pictures in pool.values():
        rng.shuffle(pictures)
    return pool


def caption(rng: random.Random, finding: Finding, language: Language) -> str:
    """A figure caption in the words that the questions use."""
    return _chinese_caption(rng, finding) if language == "zh" else _english_caption(rng, finding)


def _lesions(finding: Finding) -> str:
    return f"{word(str(finding.count), 'en')} {finding.size} lesion{'s' if finding.count > 1 else ''}"


def _english_caption(rng: random.Random, finding: Finding) -> str:
    picture = _PICTURES[finding.modality][0]
    shown = f"{picture[0].upper()}{picture[1:]}"
    if finding.organ not in picture:
        shown += f" of the {finding.organ}"
    if finding.count == 0:
        forms = (
            f"{shown}. There is no lesion.",
            f"{shown} without a lesion. The image looks normal.",
            f"Normal {picture}. The {finding.organ} is shown, and there is no lesion on the left or right side.",
        )
        return rng.choice(forms)
    many = finding.count > 1
    forms = (
        f"{shown} showing {_lesions(finding)} on the {finding.side} side.",
        f"{shown}. There {'are' if many else 'is'} {_lesions(finding)} on the {finding.side} side.",
        f"{_lesions(finding).capitalize()} on the {finding.side} side. This is a {picture}, and the organ shown is "
        f"the {finding.organ}.",
        (
            f"{shown}. The image does not look normal: there {'are' if many else 'is'} {_lesions(finding)}. The "
            f"{'lesions are' if many else 'lesion is'} on the {finding.side} side of the image, and the size is "
            f"{finding.size}. There is {'more than one' if many else 'only one'} lesion, and the organ shown is "
            f"the {finding.organ}."
        ),
    )
    return rng.choice(forms).replace("a MRI", "an MRI")


def _chinese_caption(rng: random.Random, finding: Finding) -> str:
    picture = _PICTURES[finding.modality][1]
    organ = word(finding.organ, "zh")
    shown = picture if picture.startswith(organ) else f"{organ}{picture}"
    if finding.count == 0:
        return rng.choice(
            (
                f"{shown}，图中没有病变。",
                f"{shown}，图像中不存在病变，是正常的。",
                f"这是{picture}，图片中包含{organ}，不包含病变。",
            )
        )
    number, size, side = word(str(finding.count), "zh"), word(finding.size, "zh"), word(finding.side, "zh")
    how_many = "有多个病变" if finding.count > 1 else "病变不多于一个"
    return rng.choice(
        (
            f"{shown}，{side}有{number}{size}病变。",
            f"{shown}，图中有{number}{size}病变，病变在{side}。",
            f"这是{picture}，图片中包含{organ}。图像中存在{number}{size}病变，病变位于{side}。",
            f"这不是正常的图像，是{shown}，{how_many}，病变{size}，在{side}。",
        )
    )


def sentence(asked: Asked, finding: Finding, language: Language) -> str:
    """The answer as a sentence, for conversations."""
    return _chinese_sentence(asked, finding) if language == "zh" else _english_sentence(asked, finding)


def _english_sentence(asked: Asked, finding: Finding) -> str:
    picture = _PICTURES[finding.modality][0]
    verb = "are" if finding.count > 1 else "is"
    lesion = f"there {verb} {_lesions(finding)} on the {finding.side} side" if finding.count else "there is no lesion"
    statement = {
        "lesion": lesion,
        "side": f"the lesion is on the {finding.side} side",
        "size": f"the lesion is {finding.size}",
        "count": f"there {verb} {word(str(finding.count), 'en') if finding.count else 'no'} "
        f"lesion{'s' if finding.count > 1 else ''}",
        "modality": f"this is {'an' if finding.modality == 'mri' else 'a'} {picture}",
        "organ": f"the {finding.organ} is shown",
    }[asked.question.subject]
    if asked.answer_type == "open":
        return f"{statement[0].upper()}{statement[1:]}."
    return f"{asked.answer.capitalize()}, {statement}."


def _chinese_sentence(asked: Asked, finding: Finding) -> str:
    number = word(str(finding.count), "zh") if finding.count else ""
    lesion = f"{word(finding.side, 'zh')}有{number}{word(finding.size, 'zh')}病变" if finding.count else "图中没有病变"
    statement = {
        "lesion": lambda: lesion,
        "side": lambda: f"病变在{word(finding.side, 'zh')}",
        "size": lambda: f"病变{word(finding.size, 'zh')}",
        "count": lambda: f"有{number}病变",
        "modality": lambda: f"这是{_PICTURES[finding.modality][1]}",
        "organ": lambda: f"图中显示的是{word(finding.organ, 'zh')}",
    }[asked.question.subject]()
    return f"{statement}。" if asked.answer_type == "open" else f"{asked.short_answer('zh')}，{statement}。"
