"""Whether what a stage read has been made anew since, by dvc.lock and without DVC, which takes seconds and a lock."""

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Inputs:
    """The inputs of all stages as they are now.

    An input that is another stage's whole output has its hash in dvc.lock. A folder that holds outputs of several
    stages (the leaderboard reads all scores), and a part of an output (a stage's own file of a recipe), are hashed on
    the disk, as DVC does it; both are small. What comes from outside is taken to be as it was: it may be a terabyte.

    Args:
        root: The project folder.
        stages: Of dvc.lock.
    """

    def __init__(self, root: Path, stages: Mapping[str, Any]) -> None:
        self._root = root
        self._made: dict[str, str] = {
            out["path"]: out["md5"] for entry in stages.values() for out in entry.get("outs", ())
        }
        self._on_disk = functools.cache(_md5)

    def has_changed(self, dep: Mapping[str, str]) -> bool:
        """Whether an input, as dvc.lock has it, differs from what it is now."""
        path, then = dep["path"], dep["md5"]
        if path in self._made:
            return self._made[path] != then
        if not any(out.startswith(f"{path}/") or path.startswith(f"{out}/") for out in self._made):
            return False
        here = self._root / path
        # What was not pulled is not here to be compared.
        return here.exists() and self._on_disk(here) != then


def _md5(path: Path) -> str:
    """DVC's hash of a file, or of a folder: that of its files' hashes and names, in order."""
    if path.is_file():
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "md5").hexdigest()
    files = {found.relative_to(path).as_posix(): _md5(found) for found in path.rglob("*") if found.is_file()}
    listed = [{"md5": md5, "relpath": name} for name, md5 in sorted(files.items())]
    return hashlib.md5(json.dumps(listed, sort_keys=True).encode()).hexdigest() + ".dir"  # noqa: S324  # DVC's
