"""A recipe's preference pairs from its own model: which images are asked about, and a run that can be stopped."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from medvlm.data.conversations import pick
from medvlm.data.judges import Judge, OverlapJudge
from medvlm.data.preference import Asks, GenerationRequest, Writer, build_preference, self_preferences
from medvlm.data.response_cache import Completion, ResponseCache
from medvlm.data.watched import watched
from medvlm.errors import InputError
from medvlm.records import Sample
from medvlm.store import Report, Workspace, fingerprint, iterate_records, shard_paths

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from medvlm.models.checkpoint import Checkpoint

__all__ = ["Asking", "RememberingWriter", "build_self_preference", "drawn_samples"]


@dataclass(frozen=True, slots=True)
class Asking:
    """How a model is asked for preference pairs."""

    about: str = "instruct"
    """The dataset whose images are asked about."""
    ask: Asks = "both"
    questions: int = 1
    """For each image, at most."""
    temperature: float = 1.2
    """As STLLaVA-Med samples; so is ``top_p``."""
    top_p: float = 0.95
    max_tokens: int = 128
    """Of an answer."""
    limit: int | None = None
    """As many images, drawn with the seed."""
    seed: int = 0


def build_self_preference(
    workspace: Workspace,
    recipe: str,
    *,
    checkpoint: Path | None = None,
    writer: Callable[[Checkpoint, Asking], Writer] | None = None,
    judge: Judge | None = None,
    asking: Asking | None = None,
    keep_leaked: bool = False,
) -> Report:
    """Write the pairs that a recipe's model makes: it asks about images, answers twice, and a judge ranks.

    What was written stays in the scratch folder until the pairs are done: a stopped run goes on where it was.

    Args:
        workspace: Gives images and checkpoint; gets ``preference_pairs(recipe)`` and the report.
        recipe: Whose pairs these are.
        checkpoint: Of the model that writes; the recipe's after stage 2 by default.
        writer: Makes a checkpoint one that samples; ``SelfQuestioner`` by default.
        judge: The offline rule by default.
        asking: What is asked, and how answers are sampled.
        keep_leaked: Keep images that a benchmark of this workspace tests with, and those that look like one.

    Raises:
        CheckpointError: The stage has no finished checkpoint.
        InputError: The dataset has no sample in the recipe's language, or not one pair came out.
        WorkspaceError: The dataset has not been built, or the disk is full.
    """
    from medvlm.models.checkpoint import load_checkpoint

    asking, judge = asking or Asking(), judge or OverlapJudge()
    model = load_checkpoint(checkpoint or workspace.checkpoint(recipe, 2))
    mark = fingerprint(model.metadata["fingerprint"], asking.temperature, asking.top_p, asking.max_tokens)
    samples, total = drawn_samples(workspace.samples(asking.about), model.recipe.language, asking.limit, asking.seed)
    counts: dict[str, int] = {"model": 0, "dataset": 0}
    details: dict[str, Any] = {
        "asked_by": counts,
        "checkpoint": model.metadata["fingerprint"],
        "judge": judge.name,
        "images": total,
        "temperature": asking.temperature,
        "top_p": asking.top_p,
    }
    with _remembering(
        workspace.scratch("preference", f"{recipe}.sqlite"), (writer or _questioner)(model, asking), mark
    ) as remembering:
        rows = self_preferences(
            watched(samples, total, "images"),
            remembering,
            judge,
            questions=asking.questions,
            ask=asking.ask,
            seed=asking.seed,
            asked_by=counts,
        )
        return build_preference(workspace, recipe, rows, seed=asking.seed, details=details, keep_leaked=keep_leaked)


def drawn_samples(folder: Path, language: str, limit: int | None, seed: int) -> tuple[Iterator[Sample], int]:
    """The samples in a language, or as many of them as wanted, in their order; and how many they are.

    Which are drawn depends on the seed and on their ids alone: others beside them change little.

    Raises:
        InputError: There is none in the language.
        WorkspaceError: The dataset has not been built.
    """
    ids: list[str] = []
    for path in shard_paths(folder):
        table = pq.read_table(path, columns=["sample_id", "language"])
        rows = zip(table["sample_id"].to_pylist(), table["language"].to_pylist(), strict=True)
        ids += [sample_id for sample_id, spoken in rows if spoken == language]
    if not ids:
        raise InputError(
            f"the dataset has no sample in the recipe's language, {language}",
            where=str(folder),
            hint="build it from texts in that language, or ask about another dataset with --about",
        )
    drawn = set(sorted(ids, key=lambda one: (pick(seed, f"{one} drawn", 2**62), one))[:limit])
    return (sample for sample in iterate_records(folder, Sample) if sample.sample_id in drawn), len(drawn)


def _questioner(checkpoint: Checkpoint, asking: Asking) -> Writer:
    from medvlm.evaluation.self_question import SelfQuestioner
    from medvlm.models.template import TEMPLATES

    questioner = SelfQuestioner(
        checkpoint, temperature=asking.temperature, top_p=asking.top_p, max_new_tokens=asking.max_tokens
    )
    _, stage = checkpoint.recipe.stage(checkpoint.metadata["stage"])
    return questioner if TEMPLATES[stage.template].asks else _Prompted(questioner)


class _Prompted:
    """A model that was never taught to ask: it is asked for a question as for anything else."""

    def __init__(self, writer: Writer) -> None:
        self.ask = self.answer = writer.answer


@contextmanager
def _remembering(path: Path, writer: Writer, mark: str) -> Generator[RememberingWriter]:
    """A writer whose texts are kept in a file; it goes when the block ends well."""
    with ResponseCache(path) as cache:
        yield RememberingWriter(writer, cache, mark)
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


class RememberingWriter:
    """A writer that is asked the same only once.

    Args:
        writer: Asked for what is not known.
        cache: Holds the texts; they are on disk before they are returned.
        mark: Fingerprint of the model and its settings.
    """

    def __init__(self, writer: Writer, cache: ResponseCache, mark: str) -> None:
        self._writer = writer
        self._cache = cache
        self._mark = mark

    def ask(self, requests: Sequence[GenerationRequest]) -> list[str]:
        """A question about each request's image."""
        return self._texts("ask", requests, self._writer.ask)

    def answer(self, requests: Sequence[GenerationRequest]) -> list[str]:
        """An answer to each request's prompt."""
        return self._texts("answer", requests, self._writer.answer)

    def _texts(
        self,
        what: str,
        requests: Sequence[GenerationRequest],
        write: Callable[[Sequence[GenerationRequest]], Sequence[str]],
    ) -> list[str]:
        keys = [self._key(what, request) for request in requests]
        known = {key: found.text for key in keys if (found := self._cache.get(key))}
        new = {key: request for key, request in zip(keys, requests, strict=True) if key not in known}
        written = dict(zip(new, write(list(new.values())), strict=True)) if new else {}
        self._cache.put_all({key: Completion(text, "stop", 0, 0) for key, text in written.items()})
        texts = known | written
        return [texts[key] for key in keys]

    def _key(self, what: str, request: GenerationRequest) -> str:
        image = hashlib.sha256(request.image).hexdigest()
        return ResponseCache.key(
            {"mark": self._mark, "what": what, "image": image, "prompt": request.prompt, "seed": request.seed}
        )
