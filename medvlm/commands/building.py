"""What the verbs that build datasets share: options, the chat endpoint, and how a report is printed."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from medvlm.cli import print_json
from medvlm.store import Report, Workspace

if TYPE_CHECKING:
    from medvlm.data.endpoint import ChatClient

__all__ = ["BUDGET_OPTION", "JSON_OPTION", "KEEP_OPTION", "ChatAccess", "print_report"]

BUDGET_OPTION = click.option("--token-budget", type=click.IntRange(1), help="Most tokens to spend on the endpoint.")
KEEP_OPTION = click.option(
    "--keep-leaked",
    is_flag=True,
    help="Keep images that a benchmark of this workspace tests with, or that look like one.",
)
JSON_OPTION = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


@dataclasses.dataclass(frozen=True)
class ChatAccess:
    """How much of the endpoint that the environment names may be used."""

    token_budget: int | None
    concurrency: int

    @contextmanager
    def opened(self, workspace: Workspace) -> Generator[ChatClient]:
        """A client whose answers are kept in the workspace; says in the end what was spent."""
        from medvlm.data.endpoint import ChatClient, Endpoint, EndpointSettings, TokenBudget
        from medvlm.data.response_cache import ResponseCache

        endpoint = Endpoint.from_environment()
        with ResponseCache(workspace.scratch("endpoint") / "answers.sqlite") as cache:
            settings = EndpointSettings(concurrency=self.concurrency)
            client = ChatClient(endpoint, cache, budget=TokenBudget(self.token_budget), settings=settings)
            yield client
            click.echo(f"spent {client.budget.spent:,} tokens", err=True)


def print_report(report: Report, as_json: bool) -> None:
    """Print a step's report: one JSON object, or its counts and losses for people."""
    if as_json:
        print_json(dataclasses.asdict(report))
        return
    click.echo(f"{report.step}: done in {report.duration_s:.1f} s")
    for name, count in report.counts.items():
        click.echo(f"  {name:<24} {count:>9,}")
    for reason, lost in report.details.get("dropped", {}).items():
        click.echo(f"  dropped, {reason}: {lost['count']:,}, such as {lost['first'][0]}")
