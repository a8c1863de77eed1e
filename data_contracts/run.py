"""One run of a contract: read the narrow columns, ask each tool what it is best at, write the result."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import shutil
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from data_contracts import CONTRACTS, drift
from data_contracts.contract import Column, Contract, Limit, Rows, Selection, Table, Target
from data_contracts.images import check_images
from data_contracts.result import Broken, Check, ContractResult, write_result
from medvlm.errors import WorkspaceError
from medvlm.records import schema_of
from medvlm.shards import shard_errors
from medvlm.store import Workspace, read_json, write_json

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["result_folder", "run_contract"]

MEMORY = "1GB"
"""Limit of DuckDB's own memory; it spills to disk beyond."""
DOCS = "docs/index.html"
"""The first page of the Data Docs, below a contract's folder."""


def result_folder(workspace: Workspace, name: str, selection: Selection) -> Path:
    """Where a run's result lies. A run for one recipe or benchmark has a sub-folder of its own."""
    return workspace.contract(name).joinpath(*selection.scope)


def run_contract(
    workspace: Workspace,
    name: str,
    *,
    selection: Selection | None = None,
    docs: bool = False,
    accept: bool = False,
    seed: int = 0,
) -> ContractResult:
    """Check one contract and write ``result.json``, ``quarantine.parquet`` and ``report.json``.

    Args:
        workspace: Where the tables are and the result goes.
        name: A key of ``CONTRACTS``.
        selection: One recipe or benchmark only; the result then lies in a sub-folder.
        docs: Build the Great Expectations Data Docs too; ``result.json`` names their first page.
        accept: Take this version as the one that later ones are compared with, however far it moved.
        seed: Chooses the pictures to decode where there are too many for all.

    Raises:
        WorkspaceError: The step that makes the table has not run, or a shard is damaged.
    """
    started = time.monotonic()
    selection = selection or Selection()
    contract: Contract = importlib.import_module(CONTRACTS[name]).CONTRACT
    folder = result_folder(workspace, name, selection)
    _forget(folder / "result.json")
    remembered = _remembered(folder)
    checks: list[Check] = []
    numbers: dict[str, float] = {}
    rows, fingerprints, pages, versions = 0, [], {}, {}
    targets = contract.targets(workspace, selection)
    for target in targets:
        outcome = _check_target(contract, target, remembered.get(target.label), accept=accept, seed=seed)
        checks += outcome.checks
        rows += outcome.rows
        numbers |= {f"{_prefix(target)}{key}": value for key, value in outcome.numbers.items()}
        fingerprints.append(outcome.fingerprint)
        pages[target.label] = outcome.validation
        versions[target.label] = (outcome.fingerprint, outcome.statistics)
    result = ContractResult(
        contract=name,
        title=contract.title,
        targets=tuple(target.label for target in targets if target.label),
        rows=rows,
        fingerprint=hashlib.sha256("".join(fingerprints).encode()).hexdigest()[:16],
        checks=tuple(checks),
        numbers=numbers,
        docs=DOCS if docs else "",
    )
    if docs:
        from data_contracts.docs import write_docs

        write_docs((folder / DOCS).parent, result, pages)
    else:
        # Pages of an earlier run would show an old verdict.
        shutil.rmtree((folder / DOCS).parent, ignore_errors=True)
    write_result(folder, result, started=started)
    if contract.drift and (result.success or accept):
        accepted = {
            label: drift.accept(remembered.get(label), mark, now, by_hand=accept)
            for label, (mark, now) in versions.items()
            if now is not None
        }
        write_json(folder / "accepted.json", remembered | accepted)
    return result


class _Outcome:
    """What one target gave."""

    def __init__(self) -> None:
        self.checks: list[Check] = []
        self.rows = 0
        self.fingerprint = ""
        self.numbers: dict[str, float] = {}
        self.statistics: drift.Statistics | None = None
        self.validation: Any = None


def _forget(result: Path) -> None:
    """Delete the last result: a run that fails half-way must not leave an old verdict on new data."""
    try:
        result.unlink(missing_ok=True)
    except OSError as error:
        raise WorkspaceError(
            f"the workspace cannot be written: {error.strerror}",
            where=str(result),
            hint="fix its permissions, or choose another folder with --workspace",
        ) from error


def _remembered(folder: Path) -> dict[str, Any]:
    path = folder / "accepted.json"
    return read_json(path) if path.exists() else {}


def _prefix(target: Target) -> str:
    return f"{target.label}:" if target.label else ""


def _check_target(
    contract: Contract, target: Target, remembered: dict[str, Any] | None, *, accept: bool, seed: int
) -> _Outcome:
    outcome = _Outcome()
    shards = {table.name: table.shards() for table in target.tables}
    columns = [_check_columns(table, shards[table.name], _prefix(target)) for table in target.tables]
    outcome.checks += columns
    if not all(check.success for check in columns):
        # Nothing else can be asked of a table that lacks its columns.
        outcome.fingerprint = hashlib.sha256("".join(check.observed for check in columns).encode()).hexdigest()[:16]
        return outcome
    with _database(shards) as database:
        frame = database.execute(contract.frame).df()
        outcome.rows = len(frame)
        outcome.fingerprint = _fingerprint(frame)
        column_rules = [rule for rule in contract.rules if isinstance(rule, Column)]
        verdicts, outcome.validation = _check_frame(contract, target, frame, column_rules)
        for rule in contract.rules:
            if isinstance(rule, Column):
                outcome.checks.append(verdicts[rule.name])
            elif isinstance(rule, Rows):
                outcome.checks.append(_check_rows(database, rule, target, len(frame)))
            else:
                outcome.numbers[rule.name] = _number(database, rule.query)
                outcome.checks.append(_check_limit(rule, outcome.numbers[rule.name], target))
    if contract.images:
        row_label = f"{target.label}/" if target.label else ""
        found = check_images(shards[target.tables[0].name], contract.images, seed=seed, label=row_label)
        outcome.checks += [dataclasses.replace(check, name=f"{_prefix(target)}{check.name}") for check in found]
    if contract.drift:
        outcome.statistics = drift.statistics(frame, contract.drift)
        before = None if accept else drift.baseline(remembered, outcome.fingerprint)
        outcome.checks += drift.check_drift(outcome.statistics, before, label=_prefix(target))
    return outcome


@contextmanager
def _database(shards: dict[str, list[Path]]) -> Generator[duckdb.DuckDBPyConnection]:
    """An in-memory DuckDB with one view a table.

    Raises:
        WorkspaceError: A shard is damaged.
    """
    with duckdb.connect(":memory:", config={"memory_limit": MEMORY}) as connection:
        try:
            for name, paths in shards.items():
                connection.read_parquet([str(path) for path in paths]).create_view(name)
            yield connection
        except (duckdb.IOException, duckdb.InvalidInputException) as error:
            raise WorkspaceError(
                f"a shard cannot be read: {error}",
                where=", ".join(str(paths[0].parent) for paths in shards.values() if paths),
                hint="restore it with 'dvc checkout', or delete it and run its step again",
            ) from error


def _check_columns(table: Table, shards: list[Path], prefix: str) -> Check:
    """Every shard has the columns of the record type, with their types."""
    wanted = {field.name: field.type for field in schema_of(table.record)}
    broken: list[Broken] = []
    for path in shards:
        with shard_errors(path):
            found = pq.read_schema(path)
        for name, kind in wanted.items():
            if name not in found.names:
                broken.append(Broken(f"{path.name}:{name}", "missing"))
            elif found.names.count(name) > 1:
                broken.append(Broken(f"{path.name}:{name}", "there twice or more"))
            elif not _same_type(found.field(name).type, kind):
                broken.append(Broken(f"{path.name}:{name}", f"{found.field(name).type}, expected {kind}"))
    if not shards:
        broken.append(Broken(table.name, "no shard"))
    return Check(
        name=f"{prefix}{table.name}_columns",
        rule=f"the table '{table.name}' has the columns of {table.record.__name__} with their types",
        success=not broken,
        severity="fail",
        observed=f"{len(wanted) - len({b.row_id.split(':')[-1] for b in broken})} of {len(wanted)} columns right",
        expected=", ".join(wanted),
        broken=tuple(broken),
    )


def _same_type(found: pa.DataType, wanted: pa.DataType) -> bool:
    """Equal but for large variants and the names of list items, which other writers choose."""
    return str(found).replace("large_", "").replace("element", "item").replace(" not null", "") == str(wanted).replace(
        " not null", ""
    )


def _fingerprint(frame: pd.DataFrame) -> str:
    import pandas as pd

    # The library's own types do not know this public function.
    hash_rows = cast(Any, pd).util.hash_pandas_object
    digest = hashlib.sha256(",".join(frame.columns).encode())
    digest.update(hash_rows(frame, index=False).to_numpy().tobytes())
    return digest.hexdigest()[:16]


def _check_frame(
    contract: Contract, target: Target, frame: pd.DataFrame, rules: list[Column]
) -> tuple[dict[str, Check], Any]:
    from data_contracts.expectations import validate

    validation, broken = validate(contract.name, frame, rules)
    row_label = f"{target.label}/" if target.label else ""
    return {
        rule.name: _row_verdict(
            rule, target, [Broken(f"{row_label}{row}", value) for row, value in broken[rule.name]], len(frame)
        )
        for rule in rules
    }, validation


def _row_verdict(rule: Column | Rows, target: Target, broken: list[Broken], rows: int) -> Check:
    return Check(
        name=f"{_prefix(target)}{rule.name}",
        rule=rule.text,
        success=len(broken) <= rule.tolerated * rows,
        severity=rule.severity,
        observed=f"{len(broken):,} of {rows:,} rows break it",
        expected=f"at most {rule.tolerated:.1%} of rows break it" if rule.tolerated else "no row breaks it",
        broken=tuple(broken),
    )


def _check_rows(database: duckdb.DuckDBPyConnection, rule: Rows, target: Target, rows: int) -> Check:
    row_label = f"{target.label}/" if target.label else ""
    found = database.execute(f"SELECT row_id, value FROM ({rule.query}) ORDER BY row_id, value").fetchall()  # noqa: S608
    return _row_verdict(rule, target, [Broken(f"{row_label}{row}", str(value)) for row, value in found], rows)


def _number(database: duckdb.DuckDBPyConnection, query: str) -> float:
    row = database.execute(query).fetchone()
    return round(float(row[0]), 6) if row and row[0] is not None else 0.0


def _check_limit(rule: Limit, value: float, target: Target) -> Check:
    low = "" if rule.minimum is None else f"at least {rule.minimum:g}"
    high = "" if rule.maximum is None else f"at most {rule.maximum:g}"
    return Check(
        name=f"{_prefix(target)}{rule.name}",
        rule=rule.text,
        success=(rule.minimum is None or value >= rule.minimum) and (rule.maximum is None or value <= rule.maximum),
        severity=rule.severity,
        observed=f"{value:.4g}" if value != int(value) else f"{int(value):,}",
        expected=" and ".join(part for part in (low, high) if part),
    )
