"""The fetch against the real mirror, and against servers that misbehave."""

from __future__ import annotations

import json
import time
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from bucket_server import BucketServer, Fault
from fetch_case import MEDIA, ONE, QUICK, ROW, fetch_one, figures, many, outcomes, shard_bytes, write_list

from medvlm.data.figures import fetch_figures
from medvlm.data.objects import StoreLimits
from medvlm.errors import StoreError

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
    (tmp_path / "outer" / "pmc-oa-opendata" / "metadata").mkdir(parents=True)
    for store, hint in (
        ("empty", "root of a bucket"),
        ("missing", "give a folder"),
        ("outer", "outer/pmc-oa-opendata"),
    ):
        with pytest.raises(StoreError, match=hint):
            fetch_figures(write_list(tmp_path, [ROW]), str(tmp_path / store), tmp_path / "out")
    with pytest.raises(StoreError, match="ftp"):
        fetch_figures(write_list(tmp_path, [ROW]), "ftp://ftp.ncbi.nlm.nih.gov", tmp_path / "out")


def test_a_store_that_dies_stops_the_run_and_keeps_what_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medvlm.data.fetch_run.GIVE_UP_AFTER", 5)
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
