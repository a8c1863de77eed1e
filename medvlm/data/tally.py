"""Counts of what a build kept and what it dropped, and why: the content of its report."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from medvlm.data.readers.source import Dropped
from medvlm.records import VQAItem

__all__ = ["Tally"]

T = TypeVar("T")

FIRST = 10
"""As many dropped rows are named in a report; all are counted."""


class Tally:
    """Counts the records that pass through it and keeps the first dropped ones by name."""

    def __init__(self) -> None:
        self.kept = 0
        self._counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._dropped: Counter[str] = Counter()
        self._first: defaultdict[str, dict[str, str]] = defaultdict(dict)

    def sift(self, rows: Iterable[T | Dropped]) -> Iterator[T]:
        """The rows that were not dropped; the others are counted."""
        for row in rows:
            if isinstance(row, Dropped):
                self.drop(row)
            else:
                yield row

    def drop(self, row: Dropped) -> None:
        """Count one dropped row."""
        self._dropped[row.reason] += 1
        first = self._first[row.reason]
        if len(first) < FIRST and row.value not in first:
            first[row.value] = row.where

    def keep(self, **fields: str) -> None:
        """Count one kept record under each field's value."""
        self.kept += 1
        for name, value in fields.items():
            self._counts[name][value] += 1

    def keep_item(self, item: VQAItem) -> None:
        """Count one benchmark item."""
        self.keep(
            split=item.split,
            answer_type=item.answer_type,
            split_answer_type=f"{item.split}_{item.answer_type}",
            language=item.language,
            modality=item.modality,
        )

    @property
    def dropped(self) -> int:
        """How many rows were dropped, for whatever reason."""
        return sum(self._dropped.values())

    def dropped_for(self, *reasons: str) -> int:
        """How many rows were dropped for one of these reasons."""
        return sum(self._dropped[reason] for reason in reasons)

    def first(self, *reasons: str) -> list[str]:
        """The first different values that were dropped for these reasons, at most ten, with their places."""
        return [f"{value} ({where})" for reason in reasons for value, where in self._first[reason].items()][:FIRST]

    def by(self, field: str) -> dict[str, int]:
        """Kept records by the values of one field, in the order of the values."""
        return dict(sorted(self._counts[field].items()))

    def details(self) -> dict[str, Any]:
        """All counts as JSON: by each field, and the dropped rows by reason with the first ten of each."""
        return {
            "by": {field: self.by(field) for field in sorted(self._counts)},
            "dropped": {
                reason: {"count": count, "first": self.first(reason)} for reason, count in sorted(self._dropped.items())
            },
        }
