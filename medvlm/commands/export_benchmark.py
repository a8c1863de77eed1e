"""`medvlm export-benchmark`: a benchmark for another harness."""

from __future__ import annotations

from pathlib import Path

import click

from medvlm.cli import print_json


@click.command("export-benchmark")
@click.argument("benchmark")
@click.option("--form", type=click.Choice(["lmms-eval", "jsonl"]), default="lmms-eval", show_default=True)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="A new folder.")
@click.option("--source", type=click.Path(path_type=Path), help="The release's folder; else the workspace's items.")
@click.option("--json", "as_json", is_flag=True, help="Print what was written as one JSON object.")
@click.pass_obj
def export_benchmark(workspace: str, benchmark: str, form: str, out: Path, source: Path | None, as_json: bool) -> None:
    """Write a benchmark's test split for another harness.

    \b
    Examples:
      medvlm export-benchmark vqa-rad --out tasks/vqa-rad
      medvlm export-benchmark slake --source ~/data/slake --form jsonl --out slake-jsonl

    lmms-eval runs the task folder with --include_path; 'medvlm score' reads the samples it logs.
    """
    from medvlm.data.benchmarks import read_benchmark
    from medvlm.evaluation import interop
    from medvlm.records import VQAItem
    from medvlm.store import Workspace, iterate_records

    items = (
        read_benchmark(benchmark, source)
        if source
        else iterate_records(Workspace(Path(workspace)).items(benchmark), VQAItem)
    )
    count = interop.export_benchmark(
        (item for item in items if item.split == "test"),
        out,
        name=benchmark,
        form="jsonl" if form == "jsonl" else "lmms-eval",
    )
    if as_json:
        print_json({"benchmark": benchmark, "form": form, "items": count, "folder": str(out)})
    else:
        click.echo(f"{count} items of {benchmark} in {out}")
