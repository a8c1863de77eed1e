"""`medvlm import-checkpoint`: checkpoints of the original LLaVA layout."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from medvlm.cli import print_json
from medvlm.commands.delta import bytes_bar

__all__ = ["import_checkpoint"]

_folder = click.Path(path_type=Path)


@click.command("import-checkpoint")
@click.argument("source")
@click.option("--recipe", required=True, metavar="NAME", help="The recipe that says which model it is.")
@click.option("--out", type=_folder, help="Folder to write; it must not exist.")
@click.option("--stage", metavar="N", help="Instead of --out: put it where the recipe's stage N has its checkpoint.")
@click.option("--target", default="all", show_default=True, help="With --stage: a benchmark's name, or all.")
@click.option("--base", help="Language model or LLaVA model under a LoRA adapter or a lone mm_projector.bin.")
@click.option("--vision-tower", help="Folder or hub id of the CLIP tower, in place of the one inside.")
@click.option("--projector", type=_folder, help="An mm_projector.bin, in place of the projector inside.")
@click.option("--vision-lora", type=_folder, help="Folder of a LoRA adapter of the tower.")
@click.option("--tokenizer", help="Folder or hub id; by default the checkpoint's own.")
@click.option("--set", "overrides", multiple=True, metavar="FIELD=VALUE", help="Change a field of the recipe.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
@click.pass_obj
def import_checkpoint(
    workspace: str,
    source: str,
    recipe: str,
    out: Path | None,
    stage: str | None,
    target: str,
    base: str | None,
    vision_tower: str | None,
    projector: Path | None,
    vision_lora: Path | None,
    tokenizer: str | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Read a checkpoint of the original LLaVA layout (LLaVA-Med v1 and v1.5, Qilin-Med-VL, LoRA or merged).

    Every tensor of SOURCE, a folder or a hub id, is accounted for: one that is missing, unexpected or of another shape
    is an error that lists it. A tower inside the checkpoint is read; settings are compared with the recipe's.

    \b
    Examples:
      medvlm import-checkpoint llava-med-7b --recipe llava-med --out imported
      medvlm import-checkpoint microsoft/llava-med-v1.5-mistral-7b --recipe llava-med-v15 --stage 2
      medvlm import-checkpoint my-lora --recipe llava-med-v15 --base mistralai/Mistral-7B-Instruct-v0.2 --out merged
    """
    from medvlm.config import load_recipe
    from medvlm.store import Workspace

    loaded = load_recipe(recipe, overrides)
    number, _ = loaded.stage(stage or 2)
    if (out is None) == (stage is None):
        raise click.UsageError("give either --out or --stage")
    folder = out or Workspace(Path(workspace)).ensure().checkpoint(loaded.name, number, target)
    from medvlm.models import importing

    parts = importing.Parts(base, vision_tower, projector, vision_lora, tokenizer)
    with bytes_bar("importing") as progress:
        result = importing.import_checkpoint(source, loaded, folder, parts, stage=number, progress=progress)
    if as_json:
        print_json({**dataclasses.asdict(result), "folder": str(result.folder)})
        return
    click.echo(f"{result.folder}: {result.tensors:,} tensors, {result.parameters:,} parameters")
    for origin, count in result.from_where.items():
        click.echo(f"  {count:,} from {origin}")
    if result.merged:
        click.echo(f"  {result.merged:,} weights took up their adapter")
    if result.dropped:
        click.echo(f"  {len(result.dropped):,} stored buffers dropped: every version of transformers computes them")
    if result.added_tokens:
        added = ", ".join(f"{token} ({number})" for token, number in result.added_tokens.items())
        click.echo(f"  added to the tokenizer: {added}; {result.grown_rows} new rows, the average of the others")
    click.echo(f"sha256 {result.sha256}")
