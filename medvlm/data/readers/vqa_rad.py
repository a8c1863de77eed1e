"""VQA-RAD: questions of clinicians about 315 radiology images (Lau et al. 2018; OSF 89kps; CC0 1.0)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from medvlm.data.readers.source import Dropped, Row, choice_of, integer_of, object_rows, text_of
from medvlm.records import AnswerType, Image, Split, VQAItem

__all__ = ["IMAGE_FOLDER", "PUBLIC_FILE", "SHA256", "case_of", "read_vqa_rad"]

PUBLIC_FILE = "VQA_RAD Dataset Public.json"
IMAGE_FOLDER = "VQA_RAD Image Folder"

SHA256 = {PUBLIC_FILE: "948b7156059b864cf72344fb10669233526b175c243e5a046d20d4201d297a95"}

ANSWER_TYPES: dict[str, AnswerType] = {"CLOSED": "closed", "OPEN": "open"}
# The paper's Methods: chest X-rays, axial abdominal CT slices, and head slices that are CT or MRI.
MODALITY_OF_ORGAN = {"CHEST": "chest_xray", "ABD": "ct", "HEAD": "unknown"}
SPLIT_OF_PHRASE: dict[str, Split] = {
    "freeform": "train",
    "para": "train",
    "test_freeform": "test",
    "test_para": "test",
}


def case_of(row: Row) -> str:
    """The MedPix case of a row, one patient's; empty where the row does not say."""
    case = row.get("image_case_url")
    return case.strip() if isinstance(case, str) and case != "NULL" else ""


def read_vqa_rad(path: Path) -> Iterator[VQAItem | Dropped]:
    """Every question of the public JSON, in its order, without image bytes.

    The split follows ``phrase_type``, as the paper defines it: 1,797 train, 451 test.

    Args:
        path: ``VQA_RAD Dataset Public.json``.

    Raises:
        InputError: The file is not in the published format.
    """
    for where, row in object_rows(path):
        organ = text_of(row, "image_organ", where)
        item = VQAItem(
            item_id=str(integer_of(row, "qid", where)),
            benchmark="vqa-rad",
            split=choice_of(row, "phrase_type", SPLIT_OF_PHRASE, where),
            image=Image(b"", text_of(row, "image_name", where)),
            image_id=text_of(row, "image_name", where),
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
            case_id=case_of(row),
        )
        yield Dropped(where, "answer_empty", item.item_id) if item.answer in ("", "NULL") else item
