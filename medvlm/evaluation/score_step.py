"""The pipeline's score step: a recipe's predictions on one benchmark, to scores and wrong answers."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from medvlm.append_only import append_line, read_lines
from medvlm.data.leakage import leaked_item_ids
from medvlm.data.readers.medmnist import COLLECTIONS
from medvlm.errors import InputError
from medvlm.evaluation.answers import Joined, join_answers
from medvlm.evaluation.bootstrap import RESAMPLES, Resamples, interval
from medvlm.evaluation.calibration import calibrate
from medvlm.evaluation.classify import Classification, chosen_label, classification
from medvlm.evaluation.metrics import HEADLINE, RULES
from medvlm.evaluation.score import (
    COLUMNS,
    ScoreTable,
    intervals,
    is_official,
    items_of_split,
    score_rows,
    summary,
    tabulate,
)
from medvlm.records import AnswerType, Image, Prediction, Score, VQAItem, WrongAnswer, from_row, schema_of, to_row
from medvlm.store import (
    Report,
    Workspace,
    atomic_folder,
    fingerprint,
    iterate_records,
    read_records,
    shard_paths,
    write_report,
)

__all__ = ["REPORTED", "items_without_images", "score_recipe", "stage_order"]

STAGES = ("align", "instruct", "finetune", "moe_tune", "prefer")
REPORTED: tuple[tuple[AnswerType, str], ...] = (
    ("closed", "whole_word"),
    ("closed", "llava_med_batch"),
    ("closed", "med_moe"),
    ("open", "token.recall"),
    ("open", "token.f1"),
    ("open", "llava_med.recall"),
    ("open", "llava_med.f1"),
    ("open", "exact_match"),
)
"""(answer type, rule) of the report's flat metrics; the Parquet file holds every rule."""


def stage_order(stage: str) -> tuple[int, str]:
    """A sort key that puts stages in the order of training."""
    return (STAGES.index(stage) if stage in STAGES else len(STAGES), stage)


@dataclass(frozen=True)
class _Run:
    """The answers of one stage's checkpoint, with and without the image."""

    model: str
    stage: str
    seeing: Joined
    seeing_table: ScoreTable
    blind: Joined | None
    blind_table: ScoreTable | None


def score_recipe(workspace: Workspace, recipe: str, benchmark: str, *, resamples: int = RESAMPLES) -> Report:
    """Score a recipe's predictions on a benchmark's test split.

    Reads ``answers/`` and the benchmark's items; writes ``scores/scores.parquet`` (``Score`` under
    every rule, for every slice and each stage, also blind), ``scores/wrong_answers.parquet``
    (``WrongAnswer`` of the last stage, worst first) and ``report.json``.

    Returns:
        The report. Its metrics are the headline numbers of the last stage, such as
        ``closed.whole_word``, ``….blind`` and ``….gain`` (the seeing score less the blind one);
        those of earlier stages begin with the stage's name.

    Raises:
        WorkspaceError: The predictions or the benchmark are not there yet.
        InputError: The benchmark has no test items.
        PredictionMismatch: The predictions do not join the test items one to one.
    """
    started = time.monotonic()
    folder = workspace.items(benchmark)
    items = items_of_split(items_without_images(folder), where=str(folder))
    runs = _runs(items, workspace.predictions(recipe, benchmark) / "answers")
    draws = Resamples.draw([item.image_id for item in items], resamples=resamples)
    leaks = _leaks(workspace, benchmark, runs)
    leaked = frozenset(item_id for ids in leaks.values() for item_id in ids)
    scores: list[Score] = []
    for run in runs:
        for table, is_blind in ((run.seeing_table, False), (run.blind_table, True)):
            if table:
                rows = score_rows(table, draws, model=run.model, stage=run.stage, blind=is_blind, leaked=leaked)
                scores.extend(rows)
        scores.extend(_classification_scores(run, benchmark, draws))
    last = runs[-1]
    wrong = _wrong_answers(last)
    target = workspace.scores(recipe, benchmark)
    with atomic_folder(target / "scores") as temporary:
        _write(temporary / "scores.parquet", Score, scores)
        _write(temporary / "wrong_answers.parquet", WrongAnswer, _with_images(wrong, folder))
        content = fingerprint(temporary / "scores.parquet", temporary / "wrong_answers.parquet")
    gains = {run.stage: _gains(run, draws) for run in runs if run.blind_table}
    chances = {run.stage: found.as_json() for run in runs if (found := calibrate(run.seeing))}
    classes = {run.stage: found.as_json() for run in runs if (found := _classified(run, benchmark))}
    final = [row for row in scores if row.stage == last.stage]
    report = Report(
        step=f"score {recipe} {benchmark}",
        counts={"items": len(items), "scores": len(scores), "wrong_answers": len(wrong), "leaked_items": len(leaked)},
        metrics=_metrics(scores, gains, last.stage) | _extra_metrics(chances, classes, last.stage),
        details={
            "recipe": recipe,
            "benchmark": benchmark,
            "model": last.model,
            "stage": last.stage,
            "stages": [run.stage for run in runs],
            "official_test_split": is_official(benchmark, items),
            "test_split": {kind: sum(item.answer_type == kind for item in items) for kind in RULES},
            "interval": f"95 %, percentile bootstrap of {resamples} resamples of {draws.weight.shape[1]} images",
            "gains": gains,
            "calibration": chances,
            "classification": classes,
            "leaked_items": {name: len(ids) for name, ids in sorted(leaks.items())},
            "summary": {
                "recipe": recipe,
                "benchmark": benchmark,
                "stage": last.stage,
                "n": len(items),
                **summary([row for row in final if not row.blind]),
                "intervals": intervals([row for row in final if not row.blind]),
                **({"blind": summary([row for row in final if row.blind])} if last.blind_table else {}),
                "clean": _clean(final),
            },
        },
        seed=0,
        fingerprint=content,
    )
    written = write_report(target, report, started=started, packages=("numpy", "sacrebleu", "rouge-score", "jieba"))
    _remember(target, written)
    return written


def _remember(target: Path, report: Report) -> None:
    """Add a line to ``history.jsonl``, unless the scores are those of its last line: how they change over time."""
    path = target / "history.jsonl"
    lines = [json.loads(line) for line, _ in read_lines(path)]
    if not lines or lines[-1]["fingerprint"] != report.fingerprint:
        row = {"when": report.created_at, "fingerprint": report.fingerprint, "metrics": report.metrics}
        append_line(path, row, "the history of scores")


def items_without_images(folder: Path) -> Iterator[VQAItem]:
    """Items with empty images: the scores do not look at them, and PathVQA's are a gigabyte."""
    names = [field.name for field in dataclasses.fields(VQAItem) if field.name != "image"]
    for path in shard_paths(folder):
        for row in pq.read_table(path, columns=names).to_pylist():
            yield from_row(VQAItem, {**row, "image": {"bytes": b"", "path": ""}})


def _runs(items: Sequence[VQAItem], answers: Path) -> list[_Run]:
    """The predictions by stage, in the order of training."""
    groups: dict[tuple[str, str], dict[bool, list[Prediction]]] = {}
    for prediction in read_records(answers, Prediction):
        kinds = groups.setdefault((prediction.stage, prediction.model), {False: [], True: []})
        kinds[prediction.blind].append(prediction)
    if not groups:
        raise InputError("there are no predictions", where=str(answers), hint="run 'medvlm predict' again")
    runs: list[_Run] = []
    for (stage, model), kinds in sorted(groups.items(), key=lambda group: stage_order(group[0][0])):
        where = f"{answers}, {model} {stage}"
        seeing = join_answers(items, kinds[False], where=where)
        blind = join_answers(items, kinds[True], where=f"{where} (blind)") if kinds[True] else None
        runs.append(_Run(model, stage, seeing, tabulate(seeing), blind, tabulate(blind) if blind else None))
    return runs


def _leaks(workspace: Workspace, benchmark: str, runs: Sequence[_Run]) -> dict[str, set[str]]:
    """Test items whose very image the recipe was trained on, by training set.

    The sets are the alignment and instruct data, the benchmark's own train split, and the recipe's
    preference pairs where a stage learned from them. An item counts as leaked for every stage.
    """
    used = {"alignment", "instruct", f"{benchmark}:train"}
    used |= {f"preference/{run.model}" for run in runs if run.stage == "prefer"}
    return {name: ids for name, ids in leaked_item_ids(workspace, benchmark).items() if name in used}


def _clean(scores: Sequence[Score]) -> dict[str, dict[str, float]]:
    """The reported rules on the items whose image was in no training set; empty where none, or all, were."""
    return {
        f"{row.answer_type}.{row.rule}": {"value": row.value, "n": row.n}
        for row in scores
        if row.slice == "leaked=false" and not row.blind and (row.answer_type, row.rule) in REPORTED
    }


def _classified(run: _Run, benchmark: str) -> Classification | None:
    """What the answers to a classification benchmark come to; None for any other."""
    if benchmark not in COLLECTIONS:
        return None
    answers = [prediction.text if prediction else "" for prediction in run.seeing.predictions]
    return classification([item.answer for item in run.seeing.items], answers, COLLECTIONS[benchmark].labels)


def _classification_scores(run: _Run, benchmark: str, draws: Resamples) -> list[Score]:
    """Accuracy and macro-F1 as papers on classification report them, of the answers with the image."""
    found = _classified(run, benchmark)
    if found is None:
        return []
    right_I1 = np.array(
        [
            [float(chosen_label(prediction.text if prediction else "", found.labels) == item.answer)]
            for item, prediction in zip(run.seeing.items, run.seeing.predictions, strict=True)
        ]
    )
    ends = interval(draws.means(right_I1)[:, 0], around=found.accuracy / 100) if found.n > 1 else None
    low, high = (round(100 * end, 6) for end in ends) if ends else (None, None)
    known: tuple[tuple[str, float, float | None, float | None], ...] = (
        ("accuracy", found.accuracy, low, high),
        ("macro_f1", found.macro_f1, None, None),
    )
    return [
        Score(benchmark, run.model, run.stage, False, "all", "closed", rule, value, lower, upper, found.n)
        for rule, value, lower, upper in known
    ]


def _extra_metrics(chances: dict[str, Any], classes: dict[str, Any], last: str) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for stage in {*chances, *classes}:
        prefix = "" if stage == last else f"{stage}."
        if stage in chances:
            metrics[f"{prefix}calibration.ece"] = chances[stage]["ece"]
        if stage in classes:
            metrics |= {f"{prefix}classification.{name}": classes[stage][name] for name in ("accuracy", "macro_f1")}
    return metrics


def _metrics(scores: Sequence[Score], gains: dict[str, dict[str, dict[str, float]]], last: str) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for row in scores:
        if row.slice == "all" and (row.answer_type, row.rule) in REPORTED:
            prefix = "" if row.stage == last else f"{row.stage}."
            suffix = ".blind" if row.blind else ""
            metrics[f"{prefix}{row.answer_type}.{row.rule}{suffix}"] = row.value
    for stage, by_rule in gains.items():
        prefix = "" if stage == last else f"{stage}."
        for rule, gain in by_rule.items():
            metrics[f"{prefix}{rule}.gain"] = gain["value"]
    return metrics


def _gains(run: _Run, draws: Resamples) -> dict[str, dict[str, float]]:
    """What the image adds: seeing less blind, in points, with a paired interval, by reported rule."""
    assert run.blind_table is not None
    difference_IR = run.seeing_table.values - run.blind_table.values
    mean_BR = draws.means(difference_IR)
    gains: dict[str, dict[str, float]] = {}
    for answer_type, rule in REPORTED:
        index = COLUMNS.index((answer_type, rule))
        values = difference_IR[:, index]
        ends = interval(mean_BR[:, index])
        if ends is not None:
            points = [round(100 * float(share), 6) for share in (np.nanmean(values), *ends)]
            gains[f"{answer_type}.{rule}"] = dict(zip(("value", "low", "high"), points, strict=True))
    return gains


def _wrong_answers(run: _Run) -> list[WrongAnswer]:
    """The items below 1 under the headline rule, worst first, without their images."""
    blind = run.blind.predictions if run.blind else (None,) * len(run.seeing.items)
    wrong: list[WrongAnswer] = []
    for row, (item, prediction, without) in enumerate(
        zip(run.seeing.items, run.seeing.predictions, blind, strict=True)
    ):
        rule = HEADLINE[item.answer_type]
        score = float(run.seeing_table.column(item.answer_type, rule)[row])
        if score >= 1 or prediction is None:
            continue
        wrong.append(
            WrongAnswer(
                item_id=item.item_id,
                benchmark=item.benchmark,
                model=run.model,
                stage=run.stage,
                answer_type=item.answer_type,
                question=item.question,
                answer=item.answer,
                prediction=prediction.text,
                blind_prediction=without.text if without else None,
                rule=rule,
                score=round(score, 6),
                question_type=item.question_type,
                modality=item.modality,
                organ=item.organ,
                language=item.language,
                image_id=item.image_id,
                image=item.image,
            )
        )
    return sorted(wrong, key=lambda answer: answer.score)


def _with_images(wrong: Sequence[WrongAnswer], folder: Path) -> Iterator[WrongAnswer]:
    wanted = {answer.image_id for answer in wrong}
    images: dict[str, Image] = {}
    for item in iterate_records(folder, VQAItem):
        if item.image_id in wanted and item.image_id not in images:
            images[item.image_id] = item.image
    for answer in wrong:
        yield dataclasses.replace(answer, image=images[answer.image_id])


def _write(path: Path, kind: type[Any], records: Iterable[Any]) -> None:
    table = pa.Table.from_pylist([to_row(record) for record in records], schema=schema_of(kind))
    pq.write_table(table, path, compression="zstd")
