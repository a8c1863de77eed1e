"""Drift: what moves is seen, small sets only warn, and chosen baselines stay put."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import sound_records
from hypothesis import given
from hypothesis import strategies as st

from data_contracts import drift
from data_contracts.contract import DriftRules
from data_contracts.run import run_contract
from medvlm.store import Workspace

RULES = DriftRules(length="length", mix="mix")


def version(lengths: list[int], mix: list[str]) -> drift.Statistics:
    return drift.statistics(pd.DataFrame({"length": lengths, "mix": mix}), RULES)


def verdicts(now: drift.Statistics, before: drift.Statistics | None) -> dict[str, tuple[bool, str]]:
    return {check.name: (check.success, check.severity) for check in drift.check_drift(now, before)}


def test_the_first_version_has_nothing_to_move_from() -> None:
    assert all(ok for ok, _ in verdicts(version([5] * 10, ["ct"] * 10), None).values())


@pytest.mark.parametrize(
    ("rows", "expected"),
    [(2000, (True, "warn")), (1700, (False, "warn")), (900, (False, "warn")), (1001, (False, "warn"))],
)
def test_lost_rows_warn(rows: int, expected: tuple[bool, str]) -> None:
    before = version([5] * 2000, ["ct"] * 2000)
    assert verdicts(version([5] * rows, ["ct"] * rows), before)["drift_rows"] == expected


def test_most_rows_lost_of_a_large_set_fails() -> None:
    before = version([5] * 4000, ["ct"] * 4000)
    assert verdicts(version([5] * 1500, ["ct"] * 1500), before)["drift_rows"] == (False, "fail")


def test_another_length_distribution_fails() -> None:
    before = version([5, 50] * 1000, ["ct"] * 2000)
    assert verdicts(version([5, 500] * 1000, ["ct"] * 2000), before)["drift_length"] == (False, "fail")


def test_another_mix_fails_and_names_what_moved() -> None:
    before = version([5] * 2000, ["ct", "mri"] * 1000)
    check = drift.check_drift(version([5] * 2000, ["ct"] * 2000), before)[2]
    assert (check.success, check.severity) == (False, "fail")
    assert check.observed == "0.500, most of it 'ct': 50% → 100%"


@given(st.lists(st.tuples(st.integers(0, 10**6), st.sampled_from("abc")), min_size=1, max_size=30), st.integers(1, 5))
def test_repeating_a_set_is_no_drift(rows: list[tuple[int, str]], times: int) -> None:
    lengths, mix = [n for n, _ in rows], [m for _, m in rows]
    now, before = version(lengths * times, mix * times), version(lengths, mix)
    assert all(check.success for check in drift.check_drift(now, before))


def test_rechecking_a_version_compares_with_the_one_before() -> None:
    first, second = version([1], ["a"]), version([1, 2], ["a", "a"])
    line = drift.accept(None, "one", first)
    assert drift.baseline(line, "one") is None
    assert drift.baseline(line, "two") == first
    line = drift.accept(line, "two", second)
    assert drift.baseline(line, "two") == first
    line = drift.accept(line, "two", second)
    assert drift.baseline(line, "two") == first
    line = drift.accept(line, "two", second, by_hand=True)
    assert drift.baseline(line, "two") is None


def test_a_moved_set_is_refused_until_it_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift, "JUDGED_FROM_ROWS", 1)
    workspace = Workspace(tmp_path)
    sound_records.write(workspace, "alignment", sound_records.sound("alignment", 12))
    assert run_contract(workspace, "alignment").success
    sound_records.write(workspace, "alignment", sound_records.sound("alignment", 3))
    for _ in range(2):
        assert [check.name for check in run_contract(workspace, "alignment").broken] == ["drift_rows"]
    assert run_contract(workspace, "alignment", accept=True).success
    assert run_contract(workspace, "alignment").success
