"""`medvlm score`: score predictions under every named rule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from medvlm.cli import print_json


@click.command()
@click.option("--benchmark", required=True, help="vqa-rad, slake, slake-zh, pathvqa or a MedMNIST set.")
@click.option("--recipe", help="Score this recipe's predictions in the workspace, and write the scores there.")
@click.option("--items", type=click.Path(path_type=Path), help="The benchmark's official question file, or its folder.")
@click.option(
    "--predictions",
    type=click.Path(path_type=Path),
    help="Answers: JSONL with question_id and text, or a Parquet file or folder of ours.",
)
@click.option(
    "--missing",
    type=click.Choice(["error", "wrong"]),
    default="error",
    show_default=True,
    help="What an absent or repeated answer is. 'wrong' also leaves out unknown ids.",
)
@click.option("--split", type=click.Choice(["train", "validation", "test"]), default="test", show_default=True)
@click.option("--stage", help="Only the answers of this stage, where --predictions holds several.")
@click.option("--accept", is_flag=True, help="With --recipe: later scores are checked against these.")
@click.option("--json", "as_json", is_flag=True, help="Print the scores as one JSON object.")
@click.pass_obj
def score(
    workspace: str,
    benchmark: str,
    recipe: str | None,
    items: Path | None,
    predictions: Path | None,
    missing: str,
    split: str,
    stage: str | None,
    accept: bool,
    as_json: bool,
) -> None:
    """Score predictions under every named rule, with intervals and the blind baseline.

    \b
    Examples:
      medvlm score --recipe tiny-llava-med --benchmark vqa-rad
      medvlm score --recipe tiny-llava-med --benchmark vqa-rad --accept
      medvlm score --benchmark vqa-rad --items "VQA_RAD Dataset Public.json" \\
                   --predictions answers.jsonl --json

    Per cent, 0 to 100. The headline rules are whole_word (closed) and token.recall (open); those
    named llava_med and med_moe compute what the papers did, to compare with their tables.
    """
    if (recipe and (items or predictions)) or (accept and not recipe):
        raise click.UsageError("give either --recipe, or --items and --predictions; --accept needs --recipe")
    if recipe:
        from medvlm.evaluation.accepted import accept_scores
        from medvlm.evaluation.score_step import score_recipe
        from medvlm.store import Workspace

        place = Workspace(Path(workspace))
        report = score_recipe(place, recipe, benchmark)
        if accept:
            accept_scores(place, recipe, benchmark)
        result: dict[str, Any] = report.details["summary"]
    elif items and predictions:
        from medvlm.evaluation.score import score_files

        result = score_files(
            benchmark,
            items,
            predictions,
            missing="wrong" if missing == "wrong" else "error",
            split="train" if split == "train" else "validation" if split == "validation" else "test",
            stage=stage,
        )
    else:
        raise click.UsageError("give --recipe, or both --items and --predictions")
    if as_json:
        print_json(result)
    else:
        from medvlm.evaluation.tables import print_scores

        print_scores(result)
