"""The schedules. None is on by default: what spends GPU hours is a person's decision."""

from collections.abc import Iterator

import dagster as dg

from orchestration.jobs import nightly, train_recipe
from orchestration.resources import DvcProject


@dg.schedule(
    job=train_recipe,
    cron_schedule="0 2 * * 6",
    default_status=dg.DefaultScheduleStatus.STOPPED,
    description="Saturdays at 02:00: train those recipes of params.yaml again whose data changed.",
)
def weekly_retraining(
    context: dg.ScheduleEvaluationContext, project: DvcProject
) -> Iterator[dg.RunRequest | dg.SkipReason]:
    """One run for each recipe with changed inputs; a skip that says so where there is none."""
    requested = False
    for recipe in project.settings.recipes:
        changed = [path for n in (1, 2, 3) for path in project.changed_inputs(f"stage{n}@{recipe}")]
        if changed:
            requested = True
            yield dg.RunRequest(
                run_key=f"{recipe}-{context.scheduled_execution_time.isoformat()}",
                partition_key=recipe,
                tags={"medvlm/changed": ", ".join(changed)[:200]},
            )
    if not requested:
        yield dg.SkipReason("no recipe of params.yaml has changed inputs since it was trained")


nightly_recheck = dg.ScheduleDefinition(
    name="nightly_recheck",
    job=nightly,
    cron_schedule="0 3 * * *",
    default_status=dg.DefaultScheduleStatus.STOPPED,
    description="Every night at 03:00: drop figures of articles that were retracted or relicensed.",
)
