"""Published numbers as data: each with its source, rule, epochs, training split and test split."""

from __future__ import annotations

import functools
import importlib.resources
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from medvlm.data.readers.medmnist import COLLECTIONS
from medvlm.evaluation.score import OFFICIAL_TEST_SIZES
from medvlm.records import AnswerType

__all__ = ["PublishedScore", "chat_table", "notebook_runs", "notebook_scores", "published_scores"]


@dataclass(frozen=True, slots=True)
class PublishedScore:
    """One number that somebody printed."""

    model: str
    training: str
    """``fine-tuned`` on the benchmark, or ``zero-shot``."""
    epochs: int | None
    """Of the fine-tuning; None where there is none or it is not stated."""
    train_split: str
    benchmark: str
    answer_type: AnswerType
    rule: str
    """The name of our rule that computes it; ``unpublished.…``, ``candidate_set_accuracy``, ``nltk.bleu``
    and ``accuracy`` are none of ours and compare with none."""
    value: float
    """Per cent, as printed."""
    n: int | None
    source: str
    url: str
    note: str
    second_hand: bool
    headline: bool
    """Whether the leaderboard's table shows it unasked."""


@functools.cache
def _files(folder: str) -> list[dict[str, Any]]:
    root = importlib.resources.files("medvlm.evaluation") / "published"
    entries = (root / folder if folder else root).iterdir()
    names = sorted((entry for entry in entries if entry.name.endswith(".json")), key=lambda entry: entry.name)
    return [json.loads(entry.read_text("utf-8")) for entry in names]


def published_scores() -> Iterator[PublishedScore]:
    """Every published score, by file, model, benchmark and rule."""
    for document in _files(""):
        for row in document["rows"]:
            for benchmark, by_type in row["scores"].items():
                for answer_type, by_rule in by_type.items():
                    for rule, value in by_rule.items():
                        yield _score(document, row, benchmark, answer_type, rule, value)


def _score(
    document: dict[str, Any], row: dict[str, Any], benchmark: str, answer_type: AnswerType, rule: str, value: float
) -> PublishedScore:
    epochs = row["epochs"]
    # MedMNIST's releases differ in size, and papers do not say which one they scored.
    sizes = OFFICIAL_TEST_SIZES.get(benchmark) if benchmark not in COLLECTIONS else None
    splits = {**document["train_splits"], **row.get("train_splits", {})}
    return PublishedScore(
        model=row["model"],
        training=row["training"],
        epochs=epochs.get(benchmark) if isinstance(epochs, dict) else epochs,
        train_split=splits.get(benchmark, "unstated") if row["training"] == "fine-tuned" else "none",
        benchmark=benchmark,
        answer_type=answer_type,
        rule=rule,
        value=value,
        n=sizes[answer_type == "closed"] if sizes else None,
        source=document["source"],
        url=document["url"],
        note=row["note"],
        second_hand=document.get("second_hand", False),
        headline=row["headline"],
    )


def notebook_runs() -> dict[str, Any]:
    """All 192 runs that LLaVA-Med's evaluation notebook prints, with what their paths say.

    ``runs`` holds one object a run; ``open`` has a value for each of ``open_rules``.
    """
    return _files("runs")[0]


_TRAIN_SPLITS = {
    "data_RAD": "data_RAD: 3,064 questions, not the official 1,797",
    "vqa_rad": "official: 1,797",
    "Slake1.0": "official: 4,919",
    "pvqa": "official: 19,755",
}


def notebook_scores() -> Iterator[PublishedScore]:
    """The 192 runs of LLaVA-Med's notebook as scores; a run's path is its model."""
    document = notebook_runs()
    for run in document["runs"]:
        closed = document["closed_rule_with_options" if run["options"] else "closed_rule"]
        values: list[tuple[AnswerType, str, float]] = [
            *(("open", rule, value) for rule, value in zip(document["open_rules"], run["open"], strict=True)),
            ("closed", closed, run["closed"]),
        ]
        tuned = run["train_set"] is not None
        sizes = OFFICIAL_TEST_SIZES[run["benchmark"]]
        for answer_type, rule, value in values:
            yield PublishedScore(
                model=run["run"],
                training="fine-tuned" if tuned else "zero-shot",
                epochs=run["epochs"],
                train_split=_TRAIN_SPLITS[run["train_set"]] if tuned else "none",
                benchmark=run["benchmark"],
                answer_type=answer_type,
                rule=rule,
                value=value,
                n=sizes[answer_type == "closed"],
                source=document["source"],
                url=document["url"],
                note="answer options in the prompt; the closed denominator shrank" if run["options"] else "",
                second_hand=False,
                headline=False,
            )


def chat_table() -> dict[str, Any]:
    """LLaVA-Med's table of relative chat scores: ``columns``, ``counts``, and ``rows`` by model."""
    return _files("chat")[0]
