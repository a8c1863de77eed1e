"""The fetch against a bucket in memory that fails on request, and against the real mirror."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import unicodedata
import zlib
from pathlib import Path
from typing import Any

import pytest
from bucket_server import BucketServer, Fault, article, jats, llava_row, picture

from medvlm.data import journal
from medvlm.data.articles import FetchSettings
from medvlm.data.figures import fetch_figures
from medvlm.data.objects import StoreLimits
from medvlm.errors import InputError, StoreError, WorkspaceError
from medvlm.records import FetchOutcome, Figure
from medvlm.store import Report, read_records, read_report

QUICK = StoreLimits(timeout_s=0.4, attempts=3, backoff_s=0.01)


def write_list(folder: Path, rows: list[str]) -> Path:
    path = folder / "list.jsonl"
    path.write_text("\n".join(rows) + "\n", "utf-8")
    return path


def many(count: int, media: int = 1) -> tuple[dict[str, bytes], list[str]]:
    """Objects and rows of articles with ``media`` figures each."""
    objects: dict[str, bytes] = {}
    rows: list[str] = []
    for n in range(count):
        pmcid = f"PMC{7000 + n * 37}"
        files = {f"fig{k}.jpg": picture(n * media + k) for k in range(media)}
        objects |= article(pmcid, files, pmid=n + 1)
        rows += [llava_row(pmcid, name, f"{n + 1}_F{k + 1}") for k, name in enumerate(files)]
    return objects, rows


def outcomes(out: Path) -> list[FetchOutcome]:
    return read_records(out / "outcomes", FetchOutcome)


def figures(out: Path) -> list[Figure]:
    return read_records(out / "shards", Figure)


def shard_bytes(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (out / "shards").iterdir()}


def fetch_one(
    tmp_path: Path, objects: dict[str, bytes], row: str, *, fault: dict[str, Fault] | None = None, **kwargs: Any
) -> tuple[FetchOutcome, list[Figure]]:
    """The outcome of a list with one row."""
    out = tmp_path / "out"
    with BucketServer(objects, faults=fault or {}) as server:
        fetch_figures(write_list(tmp_path, [row]), server.url, out, limits=kwargs.pop("limits", QUICK), **kwargs)
    (outcome,) = outcomes(out)
    return outcome, figures(out)


# --- the real mirror


def expected_status(note: str) -> set[str]:
    """Statuses that agree with a line of expected.json; the licence is judged before the bytes."""
    if "absent" in note:
        return {"article_absent"}
    if "retracted" in note:
        return {"retracted"}
    if any(f"license {licence};" in note for licence in ("CC BY-NC-ND", "TDM", "None")):
        return {"licence_refused"}
    if "md5" in note:
        return {"md5_mismatch"}
    return {"undecodable"} if "broken" in note else {"ok"}


def test_every_row_of_the_mirror_ends_as_expected(real_data: Path, tmp_path: Path) -> None:
    mirror = real_data / "pmc_mirror"
    report = fetch_figures(mirror / "pmc_urls.jsonl", str(mirror / "pmc-oa-opendata"), tmp_path / "out")
    assert report.details["by_status"]["ok"] == 26
    expected = json.loads((mirror / "expected.json").read_text())
    rows = outcomes(tmp_path / "out")
    assert [row.row for row in rows] == list(range(51))
    for row in rows:
        assert row.status in expected_status(expected.get(row.pair_id, "ok")), row
    by_id = {row.pair_id: row for row in rows}
    assert by_id["29563712_F5"].version == 2
    assert by_id["29354481_trd-2-trd015-g004"].version == 1
    assert by_id["24554380_Fig23"].key.endswith("FIG23_HTML.jpg")
    assert not any(row.key.endswith(".gif") for row in rows)
    made = figures(tmp_path / "out")
    assert [f.figure_id for f in made] == [row.pair_id for row in rows if row.status == "ok"]
    assert all(figure.caption and figure.label and figure.licence and figure.source_url for figure in made)


def plain(text: str) -> str:
    """Text without blanks, and with raised characters as plain ones."""
    return "".join(unicodedata.normalize("NFKC", text).split())


def test_captions_and_mentions_are_those_that_llava_med_published(real_data: Path, tmp_path: Path) -> None:
    mirror = real_data / "pmc_mirror"
    fetch_figures(mirror / "pmc_urls.jsonl", str(mirror / "pmc-oa-opendata"), tmp_path / "out")
    groups = json.loads((real_data / "llava-med" / "llava_med_eval_qa50_fig_captions.json").read_text())
    published = {value["pair_id"]: value for group in groups.values() for value in group}
    assert len(published) == 50
    compared = 0
    for figure in figures(tmp_path / "out"):
        if figure.figure_id in published:
            theirs = published[figure.figure_id]
            assert plain(figure.caption) == plain(theirs["fig_caption"])
            said = plain(" ".join(figure.mentions))
            for mention in theirs["in_text_mention"] or []:
                assert plain(mention["tokens"]) in said
            compared += 1
    assert compared == 25


@pytest.mark.parametrize("kind", ["s3", "small pages", "index", "no listing"])
def test_the_same_shards_over_http_as_from_the_folder(real_data: Path, tmp_path: Path, kind: str) -> None:
    mirror = real_data / "pmc_mirror"
    root = mirror / "pmc-oa-opendata"
    objects = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    options: dict[str, Any] = {
        "s3": {}, "small pages": {"page_cap": 2}, "index": {"speaks_s3": False},
        "no listing": {"speaks_s3": False, "index": False},
    }[kind]  # fmt: skip
    fetch_figures(mirror / "pmc_urls.jsonl", str(root), tmp_path / "folder")
    with BucketServer(objects, **options) as server:
        fetch_figures(mirror / "pmc_urls.jsonl", server.url, tmp_path / "http")
    assert shard_bytes(tmp_path / "http") == shard_bytes(tmp_path / "folder")


# --- servers that misbehave

ONE = article("PMC100", {"a.jpg": picture(1)}, pmid=5)
ROW = llava_row("PMC100", "a.jpg", "5_F1")
MEDIA = "PMC100.1/a.jpg"


@pytest.mark.parametrize(
    ("fault", "status", "attempts", "said"),
    [
        (Fault("stall", times=-1), "timeout", 3, "nothing for"),
        (Fault("stall", times=1), "ok", 2, ""),
        (Fault("reset", times=-1), "store_error", 3, "Disconnected"),
        (Fault("reset", times=1), "ok", 2, ""),
        (Fault("status", 500, times=2), "ok", 3, ""),
        (Fault("status", 503, times=-1), "store_error", 3, "HTTP 503"),
        (Fault("status", 403, times=-1), "store_error", 1, "HTTP 403"),
        (Fault("status", 404, times=-1), "media_absent", 1, "listed, but not in the store"),
        (Fault("html", times=-1), "store_error", 3, "HTML"),
        (Fault("long", times=-1), "store_error", 3, ""),
        (Fault("short", times=-1), "store_error", 3, ""),
    ],
    ids=lambda value: f"{value.kind}{value.status}x{value.times}" if isinstance(value, Fault) else None,
)
def test_a_media_server_that_misbehaves(tmp_path: Path, fault: Fault, status: str, attempts: int, said: str) -> None:
    outcome, made = fetch_one(tmp_path, ONE, ROW, fault={MEDIA: fault})
    assert (outcome.status, outcome.attempts) == (status, attempts), outcome
    assert said in outcome.detail
    assert len(made) == (status == "ok") == outcome.figures


@pytest.mark.parametrize("key", ["metadata/PMC100.1.json", "PMC100.1/PMC100.1.xml"])
@pytest.mark.parametrize(("kind", "status"), [("stall", "timeout"), ("reset", "store_error"), ("html", "store_error")])
def test_a_passing_failure_before_the_image_is_passing_too(tmp_path: Path, key: str, kind: str, status: str) -> None:
    outcome, _ = fetch_one(tmp_path, ONE, ROW, fault={key: Fault(kind, times=-1)})
    assert outcome.status == status
    assert outcome.attempts == 3


def test_retry_after_holds_every_request_back(tmp_path: Path) -> None:
    objects, rows = many(6)
    busy = Fault("status", 429, (("Retry-After", "1"),), times=1)
    with BucketServer(objects, faults={"PMC7000.1/fig0.jpg": busy}) as server:
        started = time.monotonic()
        report = fetch_figures(
            write_list(tmp_path, rows), server.url, tmp_path / "out", limits=StoreLimits(attempts=2, backoff_s=0.01)
        )
        assert time.monotonic() - started >= 1.0
    assert report.details["by_status"] == {"ok": 6}
    assert report.metrics["retries"] == 1


def test_an_unreachable_store_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="does not answer"):
        fetch_figures(write_list(tmp_path, [ROW]), "http://127.0.0.1:9/bucket", tmp_path / "out", limits=QUICK)
    assert not (tmp_path / "out").exists()


def test_a_store_that_is_no_pmc_bucket_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for store in (tmp_path / "empty", tmp_path / "missing"):
        with pytest.raises(StoreError):
            fetch_figures(write_list(tmp_path, [ROW]), str(store), tmp_path / "out")
    with pytest.raises(StoreError, match="ftp"):
        fetch_figures(write_list(tmp_path, [ROW]), "ftp://ftp.ncbi.nlm.nih.gov", tmp_path / "out")


def test_a_store_that_dies_stops_the_run_and_keeps_what_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medvlm.data.figures.GIVE_UP_AFTER", 5)
    objects, rows = many(12)
    broken = {f"metadata/PMC{7000 + n * 37}.1.json": Fault("reset", times=-1) for n in range(4, 12)}
    path = write_list(tmp_path, rows)
    limits = StoreLimits(concurrency=1, attempts=1, timeout_s=1)
    with BucketServer(objects, faults=broken) as server:
        with pytest.raises(StoreError, match="all failed"):
            fetch_figures(path, server.url, tmp_path / "out", limits=limits)
        server.faults.clear()
        server.requests.clear()
        report = fetch_figures(path, server.url, tmp_path / "out", limits=limits)
        assert server.requests["PMC7000.1/fig0.jpg"] == 0
    assert report.details["by_status"] == {"ok": 12}


# --- articles that are not as they should be


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        (b"<html>", "not JSON"),
        (b"[]", "list"),
        (b'{"pmcid": "PMC999", "version": 1}', "names 'PMC999'"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"pmcid": "PMC100", "version": 1, "is_retracted": "no"}', "not true or false"),
    ],
)
def test_metadata_that_cannot_be_trusted(tmp_path: Path, metadata: bytes, said: str) -> None:
    outcome, _ = fetch_one(tmp_path, ONE | {"metadata/PMC100.1.json": metadata}, ROW)
    assert outcome.status == "metadata_invalid"
    assert said in outcome.detail


@pytest.mark.parametrize(
    "url",
    [
        "s3://pmc-oa-opendata/PMC999.1/a.jpg?md5=" + "0" * 32,
        "s3://other-bucket/PMC100.1/a.jpg",
        "https://evil.example/PMC100.1/a.jpg",
        "s3://pmc-oa-opendata/PMC100.1/../PMC999.1/a.jpg",
        "file:///etc/a.jpg",
    ],
)
def test_a_media_url_outside_its_article_is_never_followed(tmp_path: Path, url: str) -> None:
    objects = article("PMC100", {"a.jpg": picture(1)}, pmid=5, media_urls=[url])
    outcome, _ = fetch_one(tmp_path, objects | {"PMC999.1/a.jpg": picture(2)}, ROW)
    assert outcome.status == "metadata_invalid"
    assert "outside" in outcome.detail


@pytest.mark.parametrize(
    "name",
    ["a b.jpg", "100%.jpg", "50%20off.jpg", "Abb. 1 – Übersicht.jpg", "图1.jpg", "a#1.jpg", "a+b&c.jpg", "a?b.jpg"],
)
@pytest.mark.parametrize("store", ["http", "folder"])
def test_file_names_that_need_care(tmp_path: Path, name: str, store: str) -> None:
    objects = article("PMC100", {name: picture(1)}, pmid=5)
    row = llava_row("PMC100", name, "5_F1")
    if store == "http":
        outcome, (figure,) = fetch_one(tmp_path, objects, row)
    else:
        for key, body in objects.items():
            (tmp_path / "bucket" / key).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "bucket" / key).write_bytes(body)
        fetch_figures(write_list(tmp_path, [row]), str(tmp_path / "bucket"), tmp_path / "out")
        (outcome,), (figure,) = outcomes(tmp_path / "out"), figures(tmp_path / "out")
    assert (outcome.status, figure.image.path, figure.caption) == ("ok", name, "Caption 1 of PMC100.")


def test_versions_1_and_358(tmp_path: Path) -> None:
    old = article("PMC100", {"a.jpg": picture(1)}, pmid=5, version=1)
    new = article("PMC100", {"a.jpg": picture(2)}, pmid=5, version=358)
    outcome, (figure,) = fetch_one(tmp_path, old | new | article("PMC1001", {"a.jpg": picture(3)}, version=999), ROW)
    assert (outcome.version, figure.key) == (358, "PMC100.358/a.jpg")
    assert len(outcome.metadata_etags) == 2


def test_more_articles_than_a_page_of_the_listing_holds(tmp_path: Path) -> None:
    objects, rows = many(4)
    crowd = {f"metadata/PMC{n}.1.json": b"{}" for n in range(70000, 72500)}
    crowd |= {f"metadata/PMC7000.{n}.json": b"{}" for n in range(2, 9)}  # invalid, and newer: it decides
    report = None
    with BucketServer(objects | crowd) as server:
        report = fetch_figures(write_list(tmp_path, rows), server.url, tmp_path / "out", limits=QUICK)
    assert report.details["by_status"] == {"metadata_invalid": 1, "ok": 3}


def test_one_page_of_the_listing_answers_for_many_articles(tmp_path: Path) -> None:
    objects, rows = many(60, media=3)
    with BucketServer(objects) as server:
        report = fetch_figures(write_list(tmp_path, rows), server.url, tmp_path / "out", limits=QUICK)
        assert server.requests["?list"] <= 3
        assert max(count for key, count in server.requests.items() if key != "?list") == 1
    assert report.metrics["requests_per_figure"] == pytest.approx(server.total / 180, abs=0.001)
    assert server.total / 180 < 1.7


@pytest.mark.parametrize(
    ("changes", "row", "status", "said"),
    [
        ({"pmid": 6}, ROW, "pmid_mismatch", "PMID 5"),
        ({"pmid": None}, ROW, "ok", ""),
        ({"is_retracted": True}, ROW, "retracted", "version 1"),
        ({"license_code": "TDM"}, ROW, "licence_refused", "TDM"),
        ({"license_code": None}, ROW, "licence_refused", "null"),
        ({"is_pmc_openaccess": False}, ROW, "licence_refused", "open-access"),
        ({"media_urls": []}, ROW, "media_absent", "not among the 0"),
        ({}, llava_row("PMC100", "a.gif", "5_F1"), "ok", "stored as a.jpg"),
        ({}, llava_row("PMC100", "A.JPG", "5_F1"), "ok", "stored as a.jpg"),
        ({}, llava_row("PMC100", "a.tif", "5_F1"), "ok", "stored as a.jpg"),
        ({}, llava_row("PMC100", "b.jpg", "5_F1"), "media_absent", "b.jpg"),
        ({}, "PMC100 Fig. 1", "ok", ""),
        ({}, "PMC100_Fig1_46.jpg", "ok", "panel 46 of Fig1"),
        ({}, "PMC100 F9", "media_absent", "no figure"),
        ({}, '{"pmcid": "PMC100", "figure_id": "F1", "pmid": 6}', "pmid_mismatch", "PMID 6"),
        ({}, "not a figure", "bad_row", "PMCID"),
        ({}, ROW.replace("5_F1", "5_\\ud800"), "ok", ""),
        ({}, ROW.replace("5_F1", "9" * 40 + "_F1"), "ok", ""),
        ({"citation": "\ud800", "title": "\x00"}, ROW, "ok", ""),
        ({"license_code": "\ud800"}, ROW, "licence_refused", "?"),
        ({}, '{"pair_id": "1_F1"}', "bad_row", "none of"),
        ({}, '{"image_file_path": "x/a.jpg", "pair_id": "1_F1"}', "unresolvable", "no PMCID"),
    ],
)
def test_what_a_row_becomes(tmp_path: Path, changes: dict[str, Any], row: str, status: str, said: str) -> None:
    pmid = changes.pop("pmid", 5)
    outcome, made = fetch_one(tmp_path, article("PMC100", {"a.jpg": picture(1)}, pmid=pmid, **changes), row)
    assert outcome.status == status, outcome
    assert said in outcome.detail
    assert len(made) == (status == "ok")


def test_a_thumbnail_never_replaces_a_figure(tmp_path: Path) -> None:
    objects = article("PMC100", {"a.gif": picture(1, form="GIF")}, pmid=5)
    outcome, _ = fetch_one(tmp_path, objects, ROW)
    assert outcome.status == "media_absent"


def test_a_row_for_a_whole_article_yields_every_figure_and_one_outcome(tmp_path: Path) -> None:
    objects = article("PMC100", {"a.jpg": picture(1), "b.png": picture(2, form="PNG"), "c.jpg": b"broken"}, pmid=5)
    outcome, made = fetch_one(tmp_path, objects, "PMC100")
    assert (outcome.status, outcome.figures) == ("ok", 2)
    assert outcome.detail.startswith("2 of 3 figures")
    assert [figure.figure_id for figure in made] == ["PMC100_a", "PMC100_b"]
    assert [figure.caption for figure in made] == ["Caption 1 of PMC100.", "Caption 2 of PMC100."]


def test_the_same_row_twice_is_two_outcomes_and_one_figure(tmp_path: Path) -> None:
    with BucketServer(ONE) as server:
        fetch_figures(write_list(tmp_path, [ROW, ROW]), server.url, tmp_path / "out", limits=QUICK)
    first, second = outcomes(tmp_path / "out")
    assert (first.status, second.status, first.figures, second.figures) == ("ok", "ok", 1, 0)
    assert "row 0" in second.detail
    assert len(figures(tmp_path / "out")) == 1


BILLION_LAUGHS = (
    b'<?xml version="1.0"?><!DOCTYPE article [<!ENTITY a "ha">'
    + b"".join(
        b'<!ENTITY a%d "%s">' % (n, b"&a%s;" % (str(n - 1).encode() if n > 1 else b"") * 10) for n in range(1, 10)
    )
    + b'<!ENTITY file SYSTEM "file:///etc/passwd">]><article><body><fig id="F1"><label>Figure 1</label>'
    b'<caption><p>A &a9; b &file; c</p></caption><graphic href="a"/></fig></body></article>'
)


def test_a_billion_laughs_are_not_laughed(tmp_path: Path) -> None:
    outcome, (figure,) = fetch_one(tmp_path, article("PMC100", {"a.jpg": picture(1)}, xml=BILLION_LAUGHS, pmid=5), ROW)
    assert outcome.status == "ok"
    assert figure.caption in {"", "A b c"}


@pytest.mark.parametrize("xml", [b"", b"<article>", b"plain", b"<html></html>", jats("PMC100", 5, ["other"])])
def test_a_figure_without_a_readable_caption_says_so(tmp_path: Path, xml: bytes) -> None:
    outcome, (figure,) = fetch_one(
        tmp_path, article("PMC100", {"a.jpg": picture(1)}, xml=xml, pmid=5), ROW.replace("_F1", "_x")
    )
    assert (outcome.status, figure.caption) == ("ok", "")
    assert outcome.detail.startswith("no caption")


def huge_png(side: int) -> bytes:
    """A PNG of one colour with side x side pixels, a few hundred kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = side.to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])
    rows = zlib.compress(bytes((side + 1) * side), 1)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [14_200, 9_000])
def test_a_200_megapixel_image_is_not_decoded(tmp_path: Path, side: int) -> None:
    outcome, _ = fetch_one(
        tmp_path, article("PMC100", {"a.png": huge_png(side)}, pmid=5), ROW.replace("a.jpg", "a.png")
    )
    assert outcome.status == "too_large"


def test_a_file_over_the_limit_is_not_read(tmp_path: Path) -> None:
    objects = article("PMC100", {"a.jpg": picture(1) + bytes(200_000)}, pmid=5)
    outcome, _ = fetch_one(tmp_path, objects, ROW, settings=FetchSettings(max_bytes=100_000))
    assert (outcome.status, outcome.bytes_read) == ("too_large", 0)


# --- stopping and going on


def report_of(tmp_path: Path, objects: dict[str, bytes], rows: list[str], name: str, **kwargs: Any) -> Report:
    with BucketServer(objects) as server:
        return fetch_figures(write_list(tmp_path, rows), server.url, tmp_path / name, limits=QUICK, **kwargs)


KILLED = """
import sys
from pathlib import Path
from medvlm.data.figures import fetch_figures
from medvlm.data.objects import StoreLimits
fetch_figures(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), block_rows=8, limits=StoreLimits(concurrency=4))
"""


def test_a_killed_run_goes_on_without_fetching_a_finished_figure_again(tmp_path: Path) -> None:
    objects, rows = many(60)
    path = write_list(tmp_path, rows)
    report_of(tmp_path, objects, rows, "whole", block_rows=8)
    with BucketServer(objects, latency_s=0.02) as server:
        child = [sys.executable, "-c", KILLED, str(path), server.url, str(tmp_path / "out")]
        for wait_for in (10, 30):
            process = subprocess.Popen(child)
            while sum(count for key, count in server.requests.items() if key.endswith(".jpg")) < wait_for:
                time.sleep(0.01)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            assert not (tmp_path / "out" / "shards").exists()
        subprocess.run(child, check=True)
        twice = [key for key, count in server.requests.items() if key.endswith(".jpg") and count > 1]
        # Only what was in flight at a kill may be asked for again.
        assert len(twice) <= 8
    assert shard_bytes(tmp_path / "out") == shard_bytes(tmp_path / "whole")
    assert [row.row for row in outcomes(tmp_path / "out")] == list(range(60))
    assert list((tmp_path / ".out.fetch").iterdir()) == [tmp_path / ".out.fetch" / "lock"]


@pytest.mark.parametrize("cut", [1, 11, 12, 13, 200])
def test_a_torn_journal_loses_only_its_last_result(tmp_path: Path, cut: int, monkeypatch: pytest.MonkeyPatch) -> None:
    objects, rows = many(6)
    monkeypatch.setattr("medvlm.data.figures._put_in_place", stop)
    monkeypatch.setattr("medvlm.data.blocks.Blocks.finish", lambda self, block: None)
    with pytest.raises(InterruptedError):
        report_of(tmp_path, objects, rows, "out")
    (written,) = (tmp_path / ".out.fetch").rglob("*.journal")
    monkeypatch.undo()
    os.truncate(written, written.stat().st_size - cut)
    path = tmp_path / "list.jsonl"
    with BucketServer(objects) as server:
        # The address is part of what makes two runs the same one.
        monkeypatch.setattr("medvlm.data.figures.fingerprint", lambda *parts: written.parent.parent.name)
        fetch_figures(path, server.url, tmp_path / "out", limits=QUICK)
        assert sum(count for key, count in server.requests.items() if key.endswith(".jpg")) == 1
    assert len(figures(tmp_path / "out")) == 6


def stop(*_: object) -> None:
    raise InterruptedError


def test_a_full_disk_is_one_clear_error_and_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objects, rows = many(20)
    path = write_list(tmp_path, rows)
    real_write, room = os.write, [30_000]

    def write(descriptor: int, data: Any) -> int:
        # A disk that fills up takes part of the last write.
        taken = min(len(data), room[0])
        if not taken:
            raise OSError(28, "No space left on device")
        room[0] -= taken
        return real_write(descriptor, bytes(data)[:taken])

    with BucketServer(objects) as server:
        monkeypatch.setattr(journal.os, "write", write)
        with pytest.raises(WorkspaceError, match="No space left"):
            fetch_figures(path, server.url, tmp_path / "out", limits=QUICK)
        monkeypatch.undo()
        done = sum(count for key, count in server.requests.items() if key.endswith(".jpg"))
        assert done
        fetch_figures(path, server.url, tmp_path / "out", limits=QUICK)
    assert [row.status for row in outcomes(tmp_path / "out")] == ["ok"] * 20
    assert len(figures(tmp_path / "out")) == 20


def test_a_disk_that_fills_up_while_a_shard_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objects, rows = many(6)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with BucketServer(objects) as server:
        path = write_list(tmp_path, rows)
        with monkeypatch.context() as patched:
            patched.setattr("medvlm.data.blocks.pq.ParquetWriter.write_table", full)
            with pytest.raises(WorkspaceError, match="No space left"):
                fetch_figures(path, server.url, tmp_path / "out", limits=QUICK)
        server.requests.clear()
        fetch_figures(path, server.url, tmp_path / "out", limits=QUICK)
        assert not any(key.endswith(".jpg") for key in server.requests)
    assert len(figures(tmp_path / "out")) == 6


def test_two_runs_on_one_folder(tmp_path: Path) -> None:
    objects, rows = many(40)
    path = write_list(tmp_path, rows)
    with BucketServer(objects, latency_s=0.1) as server:
        child = [sys.executable, "-c", KILLED, str(path), server.url, str(tmp_path / "out")]
        process = subprocess.Popen(child)
        while not server.total:
            time.sleep(0.01)
        with pytest.raises(WorkspaceError, match="another fetch"):
            fetch_figures(path, server.url, tmp_path / "out")
        with pytest.raises(WorkspaceError, match="another fetch"):
            fetch_figures(path, server.url, tmp_path / "out", part=(1, 2))
        assert process.wait() == 0
    assert len(figures(tmp_path / "out")) == 40


def test_parts_fetched_apart_make_the_same_shards(tmp_path: Path) -> None:
    objects, rows = many(20)
    rows.insert(7, "neither JSON nor a PMCID")
    path = write_list(tmp_path, rows)
    report_of(tmp_path, objects, rows, "whole", block_rows=4)
    with BucketServer(objects) as server:
        options: dict[str, Any] = {"limits": QUICK, "block_rows": 4}
        counts = [
            fetch_figures(path, server.url, tmp_path / "out", part=(part, 3), **options).counts["rows"]
            for part in (3, 1, 2)
        ]
        assert sum(counts) == 21
        assert not (tmp_path / "out").exists()
        server.requests.clear()
        report = fetch_figures(path, server.url, tmp_path / "out", **options)
        assert not any(key.endswith(".jpg") for key in server.requests)
    assert report.details["by_status"] == {"bad_row": 1, "ok": 20}
    assert shard_bytes(tmp_path / "out") == shard_bytes(tmp_path / "whole")


def test_a_second_run_fetches_only_what_has_changed(tmp_path: Path) -> None:
    objects, rows = many(10)
    path = write_list(tmp_path, rows)
    with BucketServer(objects, faults={"PMC7037.1/fig0.jpg": Fault("reset", times=3)}) as server:
        run: dict[str, Any] = {"limits": QUICK, "block_rows": 4}
        first = fetch_figures(path, server.url, tmp_path / "out", **run)
        assert first.details["by_status"] == {"ok": 9, "store_error": 1}
        for key, body in article("PMC7000", {"fig0.jpg": picture(0)}, pmid=1, is_retracted=True).items():
            server.put(key, body)
        for key, body in article("PMC7074", {"fig0.jpg": picture(77)}, pmid=3).items():
            server.put(key, body)
        server.requests.clear()
        second = fetch_figures(path, server.url, tmp_path / "out", **run)
        asked = {key for key in server.requests if key.endswith(".jpg")}
        assert asked == {"PMC7037.1/fig0.jpg", "PMC7074.1/fig0.jpg"}
        assert second.details["by_status"] == {"ok": 9, "retracted": 1}
        assert second.fingerprint != first.fingerprint
        again = fetch_figures(path, server.url, tmp_path / "fresh", **run)
    assert shard_bytes(tmp_path / "out") == shard_bytes(tmp_path / "fresh")
    assert again.fingerprint == second.fingerprint


def test_another_policy_drops_what_it_does_not_admit(tmp_path: Path) -> None:
    objects = article("PMC100", {"a.jpg": picture(1)}, pmid=5, license_code="CC BY-NC") | article(
        "PMC101", {"a.jpg": picture(2)}, pmid=6, license_code="CC BY-ND"
    )
    rows = [ROW, llava_row("PMC101", "a.jpg", "6_F1")]
    kept = {}
    for policy in ("research", "commercial", "any-oa"):
        report_of(tmp_path, objects, rows, "out", settings=FetchSettings(policy=policy))
        kept[policy] = [figure.licence for figure in figures(tmp_path / "out")]
    assert kept == {"research": ["CC BY-NC"], "commercial": [], "any-oa": ["CC BY-NC", "CC BY-ND"]}
    with pytest.raises(InputError, match="no policy"):
        report_of(tmp_path, objects, rows, "out", settings=FetchSettings(policy="all"))


def test_no_more_requests_are_in_flight_than_allowed(tmp_path: Path) -> None:
    objects, rows = many(40)
    with BucketServer(objects, latency_s=0.02) as server:
        fetch_figures(write_list(tmp_path, rows), server.url, tmp_path / "out", limits=StoreLimits(concurrency=5))
        assert server.most_in_flight == 5
        assert server.connections <= 10


def test_the_rate_is_kept(tmp_path: Path) -> None:
    objects, rows = many(10)
    with BucketServer(objects) as server:
        started = time.monotonic()
        fetch_figures(write_list(tmp_path, rows), server.url, tmp_path / "out", limits=StoreLimits(requests_per_s=50))
        assert server.total / (time.monotonic() - started) <= 51


def test_the_report_and_the_progress(tmp_path: Path) -> None:
    objects, rows = many(3)
    events: list[Any] = []
    report = report_of(tmp_path, objects, [*rows, "PMC1"], "out", listen=events.append)
    assert events[-1] == {"done": 4, "total": 4, "by_status": {"article_absent": 1, "ok": 3}}
    assert read_report(tmp_path / "out") == report
    assert report.counts == {"rows": 4, "figures": 3, "figures_with_caption": 3}
    assert report.details["by_licence"] == {"CC BY": 3}
