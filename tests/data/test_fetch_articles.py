"""Articles and rows that are not as they should be: each ends in an outcome."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import pytest
from bucket_server import BucketServer, article, jats, llava_row, picture
from fetch_case import MEDIA, ONE, QUICK, ROW, fetch_one, figures, many, outcomes, write_list

from medvlm.data.articles import FetchSettings
from medvlm.data.figures import fetch_figures

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


def test_links_that_lead_out_of_a_folder_are_not_followed(tmp_path: Path) -> None:
    for key, body in ONE.items():
        (tmp_path / "bucket" / key).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "bucket" / key).write_bytes(body)
    (tmp_path / "bucket" / MEDIA).rename(tmp_path / "elsewhere.jpg")
    (tmp_path / "bucket" / MEDIA).symlink_to(tmp_path / "elsewhere.jpg")
    fetch_figures(write_list(tmp_path, [ROW]), str(tmp_path / "bucket"), tmp_path / "out")
    (outcome,) = outcomes(tmp_path / "out")
    assert (outcome.status, outcome.figures) == ("store_error", 0)
    assert "leads out" in outcome.detail
