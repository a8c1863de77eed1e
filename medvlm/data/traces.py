"""By what the images and questions of a set can be recognised, read from releases and workspaces."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from medvlm.data.benchmarks import BENCHMARKS, read_benchmark
from medvlm.errors import InputError, WorkspaceError
from medvlm.records import VQAItem
from medvlm.store import Workspace, shard_paths

__all__ = [
    "Traces",
    "family_of",
    "item_traces",
    "normalise_question",
    "read_release",
    "split_traces",
    "training_sets",
    "workspace_benchmarks",
]

_ARTICLE = re.compile(r"PMC\d+")


@dataclass
class Traces:
    """By what the rows of a set can be recognised, column by column, one entry a row."""

    name: str
    family: str
    """Sets of one family name their images alike, so that image ids can be compared."""
    row_id: list[str] = field(default_factory=list[str])
    sha256: list[str] = field(default_factory=list[str])
    phash: list[str] = field(default_factory=list[str])
    image_id: list[str] = field(default_factory=list[str])
    case_id: list[str] = field(default_factory=list[str])
    """Article or patient; empty where unknown."""
    question: list[str] = field(default_factory=list[str])
    """Normalised; of benchmark items only, since a conversation asks several."""
    asked: dict[str, str] = field(default_factory=dict[str, str])
    """Every normalised question of the set → id of a row that asks it."""

    def __len__(self) -> int:
        return len(self.row_id)

    @property
    def images(self) -> int:
        """Number of different images."""
        return len(set(self.sha256))


def normalise_question(text: str) -> str:
    """A question without case, punctuation and spacing, in any script."""
    plain = unicodedata.normalize("NFKC", text.replace("<image>", " ")).casefold()
    return " ".join("".join(c if c.isalnum() else " " for c in plain).split())


def item_traces(name: str, items: Iterable[VQAItem]) -> Traces:
    """Traces of benchmark items, which must hold image hashes.

    Args:
        name: Of the set, such as ``vqa-rad:train``.
        items: Consumed once; their bytes are not kept.
    """
    traces = Traces(name, family_of(name.split(":")[0]))
    for item in items:
        traces.row_id.append(item.item_id)
        traces.sha256.append(item.image_sha256)
        traces.phash.append(item.image_phash)
        traces.image_id.append(item.image_id)
        traces.case_id.append(item.case_id or _article(item.image_id))
        traces.question.append(normalise_question(item.question))
        traces.asked.setdefault(traces.question[-1], item.item_id)
    return traces


def family_of(benchmark: str) -> str:
    """The release that a benchmark is cut from: SLAKE's two languages share their images."""
    return benchmark.removesuffix("-zh")


def _article(name: str) -> str:
    found = _ARTICLE.search(name)
    return found.group() if found else ""


def read_release(name: str, root: Path) -> Traces:
    """Traces of one split of an official release, from its images as they lie on disk.

    Args:
        name: ``<benchmark>:<split>`` or ``<benchmark>:<split>:<language>``, such as ``slake:train:en``.
        root: The release's folder, or one with a sub-folder for each release.

    Raises:
        InputError: No such benchmark, split or language, or the release is not complete.
    """
    benchmark, split = _parse_split(name)
    folder = root / family_of(benchmark)
    folder = folder if folder.is_dir() else root
    traces = item_traces(name, (item for item in read_benchmark(benchmark, folder) if item.split == split))
    if not len(traces):
        raise InputError(
            f"the split {name!r} has no questions",
            where=str(folder),
            hint="choose one of train, validation and test that the release has",
        )
    return traces


def _parse_split(name: str) -> tuple[str, str]:
    """Benchmark and split of ``benchmark:split[:language]``."""
    parts = name.split(":")
    benchmark, split = parts[0], parts[1] if len(parts) > 1 else ""
    if len(parts) == 3 and parts[2] != "en":
        benchmark = f"{benchmark}-{parts[2]}"
    if len(parts) > 3 or benchmark not in BENCHMARKS or split not in ("train", "validation", "test"):
        raise InputError(
            f"{name!r} names no split of a benchmark",
            where="--train or --test",
            hint="write it as vqa-rad:train or slake:test:zh; "
            f"benchmarks: {', '.join(BENCHMARKS)}; splits: train, validation, test",
        )
    return benchmark, split


def workspace_benchmarks(workspace: Workspace, *, none_is_fine: bool = False) -> list[str]:
    """Names of the benchmarks that have been built, in order.

    Raises:
        WorkspaceError: There is none, and that is not fine.
    """
    folder = workspace.benchmark("x").parent
    names = sorted(path.parent.name for path in folder.glob("*/items") if not path.parent.name.startswith("."))
    if not names and not none_is_fine:
        raise WorkspaceError(
            "the workspace holds no benchmark items",
            where=str(folder),
            hint="run 'medvlm dataset build-benchmark', or compare two releases with --train, --test and --root",
        )
    return names


def training_sets(workspace: Workspace) -> Iterable[Traces]:
    """Every training set that exists, one after the other: they can be large."""
    preferences = [f"preference/{recipe}" for recipe in workspace.preference_recipes()]
    for name in ("alignment", "instruct", *preferences):
        if workspace.samples(name).is_dir():
            yield _sample_traces(workspace, name)
    for name in workspace_benchmarks(workspace, none_is_fine=True):
        train = split_traces(workspace, name, "train")
        if len(train):
            yield train


def _rows(folder: Path, query: str) -> list[tuple[str, ...]]:
    """Rows of a query over a step's shards, which it knows as ``shards``; never their image bytes.

    Raises:
        WorkspaceError: The step has not run, or a shard is damaged.
    """
    import duckdb

    paths = [str(path) for path in shard_paths(folder)]
    with duckdb.connect(":memory:") as database:
        try:
            database.read_parquet(paths).create_view("shards")
            return database.execute(query).fetchall()
        except duckdb.Error as error:
            raise WorkspaceError(
                f"the shards cannot be read: {error}",
                where=str(folder),
                hint="restore them with 'dvc checkout', or delete them and run their step again",
            ) from error


def split_traces(workspace: Workspace, name: str, split: str) -> Traces:
    """Traces of one split of a benchmark in a workspace; empty if it has no such split.

    Raises:
        WorkspaceError: The benchmark has not been built, or a shard is damaged.
    """
    rows = _rows(
        workspace.items(name),
        "SELECT item_id, image_sha256, image_phash, image_id, question, split, case_id FROM shards ORDER BY item_id",
    )
    rows = [row for row in rows if row[5] == split]
    traces = Traces(f"{name}:{split}", family_of(name))
    traces.row_id, traces.sha256, traces.phash, traces.image_id = ([row[i] for row in rows] for i in range(4))
    traces.case_id = [row[6] or _article(row[3]) for row in rows]
    traces.question = [normalise_question(row[4]) for row in rows]
    for question, row_id in zip(traces.question, traces.row_id, strict=True):
        traces.asked.setdefault(question, row_id)
    return traces


def _sample_traces(workspace: Workspace, name: str) -> Traces:
    """A training dataset's traces; its group is the article, its id the figure."""
    folder = workspace.samples(name)
    of_pairs = name.startswith("preference/")
    row_id = "pair_id" if of_pairs else "sample_id"
    said = "[{'role': 'user', 'text': question}]" if of_pairs else "turns"
    rows = _rows(folder, f"SELECT {row_id}, image_sha256, image_phash, group_id FROM shards ORDER BY 1")  # noqa: S608
    traces = Traces(name, "figures")
    traces.row_id, traces.sha256, traces.phash = ([row[i] for row in rows] for i in range(3))
    traces.image_id = list(traces.row_id)
    traces.case_id = [_article(row[3]) for row in rows]
    questions = _rows(
        folder,
        f"""SELECT said.text, min(id) FROM (SELECT {row_id} AS id, unnest({said}) AS said FROM shards)
            WHERE said.role = 'user' GROUP BY 1 ORDER BY 2, 1""",  # noqa: S608
    )
    for text, first in questions:
        traces.asked.setdefault(normalise_question(text), first)
    return traces
