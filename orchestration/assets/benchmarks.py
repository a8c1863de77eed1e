"""Group `benchmarks`: answers, scores under named rules, and the leaderboard."""

import json

import dagster as dg

from orchestration.assets.datasets import benchmark_items
from orchestration.assets.training import stage3_checkpoint
from orchestration.automation import renewed_with_inputs
from orchestration.metadata import markdown_table, materialized, picture
from orchestration.partitions import evaluations
from orchestration.resources import DvcProject

SHOWN = (
    "model", "training", "benchmark", "answer_type", "rule", "value", "low", "high", "blind", "gain", "n", "leaked",
    "clean",
)  # fmt: skip
"""Columns of the leaderboard that the UI shows."""


def _keys(context: dg.AssetExecutionContext) -> tuple[str, str]:
    keys = context.partition_key.keys_by_dimension  # type: ignore[attr-defined]
    return keys["recipe"], keys["benchmark"]


@dg.asset(
    group_name="benchmarks",
    kinds={"pytorch", "parquet"},
    owners=["team:evaluation"],
    partitions_def=evaluations,
    deps=[stage3_checkpoint, benchmark_items],
    pool="gpu",
)
def benchmark_predictions(context: dg.AssetExecutionContext, project: DvcProject) -> dg.MaterializeResult:
    """Greedy answers of each stage's checkpoint to a benchmark's test split, with the image and blind.

    Blind is a mean image: what the model knows without looking.
    """
    recipe, benchmark = _keys(context)
    run = project.reproduce(context, f"predict@{recipe}-{benchmark}")
    return materialized(run, project.workspace.predictions(recipe, benchmark))


@dg.asset(
    group_name="benchmarks",
    kinds={"parquet", "duckdb"},
    owners=["team:evaluation"],
    partitions_def=evaluations,
    deps=[benchmark_predictions, benchmark_items],
)
def benchmark_scores(context: dg.AssetExecutionContext, project: DvcProject) -> dg.MaterializeResult:
    """Every named rule on every slice, with its interval and the blind baseline."""
    recipe, benchmark = _keys(context)
    run = project.reproduce(context, f"score@{recipe}-{benchmark}")
    # matplotlib is not for the loading of the definitions.
    from medvlm.evaluation.plots import score_plots

    plots = score_plots(project.workspace, recipe, benchmark)
    shown = {title: picture(png, title) for title, png in plots.items()}
    return materialized(run, project.workspace.scores(recipe, benchmark), shown)


@dg.asset(
    group_name="benchmarks",
    kinds={"json"},
    owners=["team:evaluation"],
    deps=[benchmark_scores],
    automation_condition=renewed_with_inputs,
)
def leaderboard(context: dg.AssetExecutionContext, project: DvcProject) -> dg.MaterializeResult:
    """Our scores beside the published ones, each with its rule, split and source."""
    run = project.reproduce(context, "leaderboard")
    path = project.workspace.leaderboard / "rows.json"
    ours = [row for row in json.loads(path.read_text("utf-8")) if row["kind"] == "ours" and row["headline"]]
    table = markdown_table(SHOWN, [[row[name] for name in SHOWN] for row in ours])
    return materialized(run, project.workspace.leaderboard, {"scores": table})
