"""Chinese alignment and instruction rows about the sample figures, in ChiMed-VL's JSON Lines.

ChiMed-VL's field names could not be verified; its training code reads rows of LLaVA's shape (``id``, ``image``,
``conversations``), and that is what stands here. There is no ``domain``, as in the original.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medvlm.data.sample_bucket import SampleFigure
from medvlm.data.sample_questions import Asked, ask, caption, sentence

__all__ = ["CHINESE_PROMPTS", "chinese_alignment_rows", "chinese_instruct_rows", "write_lines"]

CHINESE_PROMPTS = (
    "描述这张图像。",
    "请描述这张图片。",
    "图中显示了什么?",
    "图像显示了什么?",
    "这是什么图像?",
    "请写一句图像说明。",
    "请为这张图像写一个简短的说明。",
    "请报告图中所见。",
)
"""Requests to describe a picture, in our own wording."""


def chinese_alignment_rows(rng: random.Random, figures: Sequence[SampleFigure]) -> list[dict[str, Any]]:
    """One row a figure: a request and a Chinese caption."""
    return [
        _row(rng, figure, [(rng.choice(CHINESE_PROMPTS), caption(rng, figure.finding, "zh"))]) for figure in figures
    ]


def chinese_instruct_rows(rng: random.Random, figures: Sequence[SampleFigure]) -> list[dict[str, Any]]:
    """One row a figure: a Chinese conversation about what can be seen; half of the answers are sentences."""
    turns: list[list[Asked]] = [[] for _ in figures]
    for asked in ask(rng, [figure.finding for figure in figures], closed=4, open_=2):
        turns[asked.picture].append(asked)
    rows: list[dict[str, Any]] = []
    for figure, questions in zip(figures, turns, strict=True):
        rng.shuffle(questions)
        rows.append(_row(rng, figure, [(q.text("zh"), _answer(rng, q, figure)) for q in questions]))
    return rows


def _answer(rng: random.Random, asked: Asked, figure: SampleFigure) -> str:
    return sentence(asked, figure.finding, "zh") if rng.random() < 0.5 else asked.short_answer("zh")


def _row(rng: random.Random, figure: SampleFigure, turns: Sequence[tuple[str, str]]) -> dict[str, Any]:
    conversations: list[dict[str, str]] = []
    for index, (question, answer) in enumerate(turns):
        if index == 0:
            question = f"<image>\n{question}" if rng.random() < 0.5 else f"{question}\n<image>"
        conversations += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": figure.pair_id, "image": f"{figure.pair_id}.jpg", "conversations": conversations}


def write_lines(path: Path, rows: Sequence[Any]) -> None:
    """Write JSON Lines, Chinese as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
