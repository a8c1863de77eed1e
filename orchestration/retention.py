"""What becomes of old runs: their logs go, and they go too where no asset is known by them alone.

Dagster keeps runs for ever. What a run materialised is known by the run's own events, so the run that last made an
asset, or a partition of it, is kept however old it is.
"""

import os
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import dagster as dg

KEEP_VARIABLE = "MEDVLM_KEEP_RUNS_DAYS"
KEEP_DAYS = 90
_ENDED = [dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED]
_BATCH = 200


def clear_old_runs(instance: dg.DagsterInstance, before: datetime) -> tuple[int, int]:
    """Delete logs of runs that ended before a time, and the runs that no asset is known by.

    Args:
        instance: Whose history is cleared.
        before: Runs that were made later stay as they are.

    Returns:
        How many runs were deleted, and how many were kept without their logs.
    """
    deleted, kept = 0, 0
    for run_id in list(_old_runs(instance, before)):
        instance.compute_log_manager.delete_logs(prefix=[run_id])
        if _is_latest_of_an_asset(instance, run_id):
            kept += 1
        else:
            instance.delete_run(run_id)
            deleted += 1
    return deleted, kept


def _old_runs(instance: dg.DagsterInstance, before: datetime) -> Iterator[str]:
    cursor: str | None = None
    while True:
        filters = dg.RunsFilter(statuses=_ENDED, created_before=before)
        found = [record.dagster_run.run_id for record in instance.get_run_records(filters, _BATCH, cursor=cursor)]
        yield from found
        if len(found) < _BATCH:
            return
        cursor = found[-1]


def _is_latest_of_an_asset(instance: dg.DagsterInstance, run_id: str) -> bool:
    kinds = {dg.DagsterEventType.ASSET_MATERIALIZATION, dg.DagsterEventType.ASSET_CHECK_EVALUATION}
    for record in instance.get_records_for_run(run_id, of_type=kinds).records:
        event = record.event_log_entry.get_dagster_event()
        if event.event_type is dg.DagsterEventType.ASSET_CHECK_EVALUATION:
            data = event.asset_check_evaluation_data
            key = dg.AssetCheckKey(data.asset_key, data.check_name)
            last = instance.event_log_storage.get_latest_asset_check_execution_by_key([key]).get(key)
            newest = last.run_id if last else None
        else:
            made = event.step_materialization_data.materialization
            partitions = [made.partition] if made.partition else None
            chosen = dg.AssetRecordsFilter(made.asset_key, asset_partitions=partitions)
            (latest,) = instance.fetch_materializations(chosen, limit=1).records
            newest = latest.run_id
        if newest == run_id:
            return True
    return False


@dg.op
def clear_old_runs_op(context: dg.OpExecutionContext) -> None:
    """Clear what ended more than ``MEDVLM_KEEP_RUNS_DAYS`` days ago, 90 where nothing is said."""
    days = int(os.environ.get(KEEP_VARIABLE) or KEEP_DAYS)
    deleted, kept = clear_old_runs(context.instance, datetime.now(UTC) - timedelta(days=days))
    context.log.info(f"older than {days} days: {deleted} runs deleted, {kept} kept without their logs")


@dg.job(description="Deletes old runs and logs; a run that an asset's present state comes from is kept.")
def clear_history() -> None:
    """One look at all runs that have ended."""
    clear_old_runs_op()


weekly_clearing = dg.ScheduleDefinition(
    name="weekly_clearing",
    job=clear_history,
    cron_schedule="0 5 * * 0",
    default_status=dg.DefaultScheduleStatus.STOPPED,
    description="Sundays at 05:00: delete runs and logs older than MEDVLM_KEEP_RUNS_DAYS (90).",
)
