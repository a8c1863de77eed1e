"""MedMNIST: small images with a modality and a class, for the router and as VQA (Yang et al. 2023; CC BY 4.0)."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image as PillowImage

from medvlm.data.readers.source import Dropped, refuse
from medvlm.errors import InputError
from medvlm.records import Image, Split, VQAItem

__all__ = ["COLLECTIONS", "Collection", "read_medmnist"]

MAX_BYTES = 16 * 2**30
"""An archive that unpacks to more is refused before it is opened."""

SPLITS: dict[str, Split] = {"train": "train", "val": "validation", "test": "test"}


@dataclass(frozen=True, slots=True)
class Collection:
    """What one of MedMNIST's files shows and what its labels mean."""

    modality: str
    question: str
    labels: tuple[str, ...]


COLLECTIONS = {
    "pneumoniamnist": Collection(
        "chest_xray", "Does this chest X-ray show pneumonia or is it normal?", ("normal", "pneumonia")
    ),
    "organcmnist": Collection(
        "ct",
        "Which organ is shown in this CT image?",
        ("bladder", "left femur", "right femur", "heart", "left kidney", "right kidney", "liver", "left lung",
         "right lung", "pancreas", "spleen"),
    ),
    "pathmnist": Collection(
        "histology",
        "Which tissue is shown in this histology image?",
        ("adipose", "background", "debris", "lymphocytes", "mucus", "smooth muscle", "normal colon mucosa",
         "cancer-associated stroma", "colorectal adenocarcinoma epithelium"),
    ),
}  # fmt: skip


def read_medmnist(path: Path) -> Iterator[VQAItem | Dropped]:
    """Every image of an ``.npz`` as a classification question, PNG bytes included.

    Args:
        path: Such as ``pneumoniamnist.npz`` or ``organcmnist_64.npz``; its name says which collection it is.

    Raises:
        InputError: The file is missing, damaged, of an unknown collection, holds Python objects, or
            other arrays than ``{train,val,test}_{images,labels}``.
    """
    name = path.stem.split("_")[0]
    if name not in COLLECTIONS:
        refuse(f"the file is named {path.name!r}", str(path), f"one of {', '.join(COLLECTIONS)}, with .npz")
    for part, split in SPLITS.items():
        images, labels = _arrays(path, part)
        for index in range(len(images)):
            yield _item(images[index], int(labels[index]), f"{part}-{index}", split, name, f"{path}, {part} {index}")


def _arrays(path: Path, part: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[Any]]:
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > MAX_BYTES:
            refuse(f"the archive unpacks to {size:,} bytes", str(path), f"at most {MAX_BYTES:,}")
        with np.load(path, allow_pickle=False) as arrays:
            images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"].reshape(-1)
    except FileNotFoundError as error:
        raise InputError("the file does not exist", where=str(path), hint="check the path") from error
    except (zipfile.BadZipFile, ValueError, KeyError, OSError, EOFError) as error:
        raise InputError(
            f"the file is no MedMNIST archive: {error}", where=str(path), hint="download it again; compare its MD5"
        ) from error
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or len(images) != len(labels):
        refuse(
            f"{part}_images is {images.dtype} {images.shape} with {len(labels)} labels",
            str(path),
            "uint8 images (N, height, width[, 3]) and N labels",
        )
    return images, labels


def _item(
    pixels: npt.NDArray[np.uint8], label: int, item_id: str, split: Split, name: str, where: str
) -> VQAItem | Dropped:
    collection = COLLECTIONS[name]
    if not 0 <= label < len(collection.labels):
        return Dropped(where, "label_unknown", str(label))
    buffer = io.BytesIO()
    PillowImage.fromarray(pixels).save(buffer, "PNG")
    return VQAItem(
        item_id=item_id,
        benchmark=name,
        split=split,
        image=Image(buffer.getvalue(), f"{item_id}.png"),
        image_id=item_id,
        image_sha256="",
        image_phash="",
        question=collection.question,
        answer=collection.labels[label],
        answer_type="closed",
        answer_type_derived=True,
        question_type="classification",
        modality=collection.modality,
        organ="",
        language="en",
    )
