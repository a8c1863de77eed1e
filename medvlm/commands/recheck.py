"""`medvlm recheck`: retractions and licence changes since the fetch."""

from __future__ import annotations

from pathlib import Path

import click

from medvlm.cli import print_json
from medvlm.store import Workspace, read_report


@click.command()
@click.option("--store", help="The store that was fetched from. [default: as in the fetch's report]")
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), help="Step folder. [default: <workspace>/figures]"
)
@click.option("--inventory", is_flag=True, help="Read the bucket's daily inventory (some 240 MB) and list nothing.")
@click.option("--dry-run", is_flag=True, help="Say what has changed, and mark nothing.")
@click.option("--concurrency", type=click.IntRange(1, 2048), default=128, show_default=True, help="Requests in flight.")
@click.option("--rate", type=click.FloatRange(0), default=0.0, help="Most requests a second; 0 is no limit.")
@click.option("--json", "as_json", is_flag=True, help="Print the counts as one JSON object.")
@click.pass_obj
def recheck(
    obj: str,
    store: str | None,
    out: Path | None,
    inventory: bool,
    dry_run: bool,
    concurrency: int,
    rate: float,
    as_json: bool,
) -> None:
    """Look for retractions and licence changes since the fetch.

    Figures of articles that were retracted, withdrawn, or left the policy's licences leave the
    shards, and their rows say why; the next dataset build is without them.

    \b
    Examples
      medvlm recheck
      medvlm recheck --inventory --dry-run --json
    """
    from medvlm.data.objects import StoreLimits
    from medvlm.data.pmc import PUBLIC_BUCKET
    from medvlm.data.recheck import recheck_figures

    workspace = Workspace(Path(obj))
    folder = out or workspace.figures
    before = read_report(folder)
    report = recheck_figures(
        folder,
        store or (str(before.details.get("store", PUBLIC_BUCKET)) if before else PUBLIC_BUCKET),
        scratch=None if out else workspace.scratch("fetch"),
        inventory=inventory,
        dry_run=dry_run,
        limits=StoreLimits(concurrency=concurrency, requests_per_s=rate),
    )
    if as_json:
        print_json({**report.counts, "verdicts": report.details["verdicts"]})
        return
    for pmcid, verdict in report.details["verdicts"].items():
        click.echo(f"{pmcid}  {verdict}", err=True)
    counts = report.counts
    click.echo(
        f"{counts['articles']:,} articles, {counts['unchanged']:,} unchanged, {counts['rows_marked']:,} rows marked",
        err=True,
    )
