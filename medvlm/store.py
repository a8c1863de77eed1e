"""Where everything lies: the workspace's paths, JSON files and step reports; and what writes and reads its shards."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from medvlm.atomic import atomic_folder, atomic_path, workspace_errors
from medvlm.errors import InputError
from medvlm.shards import iterate_records, read_records, shard_paths, write_records

__all__ = [
    "Report",
    "Workspace",
    "atomic_folder",
    "atomic_path",
    "fingerprint",
    "iterate_records",
    "read_json",
    "read_records",
    "read_report",
    "shard_paths",
    "write_json",
    "write_records",
    "write_report",
]


@dataclass(frozen=True)
class Workspace:
    """One root from which every path comes. Nothing else joins paths to it.

    Each step owns a folder: its data lies in a sub-folder of it, ``report.json`` beside that, so
    that a report (which holds times) never makes the data look changed.
    """

    root: Path

    @property
    def corpus(self) -> Path:
        """The synthetic sample corpus: bucket, URL list and official-format files."""
        return self.root / "corpus"

    @property
    def inbox(self) -> Path:
        """Where people put further URL lists."""
        return self.root / "inbox"

    @property
    def figures(self) -> Path:
        """Step folder of the fetch: ``shards/``, ``outcomes/``, ``report.json``."""
        return self.root / "figures"

    @property
    def figure_shards(self) -> Path:
        """Shards of ``Figure`` records."""
        return self.figures / "shards"

    @property
    def fetch_outcomes(self) -> Path:
        """Shards of ``FetchOutcome`` records, one for each input row."""
        return self.figures / "outcomes"

    def dataset(self, name: str) -> Path:
        """Step folder of a training dataset: ``alignment``, ``instruct`` or ``preference/<recipe>``."""
        return self.root / "datasets" / name

    def samples(self, name: str) -> Path:
        """Shards of a dataset's ``Sample`` (or ``PreferencePair``) records."""
        return self.dataset(name) / "samples"

    def preference(self, recipe: str) -> Path:
        """Step folder of the preference pairs that a recipe learns from: ``samples/`` and ``report.json``."""
        return self.dataset(f"preference/{recipe}")

    def preference_pairs(self, recipe: str) -> Path:
        """Shards of a recipe's ``PreferencePair`` records."""
        return self.preference(recipe) / "samples"

    def preference_recipes(self) -> list[str]:
        """Recipes whose preference pairs have been built, in order."""
        folder = self.dataset("preference")
        return sorted(path.parent.name for path in folder.glob("*/samples") if not path.parent.name.startswith("."))

    def benchmark(self, name: str) -> Path:
        """Step folder of a benchmark; its items of every split lie in ``items/``."""
        return self.root / "benchmarks" / name

    def items(self, name: str) -> Path:
        """Shards of a benchmark's ``VQAItem`` records, every split."""
        return self.benchmark(name) / "items"

    @property
    def leakage(self) -> Path:
        """Step folder: ``items/`` holds ``LeakedItem`` records of every benchmark; ``report.json`` the counts."""
        return self.root / "leakage"

    @property
    def leaked_items(self) -> Path:
        """Shards of ``LeakedItem`` records."""
        return self.leakage / "items"

    @property
    def privacy(self) -> Path:
        """Step folder of the look for burned-in text: ``flags/`` and ``report.json``."""
        return self.root / "privacy"

    @property
    def privacy_flags(self) -> Path:
        """Shards of ``PrivacyFlag`` records."""
        return self.privacy / "flags"

    def contract(self, name: str) -> Path:
        """A contract's last result, such as ``figures`` or ``preference/<recipe>``: result.json, quarantine.parquet."""
        return self.root / "contracts" / name

    def recipe(self, name: str) -> Path:
        """A recipe with all that it inherits, cut by stage: ``stage1.yaml``, ``stage2.yaml``, ``stage3.yaml``."""
        return self.root / "recipes" / name

    def checkpoint(self, recipe: str, stage: int, target: str = "all") -> Path:
        """A finished checkpoint. ``target`` names the benchmark where a stage makes one for each."""
        return self.stage(recipe, stage) / "checkpoint" / target

    def stage(self, recipe: str, stage: int) -> Path:
        """Step folder of one training stage (1, 2 or 3) of a recipe."""
        return self.root / "checkpoints" / recipe / f"stage{stage}"

    def logs(self, recipe: str, stage: int, target: str = "all") -> Path:
        """Folder of TensorBoard's event files of one training job; no step reads them."""
        return self.root / "logs" / recipe / f"stage{stage}" / target

    def router(self, recipe: str) -> Path:
        """Step folder of a recipe's domain router: ``router/`` and ``report.json``."""
        return self.root / "routers" / recipe

    def router_weights(self, recipe: str) -> Path:
        """A trained or imported domain router: ``router.safetensors`` and ``metadata.json``."""
        return self.router(recipe) / "router"

    def scratch(self, *parts: str) -> Path:
        """Folder for what a killed run resumes from. Not a result; safe to delete when nothing runs."""
        return self.root.joinpath("scratch", *parts)

    def predictions(self, recipe: str, benchmark: str) -> Path:
        """Step folder: ``answers/`` (with and without the image) and ``report.json``."""
        return self.root / "predictions" / recipe / benchmark

    def scores(self, recipe: str, benchmark: str) -> Path:
        """Step folder: ``scores/scores.parquet``, ``scores/wrong_answers.parquet``, ``report.json``."""
        return self.root / "scores" / recipe / benchmark

    def release(self, recipe: str) -> Path:
        """Step folder: ``bundle/`` is what leaves the house; ``promoted.json`` says which one may be used."""
        return self.root / "releases" / recipe

    @property
    def leaderboard(self) -> Path:
        """Step folder of the leaderboard: ``rows.json`` and ``report.json``."""
        return self.root / "leaderboard"

    @property
    def review(self) -> Path:
        """Folder of people's decisions, append-only."""
        return self.root / "review"

    @property
    def review_decisions(self) -> Path:
        """Every decision about a record, one JSON line each; what datasets are built from depends on it."""
        return self.review / "decisions.jsonl"

    @property
    def review_preferences(self) -> Path:
        """A shard for each preference that somebody expressed in a chat."""
        return self.review / "preferences"

    def ensure(self) -> Workspace:
        """Create the root if needed and make sure that it can be written.

        An empty journal of decisions and an empty folder of preferences are there from the start: DVC refuses a
        step that depends on a file which does not exist.

        Raises:
            WorkspaceError: It cannot, with the reason of the operating system.
        """
        probe = self.root / f".probe-{uuid.uuid4().hex}"
        with workspace_errors(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
            self.review_preferences.mkdir(parents=True, exist_ok=True)
            if not self.review_decisions.exists():
                self.review_decisions.touch()
        return self


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, with sorted keys so that equal content has equal bytes."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")


def read_json(path: Path) -> Any:
    """Parsed JSON of a file, UTF-8 with or without a byte-order mark.

    Raises:
        InputError: It is missing, not UTF-8 or not JSON, with the line where it broke.
    """
    try:
        return json.loads(path.read_text("utf-8-sig"))
    except FileNotFoundError as error:
        raise InputError("the file does not exist", where=str(path), hint="check the path") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"the file is not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}",
            where=str(path),
            hint="convert it, for example with iconv -f latin1 -t utf-8",
        ) from error
    except json.JSONDecodeError as error:
        raise InputError(
            f"the file is not JSON: {error.msg}",
            where=f"{path}, line {error.lineno}, column {error.colno}",
            hint="compare its size and SHA-256 with the published file; a truncated download ends like this",
        ) from error


@dataclass(frozen=True)
class Report:
    """What a step says about its run. Dagster metadata, DVC metrics and the dashboards read this."""

    step: str
    counts: dict[str, int] = field(default_factory=dict[str, int])
    metrics: dict[str, float] = field(default_factory=dict[str, float])
    details: dict[str, Any] = field(default_factory=dict[str, Any])
    """Anything JSON: reasons for loss, curves, tables."""
    duration_s: float = 0.0
    seed: int | None = None
    fingerprint: str = ""
    """Changes when and only when the content of the step's output does."""
    created_at: str = ""
    """UTC, ISO 8601; set when written."""
    versions: dict[str, str] = field(default_factory=dict[str, str])


def write_report(folder: Path, report: Report, *, started: float, packages: Sequence[str] = ("pyarrow",)) -> Report:
    """Write ``report.json`` beside a step's data.

    Args:
        folder: The step's folder.
        report: Without duration, time and versions, which are filled in here.
        started: ``time.monotonic()`` at the step's start.
        packages: Whose versions the result depends on; medvlm's own is always there.

    Returns:
        The report as written.
    """
    versions = {name: importlib.metadata.version(name) for name in ("medvlm", *packages)}
    full = dataclasses.replace(
        report,
        duration_s=round(time.monotonic() - started, 3),
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=versions,
    )
    write_json(folder / "report.json", dataclasses.asdict(full))
    return full


def read_report(folder: Path) -> Report | None:
    """The report of a step, or None if it has not run.

    Raises:
        InputError: The file is damaged.
    """
    path = folder / "report.json"
    if not path.exists():
        return None
    values: dict[str, Any] = read_json(path)
    known = {f.name for f in dataclasses.fields(Report)}
    return Report(**{name: value for name, value in values.items() if name in known})


def fingerprint(*parts: Any) -> str:
    """A short stable hash of JSON-like values and of the content of files (given as ``Path``)."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            with part.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        else:
            digest.update(json.dumps(part, sort_keys=True, ensure_ascii=False, default=str).encode())
        digest.update(b"\0")
    return digest.hexdigest()[:16]
