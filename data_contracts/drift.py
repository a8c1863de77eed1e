"""How far a table moved from its last accepted version: row count, length distribution and mix.

Accepted versions are remembered as a few numbers in ``accepted.json`` beside the result. A version
is accepted when its contract holds. It is compared with the version accepted before it, however
often it is checked, so that checking twice gives the same result. The thresholds of the population
stability index (0.1 and 0.25) are the usual ones of credit scoring.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from data_contracts.contract import DriftRules
from data_contracts.result import Check

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["accept", "baseline", "check_drift", "statistics"]

JUDGED_FROM_ROWS = 1_000
"""Below this many rows in either version, drift only warns: shares of small sets move by chance."""
ROWS_WARN, ROWS_FAIL = 0.10, 0.50
"""Share of the accepted version's rows that may go."""
PSI_WARN, PSI_FAIL = 0.10, 0.25
MIX_WARN, MIX_FAIL = 0.10, 0.30
"""Total variation distance: the share of rows that would have to change their name."""

Statistics = dict[str, Any]


def statistics(frame: pd.DataFrame, rules: DriftRules) -> Statistics:
    """The numbers by which a version is remembered: rows, lengths in powers of two, shares of names."""
    import numpy as np

    lengths = frame[rules.length].fillna(0).to_numpy(dtype=np.float64)
    # The binary exponent of a whole number is its length in bits: 0, 1, 2-3, 4-7, 8-15, …
    counts = np.bincount(np.frexp(np.clip(lengths, 0, None))[1])
    names = frame[rules.mix].fillna("none").value_counts()
    return {
        "rows": len(frame),
        "length": {str(bits): int(count) for bits, count in enumerate(counts) if count},
        "mix": {str(name): int(count) for name, count in sorted(names.items())},
    }


def baseline(accepted: Mapping[str, Any] | None, fingerprint: str) -> Statistics | None:
    """What a version is compared with: the last accepted one that is not itself; None if it is the first."""
    if accepted is None:
        return None
    if accepted["fingerprint"] == fingerprint:
        return cast("Statistics | None", accepted["before"])
    return cast(Statistics, accepted["statistics"])


def accept(
    accepted: Mapping[str, Any] | None, fingerprint: str, now: Statistics, *, by_hand: bool = False
) -> dict[str, Any]:
    """The record of a version as accepted. ``by_hand`` makes it the first of a new line."""
    before = None if by_hand else baseline(accepted, fingerprint)
    return {"fingerprint": fingerprint, "statistics": now, "before": before}


def check_drift(now: Statistics, before: Statistics | None, *, label: str = "") -> list[Check]:
    """Judge a version against the accepted one: beyond the first threshold warn, beyond the second fail."""
    then = before or now
    judged = min(now["rows"], then["rows"]) >= JUDGED_FROM_ROWS
    lost = max(0.0, 1.0 - now["rows"] / then["rows"]) if then["rows"] else 0.0
    psi = _stability(then["length"], now["length"])
    mix = _distance(then["mix"], now["mix"])
    moved = f"{then['rows']:,} → {now['rows']:,} rows"
    return [
        _check(f"{label}drift_rows", "rows do not vanish", lost, moved, ROWS_WARN, ROWS_FAIL, judged),
        _check(
            f"{label}drift_length",
            "text lengths keep their distribution (population stability index)",
            psi,
            f"{psi:.3f}",
            PSI_WARN,
            PSI_FAIL,
            judged,
        ),
        _check(
            f"{label}drift_mix",
            "the mix keeps its shares (total variation distance)",
            mix,
            _moved_most(then["mix"], now["mix"], mix),
            MIX_WARN,
            MIX_FAIL,
            judged,
        ),
    ]


def _check(name: str, text: str, value: float, shown: str, warn: float, fail: float, judged: bool) -> Check:
    limits = f"warn above {warn:g}, fail above {fail:g}" if judged else f"warn above {warn:g} (small set: never fails)"
    return Check(
        name=name,
        rule=f"against the last accepted version, {text}",
        success=value <= warn,
        severity="fail" if judged and value > fail else "warn",
        observed=shown,
        expected=limits,
    )


def _shares(counts: Mapping[str, int]) -> dict[str, float]:
    total = max(sum(counts.values()), 1)
    return {name: count / total for name, count in counts.items()}


def _stability(then: Mapping[str, int], now: Mapping[str, int]) -> float:
    """Population stability index of two histograms, with empty bins counted as half a row."""
    bins = sorted(then.keys() | now.keys())
    index = 0.0
    for name in bins:
        p = max(then.get(name, 0), 0.5) / max(sum(then.values()), 1)
        q = max(now.get(name, 0), 0.5) / max(sum(now.values()), 1)
        index += (q - p) * math.log(q / p)
    return round(index, 6)


def _distance(then: Mapping[str, int], now: Mapping[str, int]) -> float:
    p, q = _shares(then), _shares(now)
    return round(sum(abs(p.get(name, 0.0) - q.get(name, 0.0)) for name in sorted(p.keys() | q.keys())) / 2, 6)


def _moved_most(then: Mapping[str, int], now: Mapping[str, int], distance: float) -> str:
    p, q = _shares(then), _shares(now)
    names = sorted(p.keys() | q.keys())
    if not names or distance == 0:
        return f"{distance:.3f}"
    name = max(names, key=lambda n: abs(p.get(n, 0.0) - q.get(n, 0.0)))
    return f"{distance:.3f}, most of it '{name}': {p.get(name, 0.0):.0%} → {q.get(name, 0.0):.0%}"
