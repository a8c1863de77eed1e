"""Checks of foreign weights: every key accounted for, every size as the recipe says."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from medvlm.errors import CheckpointError

__all__ = ["check_keys", "check_sizes", "refuse_loading"]

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
