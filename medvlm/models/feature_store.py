"""The feature caches of a workspace: what each takes, which are in use, and how old ones give way to new ones."""

from __future__ import annotations

import fcntl
import shutil
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from medvlm.errors import WorkspaceError
from medvlm.store import Workspace, read_json, write_json

__all__ = ["Hold", "KeptFeatures", "hold_features", "kept_features", "prune_features"]

_MARK = ".used"
"""A file of each cache: locked while a run reads it, written at each use. Not an index: it begins with a dot."""
_ABOUT = ".about.json"


@dataclass(frozen=True, slots=True)
class KeptFeatures:
    """One cache: what one tower, in one precision, made of images."""

    key: str
    about: str
    """Recipe and tower that used it last."""
    images: int
    bytes: int
    idle_s: float
    """Since it was used last."""
    in_use: bool
    folder: Path


class Hold:
    """A cache in use: nobody prunes it until this is closed or gone."""

    def __init__(self, mark: IO[bytes]) -> None:
        self.close = weakref.finalize(self, mark.close)


def hold_features(folder: Path, about: str) -> Hold:
    """Note a use of a cache and keep it from being pruned.

    Args:
        folder: Of the cache; made where it is not there yet.
        about: Who uses it, for people.

    Raises:
        WorkspaceError: The disk is full or read-only.
    """
    write_json(folder / _ABOUT, {"about": about})
    try:
        mark = (folder / _MARK).open("wb")
        fcntl.flock(mark, fcntl.LOCK_SH)
    except OSError as error:
        raise WorkspaceError(
            f"the feature cache cannot be used: {error}",
            where=str(folder),
            hint="make room or change the permissions, or set speed.feature_cache=false in the stage",
        ) from error
    mark.write(b"\n")
    mark.flush()
    return Hold(mark)


def kept_features(workspace: Workspace) -> list[KeptFeatures]:
    """The caches of a workspace, the one used last first."""
    root = workspace.scratch("features")
    folders = [folder for folder in root.iterdir() if folder.is_dir()] if root.is_dir() else []
    return sorted((_kept(folder) for folder in folders), key=lambda kept: (kept.idle_s, kept.key))


def _kept(folder: Path) -> KeptFeatures:
    files = [path for path in folder.rglob("*") if path.is_file()]
    used = max((path.stat().st_mtime for path in files), default=folder.stat().st_mtime)
    mark, about = folder / _MARK, folder / _ABOUT
    return KeptFeatures(
        key=folder.name,
        about=read_json(about)["about"] if about.is_file() else "",
        images=sum(len(read_json(path)["images"]) for path in folder.glob("[!.]*.json")),
        bytes=sum(path.stat().st_size for path in files),
        idle_s=max(0.0, time.time() - used),
        in_use=mark.is_file() and not _free(mark),
        folder=folder,
    )


def _free(mark: Path) -> bool:
    with mark.open("rb") as stream:
        return _locked(stream)


def _locked(stream: IO[bytes]) -> bool:
    """Whether the whole lock could be had: nobody else holds a part of it."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def prune_features(workspace: Workspace, keep_bytes: float, *, spare: str = "") -> list[KeptFeatures]:
    """Remove the caches that were used longest ago, until what is left takes no more than ``keep_bytes``.

    One that a run reads is left alone. What is removed is made again when a run needs it.

    Args:
        workspace: Holds the caches.
        keep_bytes: 0 removes all that can be.
        spare: Key of one that stays.

    Returns:
        What was removed.
    """
    kept = kept_features(workspace)
    total, removed = sum(one.bytes for one in kept), list[KeptFeatures]()
    for one in reversed(kept):
        if total <= keep_bytes:
            break
        if one.key != spare and _removed(one):
            total -= one.bytes
            removed.append(one)
    return removed


def _removed(one: KeptFeatures) -> bool:
    mark: Any = one.folder / _MARK
    if not mark.is_file():
        shutil.rmtree(one.folder, ignore_errors=True)
        return True
    with mark.open("rb") as stream:
        # Held until the folder is gone: a run that comes meanwhile finds none and fills it anew.
        if _locked(stream):
            shutil.rmtree(one.folder, ignore_errors=True)
            return True
    return False
