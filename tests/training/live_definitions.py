"""A code location for a real daemon: one training on the pool, and something small that waits behind it."""

import json
import os
import sys
from pathlib import Path

import dagster as dg

from orchestration.executors import executor_of_environment
from orchestration.launchers import TrainingLauncher
from orchestration.resources import DvcProject


@dg.asset(pool="gpu")
def training(context: dg.AssetExecutionContext, project: DvcProject) -> dg.MaterializeResult:
    """Stage 1 of a twin, as an asset of ours runs it, without DVC around it."""
    project.run(context, [sys.executable, *json.loads(os.environ["MEDVLM_TEST_TRAINING"])], watch=True)
    return dg.MaterializeResult()


@dg.asset(pool="gpu")
def small() -> None:
    """Takes the same slot for a moment."""


root = Path(os.environ["DAGSTER_HOME"]).parent
defs = dg.Definitions(
    executor=executor_of_environment(),
    assets=[training, small],
    jobs=[dg.define_asset_job("train", [training]), dg.define_asset_job("look", [small])],
    resources={"project": DvcProject(root=str(root), launcher=TrainingLauncher())},
)
