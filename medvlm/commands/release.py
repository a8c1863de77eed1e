"""`medvlm release`: bundle a recipe's model with its card and credit, verify it, promote it."""

from __future__ import annotations

from pathlib import Path

import click

from medvlm.cli import print_json
from medvlm.store import Workspace


@click.group()
def release() -> None:
    """Bundle a trained model with card, credit and bill of materials; promote it once approved.

    \b
    Examples:
      medvlm release build --recipe tiny-llava-med
      medvlm release verify releases/tiny-llava-med/bundle
      medvlm release promote --recipe tiny-llava-med
    """


@release.command()
@click.option("--recipe", required=True, help="A recipe whose stages are trained and scored.")
@click.option("--json", "as_json", is_flag=True, help="Print counts and licences as one JSON object.")
@click.pass_obj
def build(workspace: str, recipe: str, as_json: bool) -> None:
    """Write the bundle: checkpoints, model card, ATTRIBUTION.csv, sbom.cdx.json and SHA256SUMS.

    \b
    Example:
      medvlm release build --recipe tiny-llava-med
    """
    from medvlm.release.bundle import build_release

    place = Workspace(Path(workspace))
    report = build_release(place, recipe)
    if as_json:
        print_json({"fingerprint": report.fingerprint, **report.counts, **report.details})
    else:
        click.echo(f"{report.counts['files']} files in {place.release(recipe) / 'bundle'}", err=True)
        click.echo("next: have it approved on the dashboard, then run 'medvlm release promote'", err=True)


@release.command()
@click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the changed files as one JSON object.")
def verify(bundle: Path, as_json: bool) -> None:
    """Compare every file of a bundle with its SHA256SUMS; exits with 1 where one differs.

    \b
    Example:
      medvlm release verify releases/tiny-llava-med/bundle
    """
    from medvlm.release.bundle import verify_release

    changed = verify_release(bundle)
    if as_json:
        print_json({"changed": changed})
    else:
        click.echo("\n".join(changed) or "every file is as it was made", err=not changed)
    if changed:
        raise SystemExit(1)


@release.command()
@click.option("--recipe", required=True, help="A recipe with a release that a person approved.")
@click.option("--json", "as_json", is_flag=True, help="Print the promotion as one JSON object.")
@click.pass_obj
def promote(workspace: str, recipe: str, as_json: bool) -> None:
    """Make the release the one that others may use; registers it where MLFLOW_TRACKING_URI is set.

    \b
    Example:
      medvlm release promote --recipe tiny-llava-med
    """
    import dataclasses

    from medvlm.release.promote import promote as promote_release

    promotion = promote_release(Workspace(Path(workspace)), recipe)
    if as_json:
        print_json(dataclasses.asdict(promotion))
    else:
        registered = f", registered as {promotion.registered}" if promotion.registered else ""
        click.echo(f"{recipe} {promotion.fingerprint} is promoted, approved by {promotion.who}{registered}", err=True)
