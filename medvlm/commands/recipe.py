"""`medvlm recipe`: list, show, check and resolve recipes."""

from __future__ import annotations

from pathlib import Path

import click

from medvlm.cli import print_json

__all__ = ["recipe"]

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
override_option = click.option(
    "--set", "overrides", multiple=True, metavar="FIELD=VALUE", help="Change a field, e.g. stages.align.epochs=2."
)


@click.group()
def recipe() -> None:
    """List, show and check recipes.

    A recipe says what a system is made of and how its three stages train. A file may `extends:`
    another one and give only what differs.

    \b
    Examples:
      medvlm recipe list
      medvlm recipe show tiny-llava-med
      medvlm recipe check my-recipe.yaml
    """


@recipe.command("list")
@as_json
def list_(as_json: bool) -> None:
    """Names of the recipes that come with medvlm."""
    from medvlm.config import load_recipe, recipe_names

    names = recipe_names()
    if as_json:
        print_json(names)
        return
    for name in names:
        click.echo(f"{name:<{max(map(len, names))}}  {load_recipe(name).title}")


@recipe.command()
@click.argument("name")
@override_option
@as_json
def show(name: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """A recipe with everything that it inherits, as YAML. NAME may be a file."""
    import yaml

    from medvlm.config import load_recipe, recipe_yaml

    text = recipe_yaml(load_recipe(name, overrides))
    if as_json:
        print_json(yaml.safe_load(text))
    else:
        click.echo(text, nl=False)


@recipe.command()
@click.argument("names", nargs=-1)
@as_json
def check(names: tuple[str, ...], as_json: bool) -> None:
    """Read recipes and refuse the first wrong one; without NAMES, all that come with medvlm."""
    from medvlm.config import load_recipe, recipe_names

    checked = [load_recipe(name).name for name in names or recipe_names()]
    if as_json:
        print_json({"valid": checked})
    else:
        click.echo(f"valid: {', '.join(checked)}")


@recipe.command()
@click.argument("name")
@click.pass_obj
def resolve(workspace: str, name: str) -> None:
    """Write stage1.yaml, stage2.yaml and stage3.yaml: what each stage of a recipe depends on.

    A file changes only if its stage does, so that an edit of one stage makes only that one stale.
    """
    from medvlm.config import load_recipe, write_stage_files
    from medvlm.store import Workspace

    folder = write_stage_files(Workspace(Path(workspace)), load_recipe(name))
    click.echo(str(folder), err=True)
