"""What a benchmark's question becomes before a model reads it, from the data in ``prompts.json``."""

from __future__ import annotations

import functools
import importlib.resources
import json
from dataclasses import dataclass
from typing import Any

from medvlm.data.readers.medmnist import COLLECTIONS
from medvlm.errors import InputError
from medvlm.evaluation.normalise import polarity, without_punctuation
from medvlm.models.template import IMAGE_MARK
from medvlm.records import VQAItem

__all__ = ["IMAGE_FIRST", "PromptStyle", "options_of", "prompt_orders", "prompt_style"]

IMAGE_FIRST = "image_first"
"""The order that a recipe with ``model.image_first`` is always asked in."""
_LONGEST_POLAR = 3
"""Characters of an answer that says yes or no and nothing else."""


@functools.cache
def _data() -> dict[str, Any]:
    source = importlib.resources.files("medvlm.evaluation") / "prompts.json"
    return json.loads(source.read_text("utf-8"))


def prompt_orders() -> tuple[str, ...]:
    """Names of the orders in which question and image can stand."""
    return tuple(_data()["orders"])


def options_of(item: VQAItem) -> tuple[str, ...]:
    """The closed set that an item's answer is from: its classes, or yes and no; empty where none is published."""
    if item.benchmark in COLLECTIONS:
        return COLLECTIONS[item.benchmark].labels
    bare = without_punctuation(item.answer)
    if item.answer_type == "closed" and len(bare) <= _LONGEST_POLAR and len(polarity(bare, item.language)) == 1:
        return tuple(_data()["languages"][item.language]["polar"])
    return ()


@dataclass(frozen=True, slots=True)
class PromptStyle:
    """How prompts are made, by name, so that a result can say it."""

    order: str
    """Such as ``question_first``."""
    options: bool
    """Whether a question with a closed set ends with it. For yes and no this tells the model that the
    question is closed, so scores with and without it are of different tasks."""

    @property
    def name(self) -> str:
        """Such as ``question_first+options``."""
        return self.order + ("+options" if self.options else "")

    @property
    def text(self) -> str:
        """The template, for the record."""
        return str(_data()["orders"][self.order]["text"])

    def prompt(self, item: VQAItem) -> str:
        """The user turn of an item; holds ``<image>`` once."""
        hint = ""
        choices = options_of(item) if self.options else ()
        if choices:
            words = _data()["languages"][item.language]
            hint = words["two" if len(choices) == 2 else "many"].replace("{options}", ", ".join(choices))
        question = item.question.replace(IMAGE_MARK, "")
        # The question last: it may hold braces, and must not be read as a template.
        return self.text.replace("{hint}", hint).replace("{question}", question)


def prompt_style(benchmark: str, *, order: str | None = None, options: bool | None = None) -> PromptStyle:
    """A benchmark's prompts, as the data has them or as asked for.

    Args:
        benchmark: Its own entry counts, else the default's.
        order: One of ``prompt_orders()``; None takes the benchmark's.
        options: With or without the options hint; None takes the benchmark's.

    Raises:
        InputError: There is no such order.
    """
    known = _data()["benchmarks"]
    entry: dict[str, Any] = known.get(benchmark, known["default"])
    chosen = entry["order"] if order is None else order
    if chosen not in prompt_orders():
        raise InputError(
            f"there is no prompt {chosen!r}", where="--prompt", hint=f"choose from {', '.join(prompt_orders())}"
        )
    return PromptStyle(chosen, bool(entry["options"] if options is None else options))
