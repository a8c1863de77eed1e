"""`medvlm delta`: weights published as a difference from LLaMA."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from medvlm.cli import print_json

if TYPE_CHECKING:
    from medvlm.models.delta import DeltaResult, StoredType

__all__ = ["bytes_bar", "delta"]

_json = click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
_out = click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write; it must not exist.")
_shard = click.option(
    "--shard-gib", default=2.0, show_default=True, type=click.FloatRange(min=0.001), help="Memory and size of a shard."
)


@click.group()
def delta() -> None:
    """Add published delta weights to their base model, or make such a delta.

    Works shard by shard, so that a 7B model needs some 4 GiB of memory, not 30. Every tensor is accounted for by
    name, shape and type; the result has a manifest with the SHA-256 of each. Reads safetensors, and .bin files of
    tensors only: code in a file is refused. A killed run goes on when the same command is repeated.

    \b
    Examples:
      medvlm delta apply --base llama-7b --delta llava_med_in_text_60k_ckpt2_delta --out llava-med-7b
      medvlm delta make --base llama-7b --target llava-med-7b --out my-delta
      medvlm import-checkpoint llava-med-7b --recipe llava-med --out checkpoints/llava-med
    """


@contextmanager
def bytes_bar(title: str) -> Generator[Callable[[int, int], None]]:
    """A progress bar on standard error that is told bytes done and in all."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@delta.command()
@click.option("--base", required=True, help="Folder or hub id of the base model, LLaMA in transformers' layout.")
@click.option("--delta", "delta_", required=True, help="Folder or hub id of the delta weights.")
@_out
@click.option("--sha256", metavar="HEX", help="The result must have this SHA-256 (of its manifest).")
@_shard
@_json
def apply(base: str, delta_: str, out: Path, sha256: str | None, shard_gib: float, as_json: bool) -> None:
    """Add a delta to its base model.

    New rows of the token tables are the delta's own; tensors that only the delta has (the projector) too. The sum is
    taken in the delta's type, float16 for the published ones, as the original does.

    \b
    Examples:
      medvlm delta apply --base llama-7b --delta data_RAD-9epoch_delta --out llava-med-rad
      medvlm delta apply --base llama-7b --delta my-delta --out model --sha256 7f3a...
    """
    from medvlm.models.delta import apply_delta

    with bytes_bar("adding the delta") as progress:
        result = apply_delta(
            base, delta_, out, expect_sha256=sha256, shard_bytes=int(shard_gib * 2**30), progress=progress
        )
    _report(result, as_json)


@delta.command()
@click.option("--base", required=True, help="Folder or hub id of the base model.")
@click.option("--target", required=True, help="Folder or hub id of the model to publish as a delta.")
@_out
@click.option(
    "--stored",
    type=click.Choice(["float16", "bfloat16", "float32"]),
    default="float16",
    show_default=True,
    help="float16 as the published deltas; float32 loses less and takes twice the room.",
)
@_shard
@_json
def make(base: str, target: str, out: Path, stored: str, shard_gib: float, as_json: bool) -> None:
    """Subtract the base from a model, so that it can be published without the base's weights.

    The difference is rounded to the stored type. How many weights applying it will not give back to the last bit is
    counted, and the SHA-256 of what it gives is stored beside it, for 'medvlm delta apply' to check.

    \b
    Example:
      medvlm delta make --base llama-7b --target llava-med-7b --out my-delta
    """
    from medvlm.models.delta import make_delta

    with bytes_bar("subtracting the base") as progress:
        result = make_delta(
            base,
            target,
            out,
            stored=cast("StoredType", stored),
            shard_bytes=int(shard_gib * 2**30),
            progress=progress,
        )
    _report(result, as_json)


def _report(result: DeltaResult, as_json: bool) -> None:
    if as_json:
        print_json({**dataclasses.asdict(result), "folder": str(result.folder)})
        return
    grown = "".join(f", {rows} new rows in {name}" for name, rows in result.grown.items())
    inexact = f", {result.inexact:,} weights that rounding changes" if result.inexact else ""
    click.echo(f"{result.folder}: {result.tensors:,} tensors, {result.parameters:,} parameters{grown}{inexact}")
    click.echo(f"sha256 {result.sha256}")
