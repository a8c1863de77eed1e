"""Preference pairs: the model asks about an image, answers twice, and a judge says which answer is better."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import medvlm
from medvlm.data.card import write_card
from medvlm.data.conversations import (
    decisions,
    figures_are_synthetic,
    pick,
    prompts,
    reviewed,
    usable_figures,
    without_leaked,
)
from medvlm.data.endpoint import Unanswered
from medvlm.data.judges import Judge
from medvlm.data.official import official_state
from medvlm.data.readers.llava_med import SLOT
from medvlm.data.readers.source import Dropped
from medvlm.data.readers.stllava_dpo import PreferenceText, read_preferences
from medvlm.data.tally import Tally
from medvlm.data.traces import normalise_question
from medvlm.errors import InputError
from medvlm.records import PreferencePair, Sample
from medvlm.review import Verdict as ReviewVerdict
from medvlm.review import saved_preferences
from medvlm.store import (
    Report,
    Workspace,
    fingerprint,
    shard_paths,
    write_records,
    write_report,
)

__all__ = [
    "Asks",
    "GenerationRequest",
    "Writer",
    "build_preference",
    "join_preferences",
    "self_preferences",
]

BATCH = 64
"""Images that are asked about at once."""

Asks = Literal["model", "dataset", "both"]
"""Whose questions are answered: with ``both``, the dataset's where the model's text is no question."""


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What the model is asked about one image."""

    image: bytes
    prompt: str
    """With ``<image>`` once."""
    seed: int
    """Of the sampling: two answers to one question differ by it alone."""


class Writer(Protocol):
    """A model that samples. Given by the caller: this module loads none."""

    def ask(self, requests: Sequence[GenerationRequest]) -> Sequence[str]:
        """A question about each request's image, in their order; the prompts are for a model with no role that asks."""
        ...

    def answer(self, requests: Sequence[GenerationRequest]) -> Sequence[str]:
        """An answer to each request's prompt, in their order."""
        ...


def build_preference(
    workspace: Workspace,
    recipe: str,
    rows: Iterable[PreferencePair | Dropped],
    *,
    official: Path | None = None,
    seed: int | None = None,
    details: Mapping[str, Any] | None = None,
    keep_leaked: bool = False,
) -> Report:
    """Write preference pairs and their report; ties, equal answers and misses are counted.

    What people preferred in the chat of this workspace comes after the rows. Reviewers' rejections and edits
    of this recipe's pairs are obeyed.

    Args:
        workspace: Gets ``preference_pairs(recipe)`` and, beside them, the report.
        recipe: Which learns from them.
        rows: Of ``join_preferences`` or ``self_preferences``.
        official: The published file, to report whether it is the published content.
        seed: Of the rows, for the report.
        details: More for the report; read after the last row.
        keep_leaked: Keep images that a benchmark of this workspace tests with, and those that look like one.

    Raises:
        InputError: Not one pair came out; what was built before stays in place.
    """
    started = time.monotonic()
    tally = Tally()

    def counted() -> Iterator[PreferencePair]:
        decided = decisions(workspace, f"preference/{recipe}")
        every = itertools.chain(rows, saved_preferences(workspace))
        heard = (row if isinstance(row, Dropped) else reviewed(row, row.pair_id, decided) for row in every)
        for pair in tally.sift(heard if keep_leaked else without_leaked(workspace, heard)):
            tally.keep(source=pair.source)
            yield pair
        if not tally.kept:
            reasons = ", ".join(f"{reason}: {lost['count']}" for reason, lost in tally.details()["dropped"].items())
            raise InputError(
                f"no preference pair came out; {reasons or 'there were no rows'}",
                where=f"preference pairs of {recipe}",
                hint="check that the figures were fetched, or raise the sampling temperature",
            )

    folder = workspace.preference_pairs(recipe)
    write_records(folder, PreferencePair, counted())
    said = (
        tally.details()
        | {"keep_leaked": keep_leaked, "synthetic": figures_are_synthetic(workspace)}
        | dict(details or {})
    )
    said |= {"files": [official_state(official)]} if official else {}
    report = Report(
        step=f"build preference {recipe}",
        counts={"pairs": tally.kept, "dropped": tally.dropped, "missed": tally.dropped_for("figure_absent")},
        details=said,
        seed=seed,
        fingerprint=fingerprint(medvlm.__version__, *shard_paths(folder)),
    )
    report = write_report(workspace.preference(recipe), report, started=started)
    write_card(workspace, f"preference/{recipe}")
    return report


def join_preferences(
    figures: Path, official: Path, decided: Mapping[str, ReviewVerdict] | None = None
) -> Iterator[PreferencePair | Dropped]:
    """The published pairs of STLLaVA-Med-DPO with the fetched figures they are about, in the figures' order.

    Args:
        figures: Shards of figures.
        official: The published JSON.
        decided: What reviewers said about figures.

    Raises:
        InputError: The file is not in its published format.
        WorkspaceError: No figures have been fetched.
    """
    wanted: dict[str, list[PreferenceText]] = {}
    for text in read_preferences(official):
        if isinstance(text, Dropped):
            yield text
        else:
            wanted.setdefault(text.pair_id, []).append(text)
    for figure in usable_figures(figures, decided):
        if isinstance(figure, Dropped):
            yield figure
            continue
        for index, text in enumerate(wanted.pop(figure.figure_id, [])):
            yield PreferencePair(
                pair_id=f"{figure.figure_id}#{index + 1}" if index else figure.figure_id,
                image=figure.image,
                image_sha256=figure.sha256,
                image_phash=figure.phash,
                group_id=figure.pmcid,
                question=text.question,
                chosen=text.chosen,
                rejected=text.rejected,
                source="official",
            )
    for pair_id, texts in wanted.items():
        for _ in texts:
            yield Dropped("pair without a usable figure", "figure_absent", pair_id)


@dataclass(frozen=True, slots=True)
class _Asked:
    """One question about one image, and what is known about its answer."""

    sample: Sample
    number: int
    question: str
    reference: str
    by: Literal["model", "dataset"]


def self_preferences(
    samples: Iterable[Sample],
    writer: Writer,
    judge: Judge,
    *,
    questions: int = 1,
    ask: Asks = "both",
    seed: int = 0,
    asked_by: dict[str, int] | None = None,
) -> Iterator[PreferencePair | Dropped]:
    """Pairs that the model makes about the images of a training set, as STLLaVA-Med does.

    Args:
        samples: Whose images are asked about. The judge's reference is their answer to the question where
            they have it, else all of their answers.
        writer: The model, sampling.
        judge: Ranks the two answers.
        questions: For each image, at most. Repeated ones are dropped.
        ask: Whether the model asks, or the questions of the samples are taken.
        seed: Decides the requests and the sampling seeds.
        asked_by: Gets how many questions are the model's and how many the dataset's.

    Yields:
        Pairs; and ``question_malformed``, ``question_repeated``, ``answer_empty``, ``answers_equal``, ``tie`` or the
        judge's own reason for each question that gave none.
    """
    counts = asked_by if asked_by is not None else {}
    for batch in _batches(samples, BATCH):
        if ask == "dataset":
            rows = [asked for sample in batch for asked in _dataset_questions(sample)[:questions]]
        else:
            rows = list(_model_questions(batch, writer, questions, seed, fall_back=ask == "both"))
        usable: list[_Asked] = []
        for row in rows:
            if isinstance(row, Dropped):
                yield row
            elif any(other.sample is row.sample and other.question == row.question for other in usable):
                yield Dropped(row.sample.sample_id, "question_repeated", row.question)
            else:
                counts[row.by] = counts.get(row.by, 0) + 1
                usable.append(row)
        yield from _answered(usable, writer, judge, seed)


def _dataset_questions(sample: Sample) -> list[_Asked]:
    rounds = zip(sample.turns[::2], sample.turns[1::2], strict=True)
    return [
        _Asked(sample, number, user.text.replace(SLOT, "").strip(), assistant.text, "dataset")
        for number, (user, assistant) in enumerate(rounds)
    ]


def _model_questions(
    batch: list[Sample], writer: Writer, questions: int, seed: int, *, fall_back: bool
) -> Iterator[_Asked | Dropped]:
    wanted = [(sample, number) for sample in batch for number in range(questions)]
    pool = prompts("self_question")
    requests = [
        GenerationRequest(
            sample.image.bytes,
            f"{SLOT}\n{pool[pick(seed, f'{sample.sample_id} {number}', len(pool))]}",
            pick(seed, f"{sample.sample_id} {number} question", 2**31),
        )
        for sample, number in wanted
    ]
    for (sample, number), text in zip(wanted, writer.ask(requests), strict=True):
        question = clean_question(text)
        own = _dataset_questions(sample)
        if question:
            yield _Asked(sample, number, question, _reference(own, question), "model")
        elif fall_back and number < len(own):
            yield own[number]
        else:
            yield Dropped(sample.sample_id, "question_malformed", text[:80])


def _reference(known: Sequence[_Asked], question: str) -> str:
    """What a sample says to a question: its answer where it was asked the same, else all that it says."""
    wanted = normalise_question(question)
    same = [asked.reference for asked in known if normalise_question(asked.question) == wanted]
    return " ".join(same or [asked.reference for asked in known])


def _answered(asked: list[_Asked], writer: Writer, judge: Judge, seed: int) -> Iterator[PreferencePair | Dropped]:
    requests = [
        GenerationRequest(
            row.sample.image.bytes,
            f"{row.question}\n{SLOT}",
            pick(seed, f"{row.sample.sample_id} {row.number} answer {turn}", 2**31),
        )
        for row in asked
        for turn in (1, 2)
    ]
    answers = writer.answer(requests) if requests else []
    for row, first, second in zip(asked, answers[::2], answers[1::2], strict=True):
        yield _judged(row, first.strip(), second.strip(), judge)


def _judged(row: _Asked, first: str, second: str, judge: Judge) -> PreferencePair | Dropped:
    sample = row.sample
    if not first or not second:
        return Dropped(sample.sample_id, "answer_empty", row.question)
    if first.lower() == second.lower():
        return Dropped(sample.sample_id, "answers_equal", first[:80])
    verdict = judge.rank(row.question, row.reference, first, second)
    if isinstance(verdict, Unanswered):
        return Dropped(f"{sample.sample_id}: {verdict.detail}", verdict.reason, row.question)
    if verdict == "tie":
        return Dropped(sample.sample_id, "tie", row.question)
    chosen, rejected = (first, second) if verdict == "first" else (second, first)
    return PreferencePair(
        pair_id=f"{sample.sample_id}-q{row.number + 1}",
        image=sample.image,
        image_sha256=sample.image_sha256,
        image_phash=sample.image_phash,
        group_id=sample.group_id,
        question=row.question,
        chosen=chosen,
        rejected=rejected,
        source=f"judge:{judge.name}",
    )


def clean_question(text: str) -> str:
    """The first question in a model's text, without list marks; empty where there is none."""
    for line in text.replace(SLOT, " ").splitlines():
        found = re.match(r"\s*(?:[-*\d.)\s]*)(?:question\s*:)?\s*(.{3,400}?[?？])", line, re.IGNORECASE)
        if found:
            return " ".join(found[1].split())
    return ""


def _batches(samples: Iterable[Sample], size: int) -> Iterator[list[Sample]]:
    iterator = iter(samples)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
