"""Stops of what runs a pipeline: SIGTERM and kill -9 during `dvc repro`, two at once, and a clock that jumps."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from failures.reliability import held

STAGE = """
stages:
  slow:
    cmd: python slow.py
    deps: [slow.py]
    outs: [out.txt]
"""
SLOW = """
import pathlib, time
pathlib.Path("begun").touch()
deadline = time.monotonic() + 60
while not pathlib.Path("go").exists():
    assert time.monotonic() < deadline
    time.sleep(0.01)
pathlib.Path("out.txt").write_text("done")
"""


def start(folder: Path) -> subprocess.Popen[bytes]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(
        [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item", "slow"],
        cwd=folder,
        env={**os.environ, "PATH": path, "DVC_NO_ANALYTICS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def until(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.02)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "dvc.yaml").write_text(STAGE)
    (tmp_path / "slow.py").write_text(SLOW)
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "-q"], cwd=tmp_path, check=True)
    return tmp_path


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_repro_leaves_no_lock_and_runs_again(project: Path, number: signal.Signals) -> None:
    first = start(project)
    until(project / "begun")
    os.killpg(first.pid, number)
    first.communicate(timeout=30)
    assert not (project / "out.txt").exists()
    (project / "go").touch()
    again = start(project)
    output, _ = again.communicate(timeout=60)
    assert again.returncode == 0, output.decode()
    assert (project / "out.txt").read_text() == "done"
    held(
        f"{number.name} to all of `dvc repro`",
        lost="what the running stage had not saved",
        saw="the run ends; nothing is written into dvc.lock",
        rerun="the stale lock is taken over, the stage runs again (a training goes on from its checkpoint)",
    )


def test_two_pipelines_on_one_workspace_do_not_run_one_stage_twice(project: Path) -> None:
    first = start(project)
    until(project / "begun")
    second = start(project)
    output, _ = second.communicate(timeout=60)
    assert second.returncode != 0
    assert "is busy" in output.decode()
    (project / "go").touch()
    assert first.communicate(timeout=60) and first.returncode == 0
    third = start(project)
    output, _ = third.communicate(timeout=60)
    assert third.returncode == 0
    assert "didn't change" in output.decode()
    held(
        "two pipelines on one workspace",
        lost="nothing",
        saw="the second is refused with the name of what is busy and who holds it",
        rerun="finds the stage done and runs nothing",
    )


def test_a_clock_that_jumps_makes_nothing_stale(project: Path) -> None:
    (project / "go").touch()
    assert start(project).communicate(timeout=60)
    for name, years in (("out.txt", -3), ("slow.py", 3)):
        moved = time.time() + years * 365 * 86400
        os.utime(project / name, (moved, moved))
    output, _ = start(project).communicate(timeout=60)
    assert "didn't change" in output.decode()
    held(
        "the clock jumps by years",
        lost="nothing",
        saw="nothing: what decides is the content's hash",
        rerun="runs nothing",
    )
