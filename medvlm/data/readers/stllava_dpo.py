"""STLLaVA-Med-DPO: pairs of answers of which one was preferred (Sun et al. 2024; no licence stated)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from medvlm.data.readers.llava_med import SLOT, turns_of
from medvlm.data.readers.source import Dropped, object_rows, text_of

__all__ = ["PreferenceText", "read_preferences"]


@dataclass(frozen=True, slots=True)
class PreferenceText:
    """A preference without its image."""

    pair_id: str
    """The figure's key: the image's name without extension."""
    question: str
    """Without the image slot."""
    chosen: str
    rejected: str


def read_preferences(path: Path) -> Iterator[PreferenceText | Dropped]:
    """The preferences of the published JSON: one for each round in which the two conversations differ.

    Rows spell their keys ``chosen_conversations`` and ``reject_conversations``.

    Raises:
        InputError: The file is not in the published format.
    """
    for where, row in object_rows(path):
        name = text_of(row, "image", where)
        pair_id = name.rsplit("/", 1)[-1].rsplit(".", 1)[0]
        chosen = turns_of(row, "chosen_conversations", where)
        rejected = turns_of(row, "reject_conversations", where)
        if isinstance(chosen, str) or isinstance(rejected, str):
            yield Dropped(where, chosen if isinstance(chosen, str) else str(rejected), name)
            continue
        if [turn.text for turn in chosen[::2]] != [turn.text for turn in rejected[::2]]:
            yield Dropped(where, "questions_differ", name)
            continue
        differing = [index for index in range(1, len(chosen), 2) if chosen[index] != rejected[index]]
        if not differing:
            yield Dropped(where, "answers_equal", name)
        for index in differing:
            question = chosen[index - 1].text.replace(SLOT, "").strip()
            yield PreferenceText(pair_id, question, chosen[index].text, rejected[index].text)
