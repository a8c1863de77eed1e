"""Plots of one recipe's scores on one benchmark, as PNG bytes for whoever shows them."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medvlm.errors import WorkspaceError
from medvlm.evaluation.accepted import read_scores
from medvlm.evaluation.metrics import HEADLINE
from medvlm.evaluation.score_step import stage_order
from medvlm.records import AnswerType, Score
from medvlm.store import Workspace, read_report

__all__ = ["calibration_plot", "confusion_plot", "score_plots", "slices_plot", "write_plots"]

_MOST_SLICES = 24
_DPI = 110
_NAMES = {"whole_word": "strict accuracy"}


def score_plots(workspace: Workspace, recipe: str, benchmark: str) -> dict[str, bytes]:
    """Every plot that the scores of a recipe on a benchmark allow, PNG by title.

    ``accuracy by slice`` always; ``open answers by slice`` where there are open questions;
    ``calibration`` where options were weighed; ``confusion`` where the benchmark is a classification.

    Raises:
        WorkspaceError: There are no scores yet.
    """
    step = workspace.scores(recipe, benchmark)
    report = read_report(step)
    if report is None:
        raise WorkspaceError("there are no scores yet", where=str(step), hint="run 'medvlm score' first")
    scores = read_scores(step / "scores" / "scores.parquet")
    last = max((score.stage for score in scores), key=stage_order)
    plots: dict[str, bytes] = {}
    titles: dict[AnswerType, str] = {"closed": "accuracy by slice", "open": "open answers by slice"}
    for answer_type, title in titles.items():
        if any(score.answer_type == answer_type for score in scores):
            plots[title] = slices_plot(scores, answer_type)
    if report.details.get("calibration"):
        plots["calibration"] = calibration_plot(report.details["calibration"])
    if report.details.get("classification"):
        plots["confusion"] = confusion_plot(report.details["classification"][last])
    return plots


def slices_plot(scores: Sequence[Score], answer_type: AnswerType) -> bytes:
    """PNG of the headline rule on each slice, with 95 % intervals and the blind baseline; the last stage.

    Args:
        scores: Of one model and benchmark.
        answer_type: Which questions.
    """
    rule = HEADLINE[answer_type]
    rows = [score for score in scores if score.answer_type == answer_type and score.rule == rule]
    last = max((score.stage for score in rows), key=stage_order)
    seeing = {score.slice: score for score in rows if score.stage == last and not score.blind}
    blind = {score.slice: score.value for score in rows if score.stage == last and score.blind}
    # The largest slices are what an eye can trust; `all` and the clean slice come first.
    first = [name for name in ("all", "leaked=false", "leaked=true") if name in seeing]
    names = [*first, *sorted(set(seeing) - set(first), key=lambda name: (-seeing[name].n, name))][:_MOST_SLICES]
    figure = _figure(8.4, 1.2 + 0.28 * len(names))
    axes = figure.subplots()
    for place, name in enumerate(names):
        score = seeing[name]
        low, high = (score.value if end is None else end for end in (score.low, score.high))
        axes.plot([low, high], [place, place], color="#4c78a8", linewidth=2)
        axes.plot(score.value, place, "o", color="#4c78a8", label="with the image" if place == 0 else None)
        if name in blind:
            axes.plot(blind[name], place, "x", color="#e45756", label="blind" if place == 0 else None)
    axes.set_yticks(range(len(names)), [f"{name} (n={seeing[name].n})" for name in names], fontsize=8)
    axes.invert_yaxis()
    axes.set(
        xlabel=f"{_NAMES.get(rule, rule)}, per cent, 95 % interval", xlim=(-2, 102), title=f"{answer_type}, {last}"
    )
    axes.grid(alpha=0.3, axis="x")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    return _png(figure)


def calibration_plot(by_stage: Mapping[str, Mapping[str, Any]]) -> bytes:
    """PNG of the reliability diagram: how often the likeliest option is right, by how likely it was.

    Args:
        by_stage: ``Calibration.as_json()`` of each stage.
    """
    figure = _figure(5, 4.2)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], linestyle="--", color="grey", linewidth=1)
    for stage, values in by_stage.items():
        bins = values["bins"]
        label = f"{stage}: ECE {values['ece']:.1f}, n={values['n']}"
        axes.plot([b["confidence"] for b in bins], [b["accuracy"] for b in bins], marker="o", label=label)
    axes.set(xlabel="confidence in the likeliest option", ylabel="share right", xlim=(0, 1.02), ylim=(-0.02, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return _png(figure)


def confusion_plot(values: Mapping[str, Any]) -> bytes:
    """PNG of a confusion matrix: rows are true classes, the last column is answers that name none.

    Args:
        values: ``Classification.as_json()``.
    """
    labels, counts = list(values["labels"]), values["confusion"]
    columns = [*labels, "no class"]
    side = max(4.0, 0.55 * len(columns) + 2)
    figure = _figure(side + 1, side)
    axes = figure.subplots()
    most = max((count for row in counts for count in row), default=0)
    axes.imshow(counts, cmap="Blues", vmin=0, vmax=max(1, most))
    for row, line in enumerate(counts):
        for column, count in enumerate(line):
            if count:
                dark = count > most / 2
                axes.text(column, row, str(count), ha="center", va="center", color="white" if dark else "black")
    axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right", fontsize=8)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    title = f"accuracy {values['accuracy']:.1f}, macro-F1 {values['macro_f1']:.1f}, n={values['n']}"
    axes.set(xlabel="answered", ylabel="true", title=title)
    return _png(figure)


def _figure(width: float, height: float) -> Any:
    # Imported here: half a second that a step without plots shall not pay.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="tight")


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    # No date and version inside, so that equal numbers are equal bytes.
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()


def write_plots(plots: Mapping[str, bytes], folder: Path) -> list[Path]:
    """Write plots as ``<title>.png``, for people without a dashboard.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{title.replace(' ', '-')}.png" for title in plots]
    for path, png in zip(paths, plots.values(), strict=True):
        path.write_bytes(png)
    return paths
