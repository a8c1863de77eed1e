"""`medvlm dataset`: build and describe training datasets and benchmarks."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from medvlm.cli import print_json
from medvlm.store import Report, Workspace

__all__ = ["dataset"]

JSON_OPTION = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


@click.group()
def dataset() -> None:
    """Build and describe training datasets and benchmarks."""


@dataset.command("build")
@click.argument("name", type=click.Choice(["alignment", "instruct"]))
@click.option(
    "--official",
    "--from",
    "source",
    type=click.Path(path_type=Path),
    help="LLaVA-Med's JSON, joined to the fetched figures; or a folder of figure shards.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Decides which prompt each figure gets.")
@JSON_OPTION
@click.pass_obj
def build(workspace: str, name: str, source: Path | None, seed: int, as_json: bool) -> None:
    """Build the training dataset NAME (alignment or instruct) from the fetched figures.

    Without --official, captions are the alignment texts and rules write the conversations.

    \b
    medvlm dataset build alignment
    medvlm dataset build instruct --official llava_med_instruct_60k_inline_mention.json
    """
    from medvlm.data.alignment import build_alignment
    from medvlm.data.instruct import build_instruct

    make = {"alignment": build_alignment, "instruct": build_instruct}[name]
    shards, official = (source, None) if source and source.is_dir() else (None, source)
    _print_report(make(Workspace(Path(workspace)).ensure(), official=official, figures=shards, seed=seed), as_json)


@dataset.command("build-benchmark")
@click.argument("name")
@click.option(
    "--source",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder of the official release.",
)
@click.option(
    "--tolerated-missing",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="Share of questions whose image may be missing or broken.",
)
@JSON_OPTION
@click.pass_obj
def build_benchmark(workspace: str, name: str, source: Path, tolerated_missing: float, as_json: bool) -> None:
    """Read benchmark NAME from its official release, or from its Parquet copy.

    NAME is vqa-rad, slake, slake-zh, pathvqa, data-rad, pmc-vqa, pneumoniamnist, organcmnist or pathmnist.

    \b
    medvlm dataset build-benchmark vqa-rad --source data/vqa-rad
    medvlm dataset build-benchmark slake-zh --source data/slake --json
    """
    from medvlm.data import benchmarks

    report = benchmarks.build_benchmark(Workspace(Path(workspace)).ensure(), name, source, tolerance=tolerated_missing)
    _print_report(report, as_json)


def _print_report(report: Report, as_json: bool) -> None:
    if as_json:
        print_json(dataclasses.asdict(report))
        return
    click.echo(f"{report.step}: done in {report.duration_s:.1f} s")
    for name, count in report.counts.items():
        click.echo(f"  {name:<24} {count:>9,}")
    for reason, lost in report.details.get("dropped", {}).items():
        click.echo(f"  dropped, {reason}: {lost['count']:,}, such as {lost['first'][0]}")
