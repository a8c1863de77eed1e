"""Two models on the same questions, pair by pair: McNemar's test and a paired bootstrap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medvlm.data.benchmarks import read_benchmark
from medvlm.errors import InputError
from medvlm.evaluation.answers import Missing, join_answers, read_predictions
from medvlm.evaluation.bootstrap import RESAMPLES, Resamples, interval
from medvlm.evaluation.score import COLUMNS, items_of_split, tabulate
from medvlm.evaluation.score_step import items_without_images, stage_order
from medvlm.records import AnswerType, Prediction, VQAItem
from medvlm.store import Workspace

__all__ = ["Difference", "compare_answers", "compare_models", "mcnemar"]

_DIGITS = 6


@dataclass(frozen=True, slots=True)
class Difference:
    """How two models differ under one rule, over the items that the rule counts for both."""

    answer_type: AnswerType
    rule: str
    n: int
    first: float
    """Per cent."""
    second: float
    difference: float
    """``second`` less ``first``, in points."""
    low: float | None
    """Ends of the paired bootstrap's 95 % interval, which resamples images."""
    high: float | None
    only_first: int | None
    """Items that only the first model has right; None under a rule with partial marks."""
    only_second: int | None
    p_value: float | None
    """McNemar's exact test, two-sided. It takes questions on one image as independent: where it and
    the interval disagree, believe the interval."""


def compare_answers(
    items: Sequence[VQAItem],
    first: Sequence[Prediction],
    second: Sequence[Prediction],
    *,
    missing: Missing = "error",
    resamples: int = RESAMPLES,
    names: tuple[str, str] = ("first", "second"),
) -> list[Difference]:
    """Compare two models' answers to the same items under every rule.

    Raises:
        PredictionMismatch: Either does not join the items one to one.
    """
    tables = [
        tabulate(join_answers(items, predictions, missing=missing, where=name))
        for predictions, name in ((first, names[0]), (second, names[1]))
    ]
    draws = Resamples.draw([item.image_id for item in items], resamples=resamples)
    difference_IR = tables[1].values - tables[0].values
    mean_BR = draws.means(difference_IR)
    found: list[Difference] = []
    for index, (answer_type, rule) in enumerate(COLUMNS):
        both_I = ~np.isnan(difference_IR[:, index])
        if both_I.any():
            a, b = (table.values[both_I, index] for table in tables)
            ends = interval(mean_BR[:, index]) if draws.images(both_I) > 1 else None
            found.append(_difference(answer_type, rule, a, b, ends))
    return found


def _difference(
    answer_type: AnswerType,
    rule: str,
    first: NDArray[np.float64],
    second: NDArray[np.float64],
    ends: tuple[float, float] | None,
) -> Difference:
    whole = bool(np.isin(first, (0, 1)).all() and np.isin(second, (0, 1)).all())
    only_first, only_second = int((first > second).sum()), int((second > first).sum())
    return Difference(
        answer_type=answer_type,
        rule=rule,
        n=len(first),
        first=_points(first.mean()),
        second=_points(second.mean()),
        difference=_points(second.mean() - first.mean()),
        low=_points(ends[0]) if ends else None,
        high=_points(ends[1]) if ends else None,
        only_first=only_first if whole else None,
        only_second=only_second if whole else None,
        p_value=mcnemar(only_first, only_second) if whole else None,
    )


def _points(share: float) -> float:
    return round(100 * float(share), _DIGITS)


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided p of McNemar's exact test; 1 where the models never differ.

    Args:
        only_first: Pairs that only the first has right.
        only_second: Pairs that only the second has right.
    """
    from scipy.stats import binomtest

    pairs = only_first + only_second
    return float(binomtest(only_first, pairs, 0.5).pvalue) if pairs else 1.0


def compare_models(
    workspace: Workspace,
    benchmark: str,
    first: str,
    second: str,
    *,
    items_path: Path | None = None,
    missing: Missing = "error",
    resamples: int = RESAMPLES,
) -> list[Difference]:
    """Compare two named models on a benchmark's test split.

    Args:
        workspace: Holds the recipes' predictions, and the items unless ``items_path`` is given.
        benchmark: Such as ``vqa-rad``.
        first: A prediction file, or ``recipe``, ``recipe:stage``, ``recipe:blind`` or
            ``recipe:stage:blind``. Without a stage, the last one that was predicted.
        second: The same.
        items_path: The benchmark's official file or folder.
        missing: As in ``join_answers``.
        resamples: Of the bootstrap.

    Raises:
        InputError: A model has no such answers.
        WorkspaceError: The predictions or the items are not there yet.
        PredictionMismatch: Either does not join the items one to one.
    """
    if items_path:
        items = items_of_split(read_benchmark(benchmark, items_path, images=False), where=str(items_path))
    else:
        folder = workspace.items(benchmark)
        items = items_of_split(items_without_images(folder), where=str(folder))
    answers = [_answers_of(workspace, benchmark, name) for name in (first, second)]
    return compare_answers(items, *answers, missing=missing, resamples=resamples, names=(first, second))


def _answers_of(workspace: Workspace, benchmark: str, name: str) -> list[Prediction]:
    if Path(name).exists():
        predictions = read_predictions(Path(name), benchmark=benchmark)
        marks: list[str] = []
    else:
        recipe, *marks = name.split(":")
        predictions = read_predictions(workspace.predictions(recipe, benchmark) / "answers", benchmark=benchmark)
    stages = sorted({prediction.stage for prediction in predictions}, key=stage_order)
    blind = "blind" in marks
    stage = next((mark for mark in marks if mark != "blind"), stages[-1] if stages else "")
    chosen = [prediction for prediction in predictions if prediction.stage == stage and prediction.blind == blind]
    if not chosen:
        raise InputError(
            f"there are no answers of {name!r}" + (" without the image" if blind else ""),
            where=name,
            hint=f"predicted stages: {', '.join(stages) or 'none'}; name one as recipe:stage",
        )
    return chosen
