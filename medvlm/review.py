"""What people decided about records: an append-only journal, and the verdicts that datasets obey.

One JSON line a decision in ``decisions.jsonl``: who, when, what, before, after. A decision is on the
disk when ``Journal.append`` returns; any number of processes may append at once. Nothing is ever
changed or removed: taking a decision back is a decision too.
"""

from __future__ import annotations

import dataclasses
import json
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from typing import Literal, TypeVar, get_args

from medvlm.append_only import append_line, read_lines
from medvlm.errors import InputError
from medvlm.records import Figure, PreferencePair, Sample, schema_of, to_row
from medvlm.store import Workspace, atomic_path, read_records

__all__ = [
    "Action",
    "Agreement",
    "Decision",
    "Journal",
    "Verdict",
    "agreement",
    "cohen_kappa",
    "obey",
    "save_preference",
    "saved_preferences",
    "standing",
    "texts_of",
    "verdicts",
]

Action = Literal["accept", "reject", "edit", "flag_privacy", "undo"]
Record = TypeVar("Record", Figure, Sample, PreferencePair)
_KEYS = {Figure: "figure_id", Sample: "sample_id", PreferencePair: "pair_id"}


@dataclass(frozen=True, slots=True)
class Decision:
    """One person's word on one record."""

    decision_id: str
    who: str
    when: str
    """UTC, ISO 8601 with microseconds."""
    source: str
    """The table the record is in: ``figures``, a dataset's name, or ``benchmark/<name>``."""
    record_id: str
    action: Action
    reason: str
    before: tuple[str, ...]
    """The record's texts as the reviewer saw them: a caption, or each turn."""
    after: tuple[str, ...]
    """The texts as edited; empty for every other action."""
    undoes: str
    """The ``decision_id`` that an ``undo`` takes back; else empty."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What stands about a record when every decision was heard."""

    keep: bool
    privacy: bool
    """Somebody flagged it; it stays out until they take that back."""
    before: tuple[str, ...]
    after: tuple[str, ...]
    """The edited texts; empty where nobody edited."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far two reviewers agree on keeping or dropping the records that both have judged."""

    first: str
    second: str
    records: int
    observed: float
    """Share of equal verdicts, 0 to 1."""
    kappa: float | None
    """Cohen's kappa; None where chance alone would agree always."""


class Journal:
    """The decisions of a workspace.

    Args:
        workspace: Its ``review`` folder is created with the first decision.
    """

    def __init__(self, workspace: Workspace) -> None:
        self.path: Path = workspace.review_decisions

    def decide(
        self,
        who: str,
        source: str,
        record_id: str,
        action: Action,
        *,
        reason: str = "",
        before: Sequence[str] = (),
        after: Sequence[str] = (),
        undoes: str = "",
    ) -> Decision:
        """Write a decision down; it is on the disk when this returns.

        Raises:
            InputError: It has no reviewer or no record, or is a rejection without a reason or an
                edit that changes nothing.
            WorkspaceError: It could not be written; the journal is as it was.
        """
        where = f"{source} {record_id}"
        if not who.strip() or not record_id:
            raise InputError("a decision needs a reviewer and a record", where=where, hint="enter your name first")
        if action == "reject" and not reason.strip():
            raise InputError("a rejection needs a reason", where=where, hint="choose one of the reasons, or write one")
        if action == "edit" and (not after or tuple(after) == tuple(before)):
            raise InputError("the edit changes nothing", where=where, hint="change the text, or accept it as it is")
        when = datetime.now(UTC).isoformat(timespec="microseconds")
        decision = Decision(
            uuid.uuid4().hex,
            who.strip(),
            when,
            source,
            record_id,
            action,
            reason.strip(),
            tuple(before),
            tuple(after),
            undoes,
        )
        self.append(decision)
        return decision

    def undo(self, who: str) -> Decision | None:
        """Take back the last decision of a reviewer that still stands; None if there is none."""
        mine = [decision for decision in standing(self.read()) if decision.who == who.strip()]
        if not mine:
            return None
        last = mine[-1]
        self.decide(who, last.source, last.record_id, "undo", before=last.before, undoes=last.decision_id)
        return last

    def append(self, decision: Decision) -> None:
        """Write one line and wait until the disk has it.

        Raises:
            WorkspaceError: It could not be written; the journal is as it was.
        """
        append_line(self.path, dataclasses.asdict(decision), "the decision")

    def read(self) -> list[Decision]:
        """Every decision in the order they were made; a line that a killed writer left half is not one.

        Raises:
            InputError: A line in the middle is damaged.
        """
        return [_decision(line, where) for line, where in read_lines(self.path)]

    def stamp(self) -> tuple[int, int]:
        """Changes with every decision: size and time of the file."""
        if not self.path.exists():
            return (0, 0)
        stat = self.path.stat()
        return (stat.st_size, stat.st_mtime_ns)


def _decision(line: bytes, where: str) -> Decision:
    try:
        values = json.loads(line)
        values["before"], values["after"] = tuple(values["before"]), tuple(values["after"])
        decision = Decision(**values)
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"the line is not a decision: {error}",
            where=where,
            hint="restore the file from its last copy; decisions are only ever appended to it",
        ) from error
    if decision.action not in get_args(Action):
        raise InputError(
            f"the action {decision.action!r} is unknown", where=where, hint="use the version of medvlm that wrote it"
        )
    return decision


def standing(decisions: Iterable[Decision]) -> list[Decision]:
    """The decisions that nobody took back, in their order."""
    heard = list(decisions)
    undone = {decision.undoes for decision in heard if decision.action == "undo"}
    return [d for d in heard if d.action != "undo" and d.decision_id not in undone]


def verdicts(decisions: Iterable[Decision], source: str) -> dict[str, Verdict]:
    """What stands about each judged record of a table.

    The last word counts, whoever says it, but a privacy flag keeps a record out until it is taken
    back. An edit is also an acceptance, and a later acceptance keeps the edited text.
    """
    result: dict[str, Verdict] = {}
    for decision in standing(decisions):
        if decision.source != source:
            continue
        old = result.get(decision.record_id)
        privacy = decision.action == "flag_privacy" or (old is not None and old.privacy)
        edited = decision if decision.action == "edit" else old
        result[decision.record_id] = Verdict(
            keep=decision.action in ("accept", "edit") and not privacy,
            privacy=privacy,
            before=edited.before if edited else decision.before,
            after=edited.after if edited else (),
        )
    return result


def obey(
    records: Iterable[Record], decided: Mapping[str, Verdict], counts: Counter[str] | None = None
) -> Iterator[Record]:
    """Records as the reviewers want them: dropped, edited, or as they were.

    Args:
        records: Figures, samples or preference pairs.
        decided: From ``verdicts`` for their table.
        counts: Gets ``review_rejected``, ``review_privacy``, ``review_edited`` and
            ``review_stale_edits`` (the text is no longer the one that was edited, so it is left alone).
    """
    tally = counts if counts is not None else Counter[str]()
    for record in records:
        verdict = decided.get(getattr(record, _KEYS[type(record)]))
        if verdict and not verdict.keep:
            tally["review_privacy" if verdict.privacy else "review_rejected"] += 1
            continue
        if verdict and verdict.after:
            if verdict.before != texts_of(record) or len(verdict.after) != len(verdict.before):
                tally["review_stale_edits"] += 1
            else:
                tally["review_edited"] += 1
                yield _edited(record, verdict.after)
                continue
        yield record


def texts_of(record: Figure | Sample | PreferencePair) -> tuple[str, ...]:
    """The texts of a record that reviewers judge, in reading order."""
    if isinstance(record, PreferencePair):
        return (record.question, record.chosen, record.rejected)
    return (record.caption,) if isinstance(record, Figure) else tuple(turn.text for turn in record.turns)


def _edited(record: Record, texts: tuple[str, ...]) -> Record:
    if isinstance(record, Figure):
        return dataclasses.replace(record, caption=texts[0])
    if isinstance(record, PreferencePair):
        question, chosen, rejected = texts
        return dataclasses.replace(record, question=question, chosen=chosen, rejected=rejected, source="review")
    turns = tuple(dataclasses.replace(turn, text=text) for turn, text in zip(record.turns, texts, strict=True))
    return dataclasses.replace(record, turns=turns, source="review")


def save_preference(workspace: Workspace, pair: PreferencePair) -> None:
    """Keep a preference that somebody expressed in a chat: one small file, written whole or not at all.

    Raises:
        WorkspaceError: The disk is full or read-only.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    # Named after its content: saying the same twice keeps it once.
    with atomic_path(workspace.review_preferences / f"{pair.pair_id}.parquet") as temporary:
        pq.write_table(pa.Table.from_pylist([to_row(pair)], schema=schema_of(PreferencePair)), temporary)


def saved_preferences(workspace: Workspace) -> list[PreferencePair]:
    """Every preference expressed in a chat, by id; what the next preference dataset adds.

    Raises:
        WorkspaceError: A file is damaged.
    """
    folder = workspace.review_preferences
    return read_records(folder, PreferencePair) if folder.is_dir() else []


def agreement(decisions: Iterable[Decision], source: str | None = None) -> list[Agreement]:
    """Cohen's kappa of every two reviewers over the records of a table, or of all, that both judged."""
    labels: dict[str, dict[tuple[str, str], str]] = defaultdict(dict)
    for decision in standing(decisions):
        if source is None or decision.source == source:
            kept = "keep" if decision.action in ("accept", "edit") else "drop"
            labels[decision.who][decision.source, decision.record_id] = kept
    result: list[Agreement] = []
    for first, second in combinations(sorted(labels), 2):
        both = sorted(labels[first].keys() & labels[second].keys())
        if both:
            pairs = [(labels[first][key], labels[second][key]) for key in both]
            observed = sum(a == b for a, b in pairs) / len(pairs)
            result.append(Agreement(first, second, len(pairs), observed, cohen_kappa(pairs)))
    return result


def cohen_kappa(pairs: Sequence[tuple[str, str]]) -> float | None:
    """Agreement of two raters beyond chance, -1 to 1 (Cohen 1960).

    Args:
        pairs: One (label, label) for each thing that both have rated.

    Returns:
        None without pairs, or where both gave everything the same single label.
    """
    if not pairs:
        return None
    n = len(pairs)
    first, second = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    observed = sum(a == b for a, b in pairs) / n
    chance = sum(first[label] * second[label] for label in first) / n**2
    return None if chance == 1 else (observed - chance) / (1 - chance)
