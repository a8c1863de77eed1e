"""Pickles that hold plain containers only, read without ever calling anything they name."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, NoReturn

from medvlm.errors import InputError

__all__ = ["read_plain_pickle"]


class _PlainUnpickler(pickle.Unpickler):
    """Lists, dicts, texts and numbers need no class; whatever asks for one is refused."""

    def find_class(self, module_name: str, global_name: str, /) -> NoReturn:
        raise pickle.UnpicklingError(f"it names {module_name}.{global_name}")

    def persistent_load(self, pid: object) -> NoReturn:
        raise pickle.UnpicklingError("it refers to an object outside the file")


def read_plain_pickle(path: Path) -> Any:
    """The lists, dicts, texts, bytes and numbers of a pickle.

    Raises:
        InputError: The file is missing or damaged, or asks for a class or function; none is looked up.
    """
    try:
        with path.open("rb") as stream:
            return _PlainUnpickler(stream).load()
    except FileNotFoundError as error:
        raise InputError("the file does not exist", where=str(path), hint="check the path") from error
    # A damaged pickle can fail in any of these ways; none of them has run foreign code.
    except (pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError, TypeError, AttributeError,
            MemoryError, OverflowError) as error:  # fmt: skip
        raise InputError(
            f"the pickle cannot be read as plain data: {error or type(error).__name__}",
            where=str(path),
            hint="use the JSON or Parquet copy of this dataset; pickles that hold objects are never loaded",
        ) from error
