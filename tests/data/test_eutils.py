"""Searching for articles, against a server that answers as esearch does."""

from __future__ import annotations

import json
import re
import threading
import time
import urllib.parse
from collections.abc import Iterator
from datetime import date, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from medvlm.data import eutils
from medvlm.data.eutils import article_query, find_articles
from medvlm.data.lists import read_refs
from medvlm.data.objects import StoreLimits
from medvlm.errors import InputError, StoreError
from medvlm.records import FigureRef


class ESearch(ThreadingHTTPServer):
    """One article a day of January 2024, and a hundred on the 15th."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        first = date(2024, 1, 1)
        self.articles = [(first + timedelta(days=n), 1000 + n) for n in range(31)]
        self.articles += [(date(2024, 1, 15), 2000 + n) for n in range(100)]
        self.queries: list[dict[str, str]] = []
        self.times: list[float] = []
        self.reply: bytes | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/entrez/eutils"


class Handler(BaseHTTPRequestHandler):
    server: ESearch

    def do_GET(self) -> None:
        values = {k: v[0] for k, v in urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query).items()}
        self.server.queries.append(values)
        self.server.times.append(time.monotonic())
        days = re.search(r"(\d{4}/\d\d/\d\d):(\d{4}/\d\d/\d\d)\[pmcrdat\]", values["term"])
        assert days
        first, last = (date(*map(int, day.split("/"))) for day in days.groups())
        ids = [str(n) for day, n in self.server.articles if first <= day <= last]
        result = {"count": str(len(ids)), "idlist": ids[: int(values["retmax"])]}
        body = self.server.reply or json.dumps({"esearchresult": result}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""


@pytest.fixture
def esearch(monkeypatch: pytest.MonkeyPatch) -> Iterator[ESearch]:
    for name in ("NCBI_API_KEY", "NCBI_EMAIL"):
        monkeypatch.delenv(name, raising=False)
    server = ESearch()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def test_the_articles_of_a_search_are_a_list_to_fetch(esearch: ESearch, tmp_path: Path) -> None:
    found = find_articles("liver", tmp_path / "list.jsonl", since=date(2024, 1, 1), server=esearch.url)
    assert (found.total, len(found.pmcids), found.requests) == (131, 131, 1)
    refs = list(read_refs(tmp_path / "list.jsonl"))
    assert [ref.pmcid for ref in refs if isinstance(ref, FigureRef)] == list(found.pmcids)
    assert esearch.queries[0]["db"] == "pmc"
    assert "api_key" not in esearch.queries[0]
    assert esearch.queries[0]["term"].startswith("(liver) AND open_access[filter] AND (")


def test_a_result_longer_than_ncbi_lists_is_cut_by_date(
    esearch: ESearch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCBI_API_KEY", "secret")
    monkeypatch.setattr(eutils, "IDS_PER_QUERY", 101)
    found = find_articles(
        "liver", tmp_path / "list", since=date(2024, 1, 1), until=date(2024, 1, 31), server=esearch.url
    )
    assert sorted(found.pmcids) == sorted(f"PMC{n}" for _, n in esearch.articles)
    assert found.total == 131
    assert all(values["api_key"] == "secret" for values in esearch.queries)
    monkeypatch.setattr(eutils, "IDS_PER_QUERY", 100)
    with pytest.raises(InputError, match="on 2024-01-15"):
        find_articles("liver", tmp_path / "list", since=date(2024, 1, 13), until=date(2024, 1, 16), server=esearch.url)


def test_the_limit_bounds_list_and_requests(esearch: ESearch, tmp_path: Path) -> None:
    found = find_articles("liver", tmp_path / "list", since=date(2024, 1, 1), limit=7, server=esearch.url)
    assert (len(found.pmcids), found.total, found.requests) == (7, 131, 1)
    assert esearch.queries[0]["retmax"] == "7"


def test_no_more_than_three_requests_a_second(
    esearch: ESearch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eutils, "IDS_PER_QUERY", 101)
    started = time.monotonic()
    found = find_articles("x", tmp_path / "list", since=date(2024, 1, 14), until=date(2024, 1, 16), server=esearch.url)
    assert (len(found.pmcids), found.requests) == (103, 5)
    # From the start to the last arrival: what a busy machine adds can only make it longer.
    assert esearch.times[-1] - started >= 4 / 3


def test_the_licences_of_a_policy() -> None:
    query = article_query("x", "commercial")
    assert "(cc_by_license[filter] OR cc_by-sa_license[filter] OR cc0_license[filter])" in query
    assert "cc_by-nc-sa_license[filter]" in article_query("x", "research")
    assert "-nd_" not in article_query("x", "research")


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (b"no", StoreError),
        (b"[]", StoreError),
        (b'{"esearchresult": {"count": "1", "idlist": ["../x"]}}', StoreError),
        (b'{"esearchresult": {"ERROR": "Invalid"}}', InputError),
        (b'{"esearchresult": {"count": "0", "idlist": [], "errorlist": {"phrasesnotfound": ["xyz"]}}}', InputError),
    ],
)
def test_answers_that_are_none(esearch: ESearch, tmp_path: Path, reply: bytes, error: type[Exception]) -> None:
    esearch.reply = reply
    with pytest.raises(error):
        find_articles("x", tmp_path / "list", server=esearch.url)
    assert not (tmp_path / "list").exists()


def test_wrong_usage_and_a_dead_server(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="empty"):
        find_articles(" ", tmp_path / "list")
    with pytest.raises(InputError, match="after"):
        find_articles("x", tmp_path / "list", since=date(2024, 2, 1), until=date(2024, 1, 1))
    with pytest.raises(StoreError, match="do not answer"):
        find_articles("x", tmp_path / "list", server="http://127.0.0.1:9", limits=StoreLimits(attempts=1))
