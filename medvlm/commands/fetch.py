"""`medvlm fetch`: the figures of a list, from the PMC Cloud Service into shards."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from medvlm.cli import print_json
from medvlm.store import Report, Workspace


@click.command()
@click.option("--urls", type=click.Path(path_type=Path), required=True, help="List of wanted figures, one row a line.")
@click.option(
    "--store",
    default="s3://pmc-oa-opendata",
    show_default=True,
    help="Folder, http(s):// address or s3:// bucket laid out as PMC's, or a folder of old .tar.gz packages.",
)
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), help="Step folder. [default: <workspace>/figures]"
)
@click.option(
    "--policy",
    type=click.Choice(["research", "commercial", "any-oa"]),
    default="research",
    show_default=True,
    help="Which licences are taken: see the notes below.",
)
@click.option("--concurrency", type=click.IntRange(1, 2048), default=128, show_default=True, help="Requests in flight.")
@click.option("--rate", type=click.FloatRange(0), default=0.0, help="Most requests a second; 0 is no limit.")
@click.option("--timeout", type=click.FloatRange(0.1), default=30.0, show_default=True, help="Longest silence, in s.")
@click.option("--attempts", type=click.IntRange(1, 20), default=5, show_default=True, help="Tries for each request.")
@click.option("--max-side", type=click.IntRange(32), default=1024, show_default=True, help="Longest side, in pixels.")
@click.option("--captions/--no-captions", default=True, help="Read captions and mentions from the articles' XML.")
@click.option("--shard", help="Fetch one part only, such as 3/16. Then run once without it to put all in place.")
@click.option("--fresh", is_flag=True, help="Forget what earlier runs fetched.")
@click.option("--tolerate-bad-rows", is_flag=True, help="Exit 0 although rows of the list cannot be read.")
@click.option("--json", "as_json", is_flag=True, help="Print the counts as one JSON object.")
@click.pass_obj
def fetch(
    obj: str,
    urls: Path,
    store: str,
    out: Path | None,
    policy: str,
    concurrency: int,
    rate: float,
    timeout: float,
    attempts: int,
    max_side: int,
    captions: bool,
    shard: str | None,
    fresh: bool,
    tolerate_bad_rows: bool,
    as_json: bool,
) -> None:
    """Fetch the figures of a URL list from the PMC Cloud Service.

    Every row of the list gets an outcome: ok, or the reason why there is no figure. A run that was
    stopped goes on where it was; a run on a finished list looks only for what has changed.

    \b
    Rows of the list may be
      LLaVA-Med's     {"pmc_tar_url": …, "image_file_path": "PMC1/a.jpg", "pair_id": "123_F1"}
      articles        PMC7236913              every figure of it
      figures         PMC7236913 F2           or {"pmcid": "PMC7236913", "figure_id": "F2"}
      panel names     PMC8253873_Fig6_46.jpg  the whole figure is taken
    \b
    Policies
      research        CC0, CC BY, CC BY-SA, CC BY-NC, CC BY-NC-SA
      commercial      CC0, CC BY, CC BY-SA
      any-oa          these and the ND licences; text-mining permissions never
    \b
    Examples
      medvlm fetch --urls llava_med_image_urls.jsonl
      medvlm fetch --urls pmc_urls.jsonl --store ./pmc-oa-opendata --out figures --json
      medvlm fetch --urls list.jsonl --shard 3/16
    """
    from medvlm.data.articles import FetchSettings
    from medvlm.data.figures import fetch_figures
    from medvlm.data.lists import refuse_bad_rows
    from medvlm.data.objects import StoreLimits

    workspace = Workspace(Path(obj))
    with progress_bar() as listen:
        report = fetch_figures(
            urls,
            store,
            out or workspace.figures,
            scratch=None if out else workspace.scratch("fetch"),
            settings=FetchSettings(policy=policy, max_side_px=max_side, captions=captions),
            limits=StoreLimits(concurrency=concurrency, requests_per_s=rate, timeout_s=timeout, attempts=attempts),
            part=_part(shard),
            fresh=fresh,
            listen=listen,
        )
    if as_json:
        print_json(_summary(report))
    else:
        _print(report, out or workspace.figures)
    if not tolerate_bad_rows and report.details["by_status"].get("bad_row"):
        refuse_bad_rows((out or workspace.figures) / "outcomes", urls)


@contextmanager
def progress_bar() -> Generator[Callable[[Mapping[str, Any]], None]]:
    """A listener for a step's progress events; it draws a bar where standard error is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from medvlm.progress import report_progress

    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)

        def listen(event: Mapping[str, Any]) -> None:
            report_progress(event)
            counts = ", ".join(f"{count:,} {status}" for status, count in sorted(event["by_status"].items()))
            bar.update(task, total=event["total"], completed=event["done"], description=counts)

        yield listen


def _part(shard: str | None) -> tuple[int, int]:
    if shard is None:
        return (1, 1)
    first, _, second = shard.partition("/")
    if not (first.isdigit() and second.isdigit() and 1 <= int(first) <= int(second)):
        raise click.BadParameter(f"{shard!r} is not a part such as 3/16", param_hint="--shard")
    return int(first), int(second)


def _summary(report: Report) -> dict[str, Any]:
    return {"rows": report.counts["rows"], "by_status": report.details["by_status"], **report.metrics}


def _print(report: Report, out: Path) -> None:
    click.echo(f"{report.counts['rows']:,} rows", err=True)
    for status, count in sorted(report.details["by_status"].items(), key=lambda item: -item[1]):
        click.echo(f"  {count:>9,}  {status}", err=True)
    click.echo(f"in {out}", err=True)
