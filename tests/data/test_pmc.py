"""Versions, licences and media keys of PMC's bucket."""

from __future__ import annotations

import dataclasses
import json

import pytest
from bucket_server import article
from hypothesis import given
from hypothesis import strategies as st

from medvlm.data.pmc import (
    POLICIES,
    ArticleVersion,
    choose_versions,
    find_media,
    licence_allowed,
    normalise_licence,
    parse_metadata,
    source_url,
    version_of_key,
)


def version(number: int = 1, *media: str, **changes: object) -> ArticleVersion:
    objects = article("PMC1", dict.fromkeys(media, b"x"), version=number)
    parsed = parse_metadata(objects[f"metadata/PMC1.{number}.json"], "PMC1", number)
    assert isinstance(parsed, ArticleVersion)
    return dataclasses.replace(parsed, **changes)  # type: ignore[arg-type]


PUBLISHED = version(1, "a.jpg")
MANUSCRIPT = version(2, manuscript=True, open_access=False, licence="TDM")


@pytest.mark.parametrize(
    ("versions", "chosen"),
    [
        ([PUBLISHED], [1]),
        ([PUBLISHED, MANUSCRIPT], [1]),
        ([MANUSCRIPT, PUBLISHED], [1]),
        ([version(1, "a.jpg"), version(3, "a.jpg"), version(2, "a.jpg")], [3]),
        ([version(1, "a.jpg"), version(358, "a.jpg")], [358]),
        ([version(2, "a.jpg")], [2]),
        # A manuscript under a licence of its own, where the published article has none.
        ([version(1, licence=None, open_access=False), version(2, "m.jpg", manuscript=True)], [2]),
        ([version(1, "a.jpg"), version(2, "m.jpg", manuscript=True)], [1, 2]),
        ([version(1), version(2, "m.jpg", manuscript=True)], [2, 1]),
    ],
)
def test_the_version_to_use(versions: list[ArticleVersion], chosen: list[int]) -> None:
    usable, status, _ = choose_versions(versions, "research")
    assert status is None
    assert [v.version for v in usable] == chosen


@pytest.mark.parametrize(
    ("versions", "status"),
    [
        ([], "article_absent"),
        ([MANUSCRIPT], "licence_refused"),
        ([version(1, "a.jpg", retracted=True)], "retracted"),
        ([version(1, "a.jpg", retracted=True), MANUSCRIPT], "retracted"),
        ([version(1, "a.jpg"), version(2, manuscript=True, retracted=True)], "retracted"),
        # The newer one lost its licence: the older one's is not to be used either.
        ([version(1, "a.jpg"), version(2, licence="CC BY-ND")], "licence_refused"),
        ([version(1, "a.jpg"), version(2, licence=None, open_access=False)], "licence_refused"),
        ([version(1, "a.jpg", open_access=False)], "licence_refused"),
    ],
)
def test_no_version_to_use(versions: list[ArticleVersion], status: str) -> None:
    usable, found, detail = choose_versions(versions, "research")
    assert (usable, found) == ([], status)
    assert detail


@pytest.mark.parametrize(
    ("code", "normal"),
    [
        ("CC BY", "CC BY"), ("cc by-nc", "CC BY-NC"), ("CC-BY-NC-SA", "CC BY-NC-SA"), ("CC BY 4.0", "CC BY"),
        ("CC0", "CC0"), ("CC0 1.0", "CC0"), (" CC  BY ", "CC BY"), ("TDM", "TDM"), ("CC BY-XX", "CC BY-XX"),
        (None, None), ("", None), (3, None), ("CC BY or so", "CC BY OR SO"),
    ],
)  # fmt: skip
def test_licence_codes(code: object, normal: str | None) -> None:
    assert normalise_licence(code) == normal


def test_policies() -> None:
    codes = ["CC0", "CC BY", "CC BY-SA", "CC BY-NC", "CC BY-NC-SA", "CC BY-ND", "CC BY-NC-ND", "TDM", None, "GPL"]
    admitted = {policy: [licence_allowed(code, policy) for code in codes].count(True) for policy in POLICIES}
    assert admitted == {"research": 5, "commercial": 3, "any-oa": 7}
    assert not any(licence_allowed(code, policy) for policy in POLICIES for code in ("TDM", None, "GPL"))


@pytest.mark.parametrize(
    ("wanted", "media", "found"),
    [
        ("a.jpg", ["a.jpg", "A.jpg"], "a.jpg"),
        ("A.JPG", ["a.jpg"], "a.jpg"),
        ("a.jpg", ["a.png", "a.tif"], "a.png"),
        ("a.jpg", ["a.tif", "a.gif"], "a.tif"),
        ("a.jpg", ["a.gif"], None),
        ("a.gif", ["a.gif", "a.jpg"], "a.jpg"),
        ("a.gif", ["a.gif"], "a.gif"),
        ("a", ["a.jpg"], "a.jpg"),
        ("pone.001.g004", ["pone.001.g004.jpg", "pone.001.jpg"], "pone.001.g004.jpg"),
        ("a.pdf", ["a.jpg"], None),
        ("a.jpg", ["a.pdf", "a.xlsx"], None),
        ("b.jpg", ["a.jpg"], None),
    ],
)
def test_the_media_file_that_a_name_means(wanted: str, media: list[str], found: str | None) -> None:
    chosen, note = find_media(version(1, *media), wanted)
    assert (chosen.name if chosen else None) == found
    assert (note == "") == (wanted == found)


@given(st.binary(max_size=60) | st.text().map(str.encode))
def test_any_bytes_are_metadata_or_a_reason(body: bytes) -> None:
    assert isinstance(parse_metadata(body, "PMC1", 1), ArticleVersion | str)


@given(
    st.dictionaries(
        st.sampled_from(list(json.loads(article("PMC1", {})["metadata/PMC1.1.json"]))),
        st.none() | st.integers() | st.text() | st.lists(st.text()),
    )
)
def test_any_changed_field_is_read_or_refused(changes: dict[str, object]) -> None:
    values = json.loads(article("PMC1", {"a.jpg": b""})["metadata/PMC1.1.json"]) | changes
    parsed = parse_metadata(json.dumps(values).encode(), "PMC1", 1)
    assert isinstance(parsed, str) or all(media.key.startswith("PMC1.1/") for media in parsed.media)


def test_keys_and_addresses() -> None:
    assert version_of_key("metadata/PMC12.358.json") == ("PMC12", 358)
    assert version_of_key("metadata/PMC12.json") is None
    assert version_of_key("PMC12.1/PMC12.1.json") is None
    assert source_url("PMC1.1/a b%.jpg") == "https://pmc-oa-opendata.s3.amazonaws.com/PMC1.1/a%20b%25.jpg"
