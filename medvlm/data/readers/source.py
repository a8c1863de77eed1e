"""What every reader shares: rows of foreign files, typed access to their fields, and dropped rows."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

from medvlm.errors import InputError
from medvlm.records import AnswerType

__all__ = [
    "Dropped",
    "Row",
    "choice_of",
    "file_sha256",
    "integer_of",
    "json_lines",
    "object_rows",
    "read_text",
    "refuse",
    "starts_with",
    "text_of",
    "yes_no_type",
]

T = TypeVar("T")
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Dropped:
    """A row that a reader read and did not pass on."""

    where: str
    """File and row."""
    reason: str
    """A word for counting, such as ``answer_empty``."""
    value: str
    """The offending value."""


def refuse(what: str, where: str, expected: str) -> NoReturn:
    """Raise the one error of a file that is not in its published format.

    Raises:
        InputError: Always.
    """
    raise InputError(what, where=where, hint=f"expected {expected}; compare the file with the published one")


def object_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """The objects of a JSON array file, each with its place for error messages.

    One object is parsed at a time: a file of half a million takes the memory of its text.

    Raises:
        InputError: The file is missing, not UTF-8, truncated, or not an array of objects.
    """
    text = read_text(path)
    decoder = json.JSONDecoder()
    position = _skip(text, 0)
    if text[position : position + 1] != "[":
        refuse(f"the file begins with {text[position : position + 20]!r}", str(path), "a JSON array of objects")
    position, index = _skip(text, position + 1), 0
    while text[position : position + 1] != "]":
        where = f"{path}, element {index}"
        try:
            row, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise _not_json(error, path) from error
        if not isinstance(row, dict):
            refuse(f"the element is {_kind(row)}", where, "a JSON object")
        yield where, cast(Row, row)
        position, index = _skip(text, position), index + 1
        if text[position : position + 1] == ",":
            position = _skip(text, position + 1)
        elif text[position : position + 1] != "]":
            raise _not_json(json.JSONDecodeError("expected a comma or the array's end", text, position), path)
    if _skip(text, position + 1) != len(text):
        raise _not_json(json.JSONDecodeError("there is more after the array", text, position + 1), path)


_BLANK = re.compile(r"\s*")


def _skip(text: str, position: int) -> int:
    match = _BLANK.match(text, position)
    return match.end() if match else position


def _not_json(error: json.JSONDecodeError, path: Path) -> InputError:
    return InputError(
        f"the file is not JSON: {error.msg}",
        where=f"{path}, line {error.lineno}, column {error.colno}",
        hint="compare its size and SHA-256 with the published file; a truncated download ends like this",
    )


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with or without a byte-order mark.

    Raises:
        InputError: It is missing or not UTF-8, with the byte where it broke.
    """
    try:
        return path.read_text("utf-8-sig")
    except (FileNotFoundError, IsADirectoryError) as error:
        raise InputError("the file does not exist", where=str(path), hint="check the path") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"the file is not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}",
            where=str(path),
            hint="convert it, for example with iconv -f latin1 -t utf-8",
        ) from error


def json_lines(path: Path) -> Iterator[tuple[str, Row]]:
    """The objects of a JSON Lines file, each with its place; the file is streamed.

    Raises:
        InputError: The file is missing, not UTF-8, or a line is not a JSON object.
    """
    try:
        with path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield f"{path}, line {number}", _json_line(line, f"{path}, line {number}")
    except FileNotFoundError as error:
        raise InputError("the file does not exist", where=str(path), hint="check the path") from error


def _json_line(line: bytes, where: str) -> Row:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(
            f"the line is not UTF-8: byte {error.start} is 0x{line[error.start]:02x}",
            where=where,
            hint="convert the file, for example with iconv -f latin1 -t utf-8",
        ) from error
    except json.JSONDecodeError as error:
        raise InputError(
            f"the line is not JSON: {error.msg} at column {error.colno}",
            where=where,
            hint="compare the file's size with the published one; a truncated download ends like this",
        ) from error
    if not isinstance(row, dict):
        refuse(f"the line is {_kind(row)}", where, "a JSON object")
    return cast(Row, row)


def text_of(row: Row, key: str, where: str) -> str:
    """The text under ``key``, stripped; a number becomes text, as VQA-RAD's five numeric answers must.

    Raises:
        InputError: The key is absent or holds something else.
    """
    value = _value(row, key, where)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        refuse(f"{key!r} is {_kind(value)}", where, "text")
    return value.strip()


def integer_of(row: Row, key: str, where: str) -> int:
    """The whole number under ``key``; digits in a string count, as VQA-RAD's qid ``"0"`` must.

    Raises:
        InputError: The key is absent or holds something else.
    """
    value = _value(row, key, where)
    if isinstance(value, str) and value.strip().isdecimal():
        return int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        refuse(f"{key!r} is {value!r}", where, "a whole number")
    return value


def choice_of(row: Row, key: str, choices: dict[str, T], where: str) -> T:
    """What ``choices`` gives for the stripped text under ``key``.

    Raises:
        InputError: The key is absent or the text is none of the choices.
    """
    text = text_of(row, key, where)
    if text not in choices:
        refuse(f"{key!r} is {text!r}", where, f"one of {', '.join(choices)}")
    return choices[text]


def yes_no_type(answer: str) -> AnswerType:
    """``closed`` for a yes/no answer, else ``open``: what can be derived where a release has no type."""
    return "closed" if answer.strip().lower().rstrip(".") in ("yes", "no") else "open"


def _value(row: Row, key: str, where: str) -> Any:
    if key not in row:
        refuse(f"the key {key!r} is absent; the keys are {', '.join(sorted(map(str, row)))}", where, f"the key {key!r}")
    return row[key]


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), f"the number {value!r}")


def starts_with(path: Path, character: str) -> bool:
    """Whether a text file's first character that is not blank is this one.

    Raises:
        InputError: There is no such file.
    """
    try:
        with path.open(encoding="utf-8-sig", errors="replace") as stream:
            return stream.read(4096).lstrip()[:1] == character
    except (FileNotFoundError, IsADirectoryError) as error:
        raise InputError("the file does not exist", where=str(path), hint="check the path") from error


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, 64 hex digits.

    Raises:
        InputError: There is no such file.
    """
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise InputError("the file does not exist", where=str(path), hint="check the path") from error
