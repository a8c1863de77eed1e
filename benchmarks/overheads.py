"""What the machinery around the work costs: loading the code location, a `dvc repro` of nothing, start-ups, `--help`.

    python benchmarks/overheads.py

Each number is the median of several runs in fresh processes. Exits 1 where a target is missed.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

REPOSITORY = Path(__file__).resolve().parents[1]
TRAINING_STARTED = """
import os, sys, time
def listen(event):
    if "step" not in event:
        return  # of the feature cache
    print(f"STARTED {time.monotonic() - float(os.environ['MEDVLM_BENCH_BEGAN'])}", flush=True)
    os._exit(0)
"""
"""A progress listener that says when the first step is done, and ends the process."""
EMPTY = "import sys"


def seconds_of(command: list[str], folder: Path, **environment: str) -> float:
    """Seconds of a command that succeeds."""
    began = time.monotonic()
    subprocess.run(command, cwd=folder, env=_environment(**environment), check=True, capture_output=True)
    return time.monotonic() - began


def _environment(**more: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests"), str(REPOSITORY / "tests" / "training")])
    return {**os.environ, "PATH": path, "PYTHONPATH": paths, "DVC_NO_ANALYTICS": "1", **more}


def definitions(folder: Path) -> float:
    """Seconds to load the code location, the interpreter's own start taken off."""
    load = "from orchestration.definitions import defs; defs.get_repository_def().load_all_definitions()"
    loaded = seconds_of([sys.executable, "-c", load], folder)
    return loaded - seconds_of([sys.executable, "-c", EMPTY], folder)


def empty_repro(folder: Path) -> float:
    """Seconds of `dvc repro` with nothing to do, over the stages that a part of the road has."""
    return seconds_of([sys.executable, "-m", "dvc", "repro", "benchmark@vqa-rad", "figures"], folder)


def help_text(folder: Path) -> float:
    """Seconds of `medvlm --help`."""
    return seconds_of([sys.executable, "-m", "medvlm.cli", "--help"], folder)


def training_start(folder: Path) -> float:
    """Seconds from the start of `medvlm train` to the end of its first step, of a twin of a few thousand weights."""
    from golden_case import fill_golden, golden_overrides

    from medvlm.config import load_recipe
    from medvlm.store import Workspace

    name = "tiny-llava-med"
    overrides = golden_overrides(name)
    root = Path(tempfile.mkdtemp(dir=folder))
    fill_golden(Workspace(root), load_recipe(name, overrides))
    # Beside the workspace, whose datasets/ would pass for a library of that name.
    listener = Path(tempfile.mkdtemp(dir=folder))
    (listener / "started.py").write_text(TRAINING_STARTED)
    command = [sys.executable, "-m", "medvlm.cli", "--workspace", str(root), "train", "--recipe", name, "--stage", "1"]
    command += [part for text in overrides for part in ("--set", text)]
    told = _environment(MEDVLM_PROGRESS="started:listen", MEDVLM_BENCH_BEGAN=str(time.monotonic()))
    told["PYTHONPATH"] += os.pathsep + str(listener)
    done = subprocess.run(command, cwd=folder, env=told, capture_output=True, text=True, check=True)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("STARTED")]
    return float(line.split()[1])


MEASURED = (
    ("load the Dagster code location", definitions, 3.0),
    ("`dvc repro` with nothing to do", empty_repro, 5.0),
    ("start of a training process to its first step", training_start, 15.0),
    ("`medvlm --help`", help_text, 0.5),
)


@click.command()
@click.option("--trials", default=5, show_default=True, help="Runs of each.")
def main(trials: int) -> None:
    """Print the table, and exit 1 where a target is missed."""
    sys.path[:0] = [str(REPOSITORY / "tests"), str(REPOSITORY / "tests" / "training")]
    from projects import copy_project

    missed = False
    with tempfile.TemporaryDirectory() as made:
        folder = copy_project(Path(made) / "project")
        subprocess.run(
            [sys.executable, "-m", "dvc", "repro", "benchmark@vqa-rad", "figures"],
            cwd=folder, env=_environment(), check=True, capture_output=True,
        )  # fmt: skip
        print("| what | median | least | greatest | target |\n| --- | --- | --- | --- | --- |")
        for what, measure, target in MEASURED:
            found = sorted(measure(folder) for _ in range(trials))
            median = statistics.median(found)
            missed |= median > target
            print(f"| {what} | {median:.2f} s | {found[0]:.2f} s | {found[-1]:.2f} s | {target:g} s |", flush=True)
    print(f"load of the machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors")
    sys.exit(missed)


if __name__ == "__main__":
    main()
