"""What a killed writer leaves is cleared by the next one, and never what a living one is writing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from medvlm.atomic import atomic_folder, atomic_path

WRITE = """
import sys, time
from pathlib import Path
from medvlm.atomic import {kind}
with {kind}(Path(sys.argv[1])) as temporary:
    ({target}).write_text("half")
    print("writing", flush=True)
    sys.stdin.read()
"""
KINDS = [("atomic_folder", 'temporary / "a"'), ("atomic_path", "temporary")]


def writer(path: Path, kind: str, target: str) -> subprocess.Popen[str]:
    """A process in the middle of writing ``path``."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITE.format(kind=kind, target=target), str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    return process


def killed(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def write(path: Path, kind: str) -> None:
    if kind == "atomic_path":
        with atomic_path(path) as temporary:
            temporary.write_text("whole")
    else:
        with atomic_folder(path) as temporary:
            (temporary / "a").write_text("whole")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("kind", "target"), KINDS)
def test_what_a_killed_writer_left_goes_and_a_living_one_goes_on(tmp_path: Path, kind: str, target: str) -> None:
    dead = writer(tmp_path / "out", kind, target)
    killed(dead)
    (half,) = names(tmp_path)
    assert half.startswith(".tmp-")
    living = writer(tmp_path / "out", kind, target)
    assert half not in names(tmp_path)
    write(tmp_path / "out", kind)
    assert len(names(tmp_path)) == 2
    living.communicate("")
    assert living.returncode == 0
    assert names(tmp_path) == ["out"]
    assert ((tmp_path / "out") if kind == "atomic_path" else (tmp_path / "out" / "a")).read_text() == "half"


def test_only_what_was_left_of_the_same_target_goes(tmp_path: Path) -> None:
    other = ".tmp-" + "0" * 32 + "-other"
    (tmp_path / other).mkdir()
    (tmp_path / ".tmp-mine-out").mkdir()
    write(tmp_path / "out", "atomic_folder")
    assert names(tmp_path) == [other, ".tmp-mine-out", "out"]


def test_old_content_comes_back_where_its_writer_died_between_two_names(tmp_path: Path) -> None:
    write(tmp_path / "out", "atomic_folder")
    (tmp_path / "out").rename(tmp_path / (".old-" + "1" * 32 + "-out"))

    def fails() -> None:
        with atomic_folder(tmp_path / "out"):
            raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        fails()
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "a").read_text() == "whole"
    (tmp_path / (".old-" + "2" * 32 + "-out")).mkdir()
    write(tmp_path / "out", "atomic_folder")
    assert names(tmp_path) == ["out"]


def test_where_there_are_no_locks_nothing_is_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(os.strerror(37))

    monkeypatch.setattr("medvlm.atomic.fcntl.flock", no_locks)
    left = tmp_path / (".tmp-" + "4" * 32 + "-out")
    left.mkdir()
    write(tmp_path / "out", "atomic_folder")
    assert left.exists() and (tmp_path / "out").exists()
