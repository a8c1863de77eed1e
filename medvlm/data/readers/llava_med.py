"""LLaVA-Med's published files: conversations, chat questions and figure captions (CC BY-NC 4.0)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from medvlm.data.modality import modality_of_domain
from medvlm.data.readers.source import Dropped, integer_of, json_lines, object_rows, refuse, starts_with, text_of
from medvlm.errors import InputError
from medvlm.records import Turn
from medvlm.store import read_json

__all__ = [
    "LICENCE",
    "SHA256",
    "SLOT",
    "Caption",
    "ChatQuestion",
    "Conversation",
    "fault_of",
    "read_captions",
    "read_chat_questions",
    "read_conversations",
    "turns_of",
]

LICENCE = "CC BY-NC 4.0"

# Git LFS pointers of microsoft/LLaVA-Med since 2025-04-01.
SHA256 = {
    "llava_med_alignment_500k.json": "007456f3d6c2091466b3fb6cd0573f61a63fd0c937e568f44113d5a1f23e8b93",
    "llava_med_instruct_10k.json": "84f75c2b83404fe7dd1631212b4ad73228a0dad77bb819ab29c511a535a279c8",
    "llava_med_instruct_60k.json": "cf84c82fb58e391d6cf198e2657b6fc8584a180509b8813c3604ce46f6275c19",
    "llava_med_instruct_60k_inline_mention.json": "b3649f4193a51215aee4519b44d8436a4200e182d6a78a3cb78672d97bea948a",
    "llava_med_instruct_fig_captions.json": "1d58b7befd2687695cbba04e4f51fd648899b25f4f567815eb49538faf6f07fb",
    "llava_med_image_urls.jsonl": "2604441ec3d1f6324d21846cfd44f92eab29454beed1da42a98d943b41731e44",
    "llava_med_eval_qa50_qa.jsonl": "48c6b680a962dbf8caf63e3ded2bef7770dccf9c2602f32e5f05f4b907266f25",
    "llava_med_eval_qa50_fig_captions.json": "64a4de84f8959a049ab9de68572318c6a299194b24368084159ef1f4a259aa66",
}

SLOT = "<image>"


@dataclass(frozen=True, slots=True)
class Conversation:
    """One published conversation about one figure."""

    pair_id: str
    """``<PMID>_<figure>``, the key to the figures of the URL list."""
    modality: str | None
    """From the domain flags; None where the row has none."""
    turns: tuple[Turn, ...]
    """Alternating, beginning with the user; ``<image>`` once, in the first, where it was published."""


@dataclass(frozen=True, slots=True)
class ChatQuestion:
    """One of the 193 questions of the chat evaluation."""

    question_id: str
    pair_id: str
    image_name: str
    question: str
    """Without the image slot."""
    reference: str
    """GPT-4's answer, given caption and mentions but not the image."""
    caption: str
    mentions: tuple[str, ...]
    modality: str
    kind: str
    """``conversation`` or ``detailed_description``."""


@dataclass(frozen=True, slots=True)
class Caption:
    """A figure's published caption and inline mentions."""

    pair_id: str
    pmid: str
    label: str
    caption: str
    mentions: tuple[str, ...]
    modality: str


def read_conversations(path: Path) -> Iterator[Conversation | Dropped]:
    """The conversations of an alignment or instruction file, in its order.

    Rows that spell the key ``conversatons`` are read as the others. A conversation whose roles do
    not alternate, with an empty turn, or without exactly one image slot in its first turn is dropped.

    Raises:
        InputError: The file is not in the published format.
    """
    for where, row in object_rows(path):
        pair_id = text_of(row, "id", where)
        key = "conversatons" if "conversations" not in row and "conversatons" in row else "conversations"
        turns = turns_of(row, key, where)
        if isinstance(turns, str):
            yield Dropped(where, turns, pair_id)
            continue
        domain = row.get("domain")
        modality = modality_of_domain(cast("dict[str, object]", domain)) if isinstance(domain, dict) else None
        yield Conversation(pair_id, modality, turns)


def turns_of(row: dict[str, Any], key: str, where: str) -> tuple[Turn, ...] | str:
    """The turns under ``key`` of a row in LLaVA's format, or the reason for which they cannot train.

    Raises:
        InputError: They are not a list of ``{"from": "human" or "gpt", "value": text}``.
    """
    value = row.get(key)
    if not isinstance(value, list):
        refuse(
            f"{key!r} is {str(value)[:60]}; the keys are {', '.join(sorted(map(str, row)))}",
            where,
            f'"{key}": [{{"from": "human", "value": "…"}}, …]',
        )
    turns = tuple(_turn(turn, f"{where}, turn {index}") for index, turn in enumerate(cast("list[Any]", value)))
    return fault_of(turns) or turns


def _turn(value: Any, where: str) -> Turn:
    if not isinstance(value, dict):
        refuse(f"the turn is {value!r}", where, '{"from": "human" or "gpt", "value": "…"}')
    turn = cast("dict[str, Any]", value)
    speaker = text_of(turn, "from", where)
    if speaker not in ("human", "gpt"):
        refuse(f"'from' is {speaker!r}", where, "human or gpt")
    return Turn("user" if speaker == "human" else "assistant", text_of(turn, "value", where))


def fault_of(turns: tuple[Turn, ...]) -> str | None:
    """Why these turns are no training conversation, as a word for counting; None if they are one."""
    if not turns or len(turns) % 2:
        return "turns_incomplete"
    if any(turn.role != ("user", "assistant")[index % 2] for index, turn in enumerate(turns)):
        return "roles_not_alternating"
    if any(not turn.text.replace(SLOT, "").strip() for turn in turns):
        return "turn_empty"
    slots = [turn.text.count(SLOT) for turn in turns]
    if sum(slots) == 0:
        return "image_slot_missing"
    return None if slots[0] == 1 and sum(slots) == 1 else "image_slot_misplaced"


def read_chat_questions(path: Path) -> Iterator[ChatQuestion]:
    """The questions of ``llava_med_eval_qa50_qa.jsonl``, in its order.

    Raises:
        InputError: The file is not in the published format.
    """
    for where, row in json_lines(path):
        domain = row.get("domain")
        if not isinstance(domain, dict):
            refuse(f"'domain' is {domain!r}", where, "an object of flags")
        yield ChatQuestion(
            question_id=str(integer_of(row, "question_id", where)),
            pair_id=text_of(row, "pair_id", where),
            image_name=text_of(row, "image", where),
            question=text_of(row, "text", where).replace(SLOT, "").strip(),
            reference=text_of(row, "gpt4_answer", where),
            caption=text_of(row, "fig_caption", where),
            mentions=_mentions(row, where),
            modality=modality_of_domain(cast("dict[str, object]", domain)),
            kind=text_of(row, "type", where),
        )


def read_captions(path: Path) -> Iterator[Caption]:
    """The captions of a ``…_fig_captions.json``: an object that holds a list for each domain, or one list.

    Raises:
        InputError: The file is not in the published format.
    """
    if starts_with(path, "["):
        for where, row in object_rows(path):
            yield _caption(row, where)
        return
    for domain, rows in cast("dict[str, Any]", read_json(path)).items():
        if not isinstance(rows, list):
            refuse(f"{domain!r} holds {str(rows)[:40]}", str(path), "a list of captions for each domain")
        for index, row in enumerate(cast("list[Any]", rows)):
            where = f"{path}, {domain}, element {index}"
            if not isinstance(row, dict):
                raise InputError(f"the element is {row!r}", where=where, hint="expected a JSON object")
            yield _caption(cast("dict[str, Any]", row), where)


def _caption(row: dict[str, Any], where: str) -> Caption:
    domain = row.get("domain")
    return Caption(
        pair_id=text_of(row, "pair_id", where),
        pmid=text_of(row, "pmid", where),
        label=text_of(row, "fig_label", where),
        caption=text_of(row, "fig_caption", where),
        mentions=_mentions(row, where),
        modality=modality_of_domain(cast("dict[str, object]", domain)) if isinstance(domain, dict) else "unknown",
    )


def _mentions(row: dict[str, Any], where: str) -> tuple[str, ...]:
    value = row.get("in_text_mention")
    if value is None:  # some rows have null
        return ()
    if not isinstance(value, list):
        refuse(f"'in_text_mention' is {str(value)[:40]}", where, "a list or null")
    return tuple(text_of(mention, "tokens", where) for mention in cast("list[dict[str, Any]]", value))
