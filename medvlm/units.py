"""Units of a workspace: what takes its place whole, and goes into a bucket or comes from it as one."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from medvlm.errors import WorkspaceError

__all__ = [
    "MERGED",
    "Files",
    "UnitFile",
    "alike",
    "conflict",
    "is_scratch",
    "matches",
    "merged_changes",
    "scan",
    "sha256_of",
    "unit_of",
]

_DEPTH = {
    "benchmarks": 2, "checkpoints": 3, "contracts": 2, "datasets": 2, "logs": 3, "predictions": 3, "recipes": 2,
    "releases": 2, "routers": 2, "scores": 3,
}  # fmt: skip
"""Names of folders that make a unit; one where nothing is said."""
_SCRATCH = {"train": 5, "fetch": 3, "failed": 2}
"""What of the scratch folder another machine can go on from, and the depth of its units."""
MERGED = ("inbox", "logs", "review", "scratch/failed", "scratch/fetch/*")
"""Units whose files stand each for itself, so that two machines may add to one."""


@dataclass(frozen=True, slots=True)
class UnitFile:
    """One file of a unit: its content, and what of the local file shows that it is still that."""

    sha256: str
    size: int
    mtime_ns: int = 0
    """Of the local file; in the bucket 0."""

    def is_like(self, other: UnitFile | None) -> bool:
        """Whether the other has the same bytes."""
        return other is not None and self.sha256 == other.sha256


Files = Mapping[str, UnitFile]


def unit_of(path: str) -> str | None:
    """The unit of a file of the workspace; None for what stays on its machine.

    Args:
        path: Relative to the workspace's root, with slashes.
    """
    parts = path.split("/")
    if any(part.startswith(".") for part in parts):
        return None
    if parts[0] == "scratch":
        depth = _SCRATCH.get(parts[1], 0) if len(parts) > 2 else 0
        if not depth or parts[-1].startswith("lock"):
            return None
    else:
        depth = _DEPTH.get(parts[0], 1) + (parts[1:2] == ["preference"] and parts[0] in ("contracts", "datasets"))
    return "/".join(parts[: min(depth, len(parts) - 1)]) or None


def scan(root: Path, below: str = "") -> dict[str, list[str]]:
    """Files of the workspace by unit, relative to it; what is being written is left out."""
    units: dict[str, list[str]] = {}
    for folder, folders, names in os.walk(root / below, followlinks=True):
        here = Path(folder)
        folders[:] = [name for name in folders if not name.startswith(".")]
        if below == "" and here == root / "scratch":
            folders[:] = [name for name in folders if name in _SCRATCH]
        is_checkpoint = here.name.startswith("checkpoint-") and "scratch" in here.relative_to(root).parts
        if is_checkpoint and "complete.json" not in names:
            folders.clear()
            continue
        for name in names:
            path = (here / name).relative_to(root).as_posix()
            unit = unit_of(path)
            if unit is not None:
                units.setdefault(unit, []).append(path.removeprefix(f"{unit}/"))
    return units


def alike(some: Files, others: Files) -> bool:
    """Whether both have the same files with the same bytes."""
    return some.keys() == others.keys() and all(one.is_like(others[name]) for name, one in some.items())


def matches(unit: str, patterns: Iterable[str]) -> bool:
    """Whether a pattern, such as ``datasets/*``, names the unit or a folder that it lies in."""
    return any(fnmatchcase(unit, pattern) or fnmatchcase(unit, f"{pattern}/*") for pattern in patterns)


def is_scratch(unit: str) -> bool:
    """Whether it is no result but what a killed step goes on from."""
    return unit.startswith("scratch/")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def merged_changes(unit: str, base: Files, mine: Files, theirs: Files) -> dict[str, UnitFile]:
    """What was added or changed here, to be laid over what was done there.

    Raises:
        WorkspaceError: The same file was changed here and there.
    """
    # An empty file is what every workspace begins with, and nobody's work.
    changed = {name: one for name, one in mine.items() if one.size and not one.is_like(base.get(name))}
    for name, one in changed.items():
        other = theirs.get(name)
        if other and not other.is_like(base.get(name)) and not other.is_like(one):
            raise conflict(f"{unit}/{name}", Path())
    return changed


def conflict(unit: str, root: Path) -> WorkspaceError:
    """The error for a unit that two machines have changed, with both ways out of it."""
    return WorkspaceError(
        f"{unit} was changed here and, since it was last brought in, in the bucket too",
        where=str(root / unit),
        hint="move it aside here and run the command again to take theirs; "
        f"or 'medvlm workspace push --mine {unit}' to take yours",
    )
