"""Scores as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["print_scores"]


def print_scores(result: Mapping[str, Any], console: Console | None = None) -> None:
    """Print a score summary: one table for closed and one for open questions, a rule a row.

    Args:
        result: As ``score_files`` returns it.
        console: Standard output if None.
    """
    console = console or Console()
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
    for name in ("missing", "repeated", "unknown"):
        if result.get(name):
            console.print(f"{name}: {len(result[name])} ids", style="yellow")


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{value['value']:.2f} of {value['denominator']}"
    return "" if value is None else f"{value:.2f}"
