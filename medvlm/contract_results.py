"""What the contracts last said about each dataset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from medvlm.errors import WorkspaceError
from medvlm.store import Workspace, read_json, read_report

__all__ = ["Check", "ContractResult", "contract_results"]


@dataclass(frozen=True)
class Check:
    """One rule of a contract and what was seen."""

    name: str
    rule: str
    success: bool
    blocks: bool
    """Whether a break stops what comes after; else it is a warning."""
    observed: str
    expected: str
    broken_rows: int
    examples: tuple[str, ...]


@dataclass(frozen=True)
class ContractResult:
    """The last verdict on one dataset."""

    name: str
    success: bool
    rows: int
    checks: tuple[Check, ...]
    quarantined: int
    checked_at: float
    """Seconds since the epoch."""
    docs: Path | None = None
    """First page of the Data Docs; None where none were built."""

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that do not hold and stop what comes after."""
        return tuple(check for check in self.checks if not check.success and check.blocks)

    @property
    def warned(self) -> tuple[Check, ...]:
        """The checks that do not hold and stop nothing."""
        return tuple(check for check in self.checks if not check.success and not check.blocks)


def contract_results(workspace: Workspace) -> list[ContractResult]:
    """Each contract's last verdict: broken ones first, then by name.

    Raises:
        InputError: A result is damaged.
        WorkspaceError: A result was written by another version.
    """
    root = workspace.contract("_").parent
    # A contract that each recipe has for itself lies one folder deeper.
    paths = [*root.glob("*/result.json"), *root.glob("*/*/result.json")]
    return sorted((_result(root, path) for path in paths), key=lambda r: (r.success, r.name))


def _result(root: Path, path: Path) -> ContractResult:
    result = read_json(path)
    quarantine = path.parent / "quarantine.parquet"
    try:
        success, rows = bool(result["success"]), int(result.get("rows", 0))
        checks = tuple(_check(check) for check in result.get("checks", []))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise WorkspaceError(
            "the contract's result is of another version of medvlm",
            where=str(path),
            hint="use the version that wrote it, or check the contract again",
        ) from error
    return ContractResult(
        name=path.parent.relative_to(root).as_posix(),
        success=success,
        rows=rows,
        checks=checks,
        quarantined=pq.read_metadata(quarantine).num_rows if quarantine.exists() else 0,
        checked_at=_checked_at(path),
        docs=_inside(path.parent, str(result.get("docs") or "docs/index.html")),
    )


def _checked_at(path: Path) -> float:
    """When a result was found: as its report says, since a file that was copied or pulled is newer than its check."""
    report = read_report(path.parent)
    if report is None or not report.created_at:
        return path.stat().st_mtime
    return datetime.fromisoformat(report.created_at).timestamp()


def _inside(folder: Path, name: str) -> Path | None:
    """A file of a folder, if it is there and nowhere else."""
    path = (folder / name).resolve()
    return path if path.is_relative_to(folder.resolve()) and path.is_file() else None


def _check(check: Mapping[str, Any]) -> Check:
    return Check(
        name=str(check["name"]),
        rule=str(check.get("rule", "")),
        success=bool(check["success"]),
        blocks=check.get("severity", "fail") == "fail",
        observed=_shown(check.get("observed")),
        expected=_shown(check.get("expected")),
        broken_rows=int(check.get("broken_rows") or 0),
        examples=tuple(_example(example) for example in check.get("examples") or ()),
    )


def _example(example: Any) -> str:
    return f"{example['row_id']}: {example['value']}" if isinstance(example, Mapping) else _shown(example)


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:,.4g}" if isinstance(value, float) else str(value)
