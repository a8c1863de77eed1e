"""Where a run's curve can be followed: TensorBoard's event files always, MLflow and Weights & Biases when configured.

Nothing leaves the machine unless the environment says where to. The curve that the pipeline itself reads is in the
stage's ``report.json``.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medvlm.errors import TrainingError

__all__ = ["configured_trackers", "tracked"]

_MLFLOW = ("MLFLOW_TRACKING_URI",)
_WANDB = ("WANDB_API_KEY", "WANDB_PROJECT", "WANDB_MODE", "WANDB_BASE_URL")
PROJECT = "medvlm"
"""Experiment (MLflow) and project (Weights & Biases) of runs that the environment names none for."""


def configured_trackers(environment: Mapping[str, str]) -> list[str]:
    """``mlflow`` and ``wandb``, as far as the environment configures them.

    A log-in that lies in a file of the home directory configures nothing: a run tells nobody by accident.

    Raises:
        TrainingError: One is configured, and its package is not installed.
    """
    found: list[str] = []
    off = environment.get("WANDB_MODE") == "disabled" or environment.get("WANDB_DISABLED", "").lower() in ("true", "1")
    for name, variables in (("mlflow", _MLFLOW), ("wandb", () if off else _WANDB)):
        named = [variable for variable in variables if environment.get(variable)]
        if not named:
            continue
        if importlib.util.find_spec(name) is None:
            raise TrainingError(
                f"{named[0]} is set, but the package {name!r} is not installed",
                where="environment",
                hint=f"pip install 'medvlm[tracking]', or unset {named[0]}",
            )
        found.append(name)
    return found


@contextmanager
def tracked(folder: Path, *, first_step: int, rank: int) -> Generator[list[Any]]:
    """Callbacks for the Trainer that write the curve down; closed at the end, however the run ends.

    Args:
        folder: Gets TensorBoard's event files. A resumed run goes on in the same folder.
        first_step: The step that the run goes on from: what an earlier, killed one wrote after it is hidden.
        rank: Only process 0 writes.

    Raises:
        TrainingError: As ``configured_trackers``.
    """
    trackers = configured_trackers(os.environ)
    if rank:
        yield []
        return
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import MLflowCallback, TensorBoardCallback, WandbCallback

    for tracker, variable in (("mlflow", "MLFLOW_EXPERIMENT_NAME"), ("wandb", "WANDB_PROJECT")):
        if tracker in trackers:
            os.environ.setdefault(variable, PROJECT)
    folder.mkdir(parents=True, exist_ok=True)
    if "wandb" in trackers:
        os.environ.setdefault("WANDB_DIR", str(folder))
    make_writer: Any = SummaryWriter  # its signature is not annotated
    # Steps count from 1; purging at 0 hides an earlier run of the same job that was begun anew.
    writer = make_writer(log_dir=str(folder), purge_step=first_step + 1 if first_step else 0)
    try:
        yield [
            TensorBoardCallback(tb_writer=writer),
            *([MLflowCallback()] if "mlflow" in trackers else []),
            *([WandbCallback()] if "wandb" in trackers else []),
        ]
    finally:
        writer.close()
        _finish(trackers)


def _finish(trackers: list[str]) -> None:
    """End the trackers' runs: the next target of this process is a run of its own."""
    if "mlflow" in trackers:
        mlflow: Any = importlib.import_module("mlflow")
        if mlflow.active_run() is not None:
            mlflow.end_run()
    if "wandb" in trackers:
        wandb: Any = importlib.import_module("wandb")
        wandb.finish()
