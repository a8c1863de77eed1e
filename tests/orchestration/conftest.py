"""A project folder of its own for tests that reproduce DVC stages: a copy of the tracked files."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


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


@pytest.fixture
def project_folder(tmp_path: Path) -> Path:
    return copy_project(tmp_path / "project")
