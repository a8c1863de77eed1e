"""Progress events reach the listener named in the environment, and nobody else."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from medvlm import progress

heard: list[Mapping[str, Any]] = []


def listen(event: Mapping[str, Any]) -> None:
    heard.append(event)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    heard.clear()
    yield
    progress._listener.cache_clear()


def test_a_named_listener_hears_every_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "a_listener", sys.modules[__name__])
    monkeypatch.setenv(progress.LISTENER_VARIABLE, "a_listener:listen")
    progress.report_progress({"step": 1})
    progress.report_progress({"step": 2})
    assert [e["step"] for e in heard] == [1, 2]


def test_without_a_listener_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(progress.LISTENER_VARIABLE, raising=False)
    progress.report_progress({"step": 1})
    assert heard == []


def test_a_listener_is_heard_no_longer_than_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "a_listener", sys.modules[__name__])
    monkeypatch.setenv(progress.LISTENER_VARIABLE, "a_listener:listen")
    progress.report_progress({"step": 1})
    monkeypatch.delenv(progress.LISTENER_VARIABLE)
    progress.report_progress({"step": 2})
    assert [e["step"] for e in heard] == [1]
