"""What a dataset holds: counts by split, answer type, language, modality and licence, without opening an image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.parquet as pq

from medvlm.data.benchmarks import BENCHMARKS
from medvlm.data.conversations import language_of
from medvlm.data.official import official_state, question_files
from medvlm.data.official_texts import official_files, read_official
from medvlm.data.readers import llava_med
from medvlm.data.readers.hub_parquet import hub_files
from medvlm.data.readers.stllava_dpo import read_preferences
from medvlm.data.readers.vqa_rad import PUBLIC_FILE
from medvlm.data.tally import Tally
from medvlm.errors import InputError
from medvlm.records import VQAItem
from medvlm.store import Workspace, read_report, shard_paths

__all__ = ["Description", "describe"]

# Column → name in the description, for each kind of record that shards can hold.
FIELDS = {
    "items": ("split", "answer_type", "language", "modality", "organ", "question_type"),
    "samples": ("language", "modality", "licence", "source", "dataset"),
    "pairs": ("source",),
    "figures": ("licence", "retracted"),
}
KIND_OF_COLUMN = {"answer_type": "items", "turns": "samples", "chosen": "pairs", "caption": "figures"}


@dataclass
class Description:
    """One dataset or release, counted."""

    name: str
    kind: str
    """``items``, ``samples``, ``pairs``, ``figures``; or, without images, ``texts``, ``preference texts``,
    ``chat questions`` or ``captions``."""
    rows: int
    images: int
    """Different images; for texts, different image names."""
    groups: int
    """Different articles, or images where those are the groups."""
    by: dict[str, dict[str, int]] = field(default_factory=dict[str, dict[str, int]])
    """For each field, the rows by value. ``split_answer_type`` crosses the two."""
    dropped: dict[str, Any] = field(default_factory=dict[str, Any])
    licence: str = ""
    """Of the release, where it has one licence; else see ``by``."""
    files: list[dict[str, str]] = field(default_factory=list[dict[str, str]])


def describe(workspace: Workspace, target: str) -> list[Description]:
    """Counts of a dataset or benchmark of the workspace, of a folder of shards, or of a published release.

    Args:
        workspace: Looked into first.
        target: ``figures``, ``alignment``, ``slake``, …; or a path. A release of several benchmarks gives one each.

    Raises:
        InputError: There is no such dataset, or nothing at the path that a reader knows.
    """
    built = ((workspace.samples(target), ""), (workspace.items(target), _licence(target)))
    for folder, licence in (*built, *([(workspace.figure_shards, "")] if target == "figures" else [])):
        if folder.is_dir():
            found = _shards(target, folder, licence)
            report = read_report(folder.parent)
            found.dropped = dict(report.details.get("dropped", {})) if report else {}
            return [found]
    path = Path(target)
    if not path.exists():
        raise InputError(
            f"there is no dataset and no path {target!r}",
            where=str(workspace.root),
            hint="build it with 'medvlm dataset build' or 'build-benchmark', or give a path",
        )
    if path.is_dir() and (shards := sorted(path.glob("part-*.parquet"))):
        return [_shards(path.name, shards[0].parent, "")]
    found = [_release(name, path) for name in _benchmarks_at(path)]
    return found or [_texts(file) for file in _text_files(path)]


def _licence(name: str) -> str:
    return BENCHMARKS[name].licence if name in BENCHMARKS else ""


def _shards(name: str, folder: Path, licence: str) -> Description:
    files = [str(path) for path in shard_paths(folder)]
    columns = pq.read_schema(files[0]).names
    kind = next((kind for column, kind in KIND_OF_COLUMN.items() if column in columns), "")
    if not kind:
        raise InputError(
            f"the columns are {', '.join(columns)}", where=files[0], hint="give a folder of figures, samples or items"
        )
    sha, group = ("sha256", "pmcid") if kind == "figures" else ("image_sha256", "group_id")
    group = "image_id" if kind == "items" else group
    crossed = {"split_answer_type": "split || '_' || answer_type"} if kind == "items" else {}
    if kind == "samples":
        crossed["turns"] = "len(turns)"
    with duckdb.connect() as connection:
        connection.execute("SET enable_progress_bar = false")

        def rows(query: str) -> list[tuple[Any, ...]]:
            return connection.execute(query, [files]).fetchall()

        ((count, images, groups),) = rows(
            f"SELECT count(*), count(DISTINCT {sha}), count(DISTINCT {group}) FROM read_parquet(?)"  # noqa: S608
        )
        by = {
            name: {
                str(value).lower() if isinstance(value, bool) else str(value): number
                for value, number in rows(
                    f"SELECT {expression}, count(*) FROM read_parquet(?) GROUP BY 1 ORDER BY 1"  # noqa: S608
                )
            }
            for name, expression in {**{column: column for column in FIELDS[kind]}, **crossed}.items()
        }
    return Description(name, kind, count, images, groups, by=by, licence=licence)


def _benchmarks_at(path: Path) -> list[str]:
    """Which benchmarks' releases lie at a path, by the files that are there."""
    folder = path if path.is_dir() else path.parent
    names = {path.name} if path.is_file() else {file.name for file in question_files(path)}
    found: list[str] = []
    if PUBLIC_FILE in names:
        found.append("vqa-rad")
    if path.is_dir() and (path / "data_RAD" / "trainset.json").exists() and PUBLIC_FILE in names:
        found.append("data-rad")
    if names & {"validate.json"} or ((folder / "validate.json").exists() and names & {"train.json", "test.json"}):
        found += ["slake", "slake-zh"]
    if any(name.startswith("pvqa_") or name.endswith("_vqa.pkl") for name in names):
        found.append("pathvqa")
    if any(name in ("train.csv", "test.csv", "train_2.csv", "test_2.csv") for name in names):
        found.append("pmc-vqa")
    found += [name for name in BENCHMARKS if name.endswith("mnist") and any(n.startswith(name) for n in names)]
    # Both hub copies have the same columns; only PathVQA's has a validation split.
    hub = [file.name for file in hub_files(path)]
    name = "pathvqa" if any(name.startswith("validation") for name in hub) else "vqa-rad"
    return found or ([name] if hub else [])


def _release(name: str, path: Path) -> Description:
    tally, images = Tally(), set[str]()
    for item in _counted(name, path, tally):
        images.add(item.image_id)
        tally.keep_item(item)
    details = tally.details()
    files = [official_state(file) for file in ([path] if path.is_file() else question_files(path))]
    return Description(
        name, "items", tally.kept, len(images), len(images),
        by=details["by"], dropped=details["dropped"], licence=_licence(name), files=files,
    )  # fmt: skip


def _counted(name: str, path: Path, tally: Tally) -> Iterator[VQAItem]:
    yield from tally.sift(BENCHMARKS[name].read(path))


def _text_files(path: Path) -> list[Path]:
    try:
        return official_files(path)
    except InputError as error:
        raise InputError(
            "the folder holds neither shards nor a release that a reader knows",
            where=str(path),
            hint=f"give the folder of a release ({', '.join(BENCHMARKS)}), or published JSON files",
        ) from error


def _texts(path: Path) -> Description:
    """A published file of conversations, preference pairs, chat questions or captions."""
    tally, images = Tally(), Counter[str]()
    with path.open(encoding="utf-8", errors="replace") as stream:
        begins = stream.read(20_000)
    if '"gpt4_answer"' in begins:
        for question in llava_med.read_chat_questions(path):
            images[question.pair_id] += 1
            tally.keep(
                kind=question.kind,
                language=language_of(question.question),
                modality=question.modality,
                mentions="with" if question.mentions else "without",
            )
        kind = "chat questions"
    elif '"fig_caption"' in begins:
        for caption in llava_med.read_captions(path):
            images[caption.pair_id] += 1
            tally.keep(
                language=language_of(caption.caption),
                modality=caption.modality,
                mentions="with" if caption.mentions else "without",
            )
        kind = "captions"
    elif "chosen_conversations" in begins:
        for text in tally.sift(read_preferences(path)):
            images[text.pair_id] += 1
            tally.keep(language=language_of(text.chosen))
        kind = "preference texts"
    else:
        for conversation in tally.sift(read_official(path)):
            images[conversation.pair_id] += 1
            tally.keep(
                language=language_of(*(turn.text for turn in conversation.turns)),
                modality=conversation.modality or "unknown",
                turns=str(len(conversation.turns)),
            )
        kind = "texts"
    details = tally.details()
    licence = llava_med.LICENCE if path.name in llava_med.SHA256 else ""
    return Description(
        path.name, kind, tally.kept, len(images), len(images),
        by=details["by"], dropped=details["dropped"], licence=licence, files=[official_state(path)],
    )  # fmt: skip
