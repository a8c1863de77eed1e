"""PMC-VQA: multiple-choice questions about figures of PubMed Central (Zhang et al. 2023; CC BY-SA, unverified)."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path

from medvlm.data.readers.source import Dropped, refuse, yes_no_type
from medvlm.errors import InputError
from medvlm.records import Image, Split, VQAItem

__all__ = ["read_pmc_vqa"]

LETTERS = "ABCD"
REQUIRED = ("Figure_path", "Question", *(f"Choice {letter}" for letter in LETTERS), "Answer")
IMAGE_NAME = re.compile(r"[^/\\]+\.(?:jpe?g|png|gif|tiff?|webp)\Z", re.IGNORECASE)


def read_pmc_vqa(path: Path) -> Iterator[VQAItem | Dropped]:
    """The questions of ``train.csv``, ``test.csv``, ``train_2.csv`` or ``test_2.csv``, without image bytes.

    The answer is the text of the right choice, whether the file gives its letter or its text. The
    split is the file's name. Choices are not part of the question: the systems here are asked openly.

    Raises:
        InputError: The file is missing, not UTF-8, has other columns, or a row is shifted.
    """
    split = _split_of(path)
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, strict=True)
            header = [name.strip() for name in next(reader, [])]
            missing = [name for name in REQUIRED if name not in header]
            if missing:
                refuse(f"the columns are {', '.join(header) or 'none'}", str(path), f"also {', '.join(missing)}")
            for index, values in enumerate(reader):
                where = f"{path}, line {reader.line_num}"
                if len(values) != len(header):
                    refuse(f"the row has {len(values)} fields", where, f"{len(header)}: {', '.join(header)}")
                row = {name: value.strip() for name, value in zip(header, values, strict=True)}
                yield _item(row, f"{path.stem}-{index}", split, where)
    except FileNotFoundError as error:
        raise InputError("the file does not exist", where=str(path), hint="check the path") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"the file is not UTF-8: {error.reason}", where=str(path), hint="convert it, for example with iconv"
        ) from error
    except csv.Error as error:
        raise InputError(
            f"the file is not CSV: {error}", where=str(path), hint="compare its size with the published one"
        ) from error


def _split_of(path: Path) -> Split:
    if path.stem.startswith("train"):
        return "train"
    if path.stem.startswith("test"):
        return "test"
    refuse(f"the file is named {path.name!r}", str(path), "a name that begins with train or test")


def _item(row: dict[str, str], item_id: str, split: Split, where: str) -> VQAItem | Dropped:
    name = row["Figure_path"]
    if not IMAGE_NAME.search(name):
        refuse(f"'Figure_path' is {name[:60]!r}", where, "an image's file name; are the columns shifted?")
    choices = {letter: _choice(row[f"Choice {letter}"], letter) for letter in LETTERS}
    answer = choices.get(row["Answer"]) or _choice(row["Answer"], row["Answer"][:1])
    if row["Answer"] and answer not in choices.values():
        refuse(f"'Answer' is {row['Answer'][:60]!r}", where, "a letter A to D or one of the four choices")
    if not answer or not row["Question"]:
        return Dropped(where, "answer_empty" if row["Question"] else "question_empty", item_id)
    return VQAItem(
        item_id=item_id,
        benchmark="pmc-vqa",
        split=split,
        image=Image(b"", name),
        image_id=name,
        image_sha256="",
        image_phash="",
        question=row["Question"],
        answer=answer,
        answer_type=yes_no_type(answer),
        answer_type_derived=True,
        question_type="multiple-choice",
        modality="unknown",
        organ="",
        language="en",
        case_id=_article(name),
    )


def _article(name: str) -> str:
    found = re.match(r"PMC\d+", name)
    return found[0] if found else ""


def _choice(text: str, letter: str) -> str:
    """The choice without its letter: ``" A:Axial "`` and ``"A: Axial"`` are ``Axial``."""
    return re.sub(rf"^\s*{re.escape(letter)}\s*[:.]\s*", "", text).strip() if letter else text.strip()
