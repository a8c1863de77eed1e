"""Two hosts over ssh train as one; a host that dies ends the run at once, and the next goes on without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from failures.reliability import held
from golden_case import GOLDEN_STEPS, fill_golden, golden_overrides
from two_hosts import ADDRESSES, Hosts, HostsMissing, two_hosts

from medvlm.config import load_recipe
from medvlm.store import Workspace, read_report

pytestmark = pytest.mark.timeout(1200)  # two launches, and a machine that may be busy

NAME = "tiny-llava-med"
OVERRIDES = [*golden_overrides(NAME), "checkpoints.every=0.05"]
GOLDEN = Path(__file__).with_name("golden") / f"{NAME}.json"


@pytest.fixture
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with ExitStack() as stack:
        try:
            made = stack.enter_context(two_hosts(tmp_path_factory.mktemp("hosts")))
        except HostsMissing as missing:
            pytest.skip(str(missing))
        yield made


def train(workspace: Workspace, hosts: Hosts, log: Path, *lines: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "medvlm.cli", "--workspace", str(workspace.root), "train"]
    command += ["--recipe", NAME, "--stage", "1"]
    command += [part for text in OVERRIDES for part in ("--set", text)]
    told = {"MEDVLM_LAUNCHER": "hostfile", "MEDVLM_HOSTFILE": hosts.hostfile(*lines), "OMP_NUM_THREADS": "1"}
    with log.open("wb") as stream:
        return subprocess.Popen(
            hosts.on(0, command), env={**os.environ, **hosts.environment, **told}, stdout=stream, stderr=stream
        )


def complete_steps(workspace: Workspace) -> list[int]:
    scratch = workspace.scratch("train", NAME, "stage1", "all")
    return [int(path.parent.name.split("-")[1]) for path in scratch.glob("checkpoint-*/complete.json")]


def test_a_host_dies_and_the_run_goes_on_with_the_other(hosts: Hosts, tmp_path: Path) -> None:
    workspace = fill_golden(Workspace(tmp_path / "ws"), load_recipe(NAME, OVERRIDES))
    log = tmp_path / "log"

    running = train(workspace, hosts, log, *(f"{address} slots=1" for address in ADDRESSES))
    deadline = time.monotonic() + 300
    while not complete_steps(workspace):
        assert running.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    hosts.kill(1)
    assert running.wait(60) == 1, "it does not wait for a host that is gone"
    assert "2 processes on cpu" in log.read_text()
    assert "a process of the job ended with code" in log.read_text()
    saved = max(complete_steps(workspace))
    assert saved < GOLDEN_STEPS

    again = train(workspace, hosts, log, f"{ADDRESSES[0]} slots=2")
    assert again.wait(300) == 0, log.read_text()
    assert f"going on from step {saved} of {GOLDEN_STEPS}" in log.read_text()
    report = read_report(workspace.stage(NAME, 1))
    assert report is not None
    losses = [point["loss"] for point in report.details["curves"]["all"]]
    assert losses == pytest.approx(json.loads(GOLDEN.read_text())["align"], abs=1e-4)
    held(
        "one host of two is cut off and killed",
        lost="the steps since the last checkpoint",
        saw="within a minute: a process of the job ended, with its code",
        rerun="goes on from the last whole checkpoint, with both processes on the host that is left",
    )
