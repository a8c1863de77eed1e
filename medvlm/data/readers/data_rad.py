"""The ``data_RAD`` split of VQA-RAD: 3,064 train and 451 test questions, on which LLaVA-Med trained.

It holds the paper's test questions, and rephrased ones as train rows of their own. Its ids are a
numbering of its own: a test row gets the official ``qid`` by its image and question, so that
predictions for one numbering score under the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from medvlm.data.readers.source import Dropped, choice_of, integer_of, object_rows, refuse, text_of
from medvlm.data.readers.vqa_rad import ANSWER_TYPES, MODALITY_OF_ORGAN, PUBLIC_FILE, read_vqa_rad
from medvlm.records import Image, Split, VQAItem

__all__ = ["read_data_rad"]

FILES: dict[str, Split] = {"trainset.json": "train", "testset.json": "test"}


def read_data_rad(folder: Path) -> Iterator[VQAItem | Dropped]:
    """Every row of ``trainset.json`` and ``testset.json``, without image bytes.

    Args:
        folder: Of VQA-RAD; holds the public JSON and ``data_RAD/``.

    Raises:
        InputError: A file is not in its format, or a test row is no official test question.
    """
    public = [item for item in read_vqa_rad(folder / PUBLIC_FILE) if isinstance(item, VQAItem)]
    official = {(item.image_id, item.question.lower()): item.item_id for item in public if item.split == "test"}
    cases = {item.image_id: item.case_id for item in public}
    for name, split in FILES.items():
        for where, row in object_rows(folder / "data_RAD" / name):
            item = _item(row, split, where)
            item = dataclasses.replace(item, case_id=cases.get(item.image_id, ""))
            if split == "test":
                key = (item.image_id, item.question.lower())
                if key not in official:
                    refuse(f"{item.question!r} about {item.image_id} is no test question", where, "the official test")
                item = dataclasses.replace(item, item_id=official[key])
            yield item if item.answer else Dropped(where, "answer_empty", item.item_id)


def _item(row: dict[str, object], split: Split, where: str) -> VQAItem:
    organ = text_of(row, "image_organ", where)
    name = text_of(row, "image_name", where)
    return VQAItem(
        item_id=f"data-rad-{integer_of(row, 'qid', where)}",
        benchmark="data-rad",
        split=split,
        image=Image(b"", name),
        image_id=name,
        image_sha256="",
        image_phash="",
        question=text_of(row, "question", where),
        answer=text_of(row, "answer", where),
        answer_type=choice_of(row, "answer_type", ANSWER_TYPES, where),
        answer_type_derived=False,
        question_type=text_of(row, "question_type", where),
        modality=MODALITY_OF_ORGAN.get(organ, "unknown"),
        organ=organ,
        language="en",
    )
