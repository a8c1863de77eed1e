"""Input lists in every shape that people have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bucket_server import llava_row
from hypothesis import given
from hypothesis import strategies as st

from medvlm.data.lists import index_list, parse_row, read_refs
from medvlm.errors import InputError
from medvlm.records import FetchOutcome, FigureRef


def ref(text: str) -> FigureRef:
    parsed = parse_row(3, text.encode())
    assert isinstance(parsed, FigureRef), parsed
    return parsed


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        (llava_row("PMC12", "a.jpg", "345_F1"), ("345_F1", "PMC12", "a.jpg", "F1", 345, "")),
        (llava_row("PMC12", "a b%.jpg", "345_a_b"), ("345_a_b", "PMC12", "a b%.jpg", "a_b", 345, "")),
        ('{"image_file_path": "PMC12/a.jpg"}', ("PMC12_a", "PMC12", "a.jpg", "", None, "")),
        ("PMC12", ("PMC12", "PMC12", "", "", None, "")),
        ("PMC12 F2", ("PMC12_F2", "PMC12", "", "F2", None, "")),
        ("PMC12,Fig. 2", ("PMC12_Fig._2", "PMC12", "", "Fig. 2", None, "")),
        ("PMC8253873_Fig6_46.jpg", ("PMC8253873_Fig6_46", "PMC8253873", "", "Fig6", None, "46")),
        ("PMC8253873_Fig6", ("PMC8253873_Fig6", "PMC8253873", "", "Fig6", None, "")),
        ('{"pmcid": "PMC12"}', ("PMC12", "PMC12", "", "", None, "")),
        ('{"pmcid": "PMC12", "figure_id": "F2", "pmid": 7}', ("PMC12_F2", "PMC12", "", "F2", 7, "")),
        ('{"id": 1, "image": "images/PMC12_Fig1_2.jpg"}', ("PMC12_Fig1_2", "PMC12", "", "Fig1", None, "2")),
        ("\ufeffPMC12", ("PMC12", "PMC12", "", "", None, "")),
    ],
)
def test_shapes_of_rows(text: str, fields: tuple[object, ...]) -> None:
    found = ref(text)
    assert (found.pair_id, found.pmcid, found.file_name, found.figure_id, found.pmid, found.panel) == fields
    assert found.row == 3


@pytest.mark.parametrize(
    ("line", "status", "said"),
    [
        (b"12345", "bad_row", "PMCID"),
        (b"{", "bad_row", "not JSON"),
        (b"{" * 100_000, "bad_row", "not JSON"),
        (b"\xff", "bad_row", "UTF-8"),
        (b"{}", "bad_row", "none of"),
        (b'{"pmcid": "PMC0"}', "bad_row", "PMC0"),
        (b'{"pmcid": 12}', "bad_row", "12"),
        (b'{"pmcid": "PMC12", "pmid": "x"}', "bad_row", "pmid"),
        (b'{"pmcid": "PMC12", "pmid": 1' + b"0" * 30 + b"}", "bad_row", "pmid"),
        (b"\x1c", "bad_row", "PMCID"),
        (b'{"image_file_path": 3}', "bad_row", "strings"),
        (b'{"image_file_path": "PMC12/"}', "bad_row", "no file name"),
        (b'{"image_file_path": "PMC12/.."}', "bad_row", "no file name"),
        (b'{"image_file_path": "PMC12/a\\u0000.jpg"}', "bad_row", "no file name"),
        (b'{"image_file_path": "PMC12/a\\\\b.jpg"}', "bad_row", "no file name"),
        (b'{"image_file_path": "PMC12/a.jpg", "pmc_tar_url": "x/PMC13.tar.gz"}', "unresolvable", "two articles"),
        (b'{"image_file_path": "a.jpg"}', "unresolvable", "no PMCID"),
        (b"x" * 2**21, "bad_row", "bytes"),
        (b"PMC12/../../etc/passwd", "bad_row", "PMCID"),
    ],
)
def test_rows_that_name_no_figure(line: bytes, status: str, said: str) -> None:
    parsed = parse_row(0, line)
    assert isinstance(parsed, FetchOutcome)
    assert parsed.status == status
    assert said in parsed.detail


@given(
    st.binary(min_size=1, max_size=200).filter(bytes.strip) | st.text(min_size=1).map(str.encode).filter(bytes.strip)
)
def test_any_line_is_a_reference_or_an_outcome(line: bytes) -> None:
    assert isinstance(parse_row(0, line), FigureRef | FetchOutcome)


json_values = (
    st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.text()) | st.dictionaries(st.text(), st.text())
)


@given(
    st.dictionaries(
        st.sampled_from(["pmcid", "image", "image_file_path", "pmc_tar_url", "pair_id", "pmid"]), json_values
    )
)
def test_any_object_is_a_reference_or_an_outcome(value: dict[str, object]) -> None:
    assert isinstance(parse_row(0, json.dumps(value).encode()), FigureRef | FetchOutcome)


def test_a_list_keeps_its_line_numbers(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(b"\xef\xbb\xbfPMC3\n\n  \nPMC12\r\nbad\nPMC1")
    assert [(ref.row, ref.pmcid) for ref in read_refs(path)] == [(0, "PMC3"), (3, "PMC12"), (4, ""), (5, "PMC1")]


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf\n"])
def test_an_empty_list_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "list").write_bytes(content)
    with pytest.raises(InputError, match="empty"):
        list(read_refs(tmp_path / "list"))


def test_a_missing_list_and_an_array_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be opened"):
        list(read_refs(tmp_path / "none"))
    (tmp_path / "list").write_text('[\n{"pmcid": "PMC1"}]')
    with pytest.raises(InputError, match="one JSON array"):
        list(read_refs(tmp_path / "list"))


@given(st.lists(st.sampled_from(["PMC1", "PMC12", "PMC123", "PMC2", "bad", "PMC12 F1"]), min_size=1), st.integers(1, 4))
def test_the_index_finds_every_row_once_in_every_partition(
    tmp_path_factory: pytest.TempPathFactory, rows: list[str], parts: int
) -> None:
    path = tmp_path_factory.mktemp("lists") / "list"
    path.write_text("\n".join(rows))
    seen: list[int] = []
    for part in range(1, parts + 1):
        index = index_list(path, block_rows=2, part=(part, parts))
        articles = list(index.articles())
        assert [a.pmcid + "." for a in articles] == sorted({a.pmcid + "." for a in articles})
        assert all(ref.pmcid == article.pmcid for article in articles for ref in article.refs)
        assert all([r.row for r in a.refs] == sorted(r.row for r in a.refs) for a in articles)
        seen += [ref.row for article in articles for ref in article.refs] + [bad.row for bad in index.bad_rows()]
    assert sorted(seen) == list(range(len(rows)))
