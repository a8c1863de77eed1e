"""The words in which a contract is written: rules, limits, tables and what they are run on.

A contract reads as a list of rules. Three kinds exist, because three tools are best at them:

- ``Column``: one column of one row at a time, judged by Great Expectations on pandas.
- ``Rows``: rows found by a DuckDB query (uniqueness, joins, everything that looks at two rows).
- ``Limit``: one number from a DuckDB query that has to lie within bounds (counts, shares).

Pictures are judged by ``ImageRules``, change against the last accepted version by ``DriftRules``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from medvlm.store import Workspace, shard_paths

__all__ = [
    "Column",
    "Contract",
    "DriftRules",
    "ImageRules",
    "Limit",
    "Rows",
    "Rule",
    "Selection",
    "Severity",
    "Table",
    "Target",
    "between",
    "in_set",
    "matches",
    "unique",
]

Severity = Literal["fail", "warn"]
"""A broken ``warn`` rule is shown and stops nothing."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """Each row's value of one column holds an expectation of Great Expectations."""

    name: str
    text: str
    """The rule in words, as people read it in the result."""
    expectation: str
    """Class name in ``great_expectations.expectations``."""
    options: Mapping[str, Any]
    tolerated: float = 0.0
    """Share of rows, 0 to 1, that may break it."""
    severity: Severity = "fail"


@dataclass(frozen=True, kw_only=True)
class Rows:
    """A DuckDB query finds no row, or no more than tolerated. It selects ``row_id`` and ``value``."""

    name: str
    text: str
    query: str
    tolerated: float = 0.0
    severity: Severity = "fail"


@dataclass(frozen=True, kw_only=True)
class Limit:
    """One number of a DuckDB query lies within bounds, both included. NULL counts as 0."""

    name: str
    text: str
    query: str
    minimum: float | None = None
    maximum: float | None = None
    severity: Severity = "fail"


Rule = Column | Rows | Limit


@dataclass(frozen=True, kw_only=True)
class ImageRules:
    """Which picture checks a table gets. Missing and broken pictures are counted apart."""

    id_column: str
    """Names the row in the result."""
    sha_column: str
    size_columns: tuple[str, str] | None = None
    """Width and height in pixels, where the record has them."""
    tolerated_missing: float = 0.0
    """Share of rows whose picture may be absent (zero bytes)."""


@dataclass(frozen=True, kw_only=True)
class DriftRules:
    """Columns of the contract's frame whose change against the last accepted version is judged."""

    length: str
    """A whole-number column: its distribution."""
    mix: str
    """A column of a few names: their shares."""


@dataclass(frozen=True)
class Table:
    """Shards under a name that queries use, and the record type that their schema must be."""

    name: str
    folder: Path
    record: type
    files: str = "*.parquet"
    """Which files of the folder are its shards."""

    def shards(self) -> list[Path]:
        """The table's Parquet files, in order.

        Raises:
            WorkspaceError: The step that makes it has not run.
        """
        return [path for path in shard_paths(self.folder) if path.match(self.files)]


@dataclass(frozen=True)
class Target:
    """One thing that a contract is run on: a dataset, or one benchmark of several."""

    label: str
    """Stands before row ids and check names where a contract has several targets; else empty."""
    tables: tuple[Table, ...]
    """The first one is what the rules' rows and pictures come from."""


@dataclass(frozen=True)
class Selection:
    """Which targets were asked for on the command line; None is all."""

    benchmark: str | None = None
    recipe: str | None = None

    @property
    def scope(self) -> list[str]:
        """What was named: the sub-folders of a result, from the contract's folder on."""
        return [part for part in (self.recipe, self.benchmark) if part is not None]


@dataclass(frozen=True, kw_only=True)
class Contract:
    """What one table promises."""

    name: str
    title: str
    targets: Callable[[Workspace, Selection], list[Target]]
    frame: str
    """DuckDB query for what Great Expectations sees: ``row_id`` and narrow columns, never pictures."""
    rules: tuple[Rule, ...]
    images: ImageRules | None = None
    drift: DriftRules | None = None


def between(
    name: str, text: str, column: str, low: float | None, high: float | None, *, tolerated: float = 0.0
) -> Column:
    """The rule that a number lies between two bounds, both included; None is no bound."""
    options = {"column": column, "min_value": low, "max_value": high}
    return Column(
        name=name, text=text, expectation="ExpectColumnValuesToBeBetween", options=options, tolerated=tolerated
    )


def in_set(
    name: str,
    text: str,
    column: str,
    values: tuple[str | bool, ...],
    *,
    severity: Severity = "fail",
    tolerated: float = 0.0,
) -> Column:
    """The rule that a value is one of a few."""
    return Column(
        name=name,
        text=text,
        expectation="ExpectColumnValuesToBeInSet",
        options={"column": column, "value_set": list(values)},
        severity=severity,
        tolerated=tolerated,
    )


def matches(
    name: str, text: str, column: str, pattern: str, *, severity: Severity = "fail", tolerated: float = 0.0
) -> Column:
    """The rule that a text matches a regular expression from its beginning."""
    return Column(
        name=name,
        text=text,
        expectation="ExpectColumnValuesToMatchRegex",
        options={"column": column, "regex": pattern},
        severity=severity,
        tolerated=tolerated,
    )


def unique(name: str, text: str, table: str, *columns: str, row_id: str) -> Rows:
    """The rule that no two rows agree in all of these columns. ``row_id`` names the rows in the result."""
    keys = ", ".join(columns)
    query = (
        f"SELECT {row_id} AS row_id, 'row ' || n || ' with ' || concat_ws(' | ', {keys}) AS value FROM "  # noqa: S608
        f"(SELECT *, row_number() OVER (PARTITION BY {keys}) AS n FROM "
        f"(SELECT {', '.join(dict.fromkeys([row_id, *columns]))} FROM {table})) WHERE n > 1"
    )
    return Rows(name=name, text=text, query=query)
