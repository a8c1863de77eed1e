"""Where a training job's processes run: on this host, on the hosts of a file (ssh), or in a Slurm job.

Each launcher starts the same ``python -m medvlm.training.run`` over a workspace that all hosts share. Kubernetes is
not here: there the orchestrator starts one pod, and the job in it is a local one.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from medvlm.errors import TrainingError
from medvlm.store import atomic_path

__all__ = ["MODULE", "Cluster", "SlurmJob", "cluster_of_environment", "hostfile_command", "slurm_script"]

Launcher = Literal["local", "hostfile", "slurm"]
MODULE = "medvlm.training.run"
POLL_S = 1.0
END_S = 30.0
"""How long a cancelled Slurm job may take to save and end before it is killed."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """What the environment says about where to train."""

    launcher: Launcher
    hostfile: str
    """DeepSpeed's: one ``host slots=N`` a line."""
    nodes: int
    """Of a Slurm job."""
    processes: int
    """On each node of a Slurm job: one for each GPU."""
    options: tuple[str, ...]
    """Further ``sbatch`` options, such as ``--partition=gpu --gres=gpu:8 --time=12:00:00``."""
    port: int
    """Where the first host listens for the others."""


def cluster_of_environment(environment: Mapping[str, str] | None = None) -> Cluster:
    """The cluster of ``MEDVLM_LAUNCHER`` and its companions; this host where nothing is set.

    Args:
        environment: ``MEDVLM_LAUNCHER`` (local, hostfile or slurm), ``MEDVLM_HOSTFILE``, ``MEDVLM_NODES``,
            ``MEDVLM_PROCESSES_PER_NODE``, ``MEDVLM_SLURM_OPTIONS``, ``MEDVLM_PORT``.

    Raises:
        TrainingError: A value is none of those allowed.
    """
    values = os.environ if environment is None else environment
    launcher: Any = values.get("MEDVLM_LAUNCHER") or "local"
    if launcher not in get_args(Launcher):
        raise TrainingError(
            f"there is no launcher {launcher!r}",
            where="MEDVLM_LAUNCHER",
            hint=f"choose from {', '.join(get_args(Launcher))}",
        )
    hostfile = values.get("MEDVLM_HOSTFILE", "")
    if launcher == "hostfile" and not Path(hostfile).is_file():
        raise TrainingError(
            "the launcher 'hostfile' needs a file of hosts",
            where=f"MEDVLM_HOSTFILE={hostfile}",
            hint="write one 'host slots=N' a line into a file and name it there",
        )
    return Cluster(
        launcher=launcher,
        hostfile=hostfile,
        nodes=_whole(values, "MEDVLM_NODES", 1),
        processes=_whole(values, "MEDVLM_PROCESSES_PER_NODE", 1),
        options=tuple(shlex.split(values.get("MEDVLM_SLURM_OPTIONS", ""))),
        port=_whole(values, "MEDVLM_PORT", 29500),
    )


def _whole(values: Mapping[str, str], name: str, default: int) -> int:
    text = values.get(name) or str(default)
    if not text.isdigit() or int(text) < 1:
        raise TrainingError(f"{text!r} is no number of at least 1", where=name, hint="write a number such as 2")
    return int(text)


def hostfile_command(cluster: Cluster, arguments: Sequence[str]) -> list[str]:
    """The command that starts a job on every host of a hostfile, through DeepSpeed's launcher and ssh.

    Args:
        cluster: With its hostfile.
        arguments: Of ``medvlm.training.run``.

    Raises:
        TrainingError: ``pdsh``, which DeepSpeed's launcher uses, is not installed.
    """
    if shutil.which("pdsh") is None:
        raise TrainingError("pdsh is not installed", where="PATH", hint="install it on this host: apt-get install pdsh")
    return [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        f"--hostfile={cluster.hostfile}",
        "--force_multi",
        "--launcher=pdsh",
        f"--master_port={cluster.port}",
        "--log_level=error",
        "--module",
        MODULE,
        *arguments,
    ]


def slurm_script(cluster: Cluster, name: str, folder: Path, arguments: Sequence[str]) -> str:
    """The batch script of a job: one launcher a node, which meet at the first node.

    Secrets are not in it: Slurm passes the environment of the submitting process on (``--export=ALL``).

    Args:
        cluster: Nodes, processes and further options.
        name: Of the job, shown by ``squeue``.
        folder: Gets ``log`` and ``exit_code``; on the disk that all nodes share.
        arguments: Of ``medvlm.training.run``.
    """
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes=$SLURM_JOB_NUM_NODES",
        f"--nproc-per-node={cluster.processes}",
        "--rdzv-backend=c10d",
        "--rdzv-id=$SLURM_JOB_ID",
        f"--rdzv-endpoint=$first:{cluster.port}",
        "-m",
        MODULE,
    ]
    # The launcher's own words hold shell variables; everything that came from outside is quoted.
    words = [*launch, *map(shlex.quote, arguments)]
    directives = [
        f"--job-name={name}",
        f"--nodes={cluster.nodes}",
        "--ntasks-per-node=1",
        f"--output={folder / 'log'}",
        "--open-mode=append",
        "--export=ALL",
        *cluster.options,
    ]
    return "\n".join(
        (
            "#!/bin/bash",
            *(f"#SBATCH {directive}" for directive in directives),
            'first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            # A node's name need not be known to the name server; its address is what Slurm itself uses.
            "first=$(scontrol show node \"$first\" | grep -o 'NodeAddr=[^ ]*' | cut -d = -f 2)",
            f"cd {shlex.quote(str(Path.cwd()))}",
            f"srun --kill-on-bad-exit=1 {' '.join(words)} &",
            "# A cancelled job passes the signal on and waits until the trainer has saved.",
            "trap 'scancel --signal=TERM \"$SLURM_JOB_ID.0\"' TERM INT",
            "wait $!; code=$?",
            "while kill -0 $! 2>/dev/null; do wait $!; code=$?; done",
            f"echo $code > {shlex.quote(str(folder / 'exit_code'))}",
            "exit $code",
            "",
        )
    )


class SlurmJob:
    """One submitted job: its log is passed on as it grows; a signal to this process cancels it.

    Args:
        folder: Script, log and exit code lie here, on the disk that all nodes share.
        script: As ``slurm_script`` gives it.
    """

    def __init__(self, folder: Path, script: str) -> None:
        self._folder = folder
        self._stopping = 0.0
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("log", "exit_code"):
            (folder / name).unlink(missing_ok=True)
        with atomic_path(folder / "job.sh") as temporary:
            temporary.write_text(script, "utf-8")
        self.job_id = _slurm("sbatch", "--parsable", str(folder / "job.sh")).split(";")[0].strip()

    def wait(self) -> int:
        """The exit code, once the job has ended.

        Raises:
            TrainingError: It ended without a word, such as when its node died.
        """
        seen = 0
        with self._cancelled_with_us():
            while self._state():
                seen = self._pass_on(seen)
                if self._stopping and time.monotonic() > self._stopping:
                    _slurm("scancel", self.job_id)
                time.sleep(POLL_S)
        self._pass_on(seen)
        code = self._folder / "exit_code"
        if not code.is_file():
            raise TrainingError(
                f"the Slurm job {self.job_id} ended without an exit code: cancelled, out of time, or its node died",
                where=str(self._folder / "log"),
                hint="read the log; the same command goes on from the last checkpoint",
            )
        return int(code.read_text("utf-8"))

    def cancel(self) -> None:
        """Ask the job to save and end; it is killed where that takes too long."""
        if not self._stopping:
            self._stopping = time.monotonic() + END_S
            _slurm("scancel", "--batch", "--signal=TERM", self.job_id)

    @contextmanager
    def _cancelled_with_us(self) -> Generator[None]:
        def cancel(number: int, frame: object) -> None:
            self.cancel()

        before = {number: signal.signal(number, cancel) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _state(self) -> str:
        """``PENDING``, ``RUNNING`` …; empty once the job has left the queue."""
        # A controller that restarts is away for a moment: its silence is not the job's end.
        answer = subprocess.run(
            ["squeue", "--noheader", "--job", self.job_id, "--format=%T"], capture_output=True, text=True, check=False
        )
        if answer.returncode and "Invalid job id" not in answer.stderr:
            return "UNKNOWN"
        return answer.stdout.strip()

    def _pass_on(self, seen: int) -> int:
        log = self._folder / "log"
        if not log.is_file():
            return seen
        with log.open("rb") as stream:
            stream.seek(seen)
            text = stream.read()
        sys.stderr.write(text.decode("utf-8", "replace"))
        sys.stderr.flush()
        return seen + len(text)


def _slurm(*command: str) -> str:
    """Output of one of Slurm's commands.

    Raises:
        TrainingError: Slurm is not installed here, or refuses.
    """
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except FileNotFoundError as error:
        raise TrainingError(
            f"{command[0]} is not installed", where="PATH", hint="run this where Slurm's commands are"
        ) from error
    except subprocess.CalledProcessError as error:
        raise TrainingError(
            f"Slurm refused: {error.stderr.strip()}",
            where=" ".join(command),
            hint="check MEDVLM_SLURM_OPTIONS and the queue",
        ) from error
