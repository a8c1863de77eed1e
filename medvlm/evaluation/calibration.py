"""Whether a model's certainty is worth believing: the likelihood of the options against what is right."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medvlm.evaluation.answers import Joined
from medvlm.evaluation.normalise import clean_words, polarity, without_punctuation
from medvlm.records import Prediction, VQAItem

__all__ = ["BINS", "Bin", "Calibration", "calibrate", "is_option"]

BINS = 10


@dataclass(frozen=True, slots=True)
class Bin:
    """Items whose confidence is above ``low`` and at most ``high``. Shares are 0 to 1."""

    low: float
    high: float
    n: int
    confidence: float
    """Mean share of the likelihood that the likeliest option has."""
    accuracy: float
    """How often that option is the right one."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """How a model's confidence compares with its accuracy, over the items whose options were weighed."""

    n: int
    accuracy: float
    """Per cent of items whose likeliest option is right: another number than the score of the text
    that was generated."""
    confidence: float
    """Mean, in per cent."""
    ece: float
    """Expected calibration error in points (Guo et al. 2017): the mean distance of confidence and
    accuracy over the bins, weighted by their items. 0 is perfect."""
    bins: tuple[Bin, ...]
    """Those that hold items: the reliability diagram."""

    def as_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return dataclasses.asdict(self) | {"bins": [dataclasses.asdict(one) for one in self.bins]}


def is_option(option: str, answer: str, item: VQAItem) -> bool:
    """Whether an option of a closed set is what an answer says."""
    if clean_words(option, item.language) == clean_words(answer, item.language):
        return True
    said = polarity(without_punctuation(answer), item.language)
    # SLAKE says yes in several Chinese ways; the option is one of them.
    return item.language == "zh" and len(said) == 1 and said == polarity(without_punctuation(option), "zh")


def calibrate(joined: Joined) -> Calibration | None:
    """Calibration over the items whose prediction holds the likelihood of each option; None where none does."""
    weighed = [
        (item, prediction)
        for item, prediction in zip(joined.items, joined.predictions, strict=True)
        if prediction is not None and len(prediction.option_logprobs) == len(prediction.options) > 1
    ]
    if not weighed:
        return None
    certain = [_likeliest(item, prediction) for item, prediction in weighed]
    confidence_I = np.array([confidence for confidence, _ in certain])
    right_I = np.array([right for _, right in certain], dtype=float)
    # Above an edge and at most the next one, so that a certainty of 1 has its place in the last bin.
    place_I = np.clip(np.ceil(confidence_I * BINS).astype(int) - 1, 0, BINS - 1)
    bins: list[Bin] = []
    for place in np.unique(place_I).tolist():
        inside = place_I == place
        bins.append(
            Bin(
                low=place / BINS,
                high=(place + 1) / BINS,
                n=int(inside.sum()),
                confidence=round(float(confidence_I[inside].mean()), 6),
                accuracy=round(float(right_I[inside].mean()), 6),
            )
        )
    error = sum(one.n * abs(one.confidence - one.accuracy) for one in bins) / len(weighed)
    return Calibration(
        n=len(weighed),
        accuracy=_percent(right_I.mean()),
        confidence=_percent(confidence_I.mean()),
        ece=_percent(error),
        bins=tuple(bins),
    )


def _likeliest(item: VQAItem, prediction: Prediction) -> tuple[float, bool]:
    """Share of the likeliest option among the options, and whether it is right."""
    logprobs: Sequence[float] = prediction.option_logprobs
    weights = np.exp(np.asarray(logprobs) - max(logprobs))
    place = int(weights.argmax())
    return float(weights[place] / weights.sum()), is_option(prediction.options[place], item.answer, item)


def _percent(share: float) -> float:
    return round(100 * float(share), 6)
