"""PathVQA: questions about figures of pathology textbooks (He et al. 2020; questions MIT, images not ours to share)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from medvlm.data.readers.plain_pickle import read_plain_pickle
from medvlm.data.readers.source import Dropped, object_rows, refuse, text_of, yes_no_type
from medvlm.records import Image, Split, VQAItem

__all__ = ["SPLIT_OF_PREFIX", "read_pathvqa"]

SPLIT_OF_PREFIX: dict[str, Split] = {"train": "train", "val": "validation", "test": "test"}


def read_pathvqa(path: Path) -> Iterator[VQAItem | Dropped]:
    """Every question of a ``pvqa_*.json`` or ``.pkl``, in its order, without image bytes.

    A JSON record holds one image's questions under ``sentf.pvqa`` and, at the same places, their
    answers as ``{answer: 1}`` under ``labelf.pvqa``; images without questions have empty lists.
    A pickle holds such records too, or one ``{image, question, answer}`` a question.
    The split is the first part of the image's name. The release's answer types are not in this form:
    an answer of yes or no makes a question closed, which gives the published 3,391 of 6,761.

    Raises:
        InputError: The file is not in the published format.
    """
    rows = _pickled_rows(path) if path.suffix in (".pkl", ".pickle") else object_rows(path)
    asked: Counter[str] = Counter()
    for where, row in rows:
        if "question" in row:
            image_id = text_of(row, "image", where).removesuffix(".jpg")
            split = SPLIT_OF_PREFIX.get(image_id.split("_")[0])
            if split is None:
                refuse(f"'image' is {image_id!r}", where, "train_…, val_… or test_…")
            answer = text_of(row, "answer", where)
            yield _item(image_id, split, asked[image_id], row["question"], {answer: 1}, where)
            asked[image_id] += 1
            continue
        image_id = text_of(row, "img_id", where)
        prefix = image_id.split("_")[0]
        if prefix not in SPLIT_OF_PREFIX:
            refuse(f"'img_id' is {image_id!r}", where, "train_…, val_… or test_…")
        questions, labels = _pvqa_list(row, "sentf", where), _pvqa_list(row, "labelf", where)
        if len(questions) != len(labels):
            refuse(f"there are {len(questions)} questions and {len(labels)} answers", where, "one answer a question")
        for index, (question, label) in enumerate(zip(questions, labels, strict=True)):
            place = f"{where}, question {index}"
            yield _item(image_id, SPLIT_OF_PREFIX[prefix], index, question, label, place)


def _pickled_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    value = read_plain_pickle(path)
    if not isinstance(value, list):
        refuse(f"the pickle holds a {type(value).__name__}", str(path), "a list of records")
    for index, row in enumerate(cast("list[Any]", value)):
        if not isinstance(row, dict):
            refuse(f"the element is a {type(row).__name__}", f"{path}, element {index}", "a record")
        yield f"{path}, element {index}", cast("dict[str, Any]", row)


def _pvqa_list(row: dict[str, Any], key: str, where: str) -> list[Any]:
    value = row.get(key)
    inner = cast("dict[str, Any]", value).get("pvqa") if isinstance(value, dict) else None
    if not isinstance(inner, list):
        refuse(f"{key!r} is {str(value)[:80]}", where, f'"{key}": {{"pvqa": […]}}')
    return cast("list[Any]", inner)


def _item(image_id: str, split: Split, index: int, question: Any, label: Any, where: str) -> VQAItem | Dropped:
    if not isinstance(question, str):
        refuse(f"the question is {question!r}", where, "text")
    if not isinstance(label, dict) or len(cast("dict[Any, Any]", label)) != 1:
        refuse(f"the answer is {label!r}", where, 'exactly one {"answer": 1}')
    (answer,) = map(str, cast("dict[Any, Any]", label))
    answer = answer.strip()
    if not answer or not question.strip():
        return Dropped(where, "answer_empty" if not answer else "question_empty", f"{image_id}_{index}")
    return VQAItem(
        item_id=f"{image_id}_{index}",
        benchmark="pathvqa",
        split=split,
        image=Image(b"", f"{image_id}.jpg"),
        image_id=image_id,
        image_sha256="",
        image_phash="",
        question=question.strip(),
        answer=answer,
        answer_type=yes_no_type(answer),
        answer_type_derived=True,
        question_type=question_type(question, answer),
        modality="unknown",
        organ="",
        language="en",
    )


def question_type(question: str, answer: str) -> str:
    """The question's kind in the words of the original pickles: yes/no, number, where, how, … or other."""
    if yes_no_type(answer) == "closed":
        return "yes/no"
    words = question.lower().split()
    if words[:2] in (["how", "many"], ["how", "much"]):
        return "number"
    return words[0] if words and words[0] in ("where", "how", "when", "whose", "why") else "other"
