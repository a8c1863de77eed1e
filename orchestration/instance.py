"""Makes the Dagster instance of ``DAGSTER_HOME``, tables included: SQLite on one host, PostgreSQL where one is named.

    python -m orchestration.instance

The one setting is ``MEDVLM_POSTGRES_URL``, such as ``postgresql+psycopg2://user@host:5432/dagster``.
The file written names the variable only, so that no password stands in it.
"""

import os
from pathlib import Path

import click
import dagster as dg
import yaml

SETTINGS = Path(__file__).with_name("dagster.yaml")
POSTGRES_VARIABLE = "MEDVLM_POSTGRES_URL"


def ensure_home(home: Path) -> Path:
    """Write ``dagster.yaml`` with our settings into the instance's folder, and return the file.

    Args:
        home: The folder; made where it is not there. Its history stays.
    """
    home.mkdir(parents=True, exist_ok=True)
    path = home / "dagster.yaml"
    text = SETTINGS.read_text("utf-8")
    if os.environ.get(POSTGRES_VARIABLE):
        storage = {"storage": {"postgres": {"postgres_url": {"env": POSTGRES_VARIABLE}}}}
        text += f"\n# From {POSTGRES_VARIABLE}.\n{yaml.safe_dump(storage)}"
    if not path.exists() or path.read_text("utf-8") != text:
        path.write_text(text, "utf-8")
    return path


def make_tables(home: Path) -> None:
    """Make the history's tables, where they are not there: two processes that do it at once spoil them.

    Webserver and daemon start together; on a fresh SQLite each would find none and make its own.
    """
    with dg.DagsterInstance.from_config(str(home)) as instance:
        instance.get_runs_count()
        instance.event_log_storage.get_concurrency_keys()
        instance.all_instigator_state()


@click.command()
def main() -> None:
    """Write the instance's settings and say where it keeps its history."""
    home = os.environ.get("DAGSTER_HOME")
    if not home:
        raise click.UsageError("DAGSTER_HOME is not set")
    path = ensure_home(Path(home))
    make_tables(Path(home))
    storage = f"PostgreSQL of {POSTGRES_VARIABLE}" if os.environ.get(POSTGRES_VARIABLE) else f"SQLite in {home}"
    click.echo(f"{path}: runs and events in {storage}", err=True)


if __name__ == "__main__":
    main()
