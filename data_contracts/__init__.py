"""What the pipeline's tables promise, and the run that holds them to it.

``python -m data_contracts NAME`` checks one table of a workspace: column by column with Great
Expectations, across rows with DuckDB, and picture by picture with Pillow. One module a contract.
"""

from __future__ import annotations

__all__ = ["CONTRACTS"]

# Name → module. Modules are imported when they are run.
CONTRACTS: dict[str, str] = {
    "figures": "data_contracts.figures",
    "alignment": "data_contracts.alignment",
    "instruct": "data_contracts.instruct",
    "preference": "data_contracts.preference",
    "benchmark-items": "data_contracts.benchmark_items",
    "predictions": "data_contracts.predictions",
    "scores": "data_contracts.scores",
}
