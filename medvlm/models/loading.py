"""Checks of foreign weights: every key accounted for, every size as the recipe says."""

from __future__ import annotations

import errno
import hashlib
import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medvlm.errors import CheckpointError

__all__ = ["check_hashes", "check_keys", "check_sizes", "disk_errors", "refuse_loading", "weight_hashes"]

_SHOWN = 8


@contextmanager
def refuse_loading(source: str) -> Generator[None]:
    """Turn what loaders raise into an error that names the source.

    Raises:
        CheckpointError: The block raised what a missing, damaged or unsafe file raises.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"the weights cannot be loaded: {error}",
            where=source,
            hint="check the hub id or folder; only safetensors are read, convert a .bin file first",
        ) from error


@contextmanager
def disk_errors() -> Generator[None]:
    """Turn the writer's own error for a full or read-only disk into the OSError that it hides.

    Raises:
        OSError: With the number that the operating system gave.
    """
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error)) from error


def weight_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each safetensors file of a folder, by name."""
    hashes: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as stream:
            hashes[path.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return hashes


def check_hashes(folder: Path, expected: Mapping[str, str]) -> None:
    """Refuse weights that are not the bytes that were written: a flipped bit still has the right shape.

    Args:
        folder: Of the checkpoint.
        expected: As ``weight_hashes`` gave them; empty where they were never taken.

    Raises:
        CheckpointError: A file is missing or changed; it is named.
    """
    if not expected:
        return
    found = weight_hashes(folder)
    changed = [name for name, digest in expected.items() if found.get(name) != digest]
    if changed:
        raise CheckpointError(
            f"the weights are not those that were written: {', '.join(changed)}",
            where=str(folder),
            hint="delete the folder, then restore it with 'dvc checkout' or 'dvc pull', or train the stage again",
        )


def check_keys(info: Mapping[str, Any], source: str, *, ignored: Sequence[str] = ()) -> None:
    """Refuse weights that do not cover the model exactly.

    Args:
        info: ``output_loading_info`` of ``from_pretrained``.
        source: Named in the error.
        ignored: Beginnings of keys that may be there unused.

    Raises:
        CheckpointError: Keys are missing, unexpected or of another shape; they are listed.
    """
    unexpected = [key for key in info["unexpected_keys"] if not key.startswith(tuple(ignored))]
    wrong = {
        "missing": sorted(map(str, info["missing_keys"])),
        "unexpected": sorted(unexpected),
        "of another shape": sorted(str(key) for key in info["mismatched_keys"]),
    }
    found = [f"{len(keys)} {kind}: {_listed(keys)}" for kind, keys in wrong.items() if keys]
    if found:
        raise CheckpointError(
            f"the weights do not fit the model; {'; '.join(found)}",
            where=source,
            hint="use weights of this architecture; none was left out or made up silently",
        )


def _listed(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(keys[:_SHOWN]) + more


def check_sizes(found: Any, expected: Any, names: Sequence[str], source: str) -> None:
    """Refuse weights of other sizes than the recipe says.

    Raises:
        CheckpointError: A field of the two configurations differs.
    """
    wrong = [
        f"{name} is {getattr(found, name)}, the recipe says {getattr(expected, name)}"
        for name in names
        if getattr(found, name) != getattr(expected, name)
    ]
    if wrong:
        raise CheckpointError("; ".join(wrong), where=source, hint="correct the recipe's sizes or its weights")
