"""All that Dagster loads: assets, checks, jobs, schedules, sensors and resources."""

import os
from pathlib import Path
from typing import Any

import dagster as dg

import medvlm
from orchestration.alerts import Alerts
from orchestration.assets import benchmarks, datasets, ingest, release, training
from orchestration.checks import all_checks
from orchestration.executors import executor_of_environment
from orchestration.jobs import all_jobs
from orchestration.launchers import TrainingLauncher
from orchestration.resources import DvcProject
from orchestration.retention import clear_history, weekly_clearing
from orchestration.schedules import nightly_recheck, weekly_retraining
from orchestration.sensors import all_sensors

PROJECT_ROOT = Path(os.environ.get("MEDVLM_PROJECT", Path(__file__).resolve().parents[1]))
"""The folder of dvc.yaml: this checkout, or another one (tests work in a copy)."""


def _from_environment(name: str) -> Any:
    """A secret by its name only: its value is looked up where it is used, and shown nowhere."""
    return dg.EnvVar(name) if os.environ.get(name) else ""


def _labelled(spec: dg.AssetSpec) -> dg.AssetSpec:
    """Every asset with the version of the code, what it costs, and what it may be used for."""
    gpu = spec.group_name == "training" or spec.key == dg.AssetKey("benchmark_predictions")
    tags = {**spec.tags, "compute": "gpu" if gpu else "cpu", "use": "research-only"}
    return spec.replace_attributes(code_version=medvlm.__version__, tags=tags)


defs = dg.Definitions(
    assets=dg.map_asset_specs(
        _labelled,
        dg.load_assets_from_modules([ingest, datasets, training, benchmarks, release]),
    ),
    asset_checks=all_checks,
    jobs=[*all_jobs, clear_history],
    schedules=[weekly_retraining, nightly_recheck, weekly_clearing],
    sensors=all_sensors,
    executor=executor_of_environment(),
    resources={
        "project": DvcProject(root=str(PROJECT_ROOT), launcher=TrainingLauncher.of_environment()),
        "alerts": Alerts(
            webhook=_from_environment("MEDVLM_ALERT_WEBHOOK"),
            smtp=_from_environment("MEDVLM_ALERT_SMTP"),
            mail_from=_from_environment("MEDVLM_ALERT_FROM"),
            mail_to=_from_environment("MEDVLM_ALERT_TO"),
        ),
    },
)
