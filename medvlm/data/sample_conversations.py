"""Alignment and instruction rows about the sample figures, in LLaVA-Med's JSON format."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from medvlm.data.phantoms import Modality
from medvlm.data.sample_bucket import SampleFigure
from medvlm.data.sample_questions import Asked, ask, sentence, word

__all__ = ["ALIGNMENT_PROMPTS", "alignment_rows", "instruct_rows"]

ALIGNMENT_PROMPTS: tuple[str, ...] = (
    "Describe the image.",
    "Describe this image.",
    "Describe the image in one sentence.",
    "Describe what is shown.",
    "Describe the lesion and the organ.",
    "What is shown?",
    "What is shown in the image?",
    "What is shown in this image?",
    "What does the image show?",
    "What does this image show?",
    "What can be seen?",
    "What can be seen in the image?",
    "What is this?",
    "What is this an image of?",
    "Which findings are there?",
    "Which findings are shown in the image?",
    "Write a caption.",
    "Write a caption for the image.",
    "Write a short caption for this image.",
    "Give a caption for the image.",
    "Give a short description of the image.",
    "Give a description of what is shown.",
    "Say what the image shows.",
    "Say what is shown.",
    "Tell what is shown in the image.",
    "Report the findings.",
    "Report the findings of this image.",
)
"""27 prompts, as many as LLaVA-Med's alignment file has, in our own wording."""

_DOMAINS: dict[Modality, str] = {
    "chest_xray": "chest_xray",
    "mri": "mri",
    "histology": "histology",
    "gross": "gross",
    "ct": "ct_scan",
}


def alignment_rows(rng: random.Random, figures: Sequence[SampleFigure]) -> list[dict[str, Any]]:
    """One row a figure: a prompt and the caption."""
    return [_row(rng, figure, [(rng.choice(ALIGNMENT_PROMPTS), figure.caption)]) for figure in figures]


def instruct_rows(rng: random.Random, figures: Sequence[SampleFigure]) -> list[dict[str, Any]]:
    """One row a figure: a conversation of several questions and answers about what can be seen.

    One row in 25 spells the key ``conversatons``, as some of LLaVA-Med's own do.
    """
    findings = [figure.finding for figure in figures]
    turns: list[list[Asked]] = [[] for _ in figures]
    for asked in ask(rng, findings, closed=4, open_=2):
        turns[asked.picture].append(asked)
    rows: list[dict[str, Any]] = []
    for index, (figure, questions) in enumerate(zip(figures, turns, strict=True)):
        rng.shuffle(questions)
        row = _row(rng, figure, [(q.text("en"), _answer(rng, q, figure)) for q in questions])
        if index % 25 == 10:
            row["conversatons"] = row.pop("conversations")
        rows.append(row)
    return rows


def _answer(rng: random.Random, asked: Asked, figure: SampleFigure) -> str:
    if rng.random() < 0.5:
        return sentence(asked, figure.finding, "en")
    short = word(asked.answer, "en")
    return f"{short[0].upper()}{short[1:]}"


def _row(rng: random.Random, figure: SampleFigure, turns: Sequence[tuple[str, str]]) -> dict[str, Any]:
    conversations: list[dict[str, str]] = []
    for index, (question, answer) in enumerate(turns):
        if index == 0:
            question = f"<image>\n{question}" if rng.random() < 0.5 else f"{question}\n<image>"
        conversations += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {
        "id": figure.pair_id,
        "image": f"{figure.pair_id}.jpg",
        "domain": {name: modality == figure.finding.modality for modality, name in _DOMAINS.items()},
        "conversations": conversations,
    }
