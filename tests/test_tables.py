"""Tables in pages, with filters, search and pictures; what is broken is named."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image as Picture
from sample_factory import hundred_samples

from medvlm.errors import InputError, WorkspaceError
from medvlm.records import (
    Sample,
    schema_of,
)
from medvlm.results import Results, thumbnail
from medvlm.store import Workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return hundred_samples(tmp_path)


def test_pages_follow_the_order_of_the_files_and_bring_each_row_its_own_image(workspace: Workspace) -> None:
    source = Results(workspace.root).source("instruct")
    assert source is not None and source.rows == 100
    seen = []
    for offset in range(0, 100, 30):
        page = source.page(offset=offset, limit=30)
        assert page.total == 100
        seen += page.rows
    assert [row["sample_id"] for row in seen] == [f"s{n:06d}" for n in range(100)]
    assert all(row["image"]["bytes"] == b"bytes of image %d" % n for n, row in enumerate(seen))


def test_filters_and_search_meet(workspace: Workspace) -> None:
    source = Results(workspace.root).source("instruct")
    assert source is not None
    page = source.page(where={"modality": ["mri"]}, search="finding 9")
    assert [row["sample_id"] for row in page.rows] == ["s000009", "s000091", "s000093", "s000095", "s000097", "s000099"]
    assert source.page(where={"modality": []}).total == 100
    facets = source.profile().facets
    assert set(facets) == set(source.facets)
    assert facets["modality"].to_dict("list") == {"value": ["ct", "mri"], "rows": [50, 50]}


@pytest.mark.parametrize("search", ["'", '"; DROP TABLE rows; --', "%", "\\", "$search", "𝄞"])
def test_a_search_is_a_value_and_never_part_of_the_query(workspace: Workspace, search: str) -> None:
    source = Results(workspace.root).source("instruct")
    assert source is not None
    assert source.page(search=search).total == 0


def test_only_facets_can_be_chosen(workspace: Workspace) -> None:
    source = Results(workspace.root).source("instruct")
    assert source is not None
    with pytest.raises(ValueError, match="is not one of"):
        source.page(where={"1=1) --": ["x"]})


def test_a_drawn_order_is_the_same_for_everyone_with_the_seed(workspace: Workspace) -> None:
    source = Results(workspace.root).source("instruct")
    assert source is not None
    assert source.ids(seed=1) == source.ids(seed=1) != source.ids(seed=2)
    assert sorted(source.ids(seed=1)) == [f"s{n:06d}" for n in range(100)]
    assert set(source.by_id(["s000003", "s000077", "none"])) == {"s000003", "s000077"}


def test_text_lengths_count_every_row_once(workspace: Workspace) -> None:
    source = Results(workspace.root).source("instruct")
    assert source is not None
    lengths = source.profile().lengths
    assert lengths["rows"].sum() == 100
    assert lengths["characters"].is_monotonic_increasing


def test_a_damaged_shard_is_named_with_the_next_step(workspace: Workspace) -> None:
    shard = sorted(workspace.samples("instruct").glob("*.parquet"))[0]
    data = shard.read_bytes()
    shard.write_bytes(data[: len(data) // 2])
    with pytest.raises(WorkspaceError, match="cannot be read") as caught:
        Results(workspace.root).sources()
    assert "dvc checkout" in caught.value.hint


def test_a_shard_of_another_version_is_an_error_and_not_a_crash(workspace: Workspace) -> None:
    folder = workspace.samples("other")
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"sample_id": ["a"], "mood": ["good"]}), folder / "part-00000.parquet")
    source = Results(workspace.root).source("other")
    assert source is not None
    with pytest.raises(WorkspaceError, match="cannot be read"):
        source.profile()


def test_thumbnails_fit_and_keep_16_bit_greys() -> None:
    out = io.BytesIO()
    Picture.fromarray(np.linspace(0, 65535, 600 * 300, dtype=np.uint16).reshape(300, 600)).save(out, "PNG")
    small = Picture.open(io.BytesIO(thumbnail(out.getvalue(), max_px=100)))
    assert small.size == (100, 50)
    low, high = small.convert("L").getextrema()
    assert low < 10 and high > 245
    assert 120 < np.asarray(small.convert("L")).mean() < 135


@pytest.mark.parametrize(
    "data", [b"", b"<svg xmlns='http://www.w3.org/2000/svg'><script>1</script></svg>", b"\x89PNG\r\n"]
)
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(InputError):
        thumbnail(data)


def test_a_600_000_row_dataset_opens_at_a_page_in_its_middle(tmp_path: Path) -> None:
    """Opening is all that the Data page does: the sources, the facets, the lengths and a page from the middle."""
    workspace, rows, shards = Workspace(tmp_path), 600_000, 6
    folder = workspace.samples("alignment")
    folder.mkdir(parents=True)
    schema = schema_of(Sample)
    for shard in range(shards):
        ids = np.arange(shard * rows // shards, (shard + 1) * rows // shards)
        words = pa.array([f"A chest radiograph with a finding, number {n}." for n in ids])
        n, text = len(ids), pa.string()
        turn = pa.StructArray.from_arrays(
            [pa.array(["assistant"] * n, text), words], fields=list(schema.field("turns").type.value_type)
        )
        image = pa.StructArray.from_arrays(
            [pa.array([b""] * n, pa.binary()), pa.array([""] * n, text)], fields=list(schema.field("image").type)
        )
        columns = {name: pa.array([name] * n, text) for name in schema.names}
        columns |= {
            "sample_id": pa.array([f"s{i:07d}" for i in ids]),
            "image": image,
            "turns": pa.ListArray.from_arrays(pa.array(np.arange(n + 1, dtype=np.int32)), turn).cast(
                schema.field("turns").type
            ),
        }
        table = pa.Table.from_arrays([columns[name] for name in schema.names], schema=schema)
        pq.write_table(table, folder / f"part-{shard:05d}.parquet", compression="zstd", row_group_size=20_000)
    results = Results(tmp_path)
    results.stamp()
    source = results.source("alignment")
    assert source is not None and source.rows == rows
    profile = source.profile()
    page = source.page(offset=300_000, limit=12)
    assert page.rows[0]["sample_id"] == "s0300000"
    assert profile.lengths["rows"].sum() == rows
    assert all(facet["rows"].sum() == rows for facet in profile.facets.values())
    assert source.page(search="number 599999.").rows[0]["sample_id"] == "s0599999"


def test_a_zoomed_thumbnail_shows_the_part_that_was_asked_for() -> None:
    picture = Picture.new("L", (400, 200), 0)
    picture.paste(255, (300, 100, 400, 200))  # the lower right corner is white
    out = io.BytesIO()
    picture.save(out, "PNG")

    def mean(**where: object) -> float:
        shown = Picture.open(io.BytesIO(thumbnail(out.getvalue(), max_px=64, **where))).convert("L")
        assert max(shown.size) == 64
        return float(np.asarray(shown).mean())

    assert mean(zoom=4, centre=(1.0, 1.0)) > 250
    assert mean(zoom=4, centre=(0.0, 0.0)) < 5
    assert mean(zoom=1) == pytest.approx(255 / 8, abs=3)
    assert mean(zoom=500, centre=(0.99, 0.99)) > 250  # never less than a pixel
