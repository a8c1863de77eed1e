"""`medvlm corpus`: draw the synthetic sample corpus."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from medvlm.cli import print_json
from medvlm.store import Workspace

__all__ = ["corpus"]


@click.command()
@click.option("--seed", type=int, default=0, show_default=True, help="Decides every picture and every sentence.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object.")
@click.pass_obj
def corpus(workspace: str, seed: int, as_json: bool) -> None:
    """Draw the synthetic sample corpus: articles, URL list, training rows and question sets.

    Everything in it is drawn by code; no picture shows a patient. Equal seeds give equal bytes.

    \b
    Examples:
      medvlm corpus
      medvlm --workspace /tmp/w corpus --seed 7 --json
    """
    from medvlm.data.sample import build_corpus

    place = Workspace(Path(workspace))
    report = build_corpus(place, seed=seed)
    if as_json:
        print_json(asdict(report))
        return
    click.echo(f"drew the synthetic corpus in {report.duration_s:.1f} s: {place.corpus}")
    for name, number in report.counts.items():
        click.echo(f"  {number:6d}  {name.replace('_', ' ')}")
