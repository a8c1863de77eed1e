"""`medvlm dataset build-preference`: the pairs that a recipe learns to prefer by."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from medvlm.commands.building import BUDGET_OPTION, JSON_OPTION, KEEP_OPTION, ChatAccess, print_report
from medvlm.store import Report, Workspace

__all__ = ["build_preference"]


@click.command("build-preference")
@click.option("--recipe", required=True, help="Whose pairs these are, and whose model asks and answers.")
@click.option("--official", type=click.Path(path_type=Path), help="STLLaVA-Med-DPO's JSON, joined to the figures.")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="The model; the recipe's own after stage 2 if not.")
@click.option("--about", default="instruct", show_default=True, help="The dataset whose images are asked about.")
@click.option(
    "--ask",
    type=click.Choice(["both", "model", "dataset"]),
    default="both",
    show_default=True,
    help="Whose questions; with both, the dataset's where the model's text is no question.",
)
@click.option("--questions", type=click.IntRange(1, 20), default=1, show_default=True, help="For each image.")
@click.option("--temperature", type=click.FloatRange(0.01, 5), default=1.2, show_default=True, help="Of the sampling.")
@click.option("--top-p", type=click.FloatRange(0.01, 1), default=0.95, show_default=True, help="Of the sampling.")
@click.option("--max-tokens", type=click.IntRange(1), default=128, show_default=True, help="Of an answer.")
@click.option("--limit", type=click.IntRange(1), help="As many images, drawn with the seed.")
@click.option("--seed", type=int, default=0, show_default=True, help="Decides images, requests and sampling.")
@click.option("--endpoint", is_flag=True, help="A chat model judges; else the overlap with the known answer does.")
@BUDGET_OPTION
@KEEP_OPTION
@JSON_OPTION
@click.pass_obj
def build_preference(
    obj: str,
    recipe: str,
    official: Path | None,
    checkpoint: Path | None,
    endpoint: bool,
    token_budget: int | None,
    keep_leaked: bool,
    as_json: bool,
    **asking: Any,
) -> None:
    """Build a recipe's preference pairs: its model answers each question twice, or published ones.

    What people preferred in the chat is added. The judge's endpoint is named by the environment, as for
    'dataset build --endpoint'. A stopped run goes on where it was.

    \b
    medvlm dataset build-preference --recipe tiny-llava-med --limit 200
    medvlm dataset build-preference --recipe llava-med --temperature 0.8 --endpoint
    medvlm dataset build-preference --recipe llava-med --official stllava_dpo.json
    """
    workspace = Workspace(Path(obj)).ensure()
    if official and (checkpoint or endpoint):
        raise click.UsageError("with --official, the published JSON, no model asks and none judges")
    if official:
        report = _published(workspace, recipe, official, keep_leaked=keep_leaked)
    else:
        from medvlm.data.judges import EndpointJudge
        from medvlm.evaluation.self_preference import Asking, build_self_preference

        with ChatAccess(token_budget, concurrency=1).opened(workspace) if endpoint else nullcontext() as client:
            report = build_self_preference(
                workspace,
                recipe,
                checkpoint=checkpoint,
                judge=EndpointJudge(client) if client else None,
                asking=Asking(**asking),
                keep_leaked=keep_leaked,
            )
    print_report(report, as_json)


def _published(workspace: Workspace, recipe: str, official: Path, *, keep_leaked: bool) -> Report:
    from medvlm.data.conversations import decisions
    from medvlm.data.preference import build_preference, join_preferences

    rows = join_preferences(workspace.figure_shards, official, decisions(workspace, "figures"))
    return build_preference(workspace, recipe, rows, official=official, keep_leaked=keep_leaked)
