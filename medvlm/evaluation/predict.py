"""The pipeline's predict step: a benchmark's test split answered with and without the image, resumable."""

from __future__ import annotations

import dataclasses
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medvlm.config import recipe_names
from medvlm.data.endpoint import ChatClient
from medvlm.errors import CheckpointError, InputError
from medvlm.evaluation.answerer import BATCH
from medvlm.evaluation.answers import Missing
from medvlm.evaluation.backends import Refused, ReplayBackend, ServerBackend, answer_all, mean_picture
from medvlm.evaluation.journal import AnswerJournal, merged_answers
from medvlm.evaluation.prompts import IMAGE_FIRST, PromptStyle, prompt_style
from medvlm.evaluation.shards import KINDS, Shard, answer_shard, items_to_answer, launch_shards
from medvlm.recipe_schema import Recipe
from medvlm.records import Prediction, VQAItem
from medvlm.store import (
    Report,
    Workspace,
    fingerprint,
    read_json,
    shard_paths,
    write_records,
    write_report,
)

__all__ = ["predict_benchmark", "predict_with_server", "replay_answers"]


def predict_benchmark(
    workspace: Workspace,
    recipe: Recipe,
    benchmark: str,
    *,
    stages: Sequence[int] = (3,),
    limit: int | None = None,
    batch_size: int = BATCH,
    prompt: str | None = None,
    options: bool | None = None,
    likelihoods: bool = True,
    processes: int = 1,
) -> Report:
    """Answer a benchmark's test split by a recipe's checkpoints, with and without the image.

    Args:
        workspace: Gives checkpoints and items; gets ``answers/`` and ``report.json``.
        recipe: Whose checkpoints answer.
        benchmark: Such as ``vqa-rad``.
        stages: Whose checkpoints answer: some of 1, 2 and 3. ``answers/`` holds these stages and no others.
        limit: Only the first so many items.
        batch_size: Questions answered at once.
        prompt: Order of question and image; None takes the benchmark's. See ``prompt_style``.
        options: With or without the options hint; None takes the benchmark's.
        likelihoods: Whether the likelihood of each option of a closed set is recorded too.
        processes: Each answers its share of the images, on its own GPU where there are some.

    Returns:
        Counts of items, images and answers, and how many were kept from a run that was stopped.

    Raises:
        CheckpointError: A stage has no finished checkpoint.
        WorkspaceError: The benchmark was not built, has no test items, or the disk is full.
        InputError: An image does not decode; the item is named.
        TrainingError: A process died. Finished answers are kept.
        PredictionMismatch: The processes ended well, but not every item has its answer.
    """
    started = time.monotonic()
    style = prompt_style(benchmark, order=_order(recipe, prompt), options=options)
    items, _ = items_to_answer(workspace.items(benchmark), benchmark, limit)
    answers: list[Prediction] = []
    kept = 0
    checkpoints: dict[str, str] = {}
    scratch: list[Path] = []
    for number in sorted(set(stages)):
        stage = recipe.stages[number - 1].name
        folder = _checkpoint(workspace, recipe, benchmark, number)
        checkpoints[stage] = _finished(folder)
        shard = Shard(
            checkpoint=str(folder),
            model=recipe.name,
            stage=stage,
            items=str(workspace.items(benchmark)),
            journal=str(workspace.scratch("predict", recipe.name, f"{benchmark}-stage{number}")),
            # The style's texts too: an answer to another prompt is another answer.
            inputs=_inputs(items, checkpoints[stage], style, likelihoods),
            benchmark=benchmark,
            order=style.order,
            options=style.options,
            likelihoods=likelihoods,
            limit=limit,
            batch_size=batch_size,
        )
        with AnswerJournal.of(Path(shard.journal), shard.inputs) as journal:
            kept += len(journal.answers)
        if processes == 1:
            answer_shard(shard)
        else:
            launch_shards(shard, processes)
        answers += merged_answers(Path(shard.journal), shard.inputs, items, KINDS)
        scratch.append(Path(shard.journal))
    return _write(
        workspace,
        recipe.name,
        benchmark,
        items,
        answers,
        kept=kept,
        started=started,
        scratch=scratch,
        seed=recipe.seed,
        details={
            "backend": "transformers",
            "checkpoint": checkpoints[recipe.stages[max(stages) - 1].name],
            "checkpoints": checkpoints,
            **_described(style),
            "batch_size": batch_size,
            "processes": processes,
        },
    )


def predict_with_server(
    workspace: Workspace,
    name: str,
    benchmark: str,
    client: ChatClient,
    *,
    limit: int | None = None,
    prompt: str | None = None,
    options: bool | None = None,
    blind: bool = True,
    max_tokens: int = 64,
    refused: Refused = "error",
) -> Report:
    """Have a server that speaks the chat API answer a benchmark's test split.

    Args:
        workspace: Gives items; gets ``answers/`` and ``report.json`` under ``name``.
        name: Of the model, in place of a recipe's.
        benchmark: Such as ``vqa-rad``.
        client: Asks the server, concurrently and with retries, at temperature 0.
        limit: Only the first so many items.
        prompt: As of ``predict_benchmark``.
        options: As of ``predict_benchmark``.
        blind: Whether to ask again with the mean image, which doubles the requests.
        max_tokens: Of an answer.
        refused: Whether an item that the server refuses stops the run, or counts as an empty answer.

    Returns:
        As of ``predict_benchmark``; details list the items that were refused.

    Raises:
        InputError: The name is a recipe's, or no name for a folder.
        WorkspaceError: The benchmark was not built, has no test items, or the disk is full.
        EndpointError: The server cannot be reached, refuses everything, or refuses an item.
    """
    started = time.monotonic()
    _foreign_name(name)
    style = prompt_style(benchmark, order=prompt, options=options)
    items, shown_blind = items_to_answer(workspace.items(benchmark), benchmark, limit)
    kinds = KINDS if blind else (False,)
    mean = mean_picture(shown_blind.values()) if blind else b""
    backend = ServerBackend(client, name, style=style, max_tokens=max_tokens, mean=mean, refused=refused)
    inputs = _inputs(items, f"{client.endpoint.model} {max_tokens} {refused}", style, likelihoods=False)
    return _answered(
        workspace,
        name,
        benchmark,
        backend,
        items,
        kinds,
        inputs=inputs,
        started=started,
        details={"backend": "server", "served_model": client.endpoint.model, **_described(style)},
    )


def replay_answers(
    workspace: Workspace, name: str, benchmark: str, path: Path, *, missing: Missing = "error"
) -> Report:
    """Take stored answers as a model's, so that they are scored, compared and shown like any other.

    Args:
        workspace: Gives items; gets ``answers/`` and ``report.json`` under ``name``.
        name: Of the model, in place of a recipe's.
        benchmark: Such as ``vqa-rad``.
        path: Published answers, as ``read_predictions`` reads them.
        missing: ``wrong`` takes an item without an answer as one with an empty answer.

    Raises:
        InputError: The name is a recipe's, or the file is not in its format.
        WorkspaceError: The benchmark was not built or has no test items.
        PredictionMismatch: The answers do not join the items one to one.
    """
    started = time.monotonic()
    _foreign_name(name)
    items, _ = items_to_answer(workspace.items(benchmark), benchmark, None)
    backend = ReplayBackend(path, name, benchmark=benchmark, items=items, missing=missing)
    return _answered(
        workspace,
        name,
        benchmark,
        backend,
        items,
        backend.kinds,
        inputs=fingerprint(*(shard_paths(path) if path.is_dir() else [path]), missing),
        started=started,
        details={"backend": "replay", "source": path.name, "prompt": "as stored"},
    )


def _answered(
    workspace: Workspace,
    name: str,
    benchmark: str,
    backend: ServerBackend | ReplayBackend,
    items: Sequence[VQAItem],
    kinds: Sequence[bool],
    *,
    inputs: str,
    started: float,
    details: dict[str, Any],
) -> Report:
    """Let a backend of this process answer everything, and write it."""
    scratch = workspace.scratch("predict", name, f"{benchmark}-{backend.STAGE}")
    with AnswerJournal.of(scratch, inputs) as journal:
        kept = len(journal.answers)
        answer_all(backend, items, journal, kinds=kinds, what=benchmark)
    answers = merged_answers(scratch, inputs, items, kinds)
    refusals = backend.refusals if isinstance(backend, ServerBackend) else {}
    if refusals:
        details = {**details, "refused": refusals}
    return _write(
        workspace, name, benchmark, items, answers, kept=kept, started=started, scratch=[scratch], details=details
    )


def _write(
    workspace: Workspace,
    name: str,
    benchmark: str,
    items: Sequence[VQAItem],
    answers: Sequence[Prediction],
    *,
    kept: int,
    started: float,
    scratch: Sequence[Path],
    details: dict[str, Any],
    seed: int | None = None,
) -> Report:
    step = workspace.predictions(name, benchmark)
    # In the order of the items whatever the batches were, so that equal answers are equal bytes.
    write_records(step / "answers", Prediction, answers)
    for folder in scratch:
        shutil.rmtree(folder)
    seconds = time.monotonic() - started
    report = Report(
        step=f"predict {name} {benchmark}",
        counts={
            "items": len(items),
            "images": len({item.image_sha256 for item in items}),
            "answers": len(answers),
            "resumed": kept,
        },
        metrics={"answers_per_s": round((len(answers) - kept) / seconds, 3)},
        details=details,
        seed=seed,
        fingerprint=fingerprint([dataclasses.asdict(answer) for answer in answers]),
    )
    return write_report(step, report, started=started, packages=("torch", "transformers"))


def _order(recipe: Recipe, asked: str | None) -> str | None:
    """The order of question and image that a recipe's model can be asked in; None leaves it to the benchmark.

    Raises:
        InputError: The model always has its image first, and the other order is asked for.
    """
    if not recipe.model.image_first:
        return asked
    if asked not in (None, IMAGE_FIRST):
        raise InputError(
            f"the recipe {recipe.name} always puts the image first (model.image_first)",
            where=f"--prompt {asked}",
            hint=f"leave the option out, or give {IMAGE_FIRST}",
        )
    return IMAGE_FIRST


def _checkpoint(workspace: Workspace, recipe: Recipe, benchmark: str, stage_number: int) -> Path:
    """The stage's checkpoint for a benchmark; of one that the stage did not learn, its first target's."""
    targets = recipe.targets(stage_number)
    return workspace.checkpoint(recipe.name, stage_number, benchmark if benchmark in targets else targets[0])


def _finished(folder: Path) -> str:
    """Fingerprint of a finished checkpoint, without loading it."""
    if not (folder / "metadata.json").is_file():
        raise CheckpointError(
            "there is no finished checkpoint", where=str(folder), hint="train the stage that makes it first"
        )
    return str(read_json(folder / "metadata.json")["fingerprint"])


def _inputs(items: Sequence[VQAItem], answering: str, style: PromptStyle, likelihoods: bool) -> str:
    asked = [(item.item_id, style.prompt(item), item.image_sha256) for item in items]
    return fingerprint(answering, asked, likelihoods)


def _described(style: PromptStyle) -> dict[str, Any]:
    return {"prompt": style.name, "prompt_text": style.text, "options_hint": style.options}


def _foreign_name(name: str) -> None:
    if name in recipe_names() or not re.fullmatch(r"[a-z0-9]+([.-][a-z0-9]+)*", name):
        problem = "is a recipe's name" if name in recipe_names() else "is no name for a folder"
        raise InputError(
            f"{name!r} {problem}",
            where="--name",
            hint="choose another one in small letters, digits and hyphens, such as llava-med-7b-served",
        )
