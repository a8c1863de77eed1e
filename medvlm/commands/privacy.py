"""``medvlm privacy``: what may name a patient, in pictures and in DICOM tags."""

from __future__ import annotations

from pathlib import Path

import click

from medvlm.cli import print_json
from medvlm.store import Workspace


@click.group()
def privacy() -> None:
    """Flag burned-in text for review, and take identifiers out of DICOM files.

    \b
    Examples:
      medvlm privacy flag
      medvlm privacy deidentify scan.dcm clean.dcm
    """


@privacy.command("flag")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
@click.pass_obj
def flag(workspace: str, as_json: bool) -> None:
    """Look for text-like regions in the corners of every figure and benchmark image.

    What is flagged is written to privacy/flags as Parquet, for people to look at. Nothing is dropped.
    The detector reads no text: a letter of a panel and a patient's name look alike to it.

    \b
    Example:
      medvlm privacy flag
    """
    from medvlm.data.privacy import flag_pictures

    place = Workspace(Path(workspace))
    report = flag_pictures(place)
    tables: dict[str, dict[str, int]] = report.details["tables"]
    if as_json:
        print_json({**report.counts, "tables": tables, "flags": str(place.privacy_flags)})
        return
    for table, counts in tables.items():
        click.echo(f"{counts['flagged']:7,} of {counts['pictures']:7,} pictures flagged  {table}")
    click.echo(f"rows for review in {place.privacy_flags}")


@privacy.command("deidentify")
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.argument("target", type=click.Path(file_okay=False, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def deidentify(source: Path, target: Path, as_json: bool) -> None:
    """Write copies of DICOM files that hold image tags only.

    Everything that a picture does not need is dropped: dates, names, ids, comments, private tags.
    Files that say that text is burned into their pixels are refused.

    \b
    Example:
      medvlm privacy deidentify scans/ safe/
    """
    from medvlm.data.privacy import deidentify_files

    dropped = deidentify_files(source, target)
    if as_json:
        print_json({"files": len(dropped), "dropped_tags": dropped})
        return
    for name, tags in dropped.items():
        click.echo(f"{name}: {len(tags)} tags dropped" + (f", such as {', '.join(tags[:5])}" if tags else ""))
    click.echo(f"{len(dropped)} files in {target}")
