"""The verbs fetch, find and recheck, as scripts and people call them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from bucket_server import BucketServer
from fetch_case import ONE, ROW, figures, many, write_list

from medvlm.data.bucket import base_url
from medvlm.errors import StoreError


def medvlm(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    import os

    command = [sys.executable, "-m", "medvlm.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **environment})


def test_fetch_prints_one_json_object(tmp_path: Path) -> None:
    objects, rows = many(4)
    path = write_list(tmp_path, [*rows, "PMC1"])
    with BucketServer(objects) as server:
        done = medvlm("fetch", "--urls", str(path), "--store", server.url, "--out", str(tmp_path / "out"), "--json")
        assert done.returncode == 0, done.stderr
        printed = json.loads(done.stdout)
        assert printed["rows"] == 5
        assert printed["by_status"] == {"article_absent": 1, "ok": 4}
        assert done.stderr == ""
        again = medvlm("recheck", "--out", str(tmp_path / "out"), "--json")
    assert json.loads(again.stdout) == {"articles": 4, "unchanged": 4, "rows_marked": 0, "verdicts": {}}


def test_the_workspace_is_the_default_place_and_parts_come_together(tmp_path: Path) -> None:
    path = write_list(tmp_path, [ROW])
    with BucketServer(ONE) as server:
        words = ["--workspace", str(tmp_path / "w"), "fetch", "--urls", str(path), "--store", server.url]
        part = medvlm(*words, "--shard", "1/2", "--json")
        assert json.loads(part.stdout)["rows"] == 0
        assert json.loads(medvlm(*words, "--shard", "2/2", "--json").stdout)["by_status"] == {"ok": 1}
        done = medvlm(*words)
        assert done.stdout == ""
        assert "1  ok" in done.stderr
        assert medvlm(*words, "--shard", "3/2").returncode == 2
    assert len(figures(tmp_path / "w" / "figures")) == 1


def test_an_s3_address_is_read_from_the_endpoint_of_the_environment(tmp_path: Path) -> None:
    path = write_list(tmp_path, [ROW])
    with BucketServer(ONE) as server:
        endpoint = server.url.removesuffix("/bucket")
        words = ["fetch", "--urls", str(path), "--store", "s3://bucket", "--out", str(tmp_path / "out"), "--json"]
        done = medvlm(*words, AWS_ENDPOINT_URL=endpoint)
    assert json.loads(done.stdout)["by_status"] == {"ok": 1}, done.stderr


@pytest.mark.parametrize(
    ("address", "base"),
    [
        ("s3://pmc-oa-opendata", "https://pmc-oa-opendata.s3.amazonaws.com/"),
        ("s3://my.bucket/mirror/", "https://s3.amazonaws.com/my.bucket/mirror/"),
        ("http://host:1/a/", "http://host:1/a/"),
        ("https://host", "https://host/"),
    ],
)
def test_addresses_of_buckets(monkeypatch: pytest.MonkeyPatch, address: str, base: str) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    assert base_url(address) == base


def test_an_address_without_a_bucket() -> None:
    with pytest.raises(StoreError):
        base_url("s3://")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fetch", "--urls", "no-such-list"], "cannot be opened"),
        (["find", " "], "empty"),
        (["find", "x", "--since", "2025-02-01", "--until", "2025-01-01"], "after"),
        (["recheck", "--out", "no-such-folder"], "nothing was fetched"),
    ],
)
def test_an_error_is_one_message_with_the_next_step(tmp_path: Path, words: list[str], said: str) -> None:
    done = medvlm("--workspace", str(tmp_path / "w"), *words)
    assert done.returncode == 1
    assert said in done.stderr
    assert "next:" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
