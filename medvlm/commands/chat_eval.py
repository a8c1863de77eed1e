"""`medvlm chat-eval`: judge chat answers and reproduce LLaVA-Med's table."""

from __future__ import annotations

import os
from pathlib import Path

import click

from medvlm.cli import print_json

FILE = click.Path(dir_okay=False, path_type=Path)


@click.group("chat-eval")
def chat_eval() -> None:
    """Judge answers to LLaVA-Med's 193 chat questions, and summarise the reviews.

    \b
    Examples:
      medvlm chat-eval run --questions llava_med_eval_qa50_qa.jsonl --answers answers.jsonl \\
             --reviews reviews.jsonl --base-url http://127.0.0.1:8000/v1 --judge my-judge
      medvlm chat-eval summarise --reviews reviews.jsonl --json
    """


@chat_eval.command()
@click.option("--questions", required=True, type=FILE, help="llava_med_eval_qa50_qa.jsonl.")
@click.option("--answers", required=True, type=FILE, help="JSONL with question_id and text.")
@click.option("--reviews", required=True, type=FILE, help="Where the reviews are written.")
@click.option(
    "--base-url",
    required=True,
    envvar="MEDVLM_ENDPOINT_URL",
    show_envvar=True,
    help="OpenAI-compatible server, such as http://127.0.0.1:8000/v1. A key is taken from MEDVLM_ENDPOINT_KEY.",
)
@click.option("--judge", required=True, envvar="MEDVLM_ENDPOINT_MODEL", show_envvar=True, help="Name of the model.")
@click.option("--both-orders", is_flag=True, help="Ask twice, with the answers exchanged: cancels position bias.")
@click.option("--token-budget", type=click.IntRange(min=1), help="Stop before more tokens than this are used.")
@click.option("--max-tokens", type=click.IntRange(min=8), default=512, show_default=True, help="Of one review.")
@click.option("--concurrency", type=click.IntRange(1, 256), default=4, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON object.")
@click.pass_obj
def run(
    workspace: str,
    questions: Path,
    answers: Path,
    reviews: Path,
    base_url: str,
    judge: str,
    both_orders: bool,
    token_budget: int | None,
    max_tokens: int,
    concurrency: int,
    as_json: bool,
) -> None:
    """Have a judge mark each answer beside GPT-4's reference, and print the table.

    \b
    Example:
      medvlm chat-eval run --questions llava_med_eval_qa50_qa.jsonl --answers answers.jsonl \\
             --reviews reviews.jsonl --base-url http://127.0.0.1:8000/v1 --judge my-judge --both-orders

    Replies are cached in the workspace: the same command goes on where it stopped, and costs nothing
    for what is there.
    """
    from rich.console import Console
    from rich.progress import Progress

    from medvlm.data.endpoint import ChatClient, Endpoint, EndpointSettings, TokenBudget
    from medvlm.data.response_cache import ResponseCache
    from medvlm.evaluation.chat_eval import review_answers
    from medvlm.store import Workspace

    endpoint = Endpoint(base_url.rstrip("/"), judge, os.environ.get("MEDVLM_ENDPOINT_KEY", ""))
    console = Console(stderr=True)
    with (
        ResponseCache(Workspace(Path(workspace)).scratch("judge") / "answers.sqlite") as cache,
        Progress(console=console, disable=not console.is_terminal) as progress,
    ):
        task = progress.add_task("reviews", total=None)
        summary = review_answers(
            questions,
            answers,
            reviews,
            ChatClient(
                endpoint, cache, budget=TokenBudget(token_budget), settings=EndpointSettings(concurrency=concurrency)
            ),
            both_orders=both_orders,
            max_tokens=max_tokens,
            on_reply=lambda done, tokens: progress.update(
                task, completed=done, description=f"reviews: {done}, {tokens} tokens"
            ),
        )
    _show(summary, as_json=as_json)


@chat_eval.command()
@click.option("--reviews", required=True, type=FILE, help="Reviews of ours, or LLaVA-Med's with gpt_eval.")
@click.option("--questions", type=FILE, help="Gives type and domain where the reviews lack them.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON object.")
def summarise(reviews: Path, questions: Path | None, as_json: bool) -> None:
    """Make LLaVA-Med's table from stored reviews; lists those that hold no two marks.

    \b
    Example:
      medvlm chat-eval summarise --reviews reviews.jsonl --json
    """
    from medvlm.evaluation.chat_eval import summarise_reviews

    _show(summarise_reviews(reviews, questions), as_json=as_json)


def _show(summary: dict[str, object], *, as_json: bool) -> None:
    if as_json:
        print_json(summary)
    else:
        from medvlm.evaluation.tables import print_chat_table

        print_chat_table(summary)
