"""Parts of a list spread over two Celery workers, with a real Redis between them and Dagster."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from bucket_server import BucketServer
from fetch_case import many, write_list

from medvlm.pipeline import with_items
from medvlm.settings import Settings, write_settings
from orchestration.instance import ensure_home, make_tables

ROWS = 24
PARTS = [f"list.jsonl:{part}-of-3" for part in (1, 2, 3)]


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[str]:
    """The address of a Redis of its own, on loopback and without a file."""
    if not shutil.which("redis-server"):
        pytest.skip("Redis is not installed: apt-get install redis-server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)]
    server = subprocess.Popen(["redis-server", *options], stdout=subprocess.DEVNULL)
    yield f"redis://127.0.0.1:{port}/0"
    server.terminate()
    server.wait()


def workers(environment: dict[str, str], folder: Path) -> list[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "celery", "-A", "orchestration.celery_worker", "worker", "--pool", "solo"]
    command += ["--without-gossip", "--without-mingle", "--without-heartbeat", "--loglevel", "INFO"]
    started = []
    for name in ("first", "second"):
        with (folder / f"{name}.log").open("wb") as log:
            arguments = [*command, "--hostname", f"{name}@test"]
            started.append(subprocess.Popen(arguments, env=environment, stdout=log, stderr=log))
    deadline = time.monotonic() + 120
    while not all("ready." in (folder / f"{name}.log").read_text() for name in ("first", "second")):
        assert time.monotonic() < deadline, (folder / "first.log").read_text()
        time.sleep(0.1)
    return started


def test_parts_of_a_list_go_to_two_workers(redis: str, tmp_path: Path) -> None:
    import dagster as dg

    objects, rows = many(ROWS)
    (tmp_path / "inbox").mkdir()
    urls = write_list(tmp_path / "inbox", rows).rename(tmp_path / "list.jsonl")
    home = ensure_home(tmp_path / "home").parent
    make_tables(home)
    with BucketServer(objects, latency_s=0.02) as server:
        sample = Settings.sample()
        figures = sample.figures.model_copy(update={"urls": urls.name, "store": server.url})
        write_settings(tmp_path / "params.yaml", with_items(sample.model_copy(update={"figures": figures})))
        with dg.DagsterInstance.from_config(str(home)) as instance:
            instance.add_dynamic_partitions("list_parts", PARTS)
        environment = {
            **os.environ, "DAGSTER_HOME": str(home), "MEDVLM_PROJECT": str(tmp_path), "MEDVLM_EXECUTOR": "celery",
            "MEDVLM_CELERY_BROKER": redis,
        }  # fmt: skip
        started = workers(environment, tmp_path)
        try:
            command = [sys.executable, "-m", "dagster", "job", "execute", "-m", "orchestration.definitions"]
            command += ["-j", "fetch_parts", "--tags"]
            running = [
                subprocess.Popen(
                    [*command, json.dumps({"dagster/partition": part})],
                    env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                )
                for part in PARTS
            ]  # fmt: skip
            said = [process.communicate(timeout=200)[0] for process in running]
        finally:
            for worker in started:
                worker.terminate()
            for worker in started:
                worker.wait()
        logs = [(tmp_path / f"{name}.log").read_text() for name in ("first", "second")]
        assert [process.returncode for process in running] == [0, 0, 0], "\n".join([*said, *logs])[-4000:]
    with dg.DagsterInstance.from_config(str(home)) as instance:
        assert instance.get_materialized_partitions(dg.AssetKey("figure_parts")) == set(PARTS)
        runs = list(instance.get_runs())
        # Where the queue is may hold a password: it is nowhere in the history.
        assert not any(redis in json.dumps(run.run_config) for run in runs)
    assert all("received" in log and "succeeded" in log for log in logs), "both took parts"
