"""Rows on their way through a step, counted for whoever watches: a listener, and a bar on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from medvlm.progress import report_progress

__all__ = ["watched"]

T = TypeVar("T")


def watched(rows: Iterable[T], total: int, what: str) -> Iterator[T]:
    """The rows, unchanged; reports ``done`` and ``total`` a hundred times on the way.

    Args:
        rows: Consumed as the caller asks for them.
        total: How many there are.
        what: Stands beside the bar, such as ``figures``. The bar is drawn on standard error, on a terminal only.
    """
    step = max(1, total // 100)
    if not sys.stderr.isatty():
        for done, row in enumerate(rows, start=1):
            yield row
            if done % step == 0 or done == total:
                report_progress({"done": done, "total": total})
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        for done, row in enumerate(rows, start=1):
            yield row
            bar.advance(task)
            if done % step == 0 or done == total:
                report_progress({"done": done, "total": total})
