"""`medvlm predict`: a checkpoint's answers to a benchmark, with and without the image."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from medvlm.cli import print_json


@click.command()
@click.option("--recipe", "name", required=True, help="Recipe whose checkpoint answers; a name or a YAML file.")
@click.option("--benchmark", required=True, help="Such as vqa-rad, slake or pathvqa.")
@click.option("--stage", default="3", show_default=True, help="Whose checkpoint: a number or a name.")
@click.option("--limit", type=click.IntRange(min=1), help="Only the first so many test items.")
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True, help="Questions at once.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object.")
@click.pass_obj
def predict(
    workspace: str, name: str, benchmark: str, stage: str, limit: int | None, batch_size: int, as_json: bool
) -> None:
    """Answer a benchmark's test split greedily, with the image and blind (a mean image).

    Answers are kept batch by batch: a run that was stopped goes on where it was.

    \b
    Examples:
      medvlm predict --recipe tiny-llava-med --benchmark vqa-rad
      medvlm predict --recipe tiny-llava-med --benchmark slake --stage instruct --limit 50 --json
    """
    from medvlm.config import load_recipe
    from medvlm.evaluation.predict import predict_benchmark
    from medvlm.store import Workspace

    recipe = load_recipe(name)
    number, _ = recipe.stage(int(stage) if stage.isdigit() else stage)
    report = predict_benchmark(
        Workspace(Path(workspace)), recipe, benchmark, stage_number=number, limit=limit, batch_size=batch_size
    )
    if as_json:
        print_json(dataclasses.asdict(report))
    else:
        rate = report.metrics["answers_per_s"]
        click.echo(f"{report.counts['answers']} answers to {report.counts['items']} items, {rate:.1f} a second")
