"""Group `datasets`: what trains and what tests, each held by a contract."""

import dagster as dg

from medvlm.store import read_report
from orchestration.assets.ingest import figures, sample_corpus
from orchestration.automation import renewed_with_inputs
from orchestration.metadata import markdown_table, materialized
from orchestration.resources import DvcProject, StageRun

COMPARED = ("train", "test", "test_images", "leaked_images", "near_images", "test_items", "clean_items")
"""Columns of the leakage table that the UI shows."""


@dg.asset(group_name="datasets", kinds={"parquet"}, owners=["team:data"], deps=[sample_corpus])
def benchmark_items(context: dg.AssetExecutionContext, project: DvcProject) -> dg.MaterializeResult:
    """Questions of every benchmark and split, read from the official releases.

    The train splits are what stage 3 learns on; the test splits are what is scored.
    """
    names = list(project.settings.benchmarks)
    runs = [project.reproduce(context, f"benchmark@{name}") for name in names]
    reports = [read_report(project.workspace.benchmark(name)) for name in names]
    rows = [(name, key, count) for name, r in zip(names, reports, strict=True) if r for key, count in r.counts.items()]
    merged = StageRun("benchmark", any(r.ran for r in runs), "-".join(r.data_version for r in runs))
    return materialized(
        merged,
        project.workspace.root / "benchmarks",
        {"counts": markdown_table(("benchmark", "what", "count"), rows)},
    )


@dg.asset(group_name="datasets", kinds={"parquet"}, owners=["team:data"], deps=[figures, benchmark_items])
def alignment_dataset(context: dg.AssetExecutionContext, project: DvcProject) -> dg.MaterializeResult:
    """One figure and its caption a sample: what stage 1 learns the projector on.

    Images that a benchmark tests with are left out.
    """
    run = project.reproduce(context, "alignment")
    return materialized(run, project.workspace.dataset("alignment"))


@dg.asset(group_name="datasets", kinds={"parquet"}, owners=["team:data"], deps=[figures, benchmark_items])
def instruct_dataset(context: dg.AssetExecutionContext, project: DvcProject) -> dg.MaterializeResult:
    """Conversations about figures, from captions and inline mentions: what stage 2 learns on.

    Images that a benchmark tests with are left out.
    """
    run = project.reproduce(context, "instruct")
    return materialized(run, project.workspace.dataset("instruct"))


@dg.asset(
    group_name="datasets",
    kinds={"parquet", "duckdb"},
    owners=["team:data"],
    deps=[alignment_dataset, instruct_dataset, benchmark_items],
    automation_condition=renewed_with_inputs,
)
def leakage_report(context: dg.AssetExecutionContext, project: DvcProject) -> dg.MaterializeResult:
    """Which test items a training set has seen: by bytes, look, image id, case or question."""
    run = project.reproduce(context, "leakage")
    report = read_report(project.workspace.leakage)
    compared = report.details.get("comparisons", []) if report else []
    rows = [tuple(row[name] for name in COMPARED) for row in compared]
    return materialized(run, project.workspace.leakage, {"comparisons": markdown_table(COMPARED, rows)})
