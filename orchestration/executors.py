"""What runs the steps of a run beside each other: processes of this host, or a cluster's workers.

Workers of Celery are started with ``celery -A orchestration.celery_worker worker``.
"""

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
CELERY_BROKER = "MEDVLM_CELERY_BROKER"
"""Where Celery's workers wait, such as ``redis://queue.example:6379/0``; results come back the same way."""
RAY_ADDRESS = "RAY_ADDRESS"
"""Of the cluster's job server, such as ``http://head.example:8265``."""
RAY_PASSED_ON = ("DAGSTER_HOME", "MEDVLM_PROJECT", "MEDVLM_WORKSPACE", "MEDVLM_WORKSPACE_CACHE", VARIABLE, RAY_ADDRESS)
"""What a step's Ray job is told. Ray shows that to everybody, so secrets must be in the cluster's own environment."""


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
        executor = getattr(importlib.import_module(package), attribute)
    except ImportError as error:
        raise InputError(
            f"the executor {name!r} is not installed", where=VARIABLE, hint=f"pip install {package.replace('_', '-')}"
        ) from error
    if name == "k8s":
        return executor
    variable = CELERY_BROKER if name == "celery" else RAY_ADDRESS
    if not os.environ.get(variable):
        raise InputError(
            f"the executor {name!r} needs an address", where=variable, hint="set it; see docs/operations.md, executors"
        )
    if name == "celery":
        # By its name only: an address may hold a password, and configurations are shown.
        return executor.configured({"broker": {"env": variable}, "backend": {"env": variable}}, name="celery")
    passed_on = [name for name in RAY_PASSED_ON if os.environ.get(name)]
    return executor.configured({"ray": {"address": os.environ[variable], "env_vars": passed_on}}, name="ray")
