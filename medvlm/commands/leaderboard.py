"""`medvlm leaderboard`: all scores beside the published ones."""

from __future__ import annotations

from pathlib import Path

import click

from medvlm.cli import print_json


@click.command()
@click.option("--all", "everything", is_flag=True, help="Also earlier stages and every published row.")
@click.option("--runs", is_flag=True, help="Also the 192 runs that LLaVA-Med's notebook prints; implies --all.")
@click.option("--write", is_flag=True, help="Also write rows.json and report.json into the workspace.")
@click.option("--json", "as_json", is_flag=True, help="Print the rows as one JSON list.")
@click.pass_obj
def leaderboard(workspace: str, everything: bool, runs: bool, write: bool, as_json: bool) -> None:
    """Show the workspace's scores beside the published ones.

    \b
    Examples:
      medvlm leaderboard
      medvlm leaderboard --all
      medvlm leaderboard --json | jq '.[] | select(.kind == "ours")'

    Each row names its rule, its test split and its source: two rows compare only where the
    benchmark, the test split, the answer type and the rule agree.
    """
    import dataclasses

    from medvlm.evaluation.leaderboard import leaderboard_rows, write_leaderboard
    from medvlm.evaluation.tables import print_leaderboard
    from medvlm.store import Workspace

    place = Workspace(Path(workspace))
    if write:
        write_leaderboard(place)
    rows = leaderboard_rows(place, runs=runs)
    if as_json:
        print_json([dataclasses.asdict(row) for row in rows])
    else:
        print_leaderboard(rows, everything=everything or runs)
