"""The sensors: new lists become partitions, reviews start a rebuild, failures tell a person, DVC's work is seen."""

import hashlib
from pathlib import Path

import dagster as dg

from medvlm.errors import MedVLMError
from medvlm.review import Journal
from orchestration.alerts import Alerts
from orchestration.jobs import rebuild_data
from orchestration.outside import report_made_outside
from orchestration.partitions import keys_of_list, list_parts
from orchestration.resources import DvcProject

LIST_ENDINGS = {".jsonl", ".txt"}


@dg.sensor(
    minimum_interval_seconds=30,
    # Adding partitions spends nothing: fetching them is a person's backfill, or automation that is off by default.
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="A URL list put into the workspace's inbox folder becomes partitions of `figure_parts`.",
)
def inbox_lists(context: dg.SensorEvaluationContext, project: DvcProject) -> dg.SensorResult | dg.SkipReason:
    """Partitions for each list of the inbox, and for the list that params.yaml names."""
    known = set(context.instance.get_dynamic_partitions(list_parts.name or ""))
    new: list[str] = []
    for path in lists_of(project):
        try:
            new += [key for key in keys_of_list(path) if key not in known]
        except MedVLMError as error:
            context.log.warning(str(error))
    if not new:
        return dg.SkipReason(f"no new list in {project.workspace.inbox}")
    return dg.SensorResult(dynamic_partitions_requests=[list_parts.build_add_request(new)])


def lists_of(project: DvcProject) -> list[Path]:
    """The lists whose parts can be fetched ahead: that of params.yaml first, then the inbox by name."""
    main = Path(project.root) / project.settings.figures.urls
    inbox = project.workspace.inbox
    waiting = sorted(p for p in inbox.iterdir() if p.suffix in LIST_ENDINGS) if inbox.is_dir() else []
    return [path for path in (main, *waiting) if path.is_file()]


@dg.sensor(
    job=rebuild_data,
    minimum_interval_seconds=60,
    default_status=dg.DefaultSensorStatus.STOPPED,
    description="Enough new decisions in the dashboard's Review start a rebuild of the datasets, which obey them.",
)
def review_decisions(context: dg.SensorEvaluationContext, project: DvcProject) -> dg.RunRequest | dg.SkipReason:
    """One rebuild for each batch of decisions as large as ``review_threshold`` of params.yaml."""
    count = len(Journal(project.workspace).read())
    fresh = count - int(context.cursor or 0)
    threshold = project.settings.review_threshold
    if fresh < threshold:
        return dg.SkipReason(f"{fresh} new review decisions; {threshold} start a rebuild")
    context.update_cursor(str(count))
    return dg.RunRequest(run_key=f"decisions-{count}", tags={"medvlm/review-decisions": str(fresh)})


@dg.run_failure_sensor(
    monitor_all_code_locations=False,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Tells the webhook or mail address of the environment that a run failed; silent where there is none.",
)
def failed_runs(context: dg.RunFailureSensorContext, alerts: Alerts) -> None:
    """One message for each failed run, with its first words and the checks that failed in it."""
    words = (context.failure_event.message or "").strip()
    if names := _failed_checks(context):
        words += f"\nfailed {names}"
    alerts.send(f"medvlm: run {context.dagster_run.run_id[:8]} of {context.dagster_run.job_name} failed\n{words}")


@dg.run_status_sensor(
    run_status=dg.DagsterRunStatus.SUCCESS,
    monitor_all_code_locations=False,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Tells the webhook or mail address of the environment that a check failed in a run that went on.",
)
def failed_checks(context: dg.RunStatusSensorContext, alerts: Alerts) -> None:
    """One message for each run with failed checks, which are named."""
    if names := _failed_checks(context):
        run = context.dagster_run
        alerts.send(f"medvlm: run {run.run_id[:8]} of {run.job_name}: failed {names}")


def _failed_checks(context: dg.RunStatusSensorContext) -> str:
    records = context.instance.get_records_for_run(
        context.dagster_run.run_id, of_type=dg.DagsterEventType.ASSET_CHECK_EVALUATION
    ).records
    events = [record.event_log_entry.get_dagster_event() for record in records]
    failed = [e.asset_check_evaluation_data for e in events if not e.asset_check_evaluation_data.passed]
    return ", ".join(f"{check.check_name} of {check.asset_key.to_user_string()}" for check in failed)


@dg.sensor(
    minimum_interval_seconds=30,
    # It reads one file and starts nothing.
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="What `dvc repro` made outside Dagster is reported with its data version, so that it shows as fresh.",
)
def dvc_made(context: dg.SensorEvaluationContext, project: DvcProject) -> dg.SkipReason:
    """An event for each asset that DVC has made and Dagster does not know yet; nothing is run."""
    if not project.lock_file.is_file():
        return dg.SkipReason(f"{project.lock_file} is not there: DVC has made nothing yet")
    seen = hashlib.sha256(project.lock_file.read_bytes()).hexdigest()
    if seen == context.cursor:
        return dg.SkipReason("dvc.lock is as it was")
    assert context.repository_def is not None
    told = report_made_outside(context.instance, context.repository_def.asset_graph, project)
    context.update_cursor(seen)
    return dg.SkipReason(f"reported {', '.join(told)}" if told else "Dagster knows all that DVC has made")


all_sensors = [inbox_lists, review_decisions, failed_runs, failed_checks, dvc_made]
