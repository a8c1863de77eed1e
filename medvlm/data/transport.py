"""HTTP GET as a long job needs it: kept-alive, bounded, retried with backoff, polite to the server.

The retry loop is here, and not in the client library, so that attempts are counted, ``Retry-After``
is obeyed by all requests at once, and a body is measured before it is read.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

from medvlm.data.objects import Answer, AnswerStatus, ByteBudget, StoreLimits, StoreTally

if TYPE_CHECKING:
    import aiohttp

    _Send = Callable[[aiohttp.ClientRequest], Awaitable[aiohttp.ClientResponse]]

__all__ = ["Transport"]

LONGEST_BACKOFF_S = 30.0
TRANSFER_TIMEOUTS = 20
"""A request as a whole may take this many times the allowed silence."""
RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504, 509})
USER_AGENT = "medvlm (figures of the PMC article datasets for research)"


@dataclass(frozen=True, slots=True)
class _Failed:
    """One attempt that did not bring the object."""

    status: AnswerStatus
    detail: str
    again: bool = True
    bytes_read: int = 0


class Transport:
    """A pool of connections, used by many coroutines of one event loop."""

    def __init__(self, limits: StoreLimits) -> None:
        self.limits = limits
        self.tally = StoreTally()
        self.budget = ByteBudget(limits.bytes_in_flight)
        self._slots = asyncio.Semaphore(limits.concurrency)
        self._session: aiohttp.ClientSession | None = None
        self._next_at = 0.0
        self._silent_until = 0.0

    async def get(self, url: str, *, limit_bytes: int, html: bool = False) -> Answer:
        """The body of a URL, after as many attempts as it takes and is allowed.

        Args:
            url: Percent-encoded address.
            limit_bytes: A longer body is refused, before it is read where its length is announced.
            html: Whether an HTML page is an answer. Else it is what a proxy or a portal says in
                place of the object, and is tried again.

        Returns:
            The answer; the caller gives ``reserved`` back to ``budget``.
        """
        bytes_read, attempt, failed = 0, 0, _Failed("store_error", "no attempt was allowed")
        for attempt in range(1, self.limits.attempts + 1):
            async with self._slots:
                await self._turn()
                self.tally.requests += 1
                self.tally.retries += attempt > 1
                result = await self._attempt(url, limit_bytes, html=html)
            bytes_read += result.bytes_read
            self.tally.bytes_read += result.bytes_read
            if isinstance(result, Answer):
                return Answer(result.status, result.body, result.detail, attempt, bytes_read, result.reserved)
            failed = result
            if not failed.again:
                break
            if attempt < self.limits.attempts:
                ceiling = min(LONGEST_BACKOFF_S, self.limits.backoff_s * 2 ** (attempt - 1))
                await asyncio.sleep(random.uniform(ceiling / 2, ceiling))  # noqa: S311  # jitter, not a secret
        return Answer(failed.status, b"", failed.detail, attempt, bytes_read)

    async def close(self) -> None:
        """Close every connection."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _turn(self) -> None:
        """Wait until this request may go: for the rate, and for what the server asked."""
        if self.limits.requests_per_s:
            now = time.monotonic()
            self._next_at = max(now, self._next_at) + 1 / self.limits.requests_per_s
            await asyncio.sleep(self._next_at - 1 / self.limits.requests_per_s - now)
        while (pause := self._silent_until - time.monotonic()) > 0:
            await asyncio.sleep(pause)

    def _open(self) -> aiohttp.ClientSession:
        import aiohttp

        if self._session is None:
            silence = self.limits.timeout_s
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, ttl_dns_cache=300),
                timeout=aiohttp.ClientTimeout(
                    total=silence * TRANSFER_TIMEOUTS, sock_connect=silence, sock_read=silence
                ),
                headers={"User-Agent": USER_AGENT, "Accept-Encoding": "identity"},
                auto_decompress=False,
                trust_env=True,
                middlewares=(_count_every_attempt,),
            )
        return self._session

    async def _attempt(self, url: str, limit_bytes: int, *, html: bool) -> Answer | _Failed:
        import aiohttp
        from yarl import URL

        try:
            async with self._open().get(URL(url, encoded=True), max_redirects=3) as response:
                refused = self._refusal(response, html=html)
                if refused is not None:
                    return refused
                return await self._body(response, limit_bytes)
        except TimeoutError:
            return _Failed("timeout", f"nothing for {self.limits.timeout_s:g} s")
        except aiohttp.ClientSSLError as error:
            return _Failed("store_error", f"TLS: {error}", again=False)
        except (aiohttp.InvalidURL, aiohttp.TooManyRedirects) as error:
            return _Failed("store_error", f"{type(error).__name__}: {error}", again=False)
        except (aiohttp.ClientError, OSError) as error:
            return _Failed("store_error", f"{type(error).__name__}: {str(error)[:200]}")

    def _refusal(self, response: aiohttp.ClientResponse, *, html: bool) -> Answer | _Failed | None:
        status = response.status
        if status == 200:
            kind = response.headers.get("Content-Type", "")
            if not html and kind.lower().startswith(("text/html", "application/xhtml")):
                return _Failed("store_error", "the server answered with an HTML page")
            return None
        if status in {404, 410}:
            return Answer("absent", detail=f"HTTP {status}")
        if status in {429, 503}:
            self._obey(response.headers.get("Retry-After", ""))
        return _Failed("store_error", f"HTTP {status}", again=status in RETRIED)

    def _obey(self, retry_after: str) -> None:
        """Let every request wait as long as the server asks, in seconds or until a date."""
        try:
            seconds = float(retry_after) if retry_after.strip().isdigit() else _seconds_until(retry_after)
        except (ValueError, TypeError):
            return
        pause = min(max(seconds, 0.0), self.limits.max_pause_s)
        self._silent_until = max(self._silent_until, time.monotonic() + pause)

    async def _body(self, response: aiohttp.ClientResponse, limit_bytes: int) -> Answer | _Failed:
        length = response.content_length
        if length is not None and length > limit_bytes:
            response.close()
            return Answer("too_large", detail=f"{length:,} bytes are more than {limit_bytes:,}")
        # A body of unannounced length may become as long as is allowed.
        reserved = await self.budget.reserve(limit_bytes if length is None else length)
        kept = False
        try:
            chunks: list[bytes] = []
            size = 0
            async for chunk in response.content.iter_any():
                chunks.append(chunk)
                size += len(chunk)
                if size > limit_bytes:
                    response.close()
                    return Answer("too_large", detail=f"more than {limit_bytes:,} bytes", bytes_read=size)
            if length is not None and size != length:
                return _Failed("store_error", f"{size:,} of {length:,} bytes came", bytes_read=size)
            kept = True
            return Answer("ok", b"".join(chunks), bytes_read=size, reserved=reserved)
        finally:
            if not kept:
                await self.budget.release(reserved)


async def _count_every_attempt(request: aiohttp.ClientRequest, send: _Send) -> aiohttp.ClientResponse:
    """Keep aiohttp from repeating a request by itself when a kept-alive connection was closed."""
    import aiohttp

    try:
        return await send(request)
    except aiohttp.ClientSSLError:
        raise
    except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as error:
        raise aiohttp.ClientConnectionError(f"{type(error).__name__}: {error}") from error


def _seconds_until(date: str) -> float:
    return parsedate_to_datetime(date).timestamp() - time.time()
