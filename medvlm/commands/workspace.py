"""`medvlm workspace`: the local copy of a workspace that lies in a bucket."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import click

from medvlm.cli import print_json
from medvlm.working_copy import Moved, WorkingCopy, copy_folder

__all__ = ["workspace"]

_units = click.argument("units", nargs=-1)
_json = click.option("--json", "as_json", is_flag=True, help="Print what moved as one JSON object.")


@click.group()
def workspace() -> None:
    """Bring in and put up a workspace that lies in a bucket.

    With --workspace s3://bucket/prefix (or MEDVLM_WORKSPACE) every verb works on a local copy: what it reads is
    brought in first, what it made is put up at its end, checkpoints of a running training every minute. These verbs
    move the rest: all of it, or units such as datasets/alignment or 'checkpoints/*'.

    \b
    Keys come from the environment, a profile or the machine's role, as for every AWS tool; another server than
    Amazon's is named by AWS_ENDPOINT_URL, another folder for the copy by MEDVLM_WORKSPACE_CACHE.

    \b
    Examples:
      export MEDVLM_WORKSPACE=s3://bucket/medvlm
      medvlm train --recipe tiny-llava-med --stage 1
      medvlm workspace pull
      MEDVLM_WORKSPACE=$(medvlm workspace path) make dash
      medvlm workspace push review
    """


@workspace.command()
@_units
@_json
def pull(units: tuple[str, ...], as_json: bool) -> None:
    """Bring in UNITS, by default all, where they have changed.

    \b
    medvlm workspace pull
    medvlm workspace pull 'scores/*' leaderboard --json
    """
    _move(lambda copy: copy.pull(units or ("*",)), "brought in", as_json)


@workspace.command()
@_units
@click.option("--mine", is_flag=True, help="Also over what another machine has put up meanwhile.")
@_json
def push(units: tuple[str, ...], mine: bool, as_json: bool) -> None:
    """Put up UNITS, by default all, where they have changed here.

    \b
    medvlm workspace push
    medvlm workspace push --mine datasets/alignment
    """
    if mine and not units:
        raise click.UsageError("--mine needs the names of units")
    _move(lambda copy: copy.push(units or ("*",), mine=mine), "put up", as_json)


@workspace.command()
def path() -> None:
    """Print the folder of the local copy."""
    click.echo(copy_folder(_address()))


def _move(move: Callable[[WorkingCopy], Moved], what: str, as_json: bool) -> None:
    from medvlm.step_files import moving

    with moving() as listen:
        moved = move(WorkingCopy(copy_folder(_address()), _address(), listen))
    if as_json:
        print_json(dataclasses.asdict(moved))
    else:
        click.echo(f"{what}: {len(moved.units)} units, {moved.files:,} files, {moved.bytes / 2**20:,.1f} MB")


def _address() -> str:
    address: str | None = click.get_current_context().meta.get("bucket")
    if not address:
        raise click.UsageError("the workspace is a folder; name a bucket: medvlm --workspace s3://bucket/prefix …")
    return address
