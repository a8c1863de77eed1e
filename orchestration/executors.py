"""What runs the steps of a run beside each other: processes of this host, or a cluster's workers."""

import importlib
import os
from typing import Any

import dagster as dg

from medvlm.errors import InputError

VARIABLE = "MEDVLM_EXECUTOR"
ELSEWHERE = {
    "k8s": ("dagster_k8s", "k8s_job_executor"),
    "celery": ("dagster_celery", "celery_executor"),
    "ray": ("dagster_ray", "ray_executor"),
}
"""Executor → the package that has it, and its name there."""


def executor_of_environment() -> Any:
    """The executor that ``MEDVLM_EXECUTOR`` names; processes of this host where it names none.

    Raises:
        InputError: It is unknown, or its package is not installed.
    """
    name = os.environ.get(VARIABLE) or "multiprocess"
    here = {"multiprocess": dg.multiprocess_executor, "in_process": dg.in_process_executor}
    if name in here:
        return here[name]
    if name not in ELSEWHERE:
        known = ", ".join([*here, *ELSEWHERE])
        raise InputError(f"there is no executor {name!r}", where=VARIABLE, hint=f"choose from {known}")
    package, attribute = ELSEWHERE[name]
    try:
        return getattr(importlib.import_module(package), attribute)
    except ImportError as error:
        raise InputError(
            f"the executor {name!r} is not installed", where=VARIABLE, hint=f"pip install {package.replace('_', '-')}"
        ) from error
