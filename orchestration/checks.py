"""The contracts as blocking asset checks: what is downstream does not start on broken data."""

import json
from typing import Any

import dagster as dg

from orchestration.assets.datasets import alignment_dataset, benchmark_items, instruct_dataset
from orchestration.assets.ingest import figures
from orchestration.metadata import markdown_table
from orchestration.resources import DvcProject


def _contract_check(asset: dg.AssetsDefinition, contract: str) -> dg.AssetChecksDefinition:
    @dg.asset_check(
        asset=asset,
        name=f"{contract.replace('-', '_')}_contract",
        blocking=True,
        description=f"The Great Expectations suite `{contract}`: python -m data_contracts {contract}",
    )
    def check(context: dg.AssetCheckExecutionContext, project: DvcProject) -> dg.AssetCheckResult:
        failure = ""
        try:
            project.reproduce(context, f"contract-{contract}")
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
        return dg.AssetCheckResult(
            passed=bool(result["success"]) and not failure,
            description=failure[-2000:],
            metadata={
                "rows": result["rows"],
                "checks": markdown_table(("", "check", "observed", "expected", "broken rows"), rows),
            },
        )

    return check


contract_checks = [
    _contract_check(figures, "figures"),
    _contract_check(alignment_dataset, "alignment"),
    _contract_check(instruct_dataset, "instruct"),
    _contract_check(benchmark_items, "benchmark-items"),
]
