"""A real Slurm of Debian's packages: controller and two nodes on this machine, with a key and folders of its own."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "scontrol")

CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}
SlurmctldPort={controller}
SlurmctldAddr=127.0.0.1
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
MpiDefault=none
ReturnToService=2
InactiveLimit=0
KillWait=10
SchedulerParameters=sched_interval=1
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
"""


@dataclass(frozen=True)
class SlurmCluster:
    """Two nodes that both resolve to this machine."""

    folder: Path
    environment: dict[str, str]

    def command(self, *words: str) -> str:
        done = subprocess.run(words, env={**os.environ, **self.environment}, capture_output=True, text=True, check=True)
        return done.stdout.strip()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def running_slurm(folder: Path) -> Iterator[SlurmCluster]:
    """Start munge, the controller and both nodes; end them all afterwards."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"Slurm needs root and Debian's slurmctld, slurmd, slurm-client, munge; missing: {missing}")
    names = ("n1", "n2")
    nodes = "\n".join(f"NodeName={name} NodeAddr=127.0.0.1 Port={free_port()} CPUs=2 State=UNKNOWN" for name in names)
    for part in ("state", *(f"spool.{name}" for name in names)):
        (folder / part).mkdir()
    text = CONFIGURATION.format(host=socket.gethostname(), controller=free_port(), folder=folder, nodes=nodes)
    (folder / "slurm.conf").write_text(text)
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    environment = {"SLURM_CONF": str(folder / "slurm.conf")}
    with ExitStack() as running:
        _start(running, folder, environment, "munged", *_munge(folder))
        _until((folder / "munge.socket").exists, "munge's socket")
        _start(running, folder, environment, "slurmctld", "-D")
        for name in names:
            _start(running, folder, environment, f"slurmd-{name}", "slurmd", "-D", "-N", name)
        cluster = SlurmCluster(folder, environment)
        _until(lambda: cluster.command("sinfo", "--noheader", "--format=%T").splitlines() == ["idle"], "idle nodes")
        yield cluster


def _munge(folder: Path) -> list[str]:
    options = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    return ["--foreground", "--force", *(f"--{name}={folder}/munge.{end}" for name, end in options.items())]


def _start(running: ExitStack, folder: Path, environment: dict[str, str], name: str, *words: str) -> None:
    command = [*([name] if not name.startswith("slurmd-") else []), *words]
    log = running.enter_context((folder / f"{name}.log").open("wb"))
    process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=log, stderr=log)

    def end() -> None:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    running.callback(end)


def _until(true: object, what: str) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            if true():  # type: ignore[operator]
                return
        except subprocess.CalledProcessError:
            pass
        assert time.monotonic() < deadline, f"no {what}"
        time.sleep(0.1)
