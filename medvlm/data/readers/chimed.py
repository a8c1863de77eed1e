"""ChiMed-VL: Chinese captions and conversations about figures of PubMed Central (Liu et al. 2023; no licence stated).

Its images were never released. Their names, such as ``PMC8253873_Fig6_46.jpg``, are panels that PMC-OA cut out
of figures; here the whole figure is fetched under that name, and texts join to it by the name without extension.
The released field names could not be verified: rows in LLaVA's shape, which the training code reads, and rows
with a caption or a question and answer are understood; anything else is refused with its keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from medvlm.data.readers.llava_med import SLOT, Conversation, fault_of, turns_of
from medvlm.data.readers.source import Dropped, Row, json_lines, object_rows, refuse, starts_with, text_of
from medvlm.records import Turn

__all__ = ["CAPTION_PROMPT", "LICENCE", "read_chimed"]

LICENCE = "not stated"
CAPTION_PROMPT = "请描述这张图片。"


def read_chimed(path: Path) -> Iterator[Conversation | Dropped]:
    """The texts of ``ChiMed-VL-Alignment.jsonl`` or ``ChiMed-VL-Instruction.json``, in their order.

    Args:
        path: JSON Lines or one JSON array; which of them, the first character says.

    Raises:
        InputError: The file is neither, or a row has none of the known shapes.
    """
    rows = object_rows(path) if starts_with(path, "[") else json_lines(path)
    for where, row in rows:
        name = text_of(row, "image", where)
        pair_id = name.rsplit("/", 1)[-1].rsplit(".", 1)[0]
        turns = _turns(row, where)
        yield Dropped(where, turns, name) if isinstance(turns, str) else Conversation(pair_id, None, turns)


def _turns(row: Row, where: str) -> tuple[Turn, ...] | str:
    if "conversations" in row:
        return turns_of(row, "conversations", where)
    if "question" in row and "answer" in row:
        question, answer = text_of(row, "question", where), text_of(row, "answer", where)
    elif "caption" in row:
        question, answer = CAPTION_PROMPT, text_of(row, "caption", where)
    else:
        refuse(f"the keys are {', '.join(sorted(row))}", where, "conversations, question and answer, or caption")
    turns = (Turn("user", question if SLOT in question else f"{SLOT}\n{question}"), Turn("assistant", answer))
    return fault_of(turns) or turns
