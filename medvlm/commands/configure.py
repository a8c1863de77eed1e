"""`medvlm configure`: choose what this workspace is built from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from medvlm.cli import print_json
from medvlm.store import Workspace


@click.command()
@click.option("--urls", help="URL list: LLaVA-Med's jsonl, or a list of PMCIDs.")
@click.option("--store", help="Where the figures are: a folder, http(s)://… or s3://….")
@click.option("--policy", type=click.Choice(["research", "commercial", "any-oa"]), help="Licences that are kept.")
@click.option("--alignment", help="Official alignment file or folder; by default captions, once --urls is given.")
@click.option("--instruct", help="Official instruction file or folder; by default rule-based, once --urls is given.")
@click.option("--vqa-rad", help="Folder of the VQA-RAD release.")
@click.option("--slake", help="Folder that holds Slake1.0, English and Chinese.")
@click.option("--pathvqa", help="Folder of the PathVQA release.")
@click.option("--recipe", "recipes", multiple=True, help="Recipe to build; repeat for several. Added to the list.")
@click.option("--sample", is_flag=True, help="Begin from the synthetic sample corpus, not from the present settings.")
@click.option("--file", "path", type=click.Path(dir_okay=False, path_type=Path), default=Path("params.yaml"))
@click.option("--json", "as_json", is_flag=True, help="Print the settings as one JSON object.")
@click.pass_obj
def configure(
    workspace: str,
    urls: str | None,
    store: str | None,
    policy: str | None,
    alignment: str | None,
    instruct: str | None,
    vqa_rad: str | None,
    slake: str | None,
    pathvqa: str | None,
    recipes: tuple[str, ...],
    sample: bool,
    path: Path,
    as_json: bool,
) -> None:
    """Choose URL list, store, sources and recipes; writes params.yaml.

    \b
    Examples:
      medvlm configure --sample
      medvlm configure --urls pmc_urls.jsonl --store s3://pmc-oa-opendata
      medvlm configure --vqa-rad ~/data/vqa-rad --recipe tiny-llava-med
    """
    from medvlm.pipeline import with_items
    from medvlm.settings import Settings, read_settings, write_settings

    bucket: str | None = click.get_current_context().meta.get("bucket")
    # DVC wants its outputs inside the project: there lies the bucket's local copy.
    begun = Settings.sample("workspace" if bucket else workspace)
    settings = begun if sample or not path.exists() else read_settings(path)
    values: dict[str, Any] = settings.model_dump()
    values["bucket"] = bucket or values["bucket"]
    shards = f"{values['workspace']}/figures/shards"
    for key, value in (("urls", urls), ("store", store), ("policy", policy)):
        if value:
            values["figures"][key] = value
    for key, value in (("alignment", alignment), ("instruct", instruct)):
        # Another list has other figures: the sample's texts would join to none of them.
        values[key] = value or (shards if urls else values[key])
    for key, value in (("vqa-rad", vqa_rad), ("slake", slake), ("slake-zh", slake), ("pathvqa", pathvqa)):
        if value:
            values["benchmarks"][key] = value
    values["recipes"] = list(dict.fromkeys([*(() if sample and recipes else values["recipes"]), *recipes]))
    settings = with_items(Settings.model_validate(values))
    write_settings(path, settings)
    # With the files that reviews go into, which DVC wants to see before there is a review.
    Workspace(path.parent / settings.workspace).ensure()
    if as_json:
        print_json(settings.model_dump())
    else:
        click.echo(path.read_text("utf-8"), nl=False)
