"""The store: atomic writes, shards, reports and errors that name the next step."""

from __future__ import annotations

import errno
import os
import pickle
import time
from dataclasses import dataclass
from pathlib import Path

import duckdb
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medvlm.errors import InputError, MedVLMError, WorkspaceError
from medvlm.records import Image, Sample, Turn, schema_of
from medvlm.store import (
    Report,
    Workspace,
    atomic_folder,
    atomic_path,
    fingerprint,
    read_json,
    read_records,
    read_report,
    write_json,
    write_records,
    write_report,
)


def sample(name: str, image: bytes = b"bytes") -> Sample:
    return Sample(
        sample_id=name,
        dataset="alignment",
        image=Image(image, f"{name}.jpg"),
        image_sha256="0" * 64,
        image_phash="0" * 16,
        group_id="PMC1",
        turns=(Turn("user", "What is this?\n<image>"), Turn("assistant", "肺 & lung")),
        modality="ct",
        language="en",
        licence="CC BY",
        source="caption",
    )


def test_records_come_back_as_they_went(tmp_path: Path) -> None:
    records = [sample(f"s{i}") for i in range(10)]
    assert write_records(tmp_path / "out", Sample, records) == 10
    assert read_records(tmp_path / "out", Sample) == records


def test_large_sets_are_cut_into_shards_in_order(tmp_path: Path) -> None:
    records = [sample(f"s{i:03d}", bytes(1024)) for i in range(40)]
    write_records(tmp_path / "out", Sample, records, shard_bytes=1)
    assert len(list((tmp_path / "out").iterdir())) == 1, "one row group is the least a shard holds"
    import medvlm.shards as shards

    old, shards.ROW_GROUP_BYTES = shards.ROW_GROUP_BYTES, 4096
    try:
        write_records(tmp_path / "out", Sample, records, shard_bytes=8192)
    finally:
        shards.ROW_GROUP_BYTES = old
    assert len(list((tmp_path / "out").iterdir())) > 3
    assert read_records(tmp_path / "out", Sample) == records


def test_no_records_is_an_empty_table_with_its_columns(tmp_path: Path) -> None:
    write_records(tmp_path / "out", Sample, [])
    assert read_records(tmp_path / "out", Sample) == []
    (columns,) = duckdb.connect().execute(f"select count(*) from (describe from '{tmp_path}/out/*.parquet')").fetchone()
    assert columns == len(schema_of(Sample))


def test_duckdb_opens_images_as_they_are(tmp_path: Path) -> None:
    write_records(tmp_path / "out", Sample, [sample("a", b"xyz")])
    query = f"select image.bytes, image.path, turns[2].text from '{tmp_path}/out/*.parquet'"
    assert duckdb.connect().execute(query).fetchone() == (b"xyz", "a.jpg", "肺 & lung")


def test_a_failed_write_leaves_the_old_content_and_nothing_else(tmp_path: Path) -> None:
    write_records(tmp_path / "out", Sample, [sample("old")])

    def dies() -> object:
        yield sample("new")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_records(tmp_path / "out", Sample, dies())
    assert [r.sample_id for r in read_records(tmp_path / "out", Sample)] == ["old"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_half_written_shard_is_not_read(tmp_path: Path) -> None:
    write_records(tmp_path / "out", Sample, [sample("a")])
    (tmp_path / "out" / ".tmp-123-part-00001.parquet.partial").write_bytes(b"PAR1 half")
    assert len(read_records(tmp_path / "out", Sample)) == 1
    shard = tmp_path / "out" / "part-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-20])
    with pytest.raises(WorkspaceError, match=r"part-00000\.parquet"):
        read_records(tmp_path / "out", Sample)


def test_a_step_that_has_not_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError, match="dvc repro"):
        read_records(tmp_path / "nothing", Sample)


@pytest.mark.parametrize(("code", "words"), [(errno.ENOSPC, "disk is full"), (errno.EROFS, "cannot be written")])
def test_a_full_or_read_only_disk_is_one_clear_error(tmp_path: Path, code: int, words: str) -> None:
    with pytest.raises(WorkspaceError, match=words), atomic_path(tmp_path / "file"):
        raise OSError(code, os.strerror(code))
    with pytest.raises(WorkspaceError, match=words), atomic_folder(tmp_path / "folder"):
        raise OSError(code, os.strerror(code))
    assert list(tmp_path.iterdir()) == []


def test_a_workspace_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WorkspaceError, match="--workspace"):
        Workspace(tmp_path / "file" / "ws").ensure()


def test_reports_carry_versions_and_duration(tmp_path: Path) -> None:
    started = time.monotonic()
    written = write_report(tmp_path, Report("figures", counts={"rows": 3}), started=started)
    assert read_report(tmp_path) == written
    assert written.versions.keys() == {"medvlm", "pyarrow"}
    assert written.created_at
    assert read_report(tmp_path / "nowhere") is None


def test_json_errors_name_the_line(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text('{"a": 1,\n "b": }')
    with pytest.raises(InputError, match="line 2, column 7"):
        read_json(tmp_path / "bad.json")
    (tmp_path / "latin.json").write_bytes('"é"'.encode("latin1"))
    with pytest.raises(InputError, match="0xe9"):
        read_json(tmp_path / "latin.json")
    with pytest.raises(InputError, match="does not exist"):
        read_json(tmp_path / "none.json")
    (tmp_path / "bom.json").write_bytes(b"\xef\xbb\xbf[1]")
    assert read_json(tmp_path / "bom.json") == [1]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(json_values)
def test_fingerprint_follows_content(value: object) -> None:
    assert fingerprint(value) == fingerprint(value)
    assert fingerprint(value) != fingerprint([value, 0])


def test_fingerprint_of_a_file_is_its_content(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    write_json(a, {"x": 1})
    write_json(b, {"x": 1})
    assert fingerprint(a) == fingerprint(b)
    write_json(b, {"x": 2})
    assert fingerprint(a) != fingerprint(b)


def test_errors_survive_the_way_between_processes() -> None:
    error = WorkspaceError("what", where="here", hint="do that")
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, WorkspaceError)
    assert str(again) == str(error) == "what\n  where: here\n  next:  do that"


def test_the_error_tree_drawn_in_the_docstring_is_the_tree() -> None:
    import medvlm.errors as errors

    classes = {k: v for k, v in vars(errors).items() if isinstance(v, type)}
    assert sorted(classes) == errors.__all__
    for name, kind in classes.items():
        assert name in (errors.__doc__ or "")
        assert issubclass(kind, MedVLMError)


@dataclass(frozen=True)
class Odd:
    value: complex


def test_a_record_of_an_unknown_type_is_refused() -> None:
    with pytest.raises(TypeError, match="complex"):
        schema_of(Odd)


def test_what_people_decide_is_there_before_anybody_decides(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "ws").ensure()
    assert workspace.review_decisions.read_bytes() == b""
    assert list(workspace.review_preferences.iterdir()) == []
    workspace.review_decisions.write_text("a decision")
    assert workspace.ensure().review_decisions.read_text() == "a decision"
