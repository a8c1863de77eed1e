"""SLAKE: English and Chinese questions about 642 radiology images (Liu et al. 2021; CC BY 4.0)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from medvlm.data.readers.source import Dropped, choice_of, integer_of, object_rows, refuse, text_of
from medvlm.records import AnswerType, Image, Split, VQAItem

__all__ = ["SPLIT_OF_FILE", "read_slake"]

SPLIT_OF_FILE: dict[str, Split] = {"train.json": "train", "validate.json": "validation", "test.json": "test"}

ANSWER_TYPES: dict[str, AnswerType] = {"CLOSED": "closed", "OPEN": "open"}
LANGUAGES: dict[str, Literal["en", "zh"]] = {"en": "en", "zh": "zh"}
# Every X-ray of SLAKE is one of the lung.
MODALITIES = {"CT": "ct", "MRI": "mri", "X-Ray": "chest_xray"}


def read_slake(path: Path, language: Literal["en", "zh"]) -> Iterator[VQAItem | Dropped]:
    """The questions in one language of one of SLAKE's three files, in its order, without image bytes.

    Args:
        path: ``train.json``, ``validate.json`` or ``test.json``: its name is its split.
        language: The benchmark is ``slake`` for English and ``slake-zh`` for Chinese.

    Raises:
        InputError: The file is not in the published format, or has another name.
    """
    if path.name not in SPLIT_OF_FILE:
        refuse(
            f"the file is named {path.name!r}", str(path), f"one of {', '.join(SPLIT_OF_FILE)}, which name the split"
        )
    for where, row in object_rows(path):
        if choice_of(row, "q_lang", LANGUAGES, where) != language:
            continue
        item = VQAItem(
            item_id=str(integer_of(row, "qid", where)),
            benchmark="slake" if language == "en" else "slake-zh",
            split=SPLIT_OF_FILE[path.name],
            image=Image(b"", text_of(row, "img_name", where)),
            image_id=text_of(row, "img_id", where),
            image_sha256="",
            image_phash="",
            question=text_of(row, "question", where),
            answer=text_of(row, "answer", where),
            answer_type=choice_of(row, "answer_type", ANSWER_TYPES, where),
            answer_type_derived=False,
            question_type=text_of(row, "content_type", where),
            modality=choice_of(row, "modality", MODALITIES, where),
            organ=text_of(row, "location", where),
            language=language,
            # An image has a folder of its own, such as xmlab102.
            case_id=text_of(row, "img_name", where).rpartition("/")[0],
        )
        yield item if item.answer else Dropped(where, "answer_empty", f"qid {item.item_id}")
