"""Conversations written by rules from caption and inline mentions: no model, no network, the same every time.

They only cut and repeat what the article says, so they teach the form of a conversation, not new facts. Samples
made here say so (``source`` is ``generated-offline``).
"""

from __future__ import annotations

import re

from medvlm.data.conversations import pick
from medvlm.data.modality import modality_of_caption
from medvlm.records import Figure, Turn

__all__ = ["FINDINGS", "offline_turns"]

MAX_ROUNDS = 5
MIN_CAPTION_WORDS = 4

FINDINGS = (
    "pleural effusion", "pneumothorax", "consolidation", "cardiomegaly", "fracture", "mass", "nodule", "lesion",
    "haemorrhage", "hemorrhage", "edema", "oedema", "fibrosis", "necrosis", "thrombus", "aneurysm", "metastasis",
    "metastases", "tumor", "tumour", "abscess", "cyst", "stenosis", "atrophy", "inflammation", "infarct",
)  # fmt: skip

_UNCOUNTED = frozenset(
    ("consolidation", "cardiomegaly", "haemorrhage", "hemorrhage", "edema", "oedema", "fibrosis", "necrosis",
     "stenosis", "atrophy", "inflammation")
)  # fmt: skip
_DENIAL = r"\b(?:no|without|absence of|negative for)\s+(?:(?:signs?|evidence)\s+of\s+)?(?:an?\s+)?"
_NEGATION = re.compile(
    r"\b(?:no|not|nor|without|absence|absent|negative|free|resolved|excluded?|never)\b", re.IGNORECASE
)

# Captions of charts and drawings name modalities and findings that are not in the picture.
_DRAWING = re.compile(
    r"\b(?:schema\w*|diagrams?|flow\s?charts?|algorithms?|pathways?|survival|classification|scatter|plots?|"
    r"graphs?|curves?|histograms?|illustrations?|workflow)\b",
    re.IGNORECASE,
)

_MODALITY_ANSWERS = {
    "chest_xray": "It is a chest X-ray.",
    "mri": "It is a magnetic resonance (MR) image.",
    "histology": "It is a histology image, seen through a microscope.",
    "gross": "It is a gross pathology photograph.",
    "ct": "It is a computed tomography (CT) image.",
}
_MODALITY_QUESTIONS = (
    "What type of image is this?",
    "How was this image made?",
    "Which imaging modality is used here?",
)
_OPENERS = (
    "What does this image show?",
    "What can be seen in this figure?",
    "Can you tell me what is presented here?",
    "Please describe the image.",
    "What is this a picture of?",
)
_FOLLOW_UPS = ("What else can be seen?", "Is there more to note in the image?", "What further details are given?")
_MENTION_QUESTIONS = (
    "What does the article say about this figure?",
    "In what context is the image discussed?",
    "How do the authors refer to this finding?",
)

_SENTENCE_END = re.compile(r"(?<=[a-z0-9)\]%][.!?])\s+(?=[A-Z(])")
_ABBREVIATION = re.compile(r"(?:\b(?:Fig|Figs|Dr|vs|al|No|approx|ca|e\.g|i\.e|cf|[A-Z]))\.$")
_LABEL = re.compile(r"^(?:Fig(?:ure)?s?\.?|Plate)\s*\d+[.:]?\s*", re.IGNORECASE)
_BRACKETED_REFERENCE = re.compile(r"\s*[(\[]\s*(?:see\s+|cf\.?\s+)?(?:Fig|Table|Video)[^)\]]*[)\]]", re.IGNORECASE)
_REFERENCE = re.compile(r"\b(?:Fig(?:ure)?s?\.?)\s*\d+\s?[A-Za-z]?\b", re.IGNORECASE)


def offline_turns(figure: Figure, seed: int) -> tuple[Turn, ...] | str:
    """A conversation of one to five rounds about a figure, or why there is none.

    Args:
        figure: Only caption and mentions are read.
        seed: Decides the wording of the questions.
    """
    caption = _LABEL.sub("", _clean(figure.caption))
    if len(caption.split()) < MIN_CAPTION_WORDS:
        return "caption_too_short" if caption else "caption_empty"
    rounds = _rounds(figure, caption, seed)[:MAX_ROUNDS]
    slot = "<image>\n{}" if pick(seed, f"{figure.figure_id} slot", 2) else "{}\n<image>"
    turns: list[Turn] = []
    for index, (question, answer) in enumerate(rounds):
        turns += [Turn("user", question if index else slot.format(question)), Turn("assistant", answer)]
    return tuple(turns)


def _rounds(figure: Figure, caption: str, seed: int) -> list[tuple[str, str]]:
    def one_of(pool: tuple[str, ...], use: str) -> str:
        return pool[pick(seed, f"{figure.figure_id} {use}", len(pool))]

    sentences = split_sentences(caption)
    rounds = [(one_of(_OPENERS, "opener"), sentences[0])]
    modality = modality_of_caption(sentences[0])
    if modality in _MODALITY_ANSWERS and not _DRAWING.search(caption):
        rounds.append((one_of(_MODALITY_QUESTIONS, "modality"), _MODALITY_ANSWERS[modality]))
        rounds += _yes_no_rounds(caption)[:1]
    if len(sentences) > 1:
        rounds.append((one_of(_FOLLOW_UPS, "follow-up"), " ".join(sentences[1:])))
    mentioned = next((text for text in map(_mention, figure.mentions) if len(text.split()) >= MIN_CAPTION_WORDS), "")
    if mentioned:
        rounds.append((one_of(_MENTION_QUESTIONS, "mention"), mentioned))
    return rounds


def _yes_no_rounds(caption: str) -> list[tuple[str, str]]:
    """A question for each finding that a sentence plainly affirms, or plainly denies right before naming it.

    A sentence with a negation anywhere else is left alone: "no mass or nodule" denies both.
    """
    rounds: list[tuple[str, str]] = []
    for sentence in split_sentences(caption):
        for finding in FINDINGS:
            named = re.search(rf"(?P<no>{_DENIAL})?\b{finding}\b", sentence, re.IGNORECASE)
            if not named:
                continue
            denied = named["no"] is not None
            if denied or not _NEGATION.search(sentence):
                rounds.append((_presence_question(finding), "No." if denied else "Yes."))
    return rounds


def _presence_question(finding: str) -> str:
    if finding == "metastases":
        return "Are there metastases in the image?"
    article = "" if finding in _UNCOUNTED else "an " if finding[0] in "aeiou" else "a "
    return f"Is there {article}{finding} in the image?"


def split_sentences(text: str) -> list[str]:
    """The sentences of a caption, in order; never an empty list for a text that is not empty."""
    sentences: list[str] = []
    for part in _SENTENCE_END.split(text):
        if sentences and _ABBREVIATION.search(sentences[-1]):
            sentences[-1] += f" {part}"
        else:
            sentences.append(part)
    return sentences


def _mention(text: str) -> str:
    """The first sentence of a mention that refers to a figure, without the reference."""
    sentences = split_sentences(_clean(text))
    if not sentences:
        return ""
    chosen = next((sentence for sentence in sentences if re.search(r"\bFig", sentence)), sentences[0])
    return _REFERENCE.sub("the figure", _BRACKETED_REFERENCE.sub("", chosen)).strip()


def _clean(text: str) -> str:
    return " ".join(text.replace("<image>", "").split())
