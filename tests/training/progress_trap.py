"""A training that ends itself at a step: a progress listener that kills its own process, as an orchestrator would."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medvlm.store import Workspace


def listen(event: Mapping[str, Any]) -> None:
    step, name = os.environ["MEDVLM_TEST_TRAP"].split(":")
    if event.get("step", 0) >= int(step):  # filling the feature cache reports images, not steps
        os.kill(os.getpid(), getattr(signal, name))


def train_by_verb(
    workspace: Workspace, recipe: str, stage: str, overrides: Sequence[str], *, trap: str = "", processes: int = 1
) -> subprocess.CompletedProcess[str]:
    """`medvlm train` as a process of its own; its first process gets a signal where ``trap`` says, as ``3:SIGTERM``."""
    command = [sys.executable, "-m", "medvlm.cli", "--workspace", str(workspace.root), "train"]
    command += ["--recipe", recipe, "--stage", stage, "--processes", str(processes)]
    command += [part for text in overrides for part in ("--set", text)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    if trap:
        environment |= {
            "MEDVLM_PROGRESS": "progress_trap:listen",
            "MEDVLM_PROGRESS_EVERY_S": "0",  # a fast machine is through before the next half second
            "MEDVLM_TEST_TRAP": trap,
        }
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
