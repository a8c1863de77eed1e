"""A project folder of its own for tests that walk the pipeline: a copy of what git tracks."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


def copy_project(folder: Path) -> Path:
    """Copy what git tracks, and make it a git repository, as DVC wants one."""
    names = subprocess.run(
        ["git", "ls-files", "-z"], cwd=REPOSITORY, check=True, capture_output=True, text=True
    ).stdout.split("\0")
    for name in filter(None, names):
        source = REPOSITORY / name
        if source.is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, folder / name)
    subprocess.run(["git", "init", "-q", str(folder)], check=True)
    return folder
