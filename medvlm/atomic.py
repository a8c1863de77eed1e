"""Files and folders that take their place whole or not at all, and what dead writers left is cleared away."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from medvlm.errors import WorkspaceError

__all__ = ["atomic_folder", "atomic_path", "workspace_errors"]

_LEFT = re.compile(r"\.(tmp|old)-[0-9a-f]{32}-(.+)")


@contextmanager
def workspace_errors(path: Path) -> Generator[None]:
    """Turn the operating system's refusals into an error that names the next step."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free_mb = shutil.disk_usage(_existing_parent(path)).free // 2**20
            raise WorkspaceError(
                f"the disk is full: {free_mb} MB are free",
                where=str(path),
                hint="free some space, or choose another disk with --workspace; then run the same command again",
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise WorkspaceError(
                f"the workspace cannot be written: {error.strerror}",
                where=str(path),
                hint="fix its permissions, or choose another folder with --workspace",
            ) from error
        raise


def _existing_parent(path: Path) -> Path:
    return next(p for p in (path, *path.resolve().parents) if p.exists())


@contextmanager
def atomic_path(path: Path) -> Generator[Path]:
    """A temporary file beside ``path`` that takes its place when the block ends well.

    A killed process leaves at most a ``.tmp-`` file, which no reader looks at and the next writer of ``path`` removes.

    Raises:
        WorkspaceError: The disk is full or read-only.
    """
    with workspace_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear_left(path)
        temporary, held = _begin(path, Path.touch)
        try:
            yield temporary
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
            os.close(held)


@contextmanager
def atomic_folder(path: Path) -> Generator[Path]:
    """A temporary folder beside ``path`` that takes its place, whole, when the block ends well.

    A killed process leaves at most a ``.tmp-`` folder, which the next writer of ``path`` removes, or an ``.old-``
    one, which it removes or, where nothing came in its place, puts back.

    Raises:
        WorkspaceError: The disk is full or read-only.
    """
    with workspace_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear_left(path)
        temporary, held = _begin(path, Path.mkdir)
        old = temporary.with_name(temporary.name.replace(".tmp-", ".old-", 1))
        try:
            yield temporary
            if path.exists():
                with _held(path):
                    path.replace(old)
                    temporary.replace(path)
            else:
                temporary.replace(path)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            os.close(held)


def _begin(path: Path, create: Callable[[Path], None]) -> tuple[Path, int]:
    """A new temporary file or folder beside ``path``, and a descriptor that holds its lock.

    By the lock others see that its writer lives; the kernel ends it with the process.
    """
    while True:
        temporary = path.with_name(f".tmp-{uuid.uuid4().hex}-{path.name}")
        create(temporary)
        try:
            descriptor = _locked(temporary, fcntl.LOCK_EX)
        except FileNotFoundError:
            continue
        # Another writer may have cleared it away before it was locked.
        if temporary.exists():
            return temporary, descriptor
        os.close(descriptor)


def _locked(path: Path, operation: int) -> int:
    """A descriptor that holds a lock, which follows the inode through renames; none where there are no locks."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    with suppress(OSError):
        fcntl.flock(descriptor, operation)
    return descriptor


@contextmanager
def _held(path: Path) -> Generator[None]:
    descriptor = _locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        yield
    finally:
        os.close(descriptor)


def _clear_left(path: Path) -> None:
    """Remove what processes that died while they wrote ``path`` left beside it."""
    left: list[Path] = []
    for found in os.scandir(path.parent):
        match = _LEFT.fullmatch(found.name)
        if match and match[2] == path.name:
            left.append(path.with_name(found.name))
    for one in sorted(left):
        with suppress(OSError), _abandoned(one):
            if one.name.startswith(".old-") and not path.exists():
                one.replace(path)
            elif one.is_dir():
                shutil.rmtree(one, ignore_errors=True)
            else:
                one.unlink(missing_ok=True)


@contextmanager
def _abandoned(path: Path) -> Generator[None]:
    """Hold the lock of what nobody writes any more.

    Raises:
        OSError: A living process holds it, it has just gone, or there are no locks here.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
