"""`medvlm train`: one stage of a recipe as a DeepSpeed job."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from medvlm.cli import print_json

__all__ = ["train"]


@click.command()
@click.option("--recipe", required=True, metavar="NAME", help="A recipe's name, or a YAML file.")
@click.option("--stage", required=True, metavar="N", help="1, 2 or 3, or the stage's name.")
@click.option("--processes", type=click.IntRange(min=1), help="Default: one for each GPU; without a GPU, one.")
@click.option("--fresh", is_flag=True, help="Begin anew instead of going on from a killed or finished run.")
@click.option("--set", "overrides", multiple=True, metavar="FIELD=VALUE", help="Change a field of the recipe.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object.")
@click.pass_obj
def train(
    workspace: str,
    recipe: str,
    stage: str,
    processes: int | None,
    fresh: bool,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Train one stage of a recipe as a DeepSpeed job.

    A run that was killed goes on from its last checkpoint; a stage that is finished is kept. Both hold only
    while the recipe's stage, the data and the start checkpoint are the same.

    \b
    Examples:
      medvlm train --recipe tiny-llava-med --stage 1
      medvlm train --recipe tiny-llava-med --stage finetune --set stages.finetune.max_steps=50
      medvlm train --recipe llava-med --stage align --processes 8
    """
    from medvlm.config import load_recipe
    from medvlm.store import Workspace

    # A wrong recipe is refused before the seconds that torch takes to import.
    load_recipe(recipe, overrides).stage(stage)
    from medvlm.training.launch import launch_stage

    report = launch_stage(
        Workspace(Path(workspace)), recipe, stage, overrides=overrides, processes=processes, fresh=fresh
    )
    if as_json:
        print_json(dataclasses.asdict(report))
        return
    for name, value in sorted(report.metrics.items()):
        click.echo(f"{name}  {value:.4f}")
    click.echo(
        f"{report.counts['samples']:,} samples, {report.counts['steps']:,} steps, "
        f"{report.counts['parameters_trained']:,} of {report.counts['parameters']:,} parameters trained, "
        f"{report.duration_s:.0f} s"
    )
