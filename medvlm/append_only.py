"""Files of JSON lines that only ever grow: what was confirmed stays, whoever writes at once, whoever is killed."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from medvlm.errors import WorkspaceError

__all__ = ["append_line", "read_lines"]


def append_line(path: Path, row: Mapping[str, Any], what: str) -> None:
    """Write one line; it is on the disk when this returns. Any number of processes may append at once.

    Args:
        path: Created with its folder by the first line.
        row: JSON values.
        what: Named where it fails, such as ``the decision``.

    Raises:
        WorkspaceError: It could not be written; the file is as it was.
    """
    line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            _append(descriptor, line)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise WorkspaceError(
            f"{what} was not saved: {error.strerror}",
            where=str(path),
            hint="free some space or fix the permissions, then do it again",
        ) from error


def read_lines(path: Path) -> Iterator[tuple[bytes, str]]:
    """Each whole line and where it stands; one that a killed writer left half is none."""
    if not path.exists():
        return
    data = path.read_bytes()
    for number, line in enumerate(data[: data.rfind(b"\n") + 1].splitlines(), 1):
        yield line, f"{path}, line {number}"


def _append(descriptor: int, line: bytes) -> None:
    """Under the lock: cut off what a killed writer left half, write, sync; on failure restore."""
    end = _last_line_end(descriptor)
    os.ftruncate(descriptor, end)
    try:
        view = memoryview(line)
        while view:
            view = view[os.pwrite(descriptor, view, end + len(line) - len(view)) :]
        os.fsync(descriptor)
    except OSError:
        os.ftruncate(descriptor, end)
        raise


def _last_line_end(descriptor: int) -> int:
    """The place after the last line break: all before it was confirmed."""
    end = os.fstat(descriptor).st_size
    while end > 0:
        start = max(0, end - 65536)
        place = os.pread(descriptor, end - start, start).rfind(b"\n")
        if place >= 0:
            return start + place + 1
        end = start
    return 0
