"""`medvlm find`: articles by term, date and licence, as a list to fetch."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import click

from medvlm.cli import print_json


@click.command()
@click.argument("term")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default="articles.jsonl", show_default=True)
@click.option("--since", type=click.DateTime(["%Y-%m-%d"]), help="First day on which articles were added to PMC.")
@click.option("--until", type=click.DateTime(["%Y-%m-%d"]), help="Last day. [default: today]")
@click.option(
    "--policy",
    type=click.Choice(["research", "commercial", "any-oa"]),
    default="research",
    show_default=True,
    help="Licences, as for the fetch.",
)
@click.option("--limit", type=click.IntRange(1, 1_000_000), default=10_000, show_default=True, help="Most articles.")
@click.option("--server", default="https://eutils.ncbi.nlm.nih.gov/entrez/eutils", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the counts as one JSON object.")
def find(
    term: str,
    out: Path,
    since: datetime | None,
    until: datetime | None,
    policy: str,
    limit: int,
    server: str,
    as_json: bool,
) -> None:
    """Find articles with E-utilities and write them as a list to fetch.

    TERM is a search as PubMed Central's page takes it. Three requests a second at most, ten where
    NCBI_API_KEY is set; large searches belong in the night or on a weekend (US Eastern time).

    \b
    Examples
      medvlm find '"chest x-ray"[title]' --since 2025-01-01 --out chest.jsonl
      medvlm fetch --urls chest.jsonl
    """
    from medvlm.data.eutils import find_articles

    found = find_articles(
        term,
        out,
        since=since.date() if since else None,
        until=until.date() if until else None,
        policy=policy,
        limit=limit,
        server=server,
    )
    if as_json:
        print_json(
            {"articles": len(found.pmcids), "total": found.total, "requests": found.requests, "query": found.query}
        )
    else:
        click.echo(f"{len(found.pmcids):,} of {found.total:,} articles that match are in {out}", err=True)
