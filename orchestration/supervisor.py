"""Runs one command and makes sure that nothing of it outlives Dagster.

    python -m orchestration.supervisor [--with PID] -- COMMAND ARGS…

torch's elastic agent starts ranks in sessions of their own, so killing a process group is not
enough, and a killed parent tells nobody. This process therefore
- asks the kernel for SIGTERM when its parent dies, even by ``kill -9`` (PR_SET_PDEATHSIG);
- ends with the process named by ``--with`` too: a run worker whose step has a process of its own;
- adopts every orphaned descendant (PR_SET_CHILD_SUBREAPER), so that all stay within reach;
- on the first signal ends them in three steps, SIGINT, SIGTERM, SIGKILL, with time between the
  steps for a trainer to write its checkpoint.

It exits as the command does: its code, 128 + n where signal n ended it, 130 where it was told to
stop. The guard needs Linux; elsewhere the command runs without it, and a line says so.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time

import psutil

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36

STEPS = ((signal.SIGINT, 6.0), (signal.SIGTERM, 5.0), (signal.SIGKILL, 2.0))
"""Signals and the seconds each may take: 13 in all, under the 15 that a user is promised."""


def main() -> None:
    """Guard the command after ``--`` and exit as it does."""
    own, command = sys.argv[1 : sys.argv.index("--")], sys.argv[sys.argv.index("--") + 1 :]
    sys.exit(supervise(command, int(own[1]) if own[:1] == ["--with"] else None))


def supervise(command: list[str], companion: int | None = None) -> int:
    """Run a command to its end, or end all of it when told to.

    Args:
        command: Program and arguments; never given to a shell.
        companion: Id of a process that the command shall not outlive.

    Returns:
        The exit code for a caller.
    """
    parent = os.getppid()
    told: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, frame: told.append(received))
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            return 130  # the parent died before the kernel was asked to tell us
    else:
        print("supervisor: not Linux, so a killed parent leaves this command running", file=sys.stderr)  # noqa: T201
    watched = _process(companion) if companion else None
    if companion and not watched:
        return 130
    child = subprocess.Popen(command)
    while not told:
        if watched and not _lives(watched):
            told.append(signal.SIGTERM)
            break
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=0.2)
            break
    # After a good end too: what the command left behind belongs to nobody.
    end_descendants(child)
    if told:
        return 130
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def end_descendants(child: subprocess.Popen[bytes]) -> None:
    """End every process below this one, gently first, and collect them.

    Args:
        child: The direct child, whose return code stays readable afterwards.
    """
    for number, patience_s in STEPS:
        deadline = time.monotonic() + patience_s
        signalled: set[int] = set()
        while alive := _descendants():
            if time.monotonic() > deadline:
                break
            # Newly adopted orphans get the signal too, each process once a step.
            for process in alive:
                if process.pid not in signalled:
                    signalled.add(process.pid)
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.send_signal(number)
            time.sleep(0.05)
            child.poll()


def _process(pid: int) -> psutil.Process | None:
    try:
        return psutil.Process(pid)
    except psutil.NoSuchProcess:
        return None


def _lives(process: psutil.Process) -> bool:
    """Not gone, nor its id given to another, nor only waiting to be collected."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _descendants() -> list[psutil.Process]:
    """Living processes below this one; adopted ones that have ended are collected on the way."""
    alive: list[psutil.Process] = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                alive.append(process)
    return alive


if __name__ == "__main__":
    main()
