"""A real daemon and real run workers: cancelled, killed and restarted in the middle of a training."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import dagster as dg
import psutil
import pytest
import yaml
from failures.reliability import held
from golden_case import fill_golden, golden_overrides

from medvlm.config import load_recipe
from medvlm.pipeline import with_items
from medvlm.settings import Settings, write_settings
from medvlm.store import Workspace
from orchestration.instance import ensure_home, make_tables

pytestmark = pytest.mark.timeout(1200)  # three launches of a training, and a machine that may be busy

NAME = "tiny-llava-med"
# Long enough to be met in the middle three times.
OVERRIDES = [*golden_overrides(NAME), "stages.align.max_steps=20000", "checkpoints.every=0.001"]
PROMISED_S = 15.0


def until(condition: Callable[[], object], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@dataclass
class Live:
    """An instance with a daemon of its own, on a folder of its own."""

    folder: Path
    environment: dict[str, str]
    daemons: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def workspace(self) -> Workspace:
        return Workspace(self.folder / "workspace")

    def start_daemon(self) -> subprocess.Popen[bytes]:
        with (self.folder / "daemon.log").open("ab") as log:
            command = [sys.executable, "-m", "dagster._daemon", "run", "-m", "live_definitions"]
            process = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, cwd=self.folder)
        self.daemons.append(process)
        return process

    def launch(self, job: str) -> str:
        known = {run.run_id for run in self.runs()}
        command = [sys.executable, "-m", "dagster", "job", "launch", "-m", "live_definitions", "-j", job]
        done = subprocess.run(command, env=self.environment, cwd=self.folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        (new,) = {run.run_id for run in self.runs()} - known
        return new

    def instance(self) -> dg.DagsterInstance:
        return dg.DagsterInstance.from_config(str(self.folder / "home"))

    def runs(self) -> list[dg.DagsterRun]:
        with self.instance() as instance:
            return list(instance.get_runs())

    def status(self, run: str) -> str:
        with self.instance() as instance:
            return instance.get_run_by_id(run).status.value

    def becomes(self, run: str, status: str, seconds: float = 240) -> None:
        def words() -> str:
            return f"{self.status(run)}\n{self.log()}"

        deadline = time.monotonic() + seconds
        while (now := self.status(run)) != status:
            assert time.monotonic() < deadline and now not in {"FAILURE", "CANCELED"}, words()
            time.sleep(0.2)

    def log(self) -> str:
        return (self.folder / "daemon.log").read_text(errors="replace")[-4000:]

    def said(self, run: str) -> str:
        texts = (self.folder / "home" / "storage" / run).rglob("*.out")
        return "".join(path.read_text(errors="replace") for path in texts)

    def saved(self) -> int:
        scratch = self.workspace.scratch("train", NAME, "stage1", "all")
        return max((int(p.parent.name.split("-")[1]) for p in scratch.glob("checkpoint-*/complete.json")), default=0)

    def processes(self, word: str) -> list[psutil.Process]:
        """Living processes on this folder whose command has the word."""
        found: list[psutil.Process] = []
        for process in psutil.process_iter(["cmdline", "status"]):
            line = " ".join(process.info["cmdline"] or ())
            if word in line and str(self.folder) in line and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process)
        return found

    def slots(self) -> int:
        with self.instance() as instance:
            return instance.event_log_storage.get_concurrency_info("gpu").active_slot_count


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Live]:
    home = tmp_path / "home"
    path = ensure_home(home)
    settings = yaml.safe_load(path.read_text())
    settings["concurrency"]["runs"] = {"max_concurrent_runs": 1}
    settings["run_monitoring"]["poll_interval_seconds"] = 5
    path.write_text(yaml.safe_dump(settings))
    make_tables(home)
    write_settings(tmp_path / "params.yaml", with_items(Settings.sample()))
    workspace = fill_golden(Workspace(tmp_path / "workspace"), load_recipe(NAME, OVERRIDES))
    command = ["-m", "medvlm.cli", "--workspace", str(workspace.root), "train", "--recipe", NAME, "--stage", "1"]
    command += [part for text in OVERRIDES for part in ("--set", text)]
    here = Path(__file__).parent
    paths = [str(here), str(here.parents[1]), os.environ.get("PYTHONPATH", "")]
    made = Live(
        tmp_path,
        {
            **os.environ,
            "DAGSTER_HOME": str(home),
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "MEDVLM_TEST_TRAINING": json.dumps(command),
            "OMP_NUM_THREADS": "1",
        },
    )
    yield made
    for daemon in made.daemons:
        if daemon.poll() is None:
            daemon.terminate()
            daemon.wait(60)


def test_a_queued_run_a_cancelled_one_and_a_killed_one(live: Live) -> None:
    daemon = live.start_daemon()
    first = live.launch("train")
    queued = live.launch("look")
    until(live.saved, 300, live.log())
    assert live.status(queued) == "QUEUED"

    # The daemon dies; what runs goes on, what waits is not forgotten.
    daemon.send_signal(signal.SIGKILL)
    daemon.wait()
    assert live.processes("train"), "the training needs no daemon"
    live.start_daemon()
    assert live.status(queued) == "QUEUED"

    # Terminated as by the button of the UI.
    with live.instance() as instance:
        assert instance.run_launcher.terminate(first)
    until(lambda: not live.processes("train"), PROMISED_S, "the training outlives its run")
    until(lambda: live.status(first) == "CANCELED", 60, live.log())
    saved = live.saved()
    assert "stopped; run the same command again to go on" in live.said(first)
    live.becomes(queued, "SUCCESS")
    held(
        "kill -9 of Dagster's daemon, with one run going and one queued",
        lost="nothing",
        saw="the run goes on; no new one starts until the daemon is back",
        rerun="the queued run starts by itself once a daemon runs",
    )
    held(
        "a run is terminated in the UI",
        lost="nothing: the step is finished and saved",
        saw="every process has ended within 15 s; the pool's slot is free for the next run",
        rerun="goes on from the step that was saved",
    )

    # The retry goes on; then its worker is killed, which can tell nobody.
    second = live.launch("train")
    until(lambda: live.saved() > saved, 300, live.log())
    assert f"going on from step {saved} of" in live.said(second)
    (supervisor,) = live.processes("orchestration.supervisor")
    worker = supervisor.parent().parent()
    worker.send_signal(signal.SIGKILL)
    until(lambda: not live.processes("train"), PROMISED_S, "the training outlives its run worker")
    until(lambda: live.status(second) == "FAILURE", 120, live.log())
    until(lambda: live.slots() == 0, 60, "the slot of the pool is not given back")
    saved = live.saved()

    third = live.launch("train")
    until(lambda: f"going on from step {saved} of" in live.said(third), 120, live.log())
    with live.instance() as instance:
        assert instance.run_launcher.terminate(third)
    until(lambda: live.status(third) == "CANCELED", 60, live.log())
    held(
        "kill -9 of Dagster's run worker in the middle of a training",
        lost="at most the steps since the last checkpoint",
        saw="the run fails within a minute; every process has ended within 15 s; the pool's slot is given back",
        rerun="goes on from the last whole checkpoint",
    )
