"""Column rules as a Great Expectations suite, run on a pandas frame in this process, offline."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from data_contracts.contract import Column

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["validate"]

# Read once, on import of the library.
os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")


def validate(name: str, frame: pd.DataFrame, rules: Sequence[Column]) -> tuple[Any, dict[str, list[tuple[str, str]]]]:
    """Run the rules as one suite.

    Args:
        name: Of the suite, as Data Docs show it.
        frame: With a ``row_id`` column.
        rules: In order.

    Returns:
        The library's own validation result, for Data Docs, and for each rule its broken rows as
        (row id, value), in the frame's order.

    Raises:
        RuntimeError: An expectation could not be evaluated: the contract itself is wrong.
    """
    with warnings.catch_warnings():
        # The library's use of other libraries is not ours to fix; a contract speaks through its result.
        warnings.simplefilter("ignore")
        validation = _run(name, frame, rules)
    broken: dict[str, list[tuple[str, str]]] = {}
    for result in validation.results:
        # The library groups results by column; each carries its rule's name.
        stated = result.expectation_config.meta["name"]
        if result.exception_info.get("raised_exception") or "unexpected_index_list" not in result.result:
            raise RuntimeError(f"rule '{stated}' of contract '{name}' cannot be evaluated: {result.exception_info}")
        column = result.expectation_config.kwargs["column"]
        # The library passes over missing values. In a record every field is there, so they break the rule.
        missing = frame.loc[frame[column].isna(), "row_id"]
        broken[stated] = [(str(row), "missing") for row in missing]
        broken[stated] += [(str(row["row_id"]), str(row[column])) for row in result.result["unexpected_index_list"]]
    return validation, broken


def _run(name: str, frame: pd.DataFrame, rules: Sequence[Column]) -> Any:
    import great_expectations as gx
    import great_expectations.expectations as gxe
    from great_expectations.data_context.types.base import ProgressBarsConfig

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    expectations = [
        getattr(gxe, rule.expectation)(
            **rule.options,
            mostly=1.0 - rule.tolerated,
            severity="critical" if rule.severity == "fail" else "warning",
            meta={"name": rule.name},
            notes=rule.text,
        )
        for rule in rules
    ]
    suite = gx.ExpectationSuite(name=name, expectations=expectations)
    asset = context.data_sources.add_pandas(name).add_dataframe_asset(name)
    batch = asset.add_batch_definition_whole_dataframe("whole").get_batch({"dataframe": frame})
    return batch.validate(
        suite,
        result_format={
            "result_format": "COMPLETE",
            "unexpected_index_column_names": ["row_id"],
            "return_unexpected_index_query": False,
        },
    )
