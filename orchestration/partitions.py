"""The partitions: parts of URL lists, recipes, and recipes by benchmark."""

import re
from collections.abc import Iterator
from pathlib import Path

import dagster as dg

from medvlm.config import recipe_names
from medvlm.errors import InputError
from medvlm.settings import BENCHMARKS

recipes = dg.StaticPartitionsDefinition(recipe_names())
"""Every recipe that ships; one runs only if params.yaml lists it."""

evaluations = dg.MultiPartitionsDefinition(
    {"recipe": recipes, "benchmark": dg.StaticPartitionsDefinition(list(BENCHMARKS))}
)

list_parts = dg.DynamicPartitionsDefinition(name="list_parts")
"""Parts of URL lists, such as ``llava_med_image_urls.jsonl:3-of-16``; the sensor `inbox_lists` adds them."""

PART_ROWS = 45_000
"""Rows of a part, about: LLaVA-Med's list has 16 of them."""

_NAME = re.compile(r"[\w.-]+", re.ASCII)
_KEY = re.compile(r"(?P<name>[\w.-]+):(?P<part>\d+)-of-(?P<parts>\d+)", re.ASCII)


def keys_of_list(path: Path) -> list[str]:
    """Partition keys of one URL list, at least one.

    Raises:
        InputError: The name cannot be a key, or the list cannot be read.
    """
    if not _NAME.fullmatch(path.name):
        raise InputError(
            "the name of a URL list has letters, digits, dots, dashes and underscores only",
            where=str(path),
            hint="rename the file",
        )
    parts = max(1, round(sum(1 for _ in _rows(path)) / PART_ROWS))
    return [f"{path.name}:{part}-of-{parts}" for part in range(1, parts + 1)]


def _rows(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as stream:
            yield from (line for line in stream if line.strip())
    except OSError as error:
        raise InputError(
            f"the list cannot be read: {error.strerror}", where=str(path), hint="check the file"
        ) from error


def part_of_key(key: str) -> tuple[str, str]:
    """A list's file name and ``--shard`` of a partition key.

    Raises:
        InputError: It is no key that ``keys_of_list`` makes.
    """
    match = _KEY.fullmatch(key)
    if match is None:
        raise InputError(f"{key!r} is no part of a list", where="partition key", hint="write NAME.jsonl:3-of-16")
    return match["name"], f"{match['part']}/{match['parts']}"
