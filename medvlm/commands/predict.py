"""`medvlm predict`: answers to a benchmark, by a checkpoint, by a server, or as somebody stored them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from medvlm.cli import print_json

if TYPE_CHECKING:
    from medvlm.store import Report, Workspace

FILE = click.Path(path_type=Path)


@click.command()
@click.option("--benchmark", required=True, help="Such as vqa-rad, slake, pathvqa or pneumoniamnist.")
@click.option(
    "--backend", type=click.Choice(["transformers", "server", "replay"]), default="transformers", show_default=True
)
@click.option("--recipe", help="Whose checkpoint answers; a name or a YAML file. For transformers.")
@click.option("--name", help="What the model is called from here on. For server and replay.")
@click.option(
    "--stage", "stages", multiple=True, default=["3"], show_default=True,
    help="Whose checkpoint: a number, a name, or all; repeat it for several.",
)  # fmt: skip
@click.option("--limit", type=click.IntRange(min=1), help="Only the first so many test items.")
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True, help="Questions at once.")
@click.option(
    "--processes", type=click.IntRange(min=1), help="Share the images over so many; all GPUs, or one, if not given."
)
@click.option("--prompt", help="question_first or image_first, if not the benchmark's own.")
@click.option("--options/--no-options", default=None, help="End closed questions with their options.")
@click.option("--likelihoods/--no-likelihoods", default=True, show_default=True, help="Also of each option.")
@click.option(
    "--base-url", envvar="MEDVLM_ENDPOINT_URL", show_envvar=True,
    help="OpenAI-compatible server, such as http://127.0.0.1:8000/v1. A key is taken from MEDVLM_ENDPOINT_KEY.",
)  # fmt: skip
@click.option("--model", envvar="MEDVLM_ENDPOINT_MODEL", show_envvar=True, help="The model's name at the server.")
@click.option("--concurrency", type=click.IntRange(1, 256), default=8, show_default=True, help="Requests at once.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=64, show_default=True, help="Of a served answer.")
@click.option("--blind/--no-blind", default=True, show_default=True, help="Ask the server without the image too.")
@click.option(
    "--refused", type=click.Choice(["error", "wrong"]), default="error", show_default=True,
    help="An item that the server refuses stops the run, or counts as an empty answer.",
)  # fmt: skip
@click.option("--answers", type=FILE, help="Stored answers: JSONL with question_id and text, or Parquet. For replay.")
@click.option(
    "--missing", type=click.Choice(["error", "wrong"]), default="error", show_default=True,
    help="A stored file that lacks an item is refused, or counts it as wrong.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object.")
@click.pass_obj
def predict(
    workspace: str,
    benchmark: str,
    backend: str,
    recipe: str | None,
    name: str | None,
    stages: Sequence[str],
    limit: int | None,
    batch_size: int,
    processes: int | None,
    prompt: str | None,
    options: bool | None,
    likelihoods: bool,
    base_url: str | None,
    model: str | None,
    concurrency: int,
    max_tokens: int,
    blind: bool,
    refused: str,
    answers: Path | None,
    missing: str,
    as_json: bool,
) -> None:
    """Answer a benchmark's test split greedily, with the image and blind (a mean image).

    Answers are kept batch by batch: a run that was stopped goes on where it was.

    \b
    Examples:
      medvlm predict --recipe tiny-llava-med --benchmark vqa-rad
      medvlm predict --recipe tiny-llava-med --benchmark slake --stage 2 --stage 3
      medvlm predict --recipe llava-med --benchmark slake --processes 8 --options
      medvlm predict --backend server --name llava-med-served --benchmark slake \\
             --base-url http://127.0.0.1:8000/v1 --model llava-med-7b --concurrency 32
      medvlm predict --backend replay --name llava-zero-shot --benchmark vqa-rad \\
             --answers answer-file-llava-zeorshot.jsonl
    """
    from medvlm.store import Workspace

    place = Workspace(Path(workspace))
    if backend == "transformers":
        if not recipe:
            raise click.UsageError("the transformers backend needs --recipe")
        report = _by_checkpoint(
            place,
            recipe,
            benchmark,
            stages,
            processes,
            limit=limit,
            batch_size=batch_size,
            prompt=prompt,
            options=options,
            likelihoods=likelihoods,
        )
    elif not name:
        raise click.UsageError(f"the {backend} backend needs --name: what the model is called from here on")
    elif backend == "server":
        if not base_url or not model:
            raise click.UsageError("the server backend needs --base-url and --model")
        report = _by_server(
            place,
            name,
            benchmark,
            (base_url, model, concurrency),
            limit=limit,
            prompt=prompt,
            options=options,
            blind=blind,
            max_tokens=max_tokens,
            refused=refused,
        )
    else:
        if not answers:
            raise click.UsageError("the replay backend needs --answers")
        from medvlm.evaluation.predict import replay_answers

        report = replay_answers(place, name, benchmark, answers, missing="wrong" if missing == "wrong" else "error")
    if as_json:
        print_json(dataclasses.asdict(report))
    else:
        rate = report.metrics["answers_per_s"]
        click.echo(f"{report.counts['answers']} answers to {report.counts['items']} items, {rate:.1f} a second")


def _by_checkpoint(
    workspace: Workspace,
    recipe: str,
    benchmark: str,
    stages: Sequence[str],
    processes: int | None,
    *,
    limit: int | None,
    batch_size: int,
    prompt: str | None,
    options: bool | None,
    likelihoods: bool,
) -> Report:
    from medvlm.config import load_recipe
    from medvlm.evaluation.predict import predict_benchmark
    from medvlm.training.launch import gpu_count

    loaded = load_recipe(recipe)
    numbers = [number for stage in stages for number in ((1, 2, 3) if stage == "all" else (loaded.stage(stage)[0],))]
    return predict_benchmark(
        workspace,
        loaded,
        benchmark,
        stages=numbers,
        limit=limit,
        batch_size=batch_size,
        prompt=prompt,
        options=options,
        likelihoods=likelihoods,
        processes=processes or gpu_count() or 1,
    )


def _by_server(
    workspace: Workspace,
    name: str,
    benchmark: str,
    server: tuple[str, str, int],
    *,
    limit: int | None,
    prompt: str | None,
    options: bool | None,
    blind: bool,
    max_tokens: int,
    refused: str,
) -> Report:
    from medvlm.data.endpoint import ChatClient, Endpoint, EndpointSettings
    from medvlm.data.response_cache import ResponseCache
    from medvlm.evaluation.predict import predict_with_server

    url, model, concurrency = server
    endpoint = Endpoint(url.rstrip("/"), model, os.environ.get("MEDVLM_ENDPOINT_KEY", ""))
    with ResponseCache(workspace.scratch("served") / "answers.sqlite") as cache:
        return predict_with_server(
            workspace,
            name,
            benchmark,
            ChatClient(endpoint, cache, settings=EndpointSettings(concurrency=concurrency)),
            limit=limit,
            prompt=prompt,
            options=options,
            blind=blind,
            max_tokens=max_tokens,
            refused="wrong" if refused == "wrong" else "error",
        )
