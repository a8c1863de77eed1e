"""The whole road of one recipe or several, from URLs to the leaderboard, as Dagster runs on this machine.

    python -m orchestration.walk --recipe tiny-llava-med

Each run is stored in the instance of ``DAGSTER_HOME``, so that the UI shows it afterwards. What is
up to date is not run again, and a killed training goes on from its last checkpoint: to finish a
road that broke, walk it again.
"""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import dagster as dg

from medvlm import RESEARCH_USE_ONLY
from medvlm.settings import Settings, read_settings
from orchestration.instance import ensure_home

# Each step's own output is what a person wants to read; Dagster's events are in the UI.
QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}


@click.command()
@click.option("--recipe", "recipes", multiple=True, help="One of params.yaml's; repeat for several. Default: all.")
def walk(recipes: tuple[str, ...]) -> None:
    """Materialise every asset of some recipes and print how long each took."""
    from orchestration.definitions import PROJECT_ROOT, defs

    ensure_home(Path(os.environ.setdefault("DAGSTER_HOME", str(PROJECT_ROOT / ".dagster"))))
    settings = read_settings(PROJECT_ROOT / "params.yaml")
    began = time.monotonic()
    rows: list[tuple[str, float]] = []
    with dg.DagsterInstance.get() as instance:
        for job, partition in _runs(settings, recipes or tuple(settings.recipes)):
            result = defs.resolve_job_def(job).execute_in_process(
                instance=instance, partition_key=partition, raise_on_error=False, run_config=QUIET
            )
            rows += _durations(result, partition)
            if not result.success:
                _print_failure(result, job)
                sys.exit(1)
    click.echo("\nTime of each step:")
    for name, seconds in rows:
        click.echo(f"  {seconds:7.1f} s  {name}")
    click.echo(f"  {time.monotonic() - began:7.1f} s  in all")
    click.echo(RESEARCH_USE_ONLY)


def _runs(settings: Settings, recipes: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    yield "rebuild_data", None
    for recipe in recipes:
        yield "train_recipe", recipe
        for item in settings.items.evaluations.values():
            if item.recipe == recipe:
                yield "evaluate", str(dg.MultiPartitionKey({"recipe": recipe, "benchmark": item.benchmark}))
        yield "bundle_release", recipe
    yield "refresh_leaderboard", None


def _durations(result: dg.ExecuteInProcessResult, partition: str | None) -> Iterator[tuple[str, float]]:
    for event in result.all_events:
        if event.event_type_value == "STEP_SUCCESS":
            name = f"{event.step_key} [{partition}]" if partition else str(event.step_key)
            yield name, event.step_success_data.duration_ms / 1000


def _print_failure(result: dg.ExecuteInProcessResult, job: str) -> None:
    click.echo(f"\nerror: the job {job} failed", err=True)
    for event in result.all_events:
        if event.event_type_value == "STEP_FAILURE":
            error = event.step_failure_data.error
            cause = error.cause if error and error.cause else error
            click.echo(f"  {event.step_key}: {cause.message.strip() if cause else 'no message'}", err=True)
        if event.event_type_value == "ASSET_CHECK_EVALUATION" and not event.asset_check_evaluation_data.passed:
            data = event.asset_check_evaluation_data
            click.echo(f"  contract broken: {data.check_name}\n{data.description or ''}", err=True)
    click.echo("  next:  mend the cause and run the same command again; finished steps are not repeated", err=True)


if __name__ == "__main__":
    walk()
