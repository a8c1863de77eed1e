"""How a running step says how far it is, without knowing who listens.

A caller that wants to hear sets ``MEDVLM_PROGRESS=module:function`` in the environment; the
function is called with each event. So a step reports to an orchestrator that it never imports.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["INTERVAL_VARIABLE", "LISTENER_VARIABLE", "progress_interval_s", "report_progress"]

LISTENER_VARIABLE = "MEDVLM_PROGRESS"
INTERVAL_VARIABLE = "MEDVLM_PROGRESS_EVERY_S"

Listener = Callable[[Mapping[str, Any]], None]


def report_progress(event: Mapping[str, Any]) -> None:
    """Give one event to the listener, if there is one.

    Args:
        event: JSON values. Training sends ``step``, ``steps``, ``loss``, ``learning_rate``,
            ``samples_per_s`` and ``eta_s``; a fetch sends ``done``, ``total`` and ``by_status``.
    """
    name = os.environ.get(LISTENER_VARIABLE)
    if name:
        _listener(name)(event)


def progress_interval_s() -> float:
    """Seconds between two events of a training: 0.5, or what ``MEDVLM_PROGRESS_EVERY_S`` says; 0 is every step."""
    return float(os.environ.get(INTERVAL_VARIABLE, "0.5"))


@functools.cache
def _listener(name: str) -> Listener:
    module, function = name.split(":")
    return getattr(importlib.import_module(module), function)
