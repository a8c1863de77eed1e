"""`medvlm train-router`: the domain router of a mixture of experts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from medvlm.cli import print_json

__all__ = ["train_router"]


@click.command("train-router")
@click.option("--recipe", required=True, metavar="NAME", help="A recipe's name, or a YAML file.")
@click.option("--fresh", is_flag=True, help="Train again a router that is finished.")
@click.option("--set", "overrides", multiple=True, metavar="FIELD=VALUE", help="Change a field of the recipe.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object.")
@click.pass_obj
def train_router(workspace: str, recipe: str, fresh: bool, overrides: tuple[str, ...], as_json: bool) -> None:
    """Train the domain router of a mixture of experts, from stage 2's model and modality labels.

    It tells which expert a token goes to, and stays as it is while the experts train. A published router is taken
    over with --set model.moe.router.source=FILE. Accuracy is measured on images that were held out.

    \b
    Examples:
      medvlm train-router --recipe tiny-cliva-med-phi2
      medvlm train-router --recipe cliva-med-phi2 --set model.moe.router.source=phi_router.pth
    """
    from medvlm.config import load_recipe
    from medvlm.store import Workspace

    loaded = load_recipe(recipe, overrides)
    from medvlm.training.router import train_router as train

    report = train(Workspace(Path(workspace)), loaded, fresh=fresh)
    if as_json:
        print_json(dataclasses.asdict(report))
        return
    for index, (domain, row) in enumerate(zip(report.details["domains"], report.details["confusion"], strict=True)):
        click.echo(f"expert {index}  {' + '.join(domain):<24} held-out images by expert: {row}")
    click.echo(
        f"{report.metrics['accuracy']:.1%} of {report.counts['held_out']} held-out images and "
        f"{report.metrics['token_accuracy']:.1%} of their tokens right, from {report.counts['labels']} labels"
    )
