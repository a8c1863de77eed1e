"""Starts a training stage: in this process, as several through DeepSpeed's launcher, or on a cluster."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from medvlm.config import load_recipe
from medvlm.errors import TrainingError
from medvlm.store import Report, Workspace, read_report
from medvlm.training.cluster import MODULE, SlurmJob, cluster_of_environment, hostfile_command, slurm_script
from medvlm.training.engine import free_port
from medvlm.training.run import run_stage

__all__ = ["gpu_count", "launch_stage", "wait_for"]

_PASSED_ON = ("MEDVLM_", "DAGSTER_PIPES_", "PYTHON", "OMP_", "GLOO_", "NCCL_", "DS_ACCELERATOR")


def launch_stage(
    workspace: Workspace,
    recipe: str,
    stage: str,
    *,
    overrides: Sequence[str] = (),
    processes: int | None = None,
    fresh: bool = False,
) -> Report:
    """Train one stage of a recipe, where ``MEDVLM_LAUNCHER`` says: on this machine if nothing does.

    Args:
        workspace: Gives samples and start, gets checkpoints and ``report.json``.
        recipe: A name or a YAML file.
        stage: Its number or its name.
        overrides: ``a.b=value`` each.
        processes: One for each GPU, or as many as wanted on the CPU. None: all GPUs, or one process.
        fresh: Begin anew.

    Returns:
        The stage's report.

    Raises:
        RecipeError: The recipe or the stage does not exist, or does not validate.
        TrainingError: The job failed; with several processes, its own message stands above.
    """
    loaded = load_recipe(recipe, overrides)
    number, _ = loaded.stage(stage)
    cluster = cluster_of_environment()
    options = [f"--set={text}" for text in overrides] + (["--fresh"] if fresh else [])
    root = workspace.root.resolve() if cluster.launcher != "local" else workspace.root
    arguments = [f"--workspace={root}", f"--recipe={recipe}", f"--stage={number}", *options]
    if cluster.launcher == "slurm":
        folder = root / "scratch" / "slurm" / loaded.name / f"stage{number}"
        name = f"medvlm-{loaded.name}-stage{number}"
        _refuse(SlurmJob(folder, slurm_script(cluster, name, folder, arguments)).wait(), f"Slurm job {name}")
    elif cluster.launcher == "hostfile":
        _run_launcher(hostfile_command(cluster, arguments))
    else:
        count = gpu_count() or 1 if processes is None else processes
        if count == 1:
            return run_stage(workspace, loaded, number, fresh=fresh)
        _run_launcher(_local_command(count, arguments))
    report = read_report(workspace.stage(loaded.name, number))
    if report is None:
        raise TrainingError("the job ended without a report", where=str(workspace.root), hint="read its output above")
    return report


def gpu_count() -> int:
    """GPUs of this machine."""
    # Importing torch takes seconds that a machine without the driver need not spend.
    if not Path("/proc/driver/nvidia").exists():
        return 0
    import torch

    return torch.cuda.device_count()


def _local_command(count: int, arguments: Sequence[str]) -> list[str]:
    """DeepSpeed's launcher over ``count`` processes of this host."""
    return [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        f"--num_gpus={count}",
        f"--master_port={free_port()}",
        "--log_level=error",
        "--module",
        MODULE,
        *arguments,
    ]


def _run_launcher(command: Sequence[str]) -> None:
    """Run DeepSpeed's launcher and wait; signals go to the job.

    Raises:
        TrainingError: It ended with another code than 0.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise TrainingError("deepspeed is not installed", where="environment", hint="install medvlm's dependencies")
    environment = dict(os.environ)
    if not gpu_count():
        environment["DS_ACCELERATOR"] = "cpu"
    # More than one host: the launcher exports only what this file names.
    exported = {name: value for name, value in environment.items() if name.startswith(_PASSED_ON)}
    environment["DS_ENV_FILE"] = str(_environment_file(exported))
    try:
        with subprocess.Popen(command, env=environment, stdout=sys.stderr) as job:
            code = wait_for(job)
    finally:
        Path(environment["DS_ENV_FILE"]).unlink(missing_ok=True)
    _refuse(code, " ".join(command))


def _refuse(code: int, where: str) -> None:
    if code:
        raise TrainingError(
            f"a process of the job ended with code {code}",
            where=where,
            hint="read its message above; what was saved is kept, the same command goes on from it",
        )


def _environment_file(variables: dict[str, str]) -> Path:
    import tempfile

    # May hold an orchestrator's session: for this user only (mkstemp makes it so).
    handle, name = tempfile.mkstemp(prefix="medvlm-", suffix=".deepspeed_env")
    with os.fdopen(handle, "w") as stream:
        stream.writelines(f"{key}={value}\n" for key, value in sorted(variables.items()) if "\n" not in value)
    return Path(name)


def wait_for(job: subprocess.Popen[bytes]) -> int:
    """The exit code of a job, once it ends; SIGTERM and SIGINT go to the job."""

    def pass_on(number: int, frame: object) -> None:
        job.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return job.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
