"""Answers so far, kept batch by batch, so that a killed run loses at most one batch."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from medvlm.errors import PredictionMismatch
from medvlm.records import Prediction, VQAItem, from_row
from medvlm.store import atomic_path

__all__ = ["AnswerJournal", "merged_answers"]

Key = tuple[str, bool]
"""Item id, and whether the answer is blind."""


class AnswerJournal:
    """One process's answers on their way, beside those of the processes before it.

    Args:
        stream: Where answers are appended.
        answers: What is known already.
    """

    def __init__(self, stream: TextIO, answers: dict[Key, Prediction]) -> None:
        self._stream = stream
        self.answers = answers

    @classmethod
    @contextmanager
    def of(cls, folder: Path, inputs: str, *, rank: int = 0) -> Generator[AnswerJournal]:
        """The journal of one process; what a run with other inputs left is begun anew.

        Args:
            folder: Holds a JSONL file for each process; a first line says for which inputs it is.
            inputs: Fingerprint of checkpoint, items and prompts.
            rank: Of this process.
        """
        path = folder / f"{rank}.jsonl"
        own = _read(path, inputs)
        known = _all(folder, inputs)
        with atomic_path(path) as temporary:
            temporary.write_text("\n".join([_head(inputs), *map(_line, own)]) + "\n", "utf-8")
        with path.open("a", encoding="utf-8") as stream:
            yield cls(stream, known)

    def append(self, answers: Sequence[Prediction]) -> None:
        """Remember a batch, on disk first."""
        self._stream.write("".join(_line(answer) + "\n" for answer in answers))
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self.answers |= {(answer.item_id, answer.blind): answer for answer in answers}

    def todo(self, items: Iterable[VQAItem], *, blind: bool) -> list[VQAItem]:
        """The items that have no such answer yet."""
        return [item for item in items if (item.item_id, blind) not in self.answers]


def merged_answers(
    folder: Path, inputs: str, items: Sequence[VQAItem], kinds: Sequence[bool] = (False, True)
) -> list[Prediction]:
    """The answers of all processes, joined by id, in the order of the items: seeing ones, then blind ones.

    Raises:
        PredictionMismatch: An item has no answer; the ids are listed.
    """
    answers = _all(folder, inputs)
    wanted = [(item.item_id, blind) for blind in kinds for item in items]
    absent = [item_id for item_id, blind in wanted if (item_id, blind) not in answers]
    if absent:
        more = f" and {len(absent) - 10} more" if len(absent) > 10 else ""
        raise PredictionMismatch(
            f"{len(absent)} of {len(wanted)} answers are missing: {', '.join(absent[:10])}{more}",
            where=str(folder),
            hint="a process ended early; run the same command again: finished answers are kept",
        )
    return [answers[key] for key in wanted]


def _all(folder: Path, inputs: str) -> dict[Key, Prediction]:
    files = sorted(folder.glob("*.jsonl")) if folder.is_dir() else []
    return {(answer.item_id, answer.blind): answer for path in files for answer in _read(path, inputs)}


def _read(path: Path, inputs: str) -> list[Prediction]:
    lines = path.read_text("utf-8").split("\n") if path.exists() else []
    answers: list[Prediction] = []
    if lines and lines[0] == _head(inputs):
        for line in lines[1:]:
            # A run killed while writing leaves half a last line; its answer is made again.
            with contextlib.suppress(json.JSONDecodeError, TypeError, AttributeError):
                answers.append(from_row(Prediction, json.loads(line)))
    return answers


def _head(inputs: str) -> str:
    return json.dumps({"inputs": inputs})


def _line(answer: Prediction) -> str:
    return json.dumps(dataclasses.asdict(answer), ensure_ascii=False)
