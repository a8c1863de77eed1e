"""From figures to the samples of a training dataset: the join, the drops and the report that all builders share."""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import pyarrow.parquet as pq

import medvlm
from medvlm.data.card import write_card
from medvlm.data.leakage import ImagesUnderTest
from medvlm.data.modality import modality_of_caption
from medvlm.data.official import is_synthetic
from medvlm.data.readers.llava_med import SLOT, Conversation
from medvlm.data.readers.source import Dropped
from medvlm.data.tally import Tally
from medvlm.data.watched import watched
from medvlm.errors import InputError
from medvlm.records import Figure, PreferencePair, Sample, Turn
from medvlm.review import Journal, Verdict, obey, verdicts
from medvlm.store import (
    Report,
    Workspace,
    fingerprint,
    iterate_records,
    read_report,
    shard_paths,
    write_records,
    write_report,
)

__all__ = [
    "count_rows",
    "decisions",
    "figures_are_synthetic",
    "joined_samples",
    "language_of",
    "pick",
    "prompt_text",
    "prompts",
    "sample_of",
    "sample_or_drop",
    "samples_of_figures",
    "usable_figures",
    "without_leaked",
    "write_dataset",
]

Reviewed = TypeVar("Reviewed", Figure, Sample, PreferencePair)
Kept = TypeVar("Kept", Sample, PreferencePair)


def usable_figures(folder: Path, decided: Mapping[str, Verdict] | None = None) -> Iterator[Figure | Dropped]:
    """Fetched figures in their order, as reviewers want them, but for retracted and repeated ones.

    Args:
        folder: Shards of figures.
        decided: What reviewers said about figures.

    Raises:
        WorkspaceError: Nothing has been fetched, or a shard is damaged.
    """
    seen: set[str] = set()
    for figure in watched(iterate_records(folder, Figure), count_rows(folder), "figures"):
        if figure.retracted:
            yield Dropped(figure.pmcid, "retracted", figure.figure_id)
        elif figure.figure_id in seen:
            yield Dropped(figure.pmcid, "figure_repeated", figure.figure_id)
        else:
            seen.add(figure.figure_id)
            yield reviewed(figure, figure.figure_id, decided or {})


def reviewed(record: Reviewed, record_id: str, decided: Mapping[str, Verdict]) -> Reviewed | Dropped:
    """The record as reviewers left it, or that they took it out."""
    counts: Counter[str] = Counter()
    kept = next(obey([record], decided, counts), None)
    return kept or Dropped("review", next(iter(counts)), record_id)


def samples_of_figures(
    figures: Iterable[Figure | Dropped],
    write: Callable[[Figure], tuple[Turn, ...] | str],
    *,
    dataset: str,
    source: str,
) -> Iterator[Sample | Dropped]:
    """One sample for each figure for which ``write`` gives turns; it gives a reason where it cannot."""
    for figure in figures:
        turns = figure if isinstance(figure, Dropped) else write(figure)
        yield sample_or_drop(figure, turns, dataset=dataset, source=source)


def sample_or_drop(
    figure: Figure | Dropped, turns: tuple[Turn, ...] | Dropped | str, *, dataset: str, source: str
) -> Sample | Dropped:
    """The sample that the turns make with the figure, or the dropped row that one of them is."""
    if isinstance(figure, Dropped):
        return figure
    if isinstance(turns, str):
        return Dropped(figure.pmcid, turns, figure.figure_id)
    return turns if isinstance(turns, Dropped) else sample_of(figure, turns, dataset=dataset, source=source)


def joined_samples(
    folder: Path,
    conversations: Iterable[Conversation | Dropped],
    *,
    dataset: str,
    decided: Mapping[str, Verdict] | None = None,
) -> Iterator[Sample | Dropped]:
    """Published conversations with the fetched figures they are about, in the figures' order.

    Args:
        folder: Shards of figures. Only texts whose figure is there are held in memory.
        conversations: A figure may have several; from the second on, ``#2``, … ends the sample's id.
        dataset: Goes into each sample.
        decided: What reviewers said about figures.

    Yields:
        Samples; ``figure_absent`` for a conversation whose figure was not fetched; and what the
        reader and ``usable_figures`` dropped. A figure without a conversation is not a loss.
    """
    present = _figure_ids(folder)
    wanted: defaultdict[str, list[Conversation]] = defaultdict(list)
    for conversation in conversations:
        if isinstance(conversation, Dropped):
            yield conversation
        elif conversation.pair_id in present:
            wanted[conversation.pair_id].append(conversation)
        else:
            yield Dropped("conversation without a fetched figure", "figure_absent", conversation.pair_id)
    for figure in usable_figures(folder, decided):
        if isinstance(figure, Dropped):
            yield figure
            continue
        for index, conversation in enumerate(wanted.pop(figure.figure_id, [])):
            yield sample_of(
                figure,
                conversation.turns,
                dataset=dataset,
                source="official",
                suffix=f"#{index + 1}" if index else "",
                modality=conversation.modality,
            )


def count_rows(folder: Path) -> int:
    """Rows of a folder of shards; nothing is decoded."""
    return sum(pq.read_metadata(path).num_rows for path in shard_paths(folder))


def _figure_ids(folder: Path) -> set[str]:
    ids: set[str] = set()
    for path in shard_paths(folder):
        ids.update(pq.read_table(path, columns=["figure_id"])["figure_id"].to_pylist())
    return ids


def sample_of(
    figure: Figure,
    turns: tuple[Turn, ...],
    *,
    dataset: str,
    source: str,
    suffix: str = "",
    modality: str | None = None,
) -> Sample:
    """A sample about a figure; the article is its group, and its licence is the figure's."""
    return Sample(
        sample_id=figure.figure_id + suffix,
        dataset=dataset,
        image=figure.image,
        image_sha256=figure.sha256,
        image_phash=figure.phash,
        group_id=figure.pmcid,
        turns=turns,
        modality=modality or modality_of_caption(figure.caption),
        language=language_of(*(turn.text.replace(SLOT, "") for turn in turns)),
        licence=figure.licence,
        source=source,
    )


def language_of(*texts: str) -> Literal["en", "zh"]:
    """``zh`` where Chinese characters are at least as many as words in Latin letters, else ``en``.

    Articles in English quote Chinese names, and Chinese answers say "CT".
    """
    text = " ".join(texts)
    chinese, latin = (len(re.findall(form, text)) for form in (r"[\u4e00-\u9fff]", r"[A-Za-z]+"))
    return "zh" if chinese and chinese >= latin else "en"


def write_dataset(
    workspace: Workspace,
    name: str,
    rows: Iterable[Sample | Dropped],
    *,
    started: float,
    details: dict[str, Any],
    seed: int | None = None,
    made_with: Sequence[str] = (),
    keep_leaked: bool = False,
) -> Report:
    """Write a dataset's samples and its report: counts, and every reason for a loss with the first ten.

    Reviewers' rejections and edits of this dataset's samples are obeyed, and images that a benchmark
    of this workspace tests with, or that look like one, are dropped.

    Args:
        workspace: Gets ``samples(name)`` and the report.
        name: The dataset.
        rows: Samples in their order, and what was dropped on the way.
        started: ``time.monotonic()`` at the build's start.
        details: For the report, beside the counts.
        seed: Of the build, where it has one.
        made_with: Prompts and models beside the content and the code's version that the fingerprint covers.
        keep_leaked: Keep test images. Scores must then say so.

    Raises:
        InputError: Not one sample came out; what was built before stays in place.
    """
    tally = Tally()
    decided = decisions(workspace, name)
    heard = (row if isinstance(row, Dropped) else reviewed(row, row.sample_id, decided) for row in rows)
    if not keep_leaked:
        heard = without_leaked(workspace, heard)
    write_records(workspace.samples(name), Sample, _counted(name, heard, tally))
    counts = {"samples": tally.kept, "dropped": tally.dropped, "missed": tally.dropped_for("figure_absent")}
    report = Report(
        step=f"build {name}",
        counts=counts,
        details={
            **tally.details(),
            **details,
            "keep_leaked": keep_leaked,
            "synthetic": figures_are_synthetic(workspace),
        },
        seed=seed,
        fingerprint=fingerprint(medvlm.__version__, *made_with, *shard_paths(workspace.samples(name))),
    )
    report = write_report(workspace.dataset(name), report, started=started)
    write_card(workspace, name)
    return report


def figures_are_synthetic(workspace: Workspace) -> bool:
    """Whether the workspace's figures were fetched from its sample corpus."""
    report = read_report(workspace.figures)
    return bool(report) and is_synthetic(workspace, report.details.get("store", ""))


def without_leaked(workspace: Workspace, rows: Iterable[Kept | Dropped]) -> Iterator[Kept | Dropped]:
    """The rows, but for those whose image, or one that looks like it, a benchmark of the workspace tests with."""
    tested = ImagesUnderTest(workspace)
    for row in rows:
        found = None if isinstance(row, Dropped) else tested.touched(row.image_sha256, row.image_phash)
        if isinstance(row, Dropped) or found is None:
            yield row
        else:
            benchmark, reason = found
            yield Dropped(
                f"{'test image' if reason == 'leaked' else 'like a test image'} of {benchmark}", reason, _id_of(row)
            )


def _id_of(row: Sample | PreferencePair) -> str:
    return row.sample_id if isinstance(row, Sample) else row.pair_id


def decisions(workspace: Workspace, table: str) -> dict[str, Verdict]:
    """What reviewers said about the records of a table, such as ``figures`` or ``alignment``.

    A picture that may name somebody is out wherever it is used: to flag one text about it flags its figure.
    """
    heard = Journal(workspace).read()
    found = verdicts(heard, table)
    if table == "figures":
        texts = {d.source for d in heard if not d.source.startswith("benchmark/")} - {"figures"}
        for other in texts:
            private = (record_id for record_id, verdict in verdicts(heard, other).items() if verdict.privacy)
            found |= {_figure_of(record_id): Verdict(False, True, (), ()) for record_id in private}
    return found


def _figure_of(record_id: str) -> str:
    """The figure that a sample or a pair is named after: ``10_F1#2``, ``10_F1-q1`` → ``10_F1``."""
    return re.sub(r"(#\d+)?(-q\d+)?$", "", record_id)


def _counted(name: str, rows: Iterable[Sample | Dropped], tally: Tally) -> Iterator[Sample]:
    for sample in tally.sift(rows):
        tally.keep(
            modality=sample.modality,
            language=sample.language,
            licence=sample.licence,
            source=sample.source,
            turns=str(len(sample.turns)),
        )
        yield sample
    if not tally.kept:
        reasons = ", ".join(
            f"{reason}: {lost['count']} (first {lost['first'][0]})"
            for reason, lost in tally.details()["dropped"].items()
        )
        raise InputError(
            f"no {name} sample came out of {tally.dropped} rows; {reasons or 'there were no figures'}",
            where=name,
            hint="check that the figures of this list were fetched and that the text file belongs to them",
        )


@functools.cache
def prompts(name: str) -> tuple[str, ...]:
    """The lines of one of our prompt files.

    Args:
        name: Such as ``alignment_brief``.
    """
    return tuple(line for line in prompt_text(name).splitlines() if line.strip())


@functools.cache
def prompt_text(name: str) -> str:
    """The whole of one of our prompt files."""
    return (importlib.resources.files("medvlm.data") / "prompts" / f"{name}.txt").read_text("utf-8")


def pick(seed: int, key: str, choices: int) -> int:
    """A number below ``choices`` that depends on seed and key alone, so that other rows never change it."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{key}".encode()).digest()[:8], "big") % choices
