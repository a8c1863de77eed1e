"""Old runs and their logs go; what an asset's present state comes from stays."""

import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import dagster as dg
import pytest

from orchestration.retention import clear_history, clear_old_runs

parts = dg.StaticPartitionsDefinition(["a", "b"])


@dg.asset
def table() -> None:
    sys.stdout.write("said by the table")


@dg.asset(partitions_def=parts)
def shard() -> None: ...


@dg.asset
def broken() -> None:
    raise dg.Failure("as meant")


@dg.asset_check(asset=table)
def is_long() -> dg.AssetCheckResult:
    return dg.AssetCheckResult(passed=True)


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    with dg.instance_for_test(temp_dir=str(tmp_path)) as made:
        yield made


def logs(folder: Path, run: str) -> list[Path]:
    return [path for path in (folder / "storage" / run).rglob("*") if path.is_file()]


def test_old_runs_go_but_for_those_that_made_what_is_there(instance: dg.DagsterInstance, tmp_path: Path) -> None:
    def run(*assets: object, partition: str | None = None) -> str:
        made = dg.materialize(list(assets), instance=instance, partition_key=partition, raise_on_error=False)  # type: ignore[arg-type]
        return made.run_id

    first, failed = run(table, is_long), run(broken)
    a, b, again = run(shard, partition="a"), run(shard, partition="b"), run(shard, partition="a")
    second = run(table)
    assert logs(tmp_path, first)
    assert clear_old_runs(instance, datetime.now(UTC) - timedelta(days=1)) == (0, 0), "nothing is old yet"

    assert clear_old_runs(instance, datetime.now(UTC) + timedelta(days=1)) == (2, 4)
    left = {found.run_id for found in instance.get_runs()}
    assert left == {first, b, again, second}, "the first run has the check's last evaluation"
    assert not {failed, a} & left
    assert not logs(tmp_path, first) and not logs(tmp_path, failed)
    assert instance.get_materialized_partitions(dg.AssetKey("shard")) == {"a", "b"}
    assert instance.get_latest_materialization_event(dg.AssetKey("table")) is not None


def test_the_job_keeps_what_is_younger_than_said(instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = dg.materialize([broken], instance=instance, raise_on_error=False).run_id
    monkeypatch.setenv("MEDVLM_KEEP_RUNS_DAYS", "1")
    assert clear_history.execute_in_process(instance=instance).success
    assert instance.get_run_by_id(failed) is not None
