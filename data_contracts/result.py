"""What a run of a contract found, and how it is written so that equal data gives equal bytes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_contracts.contract import Severity
from medvlm.records import QuarantinedRow, schema_of, to_row
from medvlm.store import Report, atomic_path, write_json, write_report

__all__ = ["Broken", "Check", "ContractResult", "write_result"]

EXAMPLES = 10
VALUE_CHARACTERS = 500


@dataclass(frozen=True)
class Broken:
    """One row that breaks a rule."""

    row_id: str
    value: str


@dataclass(frozen=True)
class Check:
    """One rule's verdict on one target."""

    name: str
    """The rule's name; ``<target>:<rule>`` where a contract has several targets."""
    rule: str
    success: bool
    severity: Severity
    observed: str
    expected: str
    broken: tuple[Broken, ...] = ()

    @property
    def blocks(self) -> bool:
        """Whether this verdict stops what comes after."""
        return not self.success and self.severity == "fail"

    def to_json(self) -> dict[str, Any]:
        """As ``result.json`` holds it: with the number of broken rows and the first few of them."""
        return {
            "name": self.name,
            "rule": self.rule,
            "success": self.success,
            "severity": self.severity,
            "observed": self.observed,
            "expected": self.expected,
            "broken_rows": len(self.broken),
            "examples": [
                {"row_id": row.row_id, "value": row.value[:VALUE_CHARACTERS]} for row in self.broken[:EXAMPLES]
            ],
        }


@dataclass(frozen=True)
class ContractResult:
    """All verdicts of one contract."""

    contract: str
    title: str
    targets: tuple[str, ...]
    rows: int
    fingerprint: str
    """Of the data that was checked, pictures by their SHA-256."""
    checks: tuple[Check, ...]
    numbers: dict[str, float] = field(default_factory=dict[str, float])
    """What the limits measured, by rule."""
    docs: str = ""
    """First page of the Data Docs, relative to the result's folder; empty where none were built."""

    @property
    def success(self) -> bool:
        """Whether nothing is stopped."""
        return not any(check.blocks for check in self.checks)

    @property
    def broken(self) -> list[Check]:
        """Checks that stop what comes after."""
        return [check for check in self.checks if check.blocks]

    @property
    def warnings(self) -> list[Check]:
        """Broken checks that stop nothing."""
        return [check for check in self.checks if not check.success and not check.blocks]

    def to_json(self) -> dict[str, Any]:
        """As ``result.json`` holds it: no times, so that equal data gives equal bytes."""
        return {
            "contract": self.contract,
            "title": self.title,
            "success": self.success,
            "targets": list(self.targets),
            "rows": self.rows,
            "fingerprint": self.fingerprint,
            "numbers": self.numbers,
            "docs": self.docs,
            "checks": [check.to_json() for check in self.checks],
        }

    def quarantined(self) -> list[QuarantinedRow]:
        """Every row that broke a row-level rule, once a rule."""
        return [
            QuarantinedRow(self.contract, check.name, row.row_id, row.value[:VALUE_CHARACTERS])
            for check in self.checks
            for row in check.broken
        ]


def write_result(folder: Path, result: ContractResult, *, started: float) -> None:
    """Write ``result.json``, ``quarantine.parquet`` and ``report.json`` of one contract.

    Raises:
        WorkspaceError: The disk is full or read-only.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    quarantined = result.quarantined()
    with atomic_path(folder / "quarantine.parquet") as temporary:
        rows = [to_row(row) for row in quarantined]
        pq.write_table(pa.Table.from_pylist(rows, schema=schema_of(QuarantinedRow)), temporary, compression="zstd")
    write_json(folder / "result.json", result.to_json())
    report = Report(
        step=f"contract-{result.contract}",
        counts={
            "rows": result.rows,
            "checks": len(result.checks),
            "broken": len(result.broken),
            "warnings": len(result.warnings),
            "quarantined": len(quarantined),
        },
        metrics=result.numbers,
        details={"success": result.success, "broken": [check.to_json() for check in result.broken]},
        fingerprint=result.fingerprint,
    )
    write_report(folder, report, started=started, packages=("great_expectations", "duckdb", "pandas", "pillow"))
