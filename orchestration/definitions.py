"""All that Dagster loads: assets, checks, jobs, schedules and the one resource."""

import os
from pathlib import Path

import dagster as dg

from orchestration.assets import benchmarks, datasets, ingest, training
from orchestration.checks import contract_checks
from orchestration.jobs import all_jobs
from orchestration.resources import DvcProject
from orchestration.schedules import nightly_recheck, weekly_retraining

PROJECT_ROOT = Path(os.environ.get("MEDVLM_PROJECT", Path(__file__).resolve().parents[1]))
"""The folder of dvc.yaml: this checkout, or another one (tests work in a copy)."""

defs = dg.Definitions(
    assets=dg.load_assets_from_modules([ingest, datasets, training, benchmarks]),
    asset_checks=contract_checks,
    jobs=all_jobs,
    schedules=[weekly_retraining, nightly_recheck],
    resources={"project": DvcProject(root=str(PROJECT_ROOT))},
)
