"""Steps that ended with an error or were killed, so that a page can say so: small files in the workspace's scratch."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from medvlm.errors import MedVLMError
from medvlm.store import Workspace, read_json, write_json

__all__ = ["CONTRACT", "Failure", "failures", "record_failure", "underway"]

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
    # The disk may be full, which is why the step failed.
    with contextlib.suppress(MedVLMError, OSError):
        write_json(Workspace(root).scratch("failed", _name(command)), asdict(failure))


def _name(command: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(command).encode()).hexdigest()[:16] + ".json"


@contextlib.contextmanager
def underway(root: Path, command: Sequence[str]) -> Generator[None]:
    """Leave a note while a step runs, held by a lock that the kernel opens when the process dies; never fails itself.

    A note without its lock is a step that was killed: it had no time for a word of its own.

    Args:
        root: The workspace. Nothing is written where there is none yet.
        command: The verb and its arguments.
    """
    if not command or command[0] not in STEPS or not root.is_dir():
        yield
        return
    path = Workspace(root).scratch("underway", _name(command))
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):
            if not path.parent.parent.exists():  # a command that only reads leaves no folder behind
                held.callback(_remove_empty, path.parent, path.parent.parent)
            path.parent.mkdir(parents=True, exist_ok=True)
            note = held.enter_context(path.open("a", encoding="utf-8"))
            fcntl.flock(note, fcntl.LOCK_EX | fcntl.LOCK_NB)
            note.truncate(0)  # of one that was killed
            json.dump({"command": list(command), "when": datetime.now(UTC).isoformat(timespec="seconds")}, note)
            note.flush()
            held.callback(path.unlink, missing_ok=True)
        yield


def _remove_empty(*folders: Path) -> None:
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _killed(workspace: Workspace) -> list[Failure]:
    found: list[Failure] = []
    for path in workspace.scratch("underway").glob("*.json"):
        with contextlib.suppress(MedVLMError, OSError, TypeError, KeyError), path.open(encoding="utf-8") as note:
            fcntl.flock(note, fcntl.LOCK_SH | fcntl.LOCK_NB)
            row: dict[str, Any] = read_json(path)
            told = "the step ended without a word: it was killed, by a person, for want of memory or with its machine"
            hint = "run the same command again; what was saved is kept, and a training goes on from it"
            found.append(Failure(tuple(row["command"]), str(row["when"]), told, str(path), hint))
    return found


def failures(workspace: Workspace) -> list[Failure]:
    """The last failure of every command that ever failed, the newest last; files of other versions are left out.

    A step that was killed is one too; a running step holds its note's lock and is none.
    """
    found = _killed(workspace)
    for path in workspace.scratch("failed").glob("*.json"):
        with contextlib.suppress(MedVLMError, TypeError, KeyError):
            row: dict[str, Any] = read_json(path)
            told = [str(row[name]) for name in ("when", "what", "where", "hint")]
            found.append(Failure(tuple(row["command"]), *told))
    return sorted((f for f in found if f.command), key=lambda failure: failure.when)
