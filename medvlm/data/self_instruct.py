"""Conversations that a chat model writes from caption and inline mentions, checked before they are kept."""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar, cast

from medvlm.data.conversations import pick, prompt_text
from medvlm.data.endpoint import ChatClient, Unanswered
from medvlm.data.readers.llava_med import SLOT
from medvlm.data.readers.source import Dropped
from medvlm.data.response_cache import Completion
from medvlm.records import Figure, Turn

__all__ = ["MAX_TOKENS", "ask_in_order", "figure_request", "parse_rounds", "rounds_to_turns", "written_turns"]

MAX_TOKENS = 1_200
MAX_ROUNDS = 8
MAX_CHARACTERS = 4_000
MENTION_CHARACTERS = 6_000

_REFUSAL = re.compile(r"\b(?:I'?m sorry|I am sorry|I can(?:no|')t|as an AI|unable to (?:help|assist))\b", re.IGNORECASE)
_SOURCE = re.compile(
    r"\b(?:(?:figure |the )?caption|the (?:text|passage|article|paper|authors?)|inline mention)s?\b", re.IGNORECASE
)

T = TypeVar("T")
R = TypeVar("R")


def written_turns(client: ChatClient, figure: Figure, seed: int) -> tuple[Turn, ...] | Dropped:
    """A conversation about one figure as the endpoint wrote it, or why it is not kept.

    Raises:
        EndpointError: The endpoint cannot be reached, or refuses everything.
    """
    if not figure.caption.strip():
        return Dropped(figure.pmcid, "caption_empty", figure.figure_id)
    answer = client.complete(figure_request(figure), max_tokens=MAX_TOKENS, temperature=0.7, seed=seed)
    rounds = answer if isinstance(answer, Unanswered) else parse_rounds(answer)
    if isinstance(rounds, Unanswered):
        return Dropped(f"{figure.pmcid}: {rounds.detail}", rounds.reason, figure.figure_id)
    return rounds_to_turns(rounds, image_first=bool(pick(seed, f"{figure.figure_id} slot", 2)))


def figure_request(figure: Figure) -> list[dict[str, str]]:
    """The messages that ask for a conversation: our prompt, and what the article says."""
    mentions = "\n".join(f"- {' '.join(text.split())}" for text in figure.mentions)[:MENTION_CHARACTERS]
    said = f"Caption: {' '.join(figure.caption.split())}\n\nPassages:\n{mentions or '- none'}"
    return [{"role": "system", "content": prompt_text("self_instruct")}, {"role": "user", "content": said}]


def parse_rounds(answer: Completion) -> list[tuple[str, str]] | Unanswered:
    """The question-answer rounds of an answer, or why it is none that can train.

    Returns:
        One to eight rounds; or ``truncated``, ``refused``, ``malformed``, ``mentions_source``.
    """
    if answer.finish_reason == "content_filter":
        return Unanswered("refused", "content filter")
    if answer.finish_reason == "length":
        return Unanswered("truncated", f"cut after {answer.completion_tokens} tokens")
    found = re.search(r"\[.*\]", answer.text, re.DOTALL)
    try:
        value: Any = json.loads(found[0]) if found else None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, list):
        reason = "refused" if _REFUSAL.search(answer.text) else "malformed"
        return Unanswered(reason, answer.text[:120])
    rounds: list[tuple[str, str]] = []
    for item in cast("list[Any]", value):
        texts = [cast("dict[str, Any]", item).get(key) for key in ("question", "answer")] if _is_round(item) else []
        if len(texts) != 2 or not all(_is_usable(text) for text in texts):
            return Unanswered("malformed", str(item)[:120])
        rounds.append((str(texts[0]).strip(), str(texts[1]).strip()))
    if not 1 <= len(rounds) <= MAX_ROUNDS:
        return Unanswered("malformed", f"{len(rounds)} rounds")
    leak = next((text for pair in rounds for text in pair if _SOURCE.search(text)), None)
    return Unanswered("mentions_source", leak[:120]) if leak else rounds


def _is_round(item: Any) -> bool:
    return isinstance(item, dict) and {"question", "answer"} <= cast("dict[str, Any]", item).keys()


def _is_usable(text: Any) -> bool:
    return isinstance(text, str) and 0 < len(text.strip()) <= MAX_CHARACTERS and SLOT not in text


def rounds_to_turns(rounds: list[tuple[str, str]], *, image_first: bool) -> tuple[Turn, ...]:
    """Alternating turns, the image slot before or after the first question."""
    turns: list[Turn] = []
    for index, (question, answer) in enumerate(rounds):
        slotted = question if index else f"{SLOT}\n{question}" if image_first else f"{question}\n{SLOT}"
        turns += [Turn("user", slotted), Turn("assistant", answer)]
    return tuple(turns)


def ask_in_order(ask: Callable[[T], R], items: Iterable[T], concurrency: int) -> Generator[R]:
    """What ``ask`` returns for each item, in the items' order, with so many calls at a time.

    At most four times as many items are in memory. An exception of any call stops the rest; a
    caller that stops half way closes the generator, which waits for the calls under way.
    """
    with ThreadPoolExecutor(concurrency) as pool:
        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(ask, item))
                if len(waiting) >= 4 * concurrency:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
