"""Published files: their SHA-256, and whether a file is the published content."""

from __future__ import annotations

from pathlib import Path

from medvlm.data.readers import llava_med, vqa_rad
from medvlm.data.readers.source import file_sha256
from medvlm.store import Workspace

__all__ = ["SHA256", "is_synthetic", "official_state", "question_files"]

SHA256 = llava_med.SHA256 | vqa_rad.SHA256


def official_state(path: Path) -> dict[str, str]:
    """A file's name, its SHA-256, and ``match``, ``mismatch`` (the name is known, the content another) or ``unknown``.

    Raises:
        InputError: There is no such file.
    """
    sha256 = file_sha256(path)
    known = "mismatch" if path.name in SHA256 else "unknown"
    state = "match" if sha256 in SHA256.values() else known
    return {"file": path.name, "sha256": sha256, "official": state}


def question_files(release: Path) -> list[Path]:
    """The files of questions in a release's folder; images are not among them."""
    folders = (release, release / "Slake1.0", release / "data_RAD", release / "data")
    suffixes = (".json", ".csv", ".pkl", ".parquet", ".npz")
    return sorted(path for folder in folders for path in folder.glob("*") if path.suffix in suffixes)


def is_synthetic(workspace: Workspace, source: str | Path) -> bool:
    """Whether a file, folder or store lies in the workspace's sample corpus, so that what comes of it is synthetic."""
    return Path(source).resolve().is_relative_to(workspace.corpus.resolve())
