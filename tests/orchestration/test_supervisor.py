"""Nothing outlives the supervisor: not on a cancel, not when its parent is killed, not in another session."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from failures.reliability import held

from orchestration.supervisor import STEPS

# A command like a distributed trainer: a child in its own session, with a grandchild that, if told
# to be stubborn, ignores SIGINT and SIGTERM. Each writes its pid, so that the test knows whom to look for.
TREE = """
import os, signal, subprocess, sys, time
from pathlib import Path
folder, depth = Path(sys.argv[1]), int(sys.argv[2])
stubborn = len(sys.argv) > 3
if depth == 0 and stubborn:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if depth > 0:
    subprocess.Popen([sys.executable, __file__, str(folder), str(depth - 1), *sys.argv[3:]], start_new_session=True)
(folder / f"pid{depth}").write_text(str(os.getpid()))
time.sleep(600)
"""


def wait_for(condition: object, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def pids(folder: Path) -> list[int]:
    return [int(p.read_text() or 0) for p in folder.glob("pid*")]


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.fixture
def tree(tmp_path: Path) -> list[str]:
    script = tmp_path / "tree.py"
    script.write_text(TREE)
    return [sys.executable, "-m", "orchestration.supervisor", "--", sys.executable, str(script), str(tmp_path), "2"]


def test_a_cancel_ends_the_whole_tree(tree: list[str], tmp_path: Path) -> None:
    process = subprocess.Popen([*tree, "stubborn"])
    wait_for(lambda: len(pids(tmp_path)) == 3 and all(pids(tmp_path)))
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(15) == 130
    assert time.monotonic() - began < sum(seconds for _, seconds in STEPS) + 2
    assert not any(alive(pid) for pid in pids(tmp_path))


def test_a_killed_parent_takes_the_whole_tree_with_it(tree: list[str], tmp_path: Path) -> None:
    # The parent stands for Dagster's run worker; kill -9 gives it no chance to tell anybody.
    launcher = tmp_path / "launcher.py"
    launcher.write_text(f"import subprocess\nsubprocess.run({tree!r})\n")
    parent = subprocess.Popen([sys.executable, str(launcher)])
    wait_for(lambda: len(pids(tmp_path)) == 3 and all(pids(tmp_path)))
    parent.kill()
    parent.wait()
    wait_for(lambda: not any(alive(pid) for pid in pids(tmp_path)), 15.0)
    held(
        "kill -9 of what started a command (Dagster's run worker, DVC, a shell)",
        lost="what the command had not saved",
        saw="every process of it has ended within 15 s, also those in sessions of their own",
        rerun="starts beside nothing",
    )


def test_a_killed_companion_takes_the_whole_tree_with_it(tree: list[str], tmp_path: Path) -> None:
    # The run worker, where Dagster gives the step a process of its own that outlives it.
    companion = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    at = tree.index("--")
    process = subprocess.Popen([*tree[:at], "--with", str(companion.pid), *tree[at:]])
    wait_for(lambda: len(pids(tmp_path)) == 3 and all(pids(tmp_path)))
    companion.kill()
    assert process.wait(15) == 130
    assert not any(alive(pid) for pid in pids(tmp_path))
    companion.wait()


def test_what_a_finished_command_left_behind_is_ended_too(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, pathlib;"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True);"
        f"pathlib.Path({str(tmp_path / 'pid0')!r}).write_text(str(p.pid))"
    )
    done = subprocess.run([sys.executable, "-m", "orchestration.supervisor", "--", sys.executable, "-c", code])
    assert done.returncode == 0
    assert not any(alive(pid) for pid in pids(tmp_path))


@pytest.mark.parametrize(
    ("code", "expected"), [("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 137)]
)
def test_the_exit_code_is_the_commands(code: str, expected: int) -> None:
    command = [sys.executable, "-m", "orchestration.supervisor", "--", sys.executable, "-c", code]
    assert subprocess.run(command, env={**os.environ}).returncode == expected
