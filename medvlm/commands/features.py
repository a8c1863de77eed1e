"""`medvlm features`: what frozen towers made of images, kept for training."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from medvlm.cli import print_json

if TYPE_CHECKING:
    from medvlm.models.feature_store import KeptFeatures


@click.group()
def features() -> None:
    """Show and remove the feature caches that training keeps.

    \b
    Examples:
      medvlm features list
      medvlm features prune --keep-gb 10
      medvlm features prune --keep-gb 0

    A stage with a frozen vision tower keeps what the tower makes of each image, for later epochs,
    stages and recipes with that tower. A run that needs room removes what was used longest ago,
    above the stage's speed.feature_cache_gb; these verbs do it by hand.
    """


@features.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_obj
def list_(workspace: str, as_json: bool) -> None:
    """List the caches, the one used last first.

    \b
    Example:
      medvlm features list --json
    """
    from medvlm.models.feature_store import kept_features
    from medvlm.store import Workspace

    _show(kept_features(Workspace(Path(workspace))), as_json, "kept", "no feature cache")


@features.command()
@click.option("--keep-gb", type=click.FloatRange(min=0), required=True, help="What may stay, in GB; 0 removes all.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_obj
def prune(workspace: str, keep_gb: float, as_json: bool) -> None:
    """Remove what was used longest ago, until the rest takes no more than so many GB.

    \b
    Example:
      medvlm features prune --keep-gb 10

    A cache that a running training reads stays. What is removed is made again when it is needed.
    """
    from medvlm.models.feature_store import prune_features
    from medvlm.store import Workspace

    removed = prune_features(Workspace(Path(workspace)), keep_gb * 1e9)
    _show(removed, as_json, "removed", "nothing to remove")


def _show(found: list[KeptFeatures], as_json: bool, word: str, none: str) -> None:
    total = sum(one.bytes for one in found)
    if as_json:
        rows: list[dict[str, Any]] = [{**dataclasses.asdict(one), "folder": str(one.folder)} for one in found]
        print_json({word: rows, "bytes": total})
        return
    for one in found:
        use = "in use" if one.in_use else f"used {one.idle_s / 86400:.1f} days ago"
        click.echo(f"{one.key}  {one.images:,} images, {one.bytes / 1e9:.3f} GB, {use}, {one.about or 'unknown'}")
    click.echo(f"{word}: {total / 1e9:.3f} GB" if found else none)
