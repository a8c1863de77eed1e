"""``medvlm leakage``: which test items a training set has seen, and how."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from medvlm.cli import print_json
from medvlm.store import Workspace


@click.command()
@click.option("--train", "train_split", metavar="NAME:SPLIT[:LANG]", help="Split that is trained on, of a release.")
@click.option("--test", "test_split", metavar="NAME:SPLIT[:LANG]", help="Split that is tested on, of a release.")
@click.option(
    "--root",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="The official release's folder, or one with a sub-folder for each release.",
)
@click.option(
    "--radius",
    type=click.IntRange(0, 16),
    default=4,
    show_default=True,
    help="Bits of the perceptual hash within which a picture is near.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
@click.pass_obj
def leakage(
    workspace: str,
    train_split: str | None,
    test_split: str | None,
    root: Path | None,
    radius: int,
    as_json: bool,
) -> None:
    """Find benchmark images and questions that are in a training set.

    Without options, every training set of the workspace is compared with the test items of every
    benchmark in it, and the touched items are written to leakage/items as Parquet. With --train, --test
    and --root, two splits of official releases are compared, and nothing is written.

    \b
    Examples:
      medvlm leakage
      medvlm leakage --train vqa-rad:train --test vqa-rad:test --root data/vqa-rad
      medvlm leakage --train slake:train:en --test slake:test:zh --root data/slake --json
    """
    from medvlm.data.leakage import compare_releases, compare_workspace

    given = [train_split, test_split, root]
    if any(value is not None for value in given):
        if train_split is None or test_split is None or root is None:
            raise click.UsageError("--train, --test and --root belong together: give all three, or none of them")
        comparison = asdict(compare_releases(train_split, test_split, root, radius=radius))
        print_json(comparison) if as_json else _print_table([comparison])
        return
    place = Workspace(Path(workspace))
    report = compare_workspace(place, radius=radius)
    comparisons: list[dict[str, Any]] = report.details["comparisons"]
    if as_json:
        print_json({**report.counts, "comparisons": comparisons, "items": str(place.leaked_items)})
        return
    _print_table(comparisons)
    counts = report.counts
    click.echo(
        f"{counts['leaked_items']} of {counts['test_items']} test items leaked; how each of "
        f"{counts['touched_items']} is touched: {place.leaked_items}"
    )


def _print_table(comparisons: list[dict[str, Any]]) -> None:
    """Images that leaked, then what is only near or alike in words."""
    from rich.console import Console
    from rich.table import Table

    table = Table(caption="leaked: the very image is trained on; near: a picture within the hash's radius")
    for heading in ("trained on", "tested on"):
        table.add_column(heading)
    for heading in ("leaked images", "leaked items", "near images", "same case", "same question", "clean items"):
        table.add_column(heading, justify="right")
    for row in comparisons:
        table.add_row(
            row["train"],
            row["test"],
            f"{row['leaked_images']} of {row['test_images']}",
            f"{row['leaked_items']} of {row['test_items']}",
            str(row["near_images"]),
            str(row["ways"]["case_id"]["images"]),
            str(row["ways"]["question"]["items"]),
            str(row["clean_items"]),
        )
    # Into a pipe or a log rich would fold the table to 80 columns.
    width = None if sys.stdout.isatty() else 140
    # Split names hold colons: ":train:" is an emoji to rich.
    Console(width=width, emoji=False).print(table)
