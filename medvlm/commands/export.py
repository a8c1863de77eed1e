"""`medvlm export`: a checkpoint for vLLM and others."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from medvlm.cli import print_json
from medvlm.commands.delta import bytes_bar

if TYPE_CHECKING:
    from medvlm.models.export import ExportType

__all__ = ["export"]

_folder = click.Path(path_type=Path)


@click.command()
@click.argument("checkpoint", type=_folder)
@click.argument("out", type=_folder)
@click.option(
    "--dtype",
    type=click.Choice(["stored", "float32", "bfloat16", "float16"]),
    default="stored",
    show_default=True,
    help="Of the weights; bfloat16 is what a GPU serves.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
def export(checkpoint: Path, out: Path, dtype: str, as_json: bool) -> None:
    """Write CHECKPOINT to OUT as stock LlavaForConditionalGeneration.

    With tokenizer, image processor and a chat template that writes the prompts of training, image frame included.
    The logits are the same. A mixture of experts and the cluster projector have no stock form; the error says how
    such a checkpoint is opened instead.

    \b
    Examples:
      medvlm export workspace/recipes/tiny-llava-med/stage2/checkpoint/all exported
      medvlm export imported-v15 llava-med-v15-hf --dtype bfloat16
      vllm serve llava-med-v15-hf --chat-template-content-format openai

    The last option tells vLLM to hand images to the chat template, which older versions do not see by themselves:
    they would write a mark into the text, which the template takes apart as it does with any foreign mark.
    """
    from medvlm.models.export import export_checkpoint

    with bytes_bar("exporting") as progress:
        result = export_checkpoint(checkpoint, out, dtype=cast("ExportType", dtype), progress=progress)
    if as_json:
        print_json({**dataclasses.asdict(result), "folder": str(result.folder)})
        return
    click.echo(
        f"{result.folder}: {result.tensors:,} tensors, {result.parameters:,} parameters in {result.dtype}, "
        f"chat template {result.template}"
    )
    click.echo(f"sha256 {result.sha256}")
