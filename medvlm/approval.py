"""A person's word that a model may be used: an append-only record, asked before a release is promoted."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, get_args

from medvlm.append_only import append_line, read_lines
from medvlm.errors import InputError
from medvlm.store import Workspace

__all__ = ["Approval", "approval", "approvals", "approve"]

Word = Literal["approve", "withdraw"]


@dataclass(frozen=True, slots=True)
class Approval:
    """One person's word on one model."""

    who: str
    when: str
    """UTC, ISO 8601 with microseconds."""
    recipe: str
    fingerprint: str
    """Of what was looked at: the word holds for exactly that and for nothing that is made later."""
    word: Word
    note: str


def approve(
    workspace: Workspace, recipe: str, fingerprint: str, *, who: str, word: Word = "approve", note: str = ""
) -> Approval:
    """Write a person's word down; it is on the disk when this returns.

    Raises:
        InputError: Nobody signs it, or nothing is named; or a withdrawal gives no reason, or has
            nothing to withdraw.
        WorkspaceError: It could not be written; the record is as it was.
    """
    where = f"{recipe} {fingerprint}".strip()
    if not who.strip() or not recipe or not fingerprint:
        raise InputError("an approval needs a person and a model", where=where, hint="enter your name first")
    if word == "withdraw" and not note.strip():
        raise InputError("a withdrawal needs a reason", where=where, hint="write why into the note")
    if word == "withdraw" and approval(workspace, recipe, fingerprint) is None:
        raise InputError("there is no approval to withdraw", where=where, hint="nothing has to be done")
    when = datetime.now(UTC).isoformat(timespec="microseconds")
    row = Approval(who.strip(), when, recipe, fingerprint, word, note.strip())
    append_line(_path(workspace), dataclasses.asdict(row), "the approval")
    return row


def approvals(workspace: Workspace, recipe: str | None = None) -> list[Approval]:
    """Every word in the order they were given, of one recipe or of all.

    Raises:
        InputError: A line is damaged.
    """
    rows = [_approval(line, where) for line, where in read_lines(_path(workspace))]
    return [row for row in rows if recipe is None or row.recipe == recipe]


def approval(workspace: Workspace, recipe: str, fingerprint: str) -> Approval | None:
    """The approval that stands for a model; None if nobody gave one, or the last word withdrew it.

    Args:
        workspace: Whose record is asked.
        recipe: The model's.
        fingerprint: Of exactly what is to be used.

    Raises:
        InputError: A line of the record is damaged.
    """
    words = [row for row in approvals(workspace, recipe) if row.fingerprint == fingerprint]
    return words[-1] if words and words[-1].word == "approve" else None


def _path(workspace: Workspace) -> Path:
    return workspace.review / "approvals.jsonl"


def _approval(line: bytes, where: str) -> Approval:
    try:
        row = Approval(**json.loads(line))
    except (ValueError, TypeError) as error:
        raise InputError(
            f"the line is not an approval: {error}",
            where=where,
            hint="restore the file from its last copy; it is only ever appended to",
        ) from error
    if row.word not in get_args(Word):
        raise InputError(f"the word {row.word!r} is unknown", where=where, hint="use the medvlm that wrote it")
    return row
