"""The Hugging Face copies of VQA-RAD and PathVQA: Parquet with image, question and answer, and no answer type."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from medvlm.data.readers.source import Dropped, refuse, yes_no_type
from medvlm.errors import InputError
from medvlm.records import Image, Split, VQAItem

__all__ = ["hub_files", "read_hub_parquet"]

SPLITS: dict[str, Split] = {"train": "train", "validation": "validation", "test": "test"}
COLUMNS = {"image", "question", "answer"}


def hub_files(path: Path) -> list[Path]:
    """The Parquet files of a hub copy: ``path`` itself, or those below it; none where it is another release."""
    if path.is_dir():
        return sorted(path.glob("*.parquet")) or sorted(path.glob("data/*.parquet"))
    return [path] if path.suffix == ".parquet" else []


def read_hub_parquet(path: Path, benchmark: str) -> Iterator[VQAItem | Dropped]:
    """The rows of one file such as ``train-00000-of-00001.parquet``, with image bytes, streamed.

    The hub dropped duplicates, so its counts differ from the releases' (VQA-RAD: 1,793 train rows).
    Ids are ``<split>-<shard>-<row>``; the image id is the start of its SHA-256. An answer of yes or no makes a
    question closed, and that is marked as derived: of the official test, 21 closed questions count as open.

    Raises:
        InputError: The file is damaged, has other columns, or its name does not begin with a split.
    """
    split_name, _, rest = path.stem.partition("-")
    if split_name not in SPLITS:
        refuse(f"the file is named {path.name!r}", str(path), "a name that begins with train-, validation- or test-")
    try:
        with pq.ParquetFile(path) as file:
            _check_schema(file.schema_arrow, path)
            row = 0
            for batch in file.iter_batches(batch_size=64, columns=sorted(COLUMNS)):
                for value in batch.to_pylist():
                    shard = rest.split("-")[0] or "0"
                    yield _item(value, f"{split_name}-{int(shard) if shard.isdecimal() else shard}-{row}",
                                SPLITS[split_name], benchmark, f"{path}, row {row}")  # fmt: skip
                    row += 1
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(
            f"the file is no Parquet file: {error}", where=str(path), hint="download it again; compare its size"
        ) from error


def _check_schema(schema: pa.Schema, path: Path) -> None:
    missing = COLUMNS - set(schema.names)
    if missing:
        refuse(f"the columns are {', '.join(schema.names)}", str(path), f"{', '.join(sorted(COLUMNS))}")
    image = schema.field("image").type
    if not pa.types.is_struct(image) or image.get_field_index("bytes") < 0:
        refuse(f"the column 'image' is {image}", str(path), "struct<bytes: binary, path: string>")
    for name in ("question", "answer"):
        if not (pa.types.is_string(schema.field(name).type) or pa.types.is_large_string(schema.field(name).type)):
            refuse(f"the column {name!r} is {schema.field(name).type}", str(path), "string")


def _item(value: dict[str, Any], item_id: str, split: Split, benchmark: str, where: str) -> VQAItem | Dropped:
    data = (value["image"] or {}).get("bytes") or b""
    question, answer = (str(value[name] or "").strip() for name in ("question", "answer"))
    if not question or not answer:
        return Dropped(where, "answer_empty" if question else "question_empty", item_id)
    if not data:
        return Dropped(where, "image_missing", item_id)
    image_id = hashlib.sha256(data).hexdigest()[:16]
    return VQAItem(
        item_id=item_id,
        benchmark=benchmark,
        split=split,
        image=Image(data, value["image"].get("path") or f"{image_id}.jpg"),
        image_id=image_id,
        image_sha256="",
        image_phash="",
        question=question,
        answer=answer,
        answer_type=yes_no_type(answer),
        answer_type_derived=True,
        question_type="",
        modality="unknown",
        organ="",
        language="en",
    )
