"""Closed-set image classification by prompts: which class an answer names, accuracy, macro-F1, confusion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medvlm.errors import InputError
from medvlm.evaluation.metrics import stands_in
from medvlm.evaluation.normalise import clean_words

__all__ = ["Classification", "chosen_label", "classification"]


def chosen_label(text: str, labels: Sequence[str]) -> str | None:
    """The one class that an answer names in whole words; None if it names none or several.

    A class inside a longer one that is named does not count: "left lung" is not also "lung".
    """
    words = clean_words(text)
    named = [label for label in labels if stands_in(clean_words(label), words)]
    outermost = [
        label
        for label in named
        if not any(label != other and stands_in(clean_words(label), clean_words(other)) for other in named)
    ]
    return outermost[0] if len(outermost) == 1 else None


@dataclass(frozen=True, slots=True)
class Classification:
    """How well the classes were told apart. Shares are per cent."""

    n: int
    accuracy: float
    macro_f1: float
    """Mean F1 of the classes that occur; an answer without a class is wrong and of no class."""
    unanswered: int
    """Answers that name no class, or several."""
    labels: tuple[str, ...]
    confusion: tuple[tuple[int, ...], ...]
    """A row for each true class; a column for each predicted one, and last one for no class."""
    by_label: Mapping[str, Mapping[str, float]]
    """``precision``, ``recall``, ``f1`` and ``support`` of each class."""

    def as_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {
            "n": self.n,
            "accuracy": self.accuracy,
            "macro_f1": self.macro_f1,
            "unanswered": self.unanswered,
            "labels": list(self.labels),
            "confusion": [list(row) for row in self.confusion],
            "by_label": {label: dict(values) for label, values in self.by_label.items()},
        }


def classification(truth: Sequence[str], answers: Sequence[str], labels: Sequence[str]) -> Classification:
    """Classification metrics of free-text answers.

    Args:
        truth: The true class of each image.
        answers: What the model said, in the same order.
        labels: The closed set.

    Raises:
        InputError: There is nothing to score, or a true class is not in the set.
    """
    place = {label: index for index, label in enumerate(labels)}
    unknown = sorted({*truth} - {*labels})
    if unknown or not truth:
        raise InputError(
            f"the classes {', '.join(unknown[:10])} are not in the set" if unknown else "there are no items to score",
            where=f"labels {', '.join(labels)}",
            hint="give every class, spelled as in the items",
        )
    none = len(labels)
    confusion = np.zeros((len(labels), none + 1), dtype=np.int64)
    for true, answer in zip(truth, answers, strict=True):
        label = chosen_label(answer, labels)
        confusion[place[true], none if label is None else place[label]] += 1
    hits = np.diag(confusion).astype(float)
    support, predicted = confusion.sum(axis=1), confusion[:, :none].sum(axis=0)
    with np.errstate(invalid="ignore"):
        precision = np.nan_to_num(hits / predicted)
        recall = np.nan_to_num(hits / support)
        f1 = np.nan_to_num(2 * hits / (support + predicted))
    by_label = {
        label: {
            "precision": _percent(precision[index]),
            "recall": _percent(recall[index]),
            "f1": _percent(f1[index]),
            "support": int(support[index]),
        }
        for label, index in place.items()
    }
    return Classification(
        n=len(truth),
        accuracy=_percent(hits.sum() / len(truth)),
        macro_f1=_percent(f1[support > 0].mean()),
        unanswered=int(confusion[:, none].sum()),
        labels=tuple(labels),
        confusion=tuple(tuple(int(count) for count in row) for row in confusion),
        by_label=by_label,
    )


def _percent(share: float) -> float:
    return round(100 * float(share), 6)
