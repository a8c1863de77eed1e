"""Scores as tables for a terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from medvlm.evaluation.compare import Difference
from medvlm.evaluation.leaderboard import LeaderboardRow
from medvlm.evaluation.metrics import HEADLINE
from medvlm.evaluation.published import chat_table
from medvlm.records import AnswerType

__all__ = ["print_chat_table", "print_comparison", "print_leaderboard", "print_scores"]

_PIPE_WIDTH = 110
_STYLE: dict[str, Any] = {"title_justify": "left", "title_style": "bold", "box": SIMPLE_HEAD, "padding": (0, 1, 0, 0)}
_LEGEND = """\
Strict: closed needs exactly the right one of yes and no, or the answer in whole words (whole_word);
open is the share of the answer's words found (token.recall). blind: the same model, a mean image.
clean: without the questions whose very image was in a training set; leaked: it was for all of them.
As papers score: sub and raw find the answer anywhere, "no" in "normal" too; rec counts a repeated word
again; cand is chosen among the train answers; the rule of ? is not published. Two numbers compare only
where rule and test split agree; 'own, N' is not the official test split. All of it: --all, --json."""
_SHORT_RULES = {
    "accuracy": "acc",
    "llava_med_batch": "sub",
    "llava_med_pre35": "pre35",
    "med_moe": "raw",
    "llava_med.recall": "rec",
    "candidate_set_accuracy": "cand",
    "unpublished.recall": "?",
    "unpublished.closed": "?",
}
"""The paper-like rules that the table shows, the first found of an answer type."""


def _console() -> Console:
    # Into a pipe or a log rich would fold the table to 80 columns.
    return Console() if sys.stdout.isatty() else Console(width=_PIPE_WIDTH)


def print_scores(result: Mapping[str, Any], console: Console | None = None) -> None:
    """Print a score summary: one table for closed and one for open questions, a rule a row.

    Args:
        result: As ``score_files`` returns it.
        console: Standard output if None.
    """
    console = console or _console()
    blind: Mapping[str, Any] = result.get("blind", {})
    for answer_type in ("closed", "open"):
        values: Mapping[str, Any] = result.get(answer_type, {})
        if not values.get("n"):
            continue
        title = f"{result['benchmark']}: {values['n']} {answer_type} questions, per cent"
        table = Table(title=title, title_justify="left", title_style="bold")
        table.add_column("rule")
        for name in ("score", "95 % interval", *(["blind"] if blind else [])):
            table.add_column(name, justify="right")
        ends: Mapping[str, list[float]] = result.get("intervals", {}).get(answer_type, {})
        for rule, value in values.items():
            if rule == "n":
                continue
            low_high = f"{ends[rule][0]:.1f} to {ends[rule][1]:.1f}" if rule in ends else ""
            without = [_cell(blind.get(answer_type, {}).get(rule))] if blind else []
            table.add_row(rule, _cell(value), low_high, *without)
        console.print(table)
    if "classification" in result:
        _print_classification(result["classification"], console)
    for name in ("missing", "repeated", "unknown"):
        if result.get(name):
            console.print(f"{name}: {len(result[name])} ids", style="yellow")


def _print_classification(values: Mapping[str, Any], console: Console) -> None:
    head = f"accuracy {values['accuracy']:.1f}, macro-F1 {values['macro_f1']:.1f}; rows are true, columns predicted"
    table = Table(title=head, **_STYLE)
    table.add_column("")
    for label in (*values["labels"], "none"):
        table.add_column(label, justify="right")
    for label, row in zip(values["labels"], values["confusion"], strict=True):
        table.add_row(label, *map(str, row))
    console.print(table)


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{value['value']:.2f} of {value['denominator']}"
    return "" if value is None else f"{value:.2f}"


def print_comparison(
    differences: Sequence[Difference], first: str, second: str, console: Console | None = None
) -> None:
    """Print how two models differ, one row a rule, marking intervals that leave zero out.

    Args:
        differences: As ``compare_answers`` returns them.
        first: Name of the first model.
        second: Name of the second.
        console: Standard output if None.
    """
    console = console or _console()
    table = Table(title=f"{escape(second)} less {escape(first)}, points", **_STYLE)
    table.add_column("rule", no_wrap=True)
    for name in ("n", "first", "second", "difference", "95 %", "only 1st", "only 2nd", "McNemar p"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in differences:
        clear = row.low is not None and row.high is not None and not row.low <= 0 <= row.high
        headline = HEADLINE[row.answer_type] == row.rule
        table.add_row(
            f"{row.answer_type} {row.rule}",
            str(row.n),
            f"{row.first:.1f}",
            f"{row.second:.1f}",
            f"{row.difference:+.1f}{'*' if clear else ' '}",
            f"{row.low:+.1f} to {row.high:+.1f}" if row.low is not None else "",
            "" if row.only_first is None else str(row.only_first),
            "" if row.only_second is None else str(row.only_second),
            "" if row.p_value is None else f"{row.p_value:.2g}",
            style="bold" if headline else "",
        )
    console.print(table)
    console.print(Text("* the paired bootstrap's interval, by image, leaves zero out; headline rules are bold", "dim"))


def print_leaderboard(
    rows: Sequence[LeaderboardRow], *, everything: bool = False, console: Console | None = None
) -> None:
    """Print our scores under the strict rules, then a table a benchmark beside the published ones.

    Args:
        rows: As ``leaderboard_rows`` returns them.
        everything: Also earlier stages, and published rows that are not headlines.
        console: Standard output if None.
    """
    console = console or _console()
    shown = [row for row in rows if everything or row.headline]
    ours = [row for row in shown if row.kind == "ours"]
    if ours:
        console.print(_strict_table(ours))
    # With runs of ours the table keeps to their benchmarks.
    benchmarks = {row.benchmark for row in (shown if everything or not ours else ours)}
    sources: list[str] = []
    for benchmark in sorted(benchmarks):
        console.print(_papers_table(benchmark, [row for row in shown if row.benchmark == benchmark], sources))
    for number, source in enumerate(sources, 1):
        console.print(Text(f"[{number}] {source}", style="dim"))
    console.print(Text(_LEGEND, style="dim"))
    if not ours:
        hint = "No scores of ours yet: run 'make demo', or 'medvlm score --recipe … --benchmark …'."
        console.print(Text(hint, style="yellow"))


def _strict_table(rows: Sequence[LeaderboardRow]) -> Table:
    """Ours alone: no paper has these rules."""
    table = Table(title="This workspace, strict rules, per cent", **_STYLE)
    table.add_column("model", overflow="fold")
    for name in ("benchmark", "stage"):
        table.add_column(name, no_wrap=True)
    for name in ("closed", "95 %", "clean", "blind", "gain", "open", "95 %", "blind"):
        table.add_column(name, justify="right", no_wrap=True)
    groups: dict[tuple[str, str, str], list[LeaderboardRow]] = {}
    for row in rows:
        groups.setdefault((row.model, row.benchmark, row.training), []).append(row)
    for (model, benchmark, stage), group in groups.items():
        closed = next((row for row in group if row.rule == HEADLINE["closed"]), None)
        opened = next((row for row in group if row.rule == HEADLINE["open"]), None)
        table.add_row(
            *(Text(name) for name in (model, benchmark, stage)),
            _number(closed and closed.value),
            _interval(closed),
            _clean(closed),
            _number(closed and closed.blind),
            f"{closed.gain:+.1f}" if closed and closed.gain is not None else "",
            _number(opened and opened.value),
            _interval(opened),
            _number(opened and opened.blind),
        )
    return table


def _papers_table(benchmark: str, rows: Sequence[LeaderboardRow], sources: list[str]) -> Table:
    table = Table(title=f"{benchmark} beside the published, per cent, as papers score", **_STYLE)
    table.add_column("model", overflow="fold")
    table.add_column("trained", no_wrap=True)
    for name in ("closed", "open"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("test split", no_wrap=True)
    table.add_column("source", no_wrap=True)
    groups: dict[tuple[str, ...], list[LeaderboardRow]] = {}
    for row in rows:
        trained = row.training + (f", {row.epochs:g} ep." if row.epochs else "")
        groups.setdefault((row.kind, row.model, trained, row.test_split, row.source, row.train_split), []).append(row)
    for (kind, model, trained, test_split, source, _), group in groups.items():
        closed, opened = _as_papers(group, "closed"), _as_papers(group, "open")
        if not (closed or opened):
            continue
        if kind == "published" and source not in sources:
            sources.append(source)
        table.add_row(
            Text(model),
            trained,
            closed,
            opened,
            test_split if test_split == "official" else f"own, {sum(_sizes(group))}",
            "ours" if kind == "ours" else Text(f"[{sources.index(source) + 1}]"),
            style="bold" if kind == "ours" else "",
        )
    return table


def _as_papers(group: Sequence[LeaderboardRow], answer_type: AnswerType) -> str:
    by_rule = {row.rule: row for row in group if row.answer_type == answer_type}
    rule = next((rule for rule in _SHORT_RULES if rule in by_rule), None)
    return f"{by_rule[rule].value:.1f} {_SHORT_RULES[rule]}" if rule else ""


def _sizes(group: Sequence[LeaderboardRow]) -> list[int]:
    return [max(row.n or 0 for row in group if row.answer_type == kind) for kind in {row.answer_type for row in group}]


def _clean(row: LeaderboardRow | None) -> str:
    """The value on images that were in no training set; ``leaked`` where all of them were."""
    if row is None or not row.leaked:
        return ""
    return "leaked" if row.clean is None else f"{row.clean:.1f}"


def _interval(row: LeaderboardRow | None) -> str:
    return f"{row.low:.0f}–{row.high:.0f}" if row and row.low is not None and row.high is not None else ""


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def print_chat_table(summary: Mapping[str, Any], console: Console | None = None) -> None:
    """Print relative chat scores beside LLaVA-Med's, and the reviews that hold no marks.

    Args:
        summary: As ``summarise_reviews`` returns it.
        console: Standard output if None.
    """
    console = console or _console()
    published = chat_table()
    judges = ", ".join(summary["judges"]) or "not recorded"
    table = Table(title=f"Relative score in per cent of the reference; judge: {escape(judges)}", **_STYLE)
    table.add_column("model", overflow="fold")
    names: dict[str, str] = {
        "conversation": "conv",
        "detailed_description": "descr",
        "chest_xray": "CXR",
        "ct_scan": "CT",
    }
    columns: list[str] = published["columns"]
    for column in columns:
        table.add_column(names.get(column, column), justify="right", no_wrap=True)
    ours = [summary["table"][column] for column in columns]
    table.add_row("these reviews", *(_number(cell["relative"]) for cell in ours), style="bold")
    ends = [f"{cell['low']:.0f}–{cell['high']:.0f}" if cell["low"] is not None else "" for cell in ours]
    table.add_row("  95 %", *ends)
    table.add_row("  questions", *(str(cell["n"]) for cell in ours))
    for model, values in published["rows"].items():
        table.add_row(f"{model} [1]", *(_number(value) for value in values))
    console.print(table)
    console.print(
        Text(
            f"[1] {published['source']}; judge {published['judge']}, retired: another judge's marks compare with none",
            "dim",
        )
    )
    for entry in summary["malformed"]:
        console.print(
            Text(
                f"line {entry['line']}, question {entry['question_id']}: {entry['reason']}: {entry['first_line']}",
                "yellow",
            )
        )
