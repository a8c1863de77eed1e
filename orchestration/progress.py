"""The listener that a training process calls: its progress goes to Dagster through Pipes.

Named in ``MEDVLM_PROGRESS`` by the resource that starts the process, so the library itself never
imports Dagster. Only the process that was given a Pipes context reports; every other is silent.
"""

import atexit
import functools
from collections.abc import Mapping
from typing import Any

import dagster_pipes

LISTENER = "orchestration.progress:report"


def report(event: Mapping[str, Any]) -> None:
    """Send one progress event to the Dagster run that started this process."""
    context = _context()
    if context is not None:
        context.report_custom_message({"progress": dict(event)})


@functools.cache
def _context() -> dagster_pipes.PipesContext | None:
    if not dagster_pipes.PipesEnvVarParamsLoader().is_dagster_pipes_process():
        return None
    context = dagster_pipes.open_dagster_pipes()
    atexit.register(context.close)
    return context
