"""The Dagster instance: SQLite by default, a real PostgreSQL by one setting, no password on the disk."""

import os
import pwd
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import dagster as dg
import pytest
import yaml
from failures.reliability import held

from orchestration.instance import POSTGRES_VARIABLE, SETTINGS, ensure_home, make_tables


def test_without_a_setting_it_is_sqlite_with_our_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(POSTGRES_VARIABLE, raising=False)
    assert ensure_home(tmp_path / "home").read_text() == SETTINGS.read_text()


def test_the_password_stays_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(POSTGRES_VARIABLE, "postgresql+psycopg2://me:planted-secret@host/db")
    text = ensure_home(tmp_path / "home").read_text()
    assert "planted-secret" not in text
    assert yaml.safe_load(text)["storage"]["postgres"]["postgres_url"] == {"env": POSTGRES_VARIABLE}
    assert yaml.safe_load(text)["run_monitoring"]["enabled"] is True, "the other settings stay"


def test_tables_are_there_before_webserver_and_daemon_start_together(tmp_path: Path) -> None:
    ensure_home(tmp_path)
    make_tables(tmp_path)
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.db")}
    assert {path.name for path in made} >= {"runs.db", "schedules.db", "index.db"}
    make_tables(tmp_path)
    assert made == {path: path.stat().st_mtime_ns for path in made}, "what is there stays as it is"


@dataclass(frozen=True)
class Postgres:
    """A server of Debian's package on loopback, in a folder of its own."""

    programs: Path
    folder: Path
    port: int

    @property
    def url(self) -> str:
        return f"postgresql+psycopg2://postgres@127.0.0.1:{self.port}/postgres"

    def control(self, *arguments: str) -> None:
        # PostgreSQL refuses to run as root.
        user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        command = [*user, str(self.programs / "pg_ctl"), "-w", "-D", str(self.folder / "data"), *arguments]
        subprocess.run(command, check=True, capture_output=True, cwd="/")

    def start(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={self.folder}"
        self.control("-l", str(self.folder / "log"), "-o", options, "start")

    def stop(self) -> None:
        self.control("-m", "immediate", "stop")


@pytest.fixture
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
    if not found:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    # Not below pytest's own folder, which only root may enter.
    folder = Path(subprocess.run(["mktemp", "-d"], check=True, capture_output=True, text=True).stdout.strip())
    if os.geteuid() == 0:
        entry = pwd.getpwnam("postgres")
        os.chown(folder, entry.pw_uid, entry.pw_gid)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        server = Postgres(found[-1].parent, folder, free.getsockname()[1])
    server.control("-o", "-A trust --no-sync", "initdb")
    server.start()
    yield server
    server.stop()
    shutil.rmtree(folder)


def test_runs_are_kept_in_postgresql_and_outlive_its_restart(
    postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @dg.asset
    def table() -> None: ...

    monkeypatch.setenv(POSTGRES_VARIABLE, postgres.url)
    home = tmp_path / "home"
    ensure_home(home)
    monkeypatch.setenv("DAGSTER_HOME", str(home))
    with dg.DagsterInstance.get() as instance:
        first = dg.materialize([table], instance=instance).run_id
    postgres.stop()
    postgres.start()
    with dg.DagsterInstance.get() as instance:
        assert instance.get_run_by_id(first).is_success
        assert dg.materialize([table], instance=instance).success
    assert not list(home.rglob("*.db")), "nothing is kept in SQLite beside it"


def test_a_restart_of_postgresql_under_a_run_ends_no_run(
    postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    back: list[threading.Timer] = []

    @dg.asset
    def training(context: dg.AssetExecutionContext) -> None:
        context.log_event(dg.AssetObservation(asset_key="training", metadata={"step": 1}))
        postgres.stop()
        back.append(threading.Timer(1.0, postgres.start))
        back[0].start()
        # While it is away: Dagster tries again for some seconds.
        context.log_event(dg.AssetObservation(asset_key="training", metadata={"step": 2}))

    monkeypatch.setenv(POSTGRES_VARIABLE, postgres.url)
    ensure_home(tmp_path / "home")
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "home"))
    with dg.DagsterInstance.get() as instance:
        result = dg.materialize([training], instance=instance)
        back[0].join()
        assert result.success
        assert instance.get_run_by_id(result.run_id).is_success
        told = instance.fetch_observations(dg.AssetKey("training"), limit=5).records
        assert sorted(record.asset_observation.metadata["step"].value for record in told) == [1, 2]
    held(
        "PostgreSQL crashes and restarts under a run",
        lost="nothing: events wait until it is back, progress for as long as it takes",
        saw="a line in the run's stderr",
        rerun="not needed; were it away when a step ends, the rerun finds the step up to date",
    )
