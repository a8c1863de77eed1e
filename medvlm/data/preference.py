"""Preference pairs: the model asks about an image, answers twice, and a judge says which answer is better."""

from __future__ import annotations

import itertools
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from medvlm.data.card import write_card
from medvlm.data.conversations import figures_are_synthetic, pick, prompt_text, prompts, usable_figures, without_leaked
from medvlm.data.endpoint import ChatClient, Unanswered
from medvlm.data.official import official_state
from medvlm.data.readers.llava_med import SLOT
from medvlm.data.readers.source import Dropped
from medvlm.data.readers.stllava_dpo import PreferenceText, read_preferences
from medvlm.data.tally import Tally
from medvlm.errors import InputError
from medvlm.progress import report_progress
from medvlm.records import PreferencePair, Sample
from medvlm.review import Verdict as ReviewVerdict
from medvlm.store import (
    Report,
    Workspace,
    fingerprint,
    shard_paths,
    write_records,
    write_report,
)

__all__ = [
    "EndpointJudge",
    "Generate",
    "GenerationRequest",
    "Judge",
    "OverlapJudge",
    "Verdict",
    "build_preference",
    "join_preferences",
    "self_preferences",
]

Verdict = Literal["first", "second", "tie"]
BATCH = 16


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What the model is asked about one image."""

    image: bytes
    prompt: str
    """With ``<image>`` once."""
    seed: int
    """Of the sampling: two answers to one question differ by it alone."""


Generate = Callable[[Sequence[GenerationRequest]], Sequence[str]]
"""The model: one text for each request, in their order. Given by the caller; this module loads none."""


class Judge(Protocol):
    """Says which of two answers is better."""

    name: str
    """Goes into each pair as ``judge:<name>``."""

    def rank(self, question: str, reference: str, first: str, second: str) -> Verdict | Unanswered:
        """The better answer, a tie, or why there is no verdict.

        Args:
            question: Without the image slot.
            reference: What is known of the image: its caption or conversation.
            first: One answer.
            second: The other.
        """
        ...


class OverlapJudge:
    """The offline rule: the answer whose words overlap more with the reference (F1 over words) is better.

    A crude stand-in for a reader. Answers closer than ``margin`` are a tie.
    """

    name = "overlap-offline"

    def __init__(self, margin: float = 0.05) -> None:
        self._margin = margin

    def rank(self, question: str, reference: str, first: str, second: str) -> Verdict:
        """The answer with the larger F1 against the reference, or a tie."""
        difference = word_f1(first, reference) - word_f1(second, reference)
        if abs(difference) < self._margin:
            return "tie"
        return "first" if difference > 0 else "second"


class EndpointJudge:
    """A chat endpoint as judge, asked in both orders: where the order decides, it is a tie."""

    def __init__(self, client: ChatClient) -> None:
        self._client = client
        self.name = client.endpoint.model

    def rank(self, question: str, reference: str, first: str, second: str) -> Verdict | Unanswered:
        """The endpoint's verdict, or why it gave none.

        Raises:
            EndpointError: The endpoint cannot be reached, or refuses everything.
        """
        verdicts: list[Verdict] = []
        for one, other in ((first, second), (second, first)):
            said = f"Description: {reference}\n\nQuestion: {question}\n\nFirst: {one}\n\nSecond: {other}"
            messages = [{"role": "system", "content": prompt_text("preference_judge")}]
            answer = self._client.complete([*messages, {"role": "user", "content": said}], max_tokens=8)
            if isinstance(answer, Unanswered):
                return answer
            words = set(re.findall(r"\b(first|second|tie)\b", answer.text.lower()))
            if len(words) != 1:
                return Unanswered("verdict_malformed", answer.text[:80])
            verdicts.append("first" if "first" in words else "second" if "second" in words else "tie")
        swapped: dict[Verdict, Verdict] = {"first": "second", "second": "first", "tie": "tie"}
        return verdicts[0] if verdicts[0] == swapped[verdicts[1]] else "tie"


def word_f1(answer: str, reference: str) -> float:
    """F1 over the words of an answer and a reference, 0 to 1; Chinese characters count as words."""
    said, known = (Counter(re.findall(r"[\u4e00-\u9fff]|[^\W_]+", text.lower())) for text in (answer, reference))
    common = sum((said & known).values())
    return 2 * common / (sum(said.values()) + sum(known.values())) if common else 0.0


def build_preference(
    workspace: Workspace,
    rows: Iterable[PreferencePair | Dropped],
    *,
    official: Path | None = None,
    seed: int | None = None,
    keep_leaked: bool = False,
) -> Report:
    """Write preference pairs and their report; ties, equal answers and misses are counted.

    Args:
        workspace: Gets ``samples("preference")`` and its report.
        rows: Of ``join_preferences`` or ``self_preferences``.
        official: The published file, to report whether it is the published content.
        seed: Of the rows, for the report.
        keep_leaked: Keep images that a benchmark of this workspace tests with.

    Raises:
        InputError: Not one pair came out; what was built before stays in place.
    """
    started = time.monotonic()
    tally = Tally()

    def counted() -> Iterator[PreferencePair]:
        for pair in tally.sift(rows if keep_leaked else without_leaked(workspace, rows)):
            tally.keep(source=pair.source)
            yield pair
        if not tally.kept:
            reasons = ", ".join(f"{reason}: {lost['count']}" for reason, lost in tally.details()["dropped"].items())
            raise InputError(
                f"no preference pair came out; {reasons or 'there were no rows'}",
                where="preference",
                hint="check that the figures were fetched, or raise the sampling temperature",
            )

    write_records(workspace.samples("preference"), PreferencePair, counted())
    details = tally.details() | {"synthetic": figures_are_synthetic(workspace)}
    details |= {"official": official_state(official)} if official else {}
    report = Report(
        step="build preference",
        counts={"pairs": tally.kept, "dropped": tally.dropped, "missed": tally.dropped_for("figure_absent")},
        details=details,
        seed=seed,
        fingerprint=fingerprint(*shard_paths(workspace.samples("preference"))),
    )
    report = write_report(workspace.dataset("preference"), report, started=started)
    write_card(workspace, "preference")
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


def self_preferences(
    samples: Iterable[Sample], generate: Generate, judge: Judge, *, questions: int = 1, seed: int = 0
) -> Iterator[PreferencePair | Dropped]:
    """Pairs that the model makes about the images of a training set, as STLLaVA-Med does.

    Args:
        samples: Whose images are asked about; their answers are the judge's reference.
        generate: The model, sampling.
        judge: Ranks the two answers.
        questions: For each image. Repeated ones are dropped.
        seed: Decides the requests and the sampling seeds.

    Yields:
        Pairs; and ``question_malformed``, ``question_repeated``, ``answer_empty``, ``answers_equal``, ``tie`` or the
        judge's own reason for each question that gave none.
    """
    done = 0
    for batch in _batches(samples, BATCH):
        asked = [(sample, number) for sample in batch for number in range(questions)]
        requests = prompts("self_question")
        texts = generate(
            [
                GenerationRequest(
                    sample.image.bytes,
                    f"{SLOT}\n{requests[pick(seed, f'{sample.sample_id} {number}', len(requests))]}",
                    pick(seed, f"{sample.sample_id} {number} question", 2**31),
                )
                for sample, number in asked
            ]
        )
        usable: list[tuple[Sample, int, str]] = []
        for (sample, number), text in zip(asked, texts, strict=True):
            question = clean_question(text)
            if not question:
                yield Dropped(sample.sample_id, "question_malformed", text[:80])
            elif any(other is sample and known == question for other, _, known in usable):
                yield Dropped(sample.sample_id, "question_repeated", question)
            else:
                usable.append((sample, number, question))
        yield from _answered(usable, generate, judge, seed)
        done += len(batch)
        report_progress({"done": done})


def _answered(
    asked: list[tuple[Sample, int, str]], generate: Generate, judge: Judge, seed: int
) -> Iterator[PreferencePair | Dropped]:
    answers = generate(
        [
            GenerationRequest(
                sample.image.bytes,
                f"{question}\n{SLOT}",
                pick(seed, f"{sample.sample_id} {number} answer {turn}", 2**31),
            )
            for sample, number, question in asked
            for turn in (1, 2)
        ]
    )
    if len(answers) != 2 * len(asked):
        raise ValueError(f"the model gave {len(answers)} texts for {2 * len(asked)} requests")
    for (sample, number, question), first, second in zip(asked, answers[::2], answers[1::2], strict=True):
        yield _judged(sample, number, question, first.strip(), second.strip(), judge)


def _judged(
    sample: Sample, number: int, question: str, first: str, second: str, judge: Judge
) -> PreferencePair | Dropped:
    if not first or not second:
        return Dropped(sample.sample_id, "answer_empty", question)
    if first.lower() == second.lower():
        return Dropped(sample.sample_id, "answers_equal", first[:80])
    reference = " ".join(turn.text for turn in sample.turns if turn.role == "assistant")
    verdict = judge.rank(question, reference, first, second)
    if isinstance(verdict, Unanswered):
        return Dropped(f"{sample.sample_id}: {verdict.detail}", verdict.reason, question)
    if verdict == "tie":
        return Dropped(sample.sample_id, "tie", question)
    chosen, rejected = (first, second) if verdict == "first" else (second, first)
    return PreferencePair(
        pair_id=f"{sample.sample_id}-q{number + 1}",
        image=sample.image,
        image_sha256=sample.image_sha256,
        image_phash=sample.image_phash,
        group_id=sample.group_id,
        question=question,
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
