"""Scores of predictions: every rule side by side, by slice, with intervals and the blind baseline."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medvlm.data.benchmarks import read_benchmark
from medvlm.data.readers.medmnist import COLLECTIONS, read_medmnist
from medvlm.errors import InputError
from medvlm.evaluation.answers import Joined, Missing, join_answers, read_predictions
from medvlm.evaluation.bootstrap import RESAMPLES, Resamples, interval
from medvlm.evaluation.classify import classification
from medvlm.evaluation.metrics import RULES, apply_rules
from medvlm.records import AnswerType, Prediction, Score, Split, VQAItem

__all__ = [
    "COLUMNS",
    "OFFICIAL_TEST_SIZES",
    "ScoreTable",
    "intervals",
    "is_official",
    "items_of_split",
    "score_files",
    "score_rows",
    "slices_of",
    "summary",
    "tabulate",
]

COLUMNS: tuple[tuple[AnswerType, str], ...] = tuple(
    (answer_type, rule) for answer_type, rules in RULES.items() for rule in rules
)
SLICED_FIELDS = ("question_type", "organ", "modality", "language")
OFFICIAL_TEST_SIZES: Mapping[str, tuple[int, int]] = {
    "vqa-rad": (179, 272),
    "slake": (645, 416),
    "slake-zh": (613, 420),
    "pathvqa": (3370, 3391),
    "pneumoniamnist": (0, 624),
    "organcmnist": (0, 8216),
}
"""(open, closed) questions of each benchmark's published test split."""
_SHRINKING = "llava_med_pre35"
_DIGITS = 6  # decimals kept: finer ones depend on the order in which a machine sums


@dataclass(frozen=True)
class ScoreTable:
    """Each item's value under each rule of its answer type.

    Shapes: I items, R columns of ``COLUMNS``.
    """

    items: tuple[VQAItem, ...]
    values: NDArray[np.float64]
    """(I, R), 0 to 1; NaN where the rule is of the other answer type or does not count the item."""

    def column(self, answer_type: AnswerType, rule: str) -> NDArray[np.float64]:
        """The values of one rule, one for each item."""
        return self.values[:, COLUMNS.index((answer_type, rule))]

    def mask(self, answer_type: AnswerType) -> NDArray[np.bool_]:
        """Which items have this answer type."""
        return np.array([item.answer_type == answer_type for item in self.items], dtype=bool)


def tabulate(joined: Joined) -> ScoreTable:
    """Apply every rule to every item. An item without a usable prediction has 0 under every rule."""
    place = {column: index for index, column in enumerate(COLUMNS)}
    value_IR = np.full((len(joined.items), len(COLUMNS)), np.nan)
    for row, (item, prediction) in enumerate(zip(joined.items, joined.predictions, strict=True)):
        text = prediction.text if prediction else ""
        for rule, value in apply_rules(item.answer, text, item.answer_type, item.language).items():
            if value is not None:
                # An answer that normalises to nothing is a substring of any text: a prediction that
                # is absent must not gain from that.
                value_IR[row, place[item.answer_type, rule]] = value if prediction else 0.0
    return ScoreTable(joined.items, value_IR)


def slices_of(
    items: Sequence[VQAItem], leaked: frozenset[str] = frozenset()
) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """Named subsets of items: ``all``, ``<field>=<value>`` and ``leaked=true`` or ``false``.

    Args:
        items: In the order of the masks.
        leaked: Ids of the items whose image is in the training data; without any, no such slice.
    """
    yield "all", np.ones(len(items), dtype=bool)
    for name in SLICED_FIELDS:
        values = np.array([str(getattr(item, name)) for item in items], dtype=str)
        for value in sorted({*values.tolist()} - {""}):
            yield f"{name}={value}", values == value
    if leaked:
        is_leaked = np.array([item.item_id in leaked for item in items], dtype=bool)
        yield "leaked=true", is_leaked
        if not is_leaked.all():
            yield "leaked=false", ~is_leaked


def score_rows(
    table: ScoreTable,
    resamples: Resamples,
    *,
    model: str,
    stage: str,
    blind: bool,
    leaked: frozenset[str] = frozenset(),
) -> Iterator[Score]:
    """One ``Score`` for each slice and rule that counts at least one item, with its interval."""
    benchmark = table.items[0].benchmark if table.items else ""
    for name, mask_I in slices_of(table.items, leaked):
        sliced_IR = table.values[mask_I]
        count_R = (~np.isnan(sliced_IR)).sum(axis=0)
        sum_R = np.nansum(sliced_IR, axis=0)
        mean_BR = resamples.means(table.values, mask_I)
        for index, (answer_type, rule) in enumerate(COLUMNS):
            if not count_R[index]:
                continue
            images = resamples.images(mask_I & ~np.isnan(table.values[:, index]))
            value = float(sum_R[index] / count_R[index])
            ends = interval(mean_BR[:, index], around=value) if images > 1 else None
            yield Score(
                benchmark=benchmark,
                model=model,
                stage=stage,
                blind=blind,
                slice=name,
                answer_type=answer_type,
                rule=rule,
                value=_percent(value),
                low=_percent(ends[0]) if ends else None,
                high=_percent(ends[1]) if ends else None,
                n=int(count_R[index]),
            )


def _percent(share: float) -> float:
    return round(100 * float(share), _DIGITS)


def summary(rows: Sequence[Score]) -> dict[str, Any]:
    """The rows of the slice ``all`` as ``{"open": {"n": …, rule: per cent, …}, "closed": …}``.

    ``llava_med_pre35`` is ``{"value", "denominator"}``, since it does not count every item.
    """
    result: dict[str, Any] = {}
    for answer_type in RULES:
        # exact_match counts every item, so its n is the number of items.
        kind = {row.rule: row for row in rows if row.slice == "all" and row.answer_type == answer_type}
        values: dict[str, Any] = {"n": kind["exact_match"].n if kind else 0}
        for rule, row in kind.items():
            values[rule] = {"value": row.value, "denominator": row.n} if rule == _SHRINKING else row.value
        if answer_type == "closed" and kind:
            values.setdefault(_SHRINKING, {"value": 0.0, "denominator": 0})
        result[answer_type] = values
    return result


def is_official(benchmark: str, items: Sequence[VQAItem]) -> bool:
    """Whether these are as many open and closed questions as the benchmark's published test split."""
    closed = sum(item.answer_type == "closed" for item in items)
    return OFFICIAL_TEST_SIZES.get(benchmark) == (len(items) - closed, closed)


def items_of_split(items: Iterable[VQAItem], *, where: str, split: Split = "test") -> list[VQAItem]:
    """The items of one split.

    Raises:
        InputError: There are none, or an id occurs twice.
    """
    chosen = [item for item in items if item.split == split]
    if not chosen:
        raise InputError(f"there are no items of the {split} split", where=where, hint="check the file and --split")
    seen: set[str] = set()
    for item in chosen:
        if item.item_id in seen:
            raise InputError(
                f"the id {item.item_id!r} occurs twice", where=where, hint="each question needs its own id"
            )
        seen.add(item.item_id)
    return chosen


def score_files(
    benchmark: str,
    items_path: Path,
    predictions_path: Path,
    *,
    missing: Missing = "error",
    split: Split = "test",
    stage: str | None = None,
    resamples: int = RESAMPLES,
) -> dict[str, Any]:
    """Score a prediction file against a benchmark's official file.

    Args:
        benchmark: Such as ``vqa-rad``; or a MedMNIST collection such as ``pneumoniamnist``, which is
            scored as classification too.
        items_path: The official question file, or the release's folder; of MedMNIST the ``.npz``.
        predictions_path: As ``read_predictions`` reads it.
        missing: As in ``join_answers``.
        split: Which split was answered.
        stage: Only the predictions of this stage.
        resamples: Of the bootstrap; 0 leaves the intervals out.

    Returns:
        JSON values: ``n``, ``open`` and ``closed`` with per cent by rule; ``intervals`` in the same
        shape with [low, high]; ``blind`` where the predictions have answers without the image; and
        what did not join, under ``missing``, ``repeated`` and ``unknown``; of MedMNIST also
        ``classification``.

    Raises:
        InputError: A file is not in its format.
        PredictionMismatch: The join is not one to one.
    """
    items = items_of_split(_read_items(benchmark, items_path), where=str(items_path), split=split)
    predictions = _of_one_stage(read_predictions(predictions_path, benchmark=benchmark), stage, predictions_path)
    draws = Resamples.draw([item.image_id for item in items], resamples=resamples)
    where = str(predictions_path)
    result: dict[str, Any] = {"benchmark": benchmark, "split": split, "n": len(items)}
    seeing = [prediction for prediction in predictions if not prediction.blind]
    blind = [prediction for prediction in predictions if prediction.blind]
    if seeing or not blind:
        joined = join_answers(items, seeing, missing=missing, where=where)
        rows = list(score_rows(tabulate(joined), draws, model="", stage="", blind=False))
        result |= {**summary(rows), "intervals": intervals(rows)}
        result |= {name: list(getattr(joined, name)) for name in ("missing", "repeated", "unknown")}
        if benchmark in COLLECTIONS:
            answers = [prediction.text if prediction else "" for prediction in joined.predictions]
            labels = COLLECTIONS[benchmark].labels
            result["classification"] = classification([item.answer for item in items], answers, labels).as_json()
    if blind:
        joined = join_answers(items, blind, missing=missing, where=f"{where} (blind)")
        result["blind"] = summary(list(score_rows(tabulate(joined), draws, model="", stage="", blind=True)))
    return result


def _read_items(benchmark: str, path: Path) -> Iterator[VQAItem]:
    if benchmark in COLLECTIONS:
        yield from (item for item in read_medmnist(path) if isinstance(item, VQAItem))
    else:
        yield from read_benchmark(benchmark, path, images=False)


def _of_one_stage(predictions: list[Prediction], stage: str | None, path: Path) -> list[Prediction]:
    stages = sorted({prediction.stage for prediction in predictions})
    if stage is None and len(stages) <= 1:
        return predictions
    if stage not in stages:
        raise InputError(
            f"there are no answers of stage {stage!r}" if stage else "there are answers of several stages",
            where=str(path),
            hint=f"choose one with --stage: {', '.join(stages)}",
        )
    return [prediction for prediction in predictions if prediction.stage == stage]


def intervals(rows: Sequence[Score]) -> dict[str, dict[str, list[float]]]:
    """The ends of the 95 % intervals of the slice ``all``, in per cent, by answer type and rule."""
    result: dict[str, dict[str, list[float]]] = {answer_type: {} for answer_type in RULES}
    for row in rows:
        if row.slice == "all" and row.low is not None and row.high is not None:
            result[row.answer_type][row.rule] = [row.low, row.high]
    return result
