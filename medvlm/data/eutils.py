"""Articles by term, date and licence from NCBI's E-utilities, within the limits that NCBI asks for."""

from __future__ import annotations

import asyncio
import json
import os
import re
import urllib.parse
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any

from medvlm.data.objects import StoreLimits
from medvlm.data.pmc import POLICIES
from medvlm.data.transport import Transport
from medvlm.errors import InputError, StoreError
from medvlm.store import atomic_path

__all__ = ["EUTILS", "FoundArticles", "article_query", "find_articles"]

EUTILS = "https://eutils.ncbi.nlm.nih.gov/entrez/eutils"
IDS_PER_QUERY = 9_999
"""NCBI never returns more ids of one PMC query; longer results are cut by date."""
REQUESTS_PER_S = 3.0
REQUESTS_PER_S_WITH_KEY = 10.0
ANSWER_LIMIT_BYTES = 16 * 2**20
FIRST_DAY = date(2000, 1, 1)
"""PubMed Central opened in February 2000."""


@dataclass(frozen=True)
class FoundArticles:
    """What a search brought."""

    pmcids: tuple[str, ...]
    total: int
    """Articles that match; more than ``pmcids`` where a limit was given."""
    query: str
    requests: int


def article_query(term: str, policy: str) -> str:
    """The search of a term among open-access, not retracted articles with a policy's licences."""
    names = [licence.lower().replace(" ", "_") + "_license[filter]" for licence in sorted(POLICIES[policy])]
    return f"({term}) AND open_access[filter] AND ({' OR '.join(names)}) NOT hasretractionin"


def find_articles(
    term: str,
    out: Path,
    *,
    since: date | None = None,
    until: date | None = None,
    policy: str = "research",
    limit: int = 10_000,
    server: str = EUTILS,
    limits: StoreLimits | None = None,
) -> FoundArticles:
    """Search PubMed Central and write the articles as a list that ``medvlm fetch`` reads.

    Asks at most 3 requests a second, or 10 where ``NCBI_API_KEY`` is in the environment.
    ``NCBI_EMAIL`` is sent along where it is set, as NCBI wishes.

    Args:
        term: In the syntax of PubMed Central's search.
        out: File to write, one ``{"pmcid": …}`` a line, newest query window first.
        since: First day on which articles were added to PMC.
        until: Last day; today if None.
        policy: Licences, as for the fetch.
        limit: Most articles to write.
        server: Base address of the E-utilities.
        limits: Timeouts and retries; the rate is always NCBI's.

    Raises:
        InputError: The term is empty or NCBI does not understand it, or the dates are reversed.
        StoreError: NCBI does not answer, or answers something else.
    """
    first, last = since or FIRST_DAY, until or date.today()
    if not term.strip():
        raise InputError("the search term is empty", where="TERM", hint='such as "chest x-ray[title]"')
    if first > last:
        raise InputError(f"{first} is after {last}", where="--since", hint="give --since before --until")
    if policy not in POLICIES:
        raise InputError(f"there is no policy {policy!r}", where="--policy", hint=f"choose from {', '.join(POLICIES)}")
    rate = REQUESTS_PER_S_WITH_KEY if os.environ.get("NCBI_API_KEY") else REQUESTS_PER_S
    base = limits or StoreLimits()
    search = _Search(
        article_query(term, policy),
        limit,
        server,
        # A little under the limit: the server's clock is not ours.
        StoreLimits(1, rate * 0.95, base.timeout_s, base.attempts, base.backoff_s, base.max_pause_s),
    )
    found = asyncio.run(search.run(first, last))
    with atomic_path(out) as temporary:
        temporary.write_text("".join(json.dumps({"pmcid": pmcid}) + "\n" for pmcid in found.pmcids), "utf-8")
    return found


class _Search:
    def __init__(self, query: str, limit: int, server: str, limits: StoreLimits) -> None:
        self.query, self.limit, self.server, self.limits = query, limit, server.rstrip("/"), limits
        self.found: dict[str, None] = {}

    async def run(self, first: date, last: date) -> FoundArticles:
        self.transport = Transport(self.limits)
        try:
            total = await self._window(first, last)
        finally:
            await self.transport.close()
        pmcids = tuple(self.found)[: self.limit]
        return FoundArticles(pmcids, total, self.query, self.transport.tally.requests)

    async def _window(self, first: date, last: date) -> int:
        """Collect the ids of a range of days, halved as often as it holds too many. Returns their number."""
        wanted = max(0, min(IDS_PER_QUERY, self.limit - len(self.found)))
        count, ids = await self._search(first, last, wanted)
        if count <= max(len(ids), wanted) or len(self.found) + len(ids) >= self.limit or first == last:
            if first == last and count > len(ids) and len(self.found) + len(ids) < self.limit:
                raise InputError(
                    f"{count:,} articles match on {first}, more than NCBI lists",
                    where="TERM",
                    hint="narrow the term, for example by journal",
                )
            self.found.update(dict.fromkeys(ids))
            return count
        middle = first + (last - first) // 2
        await self._window(middle + timedelta(days=1), last)
        if len(self.found) < self.limit:
            await self._window(first, middle)
        return count

    async def _search(self, first: date, last: date, wanted: int) -> tuple[int, list[str]]:
        days = f"{first:%Y/%m/%d}:{last:%Y/%m/%d}[pmcrdat]"
        values = {
            "db": "pmc",
            "term": f"{self.query} AND {days}",
            "retmode": "json",
            "retmax": str(wanted),
            "tool": "medvlm",
        }
        for name, variable in (("email", "NCBI_EMAIL"), ("api_key", "NCBI_API_KEY")):
            if os.environ.get(variable):
                values[name] = os.environ[variable]
        url = f"{self.server}/esearch.fcgi?{urllib.parse.urlencode(values, quote_via=urllib.parse.quote)}"
        answer = await self.transport.get(url, limit_bytes=ANSWER_LIMIT_BYTES)
        await self.transport.budget.release(answer.reserved)
        if answer.status != "ok":
            raise StoreError(
                f"NCBI's E-utilities do not answer: {answer.detail or answer.status}",
                where=f"{self.server}/esearch.fcgi",
                hint="try again later; large searches belong in the night or on a weekend (US Eastern time)",
            )
        return _parse(answer.body, self.query, self.server)


def _parse(body: bytes, query: str, server: str) -> tuple[int, list[str]]:
    """Number of matches and the ids of an esearch answer."""
    try:
        result: Any = json.loads(body)["esearchresult"]
        problem = result.get("ERROR") or result.get("errorlist", {}).get("phrasesnotfound")
        if not problem:
            ids = [str(value) for value in result["idlist"]]
            if not all(re.fullmatch(r"[1-9]\d{0,11}", value) for value in ids):
                raise ValueError("an id is no number")
            return int(result["count"]), [f"PMC{value}" for value in ids]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(
            f"the answer is no search result: {error}", where=f"{server}/esearch.fcgi", hint="try again later"
        ) from error
    raise InputError(f"NCBI does not understand the search: {problem}", where=query, hint="check the term's spelling")
