"""A client for any OpenAI-compatible chat endpoint: retries, a response cache, a token budget.

Address, model and key come from the environment: ``MEDVLM_ENDPOINT_URL`` (such as
``http://127.0.0.1:8000/v1``), ``MEDVLM_ENDPOINT_MODEL`` and, where it asks for one, ``MEDVLM_ENDPOINT_KEY``.
"""

from __future__ import annotations

import email.utils
import json
import os
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NoReturn, cast

from medvlm.data.response_cache import Completion, ResponseCache
from medvlm.errors import EndpointError

__all__ = ["ChatClient", "Endpoint", "EndpointSettings", "Message", "TokenBudget", "Unanswered"]

Message = Mapping[str, Any]
"""``{"role": …, "content": …}`` as the endpoint wants it."""

MAX_RESPONSE_BYTES = 4 * 2**20
RETRIED = frozenset((408, 409, 425, 429, 500, 502, 503, 504, 529))
REFUSES_ALL = frozenset((301, 302, 303, 307, 308, 401, 402, 403, 404, 405))


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where to ask which model. The key is never printed."""

    url: str
    model: str
    key: str = field(default="", repr=False)

    @classmethod
    def from_environment(cls) -> Endpoint:
        """The endpoint that the environment names.

        Raises:
            EndpointError: A variable is absent, or the address is not http(s).
        """
        values = {name: os.environ.get(f"MEDVLM_ENDPOINT_{name}", "") for name in ("URL", "MODEL", "KEY")}
        for name in ("URL", "MODEL"):
            if not values[name]:
                raise EndpointError(
                    f"the environment variable MEDVLM_ENDPOINT_{name} is not set",
                    where=f"MEDVLM_ENDPOINT_{name}",
                    hint="export MEDVLM_ENDPOINT_URL=http://127.0.0.1:8000/v1 MEDVLM_ENDPOINT_MODEL=…",
                )
        if urllib.parse.urlsplit(values["URL"]).scheme not in ("http", "https"):
            raise EndpointError(
                "the endpoint's address is not http:// or https://",
                where="MEDVLM_ENDPOINT_URL",
                hint="give the address before /chat/completions, such as http://127.0.0.1:8000/v1",
            )
        return cls(values["URL"].rstrip("/"), values["MODEL"], values["KEY"])


@dataclass(frozen=True, slots=True)
class EndpointSettings:
    """How hard to ask."""

    concurrency: int = 8
    attempts: int = 6
    timeout_s: float = 120.0
    backoff_s: float = 1.0
    """Before the second attempt; doubled before each further one, with jitter."""
    longest_wait_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Unanswered:
    """Why one request has no answer, as a word for counting and its detail."""

    reason: str
    detail: str


class TokenBudget:
    """Tokens that may be spent, over all threads. A request reserves its worst case first, so none goes over.

    Args:
        limit: Prompt and completion tokens together; None is no limit.
    """

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._reserved = 0
        self._lock = threading.Lock()
        self.spent = 0

    def reserve(self, tokens: int) -> bool:
        """Set tokens aside; False, and nothing set aside, where they could exceed the limit."""
        with self._lock:
            if self._limit is not None and self.spent + self._reserved + tokens > self._limit:
                return False
            self._reserved += tokens
            return True

    def settle(self, reserved: int, spent: int) -> None:
        """Replace a reservation by what was really spent."""
        with self._lock:
            self._reserved -= reserved
            self.spent += spent


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class ChatClient:
    """Asks an endpoint, from any number of threads.

    Args:
        endpoint: Where and whom.
        cache: Answers that were given before; an answer found there costs nothing.
        budget: Of tokens over the life of this client.
        settings: Retries and time limits.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        cache: ResponseCache,
        *,
        budget: TokenBudget | None = None,
        settings: EndpointSettings | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.budget = budget or TokenBudget(None)
        self.settings = settings or EndpointSettings()
        self._cache = cache
        self._opener = urllib.request.build_opener(_NoRedirects)
        self._random = random.Random()  # noqa: S311  # jitter, not secrets

    def complete(
        self, messages: Sequence[Message], *, max_tokens: int, temperature: float = 0.0, seed: int = 0
    ) -> Completion | Unanswered:
        """The endpoint's answer to one conversation, from the cache where it was given before.

        Returns:
            The completion; or ``budget_spent`` or ``endpoint_refused`` where this one request has none.

        Raises:
            EndpointError: The endpoint cannot be reached, refuses everything, or answers in another
                format. What was answered so far is in the cache.
        """
        body = {
            "model": self.endpoint.model,
            "messages": list(messages),
            "max_tokens": max_tokens,
            "temperature": temperature,
            "seed": seed,
        }
        key = self._cache.key(body)
        known = self._cache.get(key)
        if known:
            return known
        # A token is rarely under two bytes, so this reserves more than the prompt takes.
        worst = len(json.dumps(body["messages"], ensure_ascii=False).encode()) // 2 + max_tokens
        if not self.budget.reserve(worst):
            return Unanswered("budget_spent", f"up to {worst} tokens were needed")
        spent = 0
        try:
            answer = self._ask(json.dumps(body).encode())
            if isinstance(answer, Completion):
                spent = answer.prompt_tokens + answer.completion_tokens
                # Of two threads that asked the same at once, both take what was kept: a second run will too.
                return self._cache.put(key, answer)
            return answer
        finally:
            self.budget.settle(worst, spent)

    def _ask(self, body: bytes) -> Completion | Unanswered:
        problem = ""
        for attempt in range(self.settings.attempts):
            wait_s = self.settings.backoff_s * 2**attempt * (0.5 + self._random.random())
            try:
                return _completion(self._post(body), self.endpoint.url)
            except urllib.error.HTTPError as error:
                with error:
                    detail = error.read(2_000).decode("utf-8", "replace")
                if error.code in REFUSES_ALL:
                    self._fail(f"the endpoint answers {error.code} {error.reason}", "check address, model and key")
                if error.code not in RETRIED:
                    return Unanswered("endpoint_refused", f"{error.code}: {self._without_key(detail)[:200]}")
                problem = f"{error.code} {error.reason}"
                wait_s = max(wait_s, _retry_after_s(error.headers.get("Retry-After", "")))
            except (OSError, ValueError) as error:  # refused, reset, timed out, or no HTTP at all
                problem = self._without_key(str(error) or type(error).__name__)
            if attempt + 1 < self.settings.attempts:
                time.sleep(min(wait_s, self.settings.longest_wait_s))
        self._fail(
            f"the endpoint gave no answer in {self.settings.attempts} attempts: {problem}",
            "start it or wait, then run the same command again: finished answers are kept",
        )

    def _post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.endpoint.key:
            headers["Authorization"] = f"Bearer {self.endpoint.key}"
        request = urllib.request.Request(f"{self.endpoint.url}/chat/completions", body, headers)  # noqa: S310
        with self._opener.open(request, timeout=self.settings.timeout_s) as response:
            data = cast(bytes, response.read(MAX_RESPONSE_BYTES))
            promised = response.headers.get("Content-Length", "")
            if promised.isdecimal() and len(data) < int(promised):
                raise OSError(f"the response ended after {len(data)} of {promised} bytes")
            return data

    def _without_key(self, text: str) -> str:
        return text.replace(self.endpoint.key, "***") if self.endpoint.key else text

    def _fail(self, what: str, hint: str) -> NoReturn:
        raise EndpointError(what, where=self.endpoint.url, hint=hint)


def _completion(data: bytes, url: str) -> Completion:
    """The first choice of a chat completion.

    Raises:
        EndpointError: The response has another format.
    """
    try:
        value: Any = json.loads(data)
        choice = value["choices"][0]
        usage: dict[str, Any] = value.get("usage") or {}
        return Completion(
            text=str(choice["message"].get("content") or ""),
            finish_reason=str(choice.get("finish_reason") or "stop"),
            prompt_tokens=int(usage.get("prompt_tokens", 0)),
            completion_tokens=int(usage.get("completion_tokens", 0)),
        )
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise EndpointError(
            f"the response is no chat completion: {data[:120]!r}",
            where=url,
            hint="give the address of an OpenAI-compatible server, up to and with /v1",
        ) from error


def _retry_after_s(value: str) -> float:
    """Seconds that a ``Retry-After`` header asks for, given as seconds or as a date; 0 where it says nothing."""
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, (email.utils.parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return 0.0
