"""A step says how far it is, and its rows pass unchanged."""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping
from typing import Any

import pytest

from medvlm.data import watched as module
from medvlm.data.watched import watched


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("terminal", [False, True])
def test_rows_pass_and_progress_is_told_about_a_hundred_times(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    events: list[Mapping[str, Any]] = []
    monkeypatch.setattr(module, "report_progress", events.append)
    screen = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    assert list(watched(range(1_050), 1_050, "figures")) == list(range(1_050))
    assert 100 <= len(events) <= 106
    assert events[-1] == {"done": 1_050, "total": 1_050}
    assert ("figures" in screen.getvalue()) == terminal


def test_rows_are_taken_only_as_they_are_asked_for() -> None:
    source = iter(range(10))
    rows = watched(source, 10, "figures")
    assert next(rows) == 0
    assert next(source) == 1
