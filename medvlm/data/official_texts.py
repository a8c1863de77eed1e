"""Published files of conversations: which of a folder's files they are, and the reader that each one needs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from medvlm.data.readers.chimed import read_chimed
from medvlm.data.readers.llava_med import Conversation, read_conversations
from medvlm.data.readers.source import Dropped, json_lines, object_rows, refuse, starts_with
from medvlm.errors import InputError

__all__ = ["holds_shards", "official_files", "read_official", "read_officials"]

_SUFFIXES = (".json", ".jsonl")


def holds_shards(folder: Path) -> bool:
    """Whether a folder holds Parquet shards rather than published files."""
    return any(folder.glob("*.parquet"))


def official_files(paths: Path | Iterable[Path]) -> list[Path]:
    """The published files that paths name, in order: a folder stands for its JSON and JSON Lines files by name.

    Raises:
        InputError: A folder has none.
    """
    files: list[Path] = []
    for path in [paths] if isinstance(paths, Path) else paths:
        if not path.is_dir():
            files.append(path)
            continue
        found = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES and not file.name.startswith("."))
        if not found:
            raise InputError(
                "the folder holds no published file",
                where=str(path),
                hint="put the .json or .jsonl files of LLaVA-Med or ChiMed-VL there, or name them one by one",
            )
        files += found
    return files


def read_officials(files: Sequence[Path]) -> Iterator[Conversation | Dropped]:
    """The conversations of several published files, one file after the other.

    Raises:
        InputError: A file has no known form.
    """
    return itertools.chain.from_iterable(map(read_official, files))


def read_official(path: Path) -> Iterator[Conversation | Dropped]:
    """The conversations of one published file: LLaVA-Med's or ChiMed-VL's, as its form says.

    Raises:
        InputError: It has neither form; the first row's keys are named.
    """
    return _reader(path)(path)


def _reader(path: Path) -> Callable[[Path], Iterator[Conversation | Dropped]]:
    # Both publish LLaVA's rows. ChiMed-VL's come as lines, or under its name, and join by the image's name.
    array = starts_with(path, "[")
    where, row = next(object_rows(path) if array else json_lines(path), (str(path), None))
    if row is None:
        raise InputError("the file has no rows", where=where, hint="compare its size with the published file's")
    if "chosen_conversations" in row:
        raise InputError(
            "the file holds preference pairs, not conversations",
            where=str(path),
            hint="give it to 'medvlm dataset build-preference --official'",
        )
    turns = row.keys() & {"conversations", "conversatons"}
    if array and "id" in row and turns and not path.name.lower().startswith("chimed"):
        return read_conversations
    if "image" in row and (turns or "caption" in row or row.keys() >= {"question", "answer"}):
        return read_chimed
    refuse(
        f"the keys are {', '.join(sorted(map(str, row)))}",
        where,
        "LLaVA-Med's id and conversations, or ChiMed-VL's image and conversations, caption, or question and answer",
    )
