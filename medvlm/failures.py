"""Steps that ended with an error, so that a page can say so: one small file each in the workspace's scratch."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from medvlm.errors import MedVLMError
from medvlm.store import Workspace, read_json, write_json

__all__ = ["CONTRACT", "Failure", "failures", "record_failure"]

CONTRACT = "contract"
STEPS = ("corpus", "fetch", "dataset", "leakage", "train", "train-router", "predict", "score", "leaderboard", CONTRACT)
"""Verbs that are steps of the pipeline; a question that could not be answered is no failed step."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A step's last end with an error. What the step made later shows that it is over."""

    command: tuple[str, ...]
    """The verb and its arguments."""
    when: str
    """UTC, ISO 8601."""
    what: str
    where: str
    hint: str

    def is_of(self, *words: str) -> bool:
        """Whether all words stand in the command, the first as its verb."""
        return self.command[0] == words[0] and all(word in self.command for word in words)


def record_failure(root: Path, command: Sequence[str], error: Exception) -> None:
    """Remember that a step failed; never fails itself.

    Args:
        root: The workspace. Nothing is written where there is none yet.
        command: The verb and its arguments; of a contract that could not be checked, ``CONTRACT`` and its name.
        error: What ended it.
    """
    if not command or command[0] not in STEPS or not root.is_dir():
        return
    told = (f"{type(error).__name__}: {error}", "", "this is a bug in medvlm; please report it")
    if isinstance(error, MedVLMError):
        told = (error.what, error.where, error.hint)
    failure = Failure(tuple(command), datetime.now(UTC).isoformat(timespec="seconds"), *told)
    name = hashlib.sha256("\0".join(command).encode()).hexdigest()[:16]
    # The disk may be full, which is why the step failed.
    with contextlib.suppress(MedVLMError, OSError):
        write_json(Workspace(root).scratch("failed", f"{name}.json"), asdict(failure))


def failures(workspace: Workspace) -> list[Failure]:
    """The last failure of every command that ever failed, the newest last; files of other versions are left out."""
    found: list[Failure] = []
    for path in workspace.scratch("failed").glob("*.json"):
        with contextlib.suppress(MedVLMError, TypeError, KeyError):
            row: dict[str, Any] = read_json(path)
            told = [str(row[name]) for name in ("when", "what", "where", "hint")]
            found.append(Failure(tuple(row["command"]), *told))
    return sorted((f for f in found if f.command), key=lambda failure: failure.when)
