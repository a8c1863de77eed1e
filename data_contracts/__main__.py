"""``python -m data_contracts NAME``: check contracts of a workspace; exit 1 if one is broken."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import click

from data_contracts import CONTRACTS
from data_contracts.contract import Selection
from data_contracts.result import Check, ContractResult
from medvlm.errors import MedVLMError
from medvlm.failures import CONTRACT, record_failure
from medvlm.store import Workspace

SHOWN_EXAMPLES = 5


@click.command(
    epilog="Rows that break a rule are written to contracts/NAME/quarantine.parquet in the workspace, "
    "with the rule's name and the offending value."
)
@click.argument("names", nargs=-1, required=True, type=click.Choice(list(CONTRACTS)))
@click.option(
    "--workspace",
    type=click.Path(file_okay=False),
    default="workspace",
    envvar="MEDVLM_WORKSPACE",
    show_default=True,
    help="Folder that holds everything the pipeline makes, or s3://bucket/prefix.",
)
@click.option("--benchmark", help="Only this benchmark (benchmark-items, predictions, scores).")
@click.option("--recipe", help="Only this recipe (preference, predictions, scores).")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON and nothing else.")
@click.option(
    "--docs/--no-docs",
    default=True,
    envvar="MEDVLM_CONTRACT_DOCS",
    show_default=True,
    help="Build HTML pages (Great Expectations Data Docs) into contracts/NAME/docs; a few tenths of a second.",
)
@click.option("--accept", is_flag=True, help="Take this version as the one that later ones are compared with.")
def main(
    names: tuple[str, ...],
    workspace: str,
    benchmark: str | None,
    recipe: str | None,
    as_json: bool,
    docs: bool,
    accept: bool,
) -> None:
    """Check what the pipeline's tables promise, and say what broke where.

    \b
    Examples:
      python -m data_contracts figures
      python -m data_contracts alignment instruct
      python -m data_contracts benchmark-items --benchmark vqa-rad --json
      python -m data_contracts preference --recipe tiny-stllava-med
      python -m data_contracts figures --accept      after a change of the data that is meant
    """
    selection = Selection(benchmark=benchmark, recipe=recipe)
    if not workspace.startswith("s3://"):
        held = _check(names, Path(workspace), selection, as_json=as_json, docs=docs, accept=accept)
    else:
        from medvlm.step_files import opened_copy

        with opened_copy(workspace, ["contract", *names]) as folder:
            held = _check(names, folder, selection, as_json=as_json, docs=docs, accept=accept)
    if not held:
        sys.exit(1)


def _check(
    names: tuple[str, ...], workspace: Path, selection: Selection, *, as_json: bool, docs: bool, accept: bool
) -> bool:
    """Check contracts and print what became of them; whether all hold."""
    from data_contracts.run import result_folder, run_contract

    results: list[ContractResult] = []
    for name in names:
        try:
            result = run_contract(Workspace(workspace), name, selection=selection, docs=docs, accept=accept)
        except Exception as error:
            # A broken contract has a result; what could not be checked has none, and leaves a note for the dashboard.
            record_failure(workspace, (CONTRACT, name, *selection.scope), error)
            raise
        results.append(result)
        if not as_json:
            click.echo(readable(result))
            if result.docs:
                click.echo(f"  pages: {result_folder(Workspace(workspace), name, selection) / result.docs}")
    if as_json:
        listed = [result.to_json() for result in results]
        success = all(result.success for result in results)
        value = listed[0] if len(listed) == 1 else {"success": success, "contracts": listed}
        click.echo(json.dumps(value, ensure_ascii=False, indent=2))
    return all(result.success for result in results)


def readable(result: ContractResult) -> str:
    """The result as people read it: what broke first, then what to look at, then how much held."""
    verdict = "holds" if result.success else "is BROKEN"
    held = sum(check.success for check in result.checks)
    lines = [f"contract '{result.contract}' {verdict}: {held} of {len(result.checks)} checks, {result.rows:,} rows"]
    for heading, checks in (("BROKEN ", result.broken), ("warning", result.warnings)):
        for check in checks:
            lines += _readable_check(heading, check)
    return "\n".join(lines)


def _readable_check(heading: str, check: Check) -> list[str]:
    lines = [
        f"  {heading} {check.name}: {check.rule}",
        f"          observed: {check.observed}; expected: {check.expected}",
    ]
    lines += [f"            {row.row_id}: {row.value[:120]}" for row in check.broken[:SHOWN_EXAMPLES]]
    if len(check.broken) > SHOWN_EXAMPLES:
        lines.append(f"            … and {len(check.broken) - SHOWN_EXAMPLES:,} more")
    return lines


if __name__ == "__main__":
    os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")
    try:
        main()
    except MedVLMError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
