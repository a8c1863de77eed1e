"""The checks: contracts, which block what is downstream; freshness, leakage, fallen scores, router, unused experts."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import dagster as dg

from medvlm.store import read_report
from orchestration.assets.benchmarks import benchmark_scores
from orchestration.assets.datasets import (
    COMPARED,
    alignment_dataset,
    benchmark_items,
    instruct_dataset,
    leakage_report,
)
from orchestration.assets.ingest import figures
from orchestration.assets.training import domain_router, preference_dataset, stage3_checkpoint
from orchestration.metadata import markdown_table
from orchestration.resources import DvcProject

LEAST_BALANCE = 0.25
"""Below it the experts are so unevenly used that some hardly learn; 1 is an even share for each."""

LICENCES_HOLD = timedelta(days=30)
"""PMC's articles are retracted and relicensed now and then; older knowledge should not be trained on unseen."""

LEAST_ROUTER_ACCURACY = 0.6
"""Share of held-out images that a router sends to the expert of their own modality. Med-MoE's has five of them, so
that guessing is right in one of five; below this the experts learn mixtures, not domains."""


def _contract_check(asset: dg.AssetsDefinition, contract: str) -> dg.AssetChecksDefinition:
    @dg.asset_check(
        asset=asset,
        name=f"{contract.replace('-', '_')}_contract",
        blocking=True,
        description=f"The Great Expectations suite `{contract}`: python -m data_contracts {contract}",
    )
    def check(context: dg.AssetCheckExecutionContext, project: DvcProject) -> dg.AssetCheckResult:
        passed, failure, metadata = _contract_result(context, project, contract, contract)
        return dg.AssetCheckResult(passed=passed, description=failure[-2000:], metadata=metadata)

    return check


def _contract_result(
    context: dg.AssetCheckExecutionContext, project: DvcProject, item: str, contract: str
) -> tuple[bool, str, dict[str, dg.MetadataValue]]:
    """Run a contract: whether it holds, the failure's words, and its checks and Data Docs as metadata.

    Raises:
        dagster.Failure: The contract itself could not be checked.
    """
    failure = ""
    try:
        project.reproduce(context, f"contract-{item}")
    except dg.Failure as error:
        failure = error.description or ""
    path = project.workspace.contract(contract) / "result.json"
    if not path.exists():
        # No result is not a broken contract: the check itself could not run.
        raise dg.Failure(failure or f"{path} was not written")
    result: dict[str, Any] = json.loads(path.read_text("utf-8"))
    rows = [
        ("✓" if c["success"] else "✗", c["name"], c.get("observed"), c.get("expected"), c.get("broken_rows"))
        for c in result["checks"]
    ]
    metadata: dict[str, dg.MetadataValue] = {
        "checks": markdown_table(("", "check", "observed", "expected", f"broken rows of {result['rows']}"), rows)
    }
    if result.get("docs"):
        metadata["data docs"] = dg.MetadataValue.path(path.parent / result["docs"])
    return bool(result["success"]) and not failure, failure, metadata


@dg.asset_check(
    asset=preference_dataset,
    name="preference_contract",
    blocking=True,
    description="The Great Expectations suite `preference`: python -m data_contracts preference --recipe R",
)
def preference_contract(context: dg.AssetCheckExecutionContext, project: DvcProject) -> dg.AssetCheckResult:
    """Of the run's recipe; run alone, of every recipe of params.yaml that learns from preferences."""
    chosen = _partition(context)
    wanted = [name for name in project.settings.items.preferences if chosen in (None, name)]
    results = {name: _contract_result(context, project, f"preference@{name}", f"preference/{name}") for name in wanted}
    return dg.AssetCheckResult(
        passed=all(passed for passed, _, _ in results.values()),
        description="\n".join(failure for _, failure, _ in results.values())[-2000:] or None,
        metadata={f"{key} {name}": value for name, (_, _, made) in results.items() for key, value in made.items()},
    )


contract_checks = [
    _contract_check(figures, "figures"),
    _contract_check(alignment_dataset, "alignment"),
    _contract_check(instruct_dataset, "instruct"),
    _contract_check(benchmark_items, "benchmark-items"),
    preference_contract,
]


@dg.asset_check(asset=figures, description="Licences and retractions were looked at in the last 30 days.")
def licences_are_recent(project: DvcProject) -> dg.AssetCheckResult:
    """Freshness, asked for at any time: a warning, an error after twice as long. A fetch or recheck renews it."""
    folder = project.workspace.figures
    looked = [report.created_at for report in (read_report(folder), read_report(folder / "recheck")) if report]
    if not looked:
        return dg.AssetCheckResult(passed=False, description="nothing has been fetched yet")
    last = max(looked)
    age = datetime.now(UTC) - datetime.fromisoformat(last)
    return dg.AssetCheckResult(
        passed=age <= LICENCES_HOLD,
        severity=dg.AssetCheckSeverity.ERROR if age > 2 * LICENCES_HOLD else dg.AssetCheckSeverity.WARN,
        description=f"last looked at {age.days} days ago; run the job nightly" if age > LICENCES_HOLD else None,
        metadata={"looked at": last, "days ago": age.days},
    )


@dg.asset_check(asset=leakage_report, description="No image of a test split is in what stages 1 and 2 learn on.")
def no_leaked_images(project: DvcProject) -> dg.AssetCheckResult:
    """Train splits of benchmarks are exempt: they are published as they are, and their scores carry a clean slice."""
    report = read_report(project.workspace.leakage)
    compared = report.details.get("comparisons", []) if report else []
    built = [row for row in compared if not row["train"].partition(":")[2]]
    touched = [row for row in built if row["leaked_images"]]
    return dg.AssetCheckResult(
        passed=not touched,
        metadata={"comparisons": markdown_table(COMPARED, [[row[name] for name in COMPARED] for row in built])},
    )


@dg.asset_check(
    asset=benchmark_scores,
    blocking=True,
    description="No headline score is below the interval of the last accepted one (`medvlm score --accept`).",
)
def scores_hold(context: dg.AssetCheckExecutionContext, project: DvcProject) -> dg.AssetCheckResult:
    """Fails the run: a leaderboard is not refreshed with a model that has become worse unnoticed.

    In a run of one partition it looks at that one, run alone at every scored recipe of params.yaml.
    """
    from medvlm.evaluation.accepted import fallen_scores

    chosen = _partition(context)
    workspace, fallen, looked = project.workspace, [], 0
    for name, item in project.settings.items.evaluations.items():
        if chosen in (None, name) and workspace.scores(item.recipe, item.benchmark).is_dir():
            looked += 1
            fallen += [f"{name}: {score}" for score in fallen_scores(workspace, item.recipe, item.benchmark)]
    return dg.AssetCheckResult(passed=not fallen, description="\n".join(fallen), metadata={"scored": looked})


def _partition(context: dg.AssetCheckExecutionContext) -> str | None:
    """``RECIPE-BENCHMARK`` or ``RECIPE`` of the run; None where the check runs alone."""
    if not context.op_execution_context.has_partition_key:
        return None
    key = context.op_execution_context.partition_key
    if isinstance(key, dg.MultiPartitionKey):
        return f"{key.keys_by_dimension['recipe']}-{key.keys_by_dimension['benchmark']}"
    return key


@dg.asset_check(asset=stage3_checkpoint, description="Every expert of a mixture takes its share of the tokens.")
def experts_balance(context: dg.AssetCheckExecutionContext, project: DvcProject) -> dg.AssetCheckResult:
    """A warning, no error: a frozen router on one modality's data is uneven by nature."""
    chosen = _partition(context)
    balances: dict[str, float] = {}
    for recipe in project.settings.recipes:
        report = read_report(project.workspace.stage(recipe, 3)) if chosen in (None, recipe) else None
        if report and "expert_balance" in report.metrics:
            balances[recipe] = report.metrics["expert_balance"]
    return dg.AssetCheckResult(
        passed=all(balance >= LEAST_BALANCE for balance in balances.values()),
        severity=dg.AssetCheckSeverity.WARN,
        description="" if balances else "no mixture of experts here",
        metadata=dict(balances),
    )


@dg.asset_check(asset=domain_router, description="The router tells held-out images of the modalities apart.")
def router_tells_apart(context: dg.AssetCheckExecutionContext, project: DvcProject) -> dg.AssetCheckResult:
    """A warning, no error: stage 3 runs with any router. Of the run's recipe; run alone, of every one with a router."""
    chosen = _partition(context)
    accuracies: dict[str, float] = {}
    for recipe in project.settings.items.routers:
        report = read_report(project.workspace.router(recipe)) if chosen in (None, recipe) else None
        if report and "accuracy" in report.metrics:
            accuracies[recipe] = report.metrics["accuracy"]
    poor = [name for name, accuracy in accuracies.items() if accuracy < LEAST_ROUTER_ACCURACY]
    words = f"below {LEAST_ROUTER_ACCURACY:g}: {', '.join(poor)}" if poor else ""
    return dg.AssetCheckResult(
        passed=not poor,
        severity=dg.AssetCheckSeverity.WARN,
        description=words if accuracies else "no router here",
        metadata=dict(accuracies),
    )


all_checks = [*contract_checks, licences_are_recent, no_leaked_images, scores_hold, experts_balance, router_tells_apart]
