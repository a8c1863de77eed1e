"""`medvlm compare`: two models' answers, pair by pair."""

from __future__ import annotations

from pathlib import Path

import click

from medvlm.cli import print_json


@click.command()
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@click.option("--benchmark", required=True, help="vqa-rad, slake, slake-zh or pathvqa.")
@click.option(
    "--items", type=click.Path(path_type=Path), help="The official question file; else the workspace's items."
)
@click.option("--missing", type=click.Choice(["error", "wrong"]), default="error", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the differences as one JSON object.")
@click.pass_obj
def compare(
    workspace: str, first: str, second: str, benchmark: str, items: Path | None, missing: str, as_json: bool
) -> None:
    """Compare two models' answers to a benchmark, pair by pair.

    A and B are recipes of the workspace (also recipe:stage, recipe:blind), or prediction files.

    \b
    Examples:
      medvlm compare tiny-llava-med tiny-qilin-med-vl --benchmark slake
      medvlm compare tiny-llava-med:blind tiny-llava-med --benchmark vqa-rad
      medvlm compare one.jsonl two.jsonl --benchmark vqa-rad --items "VQA_RAD Dataset Public.json"

    Prints, for each rule, the difference with a paired bootstrap interval by image, and McNemar's
    exact test where an answer is right or wrong.
    """
    import dataclasses

    from medvlm.evaluation.compare import compare_models
    from medvlm.evaluation.tables import print_comparison
    from medvlm.store import Workspace

    differences = compare_models(
        Workspace(Path(workspace)),
        benchmark,
        first,
        second,
        items_path=items,
        missing="wrong" if missing == "wrong" else "error",
    )
    if as_json:
        rows = [dataclasses.asdict(difference) for difference in differences]
        print_json({"benchmark": benchmark, "first": first, "second": second, "differences": rows})
    else:
        print_comparison(differences, first, second)
