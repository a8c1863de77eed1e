"""The further published sources: their shapes, their quirks, and what broken files get."""

from __future__ import annotations

import csv
import io
import json
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from figure_factory import figure, jpeg, workspace_with
from hypothesis import given
from hypothesis import strategies as st

from medvlm.data.alignment import build_alignment
from medvlm.data.benchmarks import build_benchmark, finetune_samples, read_benchmark
from medvlm.data.readers.chimed import read_chimed
from medvlm.data.readers.llava_med import Conversation
from medvlm.data.readers.plain_pickle import read_plain_pickle
from medvlm.data.readers.pmc_vqa import read_pmc_vqa
from medvlm.data.readers.source import Dropped
from medvlm.data.readers.stllava_dpo import PreferenceText, read_preferences
from medvlm.errors import InputError
from medvlm.records import Sample
from medvlm.store import Workspace, read_records

# --- data_RAD ---------------------------------------------------------------------------------


def test_data_rad_has_its_own_train_rows_and_the_official_test_ids(real_data: Path) -> None:
    items = list(read_benchmark("data-rad", real_data / "vqa-rad"))
    assert Counter((item.split, item.answer_type) for item in items) == {
        ("train", "closed"): 1823,
        ("train", "open"): 1241,
        ("test", "closed"): 272,
        ("test", "open"): 179,
    }
    official = {item.item_id: item for item in read_benchmark("vqa-rad", real_data / "vqa-rad", images=False)}
    test = [item for item in items if item.split == "test"]
    assert {item.item_id for item in test} == {item.item_id for item in official.values() if item.split == "test"}
    assert all(official[item.item_id].answer_type == item.answer_type for item in test)
    assert len({item.image_id for item in items if item.split == "train"}) == 314


# --- hub Parquet ------------------------------------------------------------------------------


def hub_file(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", image), ("question", pa.string()), ("answer", pa.string())])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return path


def hub_row(shade: int, question: str, answer: str) -> dict[str, Any]:
    return {"image": {"bytes": jpeg(shade), "path": None}, "question": question, "answer": answer}


@pytest.mark.parametrize("name", ["vqa-rad", "pathvqa"])
def test_hub_parquet_gives_derived_answer_types_and_images(tmp_path: Path, name: str) -> None:
    hub_file(tmp_path / "data" / "train-00000-of-00001-ab.parquet", [hub_row(1, "Is it?", "Yes"), hub_row(1, "Q", "")])
    hub_file(tmp_path / "data" / "test-00000-of-00001.parquet", [hub_row(2, "Where?", "left")])
    report = build_benchmark(Workspace(tmp_path / "w"), name, tmp_path)
    assert report.counts == {
        "items": 2, "dropped": 1, "test": 1, "train": 1, "test_open": 1, "train_closed": 1
    }  # fmt: skip
    test, train = read_benchmark(name, tmp_path)
    assert (test.item_id, train.item_id) == ("test-0-0", "train-0-0")
    assert train.answer_type_derived
    assert train.image.bytes == jpeg(1)
    assert len(train.image_phash) == 16
    (bare, _) = read_benchmark(name, tmp_path, images=False)
    assert bare.image.bytes == b""


def test_parquet_with_another_schema_is_one_error(tmp_path: Path) -> None:
    path = tmp_path / "train-0.parquet"
    pq.write_table(pa.table({"picture": [b""], "question": ["Q"], "answer": ["A"]}), path)
    with pytest.raises(InputError, match="the columns are picture, question, answer"):
        list(read_benchmark("vqa-rad", tmp_path))
    pq.write_table(pa.table({"image": [b""], "question": ["Q"], "answer": ["A"]}), path)
    with pytest.raises(InputError, match="the column 'image' is binary"):
        list(read_benchmark("vqa-rad", tmp_path))
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(InputError, match="no Parquet file"):
        list(read_benchmark("vqa-rad", tmp_path))
    path.rename(tmp_path / "part-0.parquet")
    with pytest.raises(InputError, match=r"part-0\.parquet"):
        list(read_benchmark("vqa-rad", tmp_path))


# --- pickles ----------------------------------------------------------------------------------


class Trap:
    sprung = False

    def __reduce__(self) -> Any:
        return (setattr, (Trap, "sprung", True))


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_asks_for_code_is_refused_unopened(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "test_vqa.pkl"
    path.write_bytes(pickle.dumps([{"image": "test_1", "question": Trap()}], protocol=protocol))
    with pytest.raises(InputError, match=r"it names .*setattr"):
        list(read_benchmark("pathvqa", path))
    assert not Trap.sprung


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=8,
    ),
    st.integers(1, 5),
)
def test_plain_pickles_are_read_as_pickle_reads_them(
    tmp_path_factory: pytest.TempPathFactory, value: Any, protocol: int
) -> None:
    path = tmp_path_factory.mktemp("pickle") / "a.pkl"
    # bytes at protocol below 3 need a codec function, which is refused.
    path.write_bytes(pickle.dumps(value, protocol=max(protocol, 3)))
    assert read_plain_pickle(path) == value


@given(st.binary(max_size=60))
def test_no_bytes_make_the_pickle_reader_fail_otherwise(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("pickle") / "a.pkl"
    path.write_bytes(data)
    try:
        read_plain_pickle(path)
    except InputError as error:
        assert "plain data" in error.what


def test_pathvqa_pickles_of_one_row_a_question_are_read(tmp_path: Path) -> None:
    rows = [
        {"image": "test_0001", "question": "Is it benign?", "answer": "yes", "question_type": "yes/no"},
        {"image": "test_0001", "question": "Where is it?", "answer": "liver"},
        {"image": "val_0002", "question": "What is it?", "answer": "skin"},
    ]
    (tmp_path / "test_vqa.pkl").write_bytes(pickle.dumps(rows))
    items = list(read_benchmark("pathvqa", tmp_path, images=False))
    assert [(item.item_id, item.split, item.answer_type, item.question_type) for item in items] == [
        ("test_0001_0", "test", "closed", "yes/no"),
        ("test_0001_1", "test", "open", "where"),
        ("val_0002_0", "validation", "open", "other"),
    ]


# --- PMC-VQA ----------------------------------------------------------------------------------

SECOND = [
    "index",
    "Figure_path",
    "Caption",
    "Question",
    "Choice A",
    "Choice B",
    "Choice C",
    "Choice D",
    "Answer",
    "split",
]
FIRST = ["Figure_path", "Question", "Answer", "Choice A", "Choice B", "Choice C", "Choice D", "Answer_label"]


def csv_file(path: Path, *rows: list[str], encoding: str = "utf-8") -> Path:
    buffer = io.StringIO()
    csv.writer(buffer).writerows(rows)
    path.write_bytes(buffer.getvalue().encode(encoding))
    return path


def test_both_versions_of_pmc_vqa_give_the_right_choice_as_text(tmp_path: Path) -> None:
    (tmp_path / "images_2").mkdir()
    (tmp_path / "images_2" / "PMC1_Fig1_2.jpg").write_bytes(jpeg(5))
    row = [
        "0",
        "PMC1_Fig1_2.jpg",
        "A caption,\nin two lines",
        "Which plane?",
        " A:Axial ",
        "B: Sagittal",
        "C:x",
        "D:y",
        "B",
        "test",
    ]
    csv_file(tmp_path / "test_2.csv", SECOND, row)
    csv_file(tmp_path / "test.csv", FIRST, ["a.jpg", "Q", "x", "A: x", "B: y", "C: z", "D: w", "A"])
    (item,) = read_benchmark("pmc-vqa", tmp_path)
    assert (item.answer, item.split, item.item_id, item.image.bytes) == ("Sagittal", "test", "test_2-0", jpeg(5))
    (item,) = read_benchmark("pmc-vqa", tmp_path / "test.csv")
    assert item.answer == "x"


@pytest.mark.parametrize(
    ("row", "message", "line"),
    [
        (["0", "a.jpg", "c", "Q", "A:1", "B:2", "C:3", "D:4", "A"], "the row has 9 fields", "line 3"),
        (["a.jpg", "c", "Q", "A:1", "B:2", "C:3", "D:4", "A", "test", "0"], "'Figure_path' is 'c'", "line 3"),
        (["0", "a.jpg", "c", "Q", "A:1", "B:2", "C:3", "D:4", "test", "A"], "'Answer' is 'test'", "line 3"),
    ],
)
def test_a_shifted_column_is_one_error_that_names_the_line(
    tmp_path: Path, row: list[str], message: str, line: str
) -> None:
    good = ["0", "a.jpg", "c", "Q", "A:1", "B:2", "C:3", "D:4", "A", "test"]
    with pytest.raises(InputError, match=message) as error:
        list(read_pmc_vqa(csv_file(tmp_path / "test_2.csv", SECOND, good, row)))
    assert line in error.value.where


def test_pmc_vqa_with_other_columns_or_encoding_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the columns are a, b"):
        list(read_pmc_vqa(csv_file(tmp_path / "train.csv", ["a", "b"])))
    with pytest.raises(InputError, match="not UTF-8"):
        list(read_pmc_vqa(csv_file(tmp_path / "train.csv", SECOND, ["é"] * 10, encoding="latin1")))
    with pytest.raises(InputError, match="not CSV"):
        list(read_pmc_vqa(_write(tmp_path / "train.csv", ",".join(SECOND) + '\n0,"a.jpg')))
    with pytest.raises(InputError, match="does not exist"):
        list(read_benchmark("pmc-vqa", tmp_path / "absent.csv" / "test.csv"))


def _write(path: Path, text: str) -> Path:
    path.write_text(text, "utf-8")
    return path


# --- ChiMed-VL and STLLaVA-Med-DPO ------------------------------------------------------------


def test_chimed_rows_of_every_shape_join_by_the_panel_name(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"image": "PMC1_Fig1_2.jpg", "caption": "胸部X光片显示结节。"},
        {"image": "PMC1_Fig2_1.jpg", "question": "这是什么?", "answer": "肝脏切片。"},
        {"id": "3", "image": "images/PMC1_Fig3_1.jpg", "conversations": [
            {"from": "human", "value": "<image>\n描述"}, {"from": "gpt", "value": "肾脏。"}]},
        {"image": "PMC1_Fig4_1.jpg", "caption": " "},
    ]  # fmt: skip
    path = _write(
        tmp_path / "ChiMed-VL-Alignment.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    )
    *read, empty = read_chimed(path)
    assert isinstance(empty, Dropped)
    assert [row.pair_id for row in read if isinstance(row, Conversation)] == [
        "PMC1_Fig1_2", "PMC1_Fig2_1", "PMC1_Fig3_1"
    ]  # fmt: skip
    array = _write(tmp_path / "ChiMed-VL-Instruction.json", json.dumps(rows[1:3]))
    assert [row.turns for row in read_chimed(array) if isinstance(row, Conversation)] == [
        row.turns for row in read[1:] if isinstance(row, Conversation)
    ]
    workspace = workspace_with(tmp_path / "w", figure(1, figure_id="PMC1_Fig1_2"))
    build_alignment(workspace, official=path)
    (sample,) = read_records(workspace.samples("alignment"), Sample)
    assert (sample.language, sample.turns[1].text) == ("zh", "胸部X光片显示结节。")


def test_chimed_with_unknown_keys_or_a_cut_line_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.jsonl", '{"image": "PMC1_Fig1_2.jpg", "texte": "x"}')
    with pytest.raises(InputError, match="the keys are image, texte"):
        list(read_chimed(path))
    path = _write(tmp_path / "a.jsonl", '\n{"image": "PMC1_Fig1_2.jpg", "caption": "x"}\n{"image": "PM')
    with pytest.raises(InputError, match="not JSON") as error:
        list(read_chimed(path))
    assert "line 3" in error.value.where


def preference(chosen: str, rejected: str, question: str = "<image>\nQ") -> dict[str, Any]:
    def turns(question: str, answer: str) -> list[dict[str, str]]:
        return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]

    return {
        "image": "10_F1.jpg",
        "chosen_conversations": turns("<image>\nQ", chosen),
        "reject_conversations": turns(question, rejected),
    }


def test_preferences_are_the_rounds_that_differ(tmp_path: Path) -> None:
    rows = [preference("A", "B"), preference("A", "A"), preference("A", "B", "<image>\nOther")]
    path = _write(tmp_path / "dpo.json", json.dumps(rows))
    pair, equal, other = read_preferences(path)
    assert pair == PreferenceText("10_F1", "Q", "A", "B")
    assert [row.reason for row in (equal, other) if isinstance(row, Dropped)] == ["answers_equal", "questions_differ"]
    misspelt = {**preference("A", "B"), "rejected_conversations": []}
    del misspelt["reject_conversations"]
    with pytest.raises(InputError, match="'reject_conversations' is None; the keys are chosen_conversations"):
        list(read_preferences(_write(path, json.dumps([misspelt]))))


# --- MedMNIST ---------------------------------------------------------------------------------


def npz(path: Path, **changed: Any) -> Path:
    arrays: dict[str, Any] = {}
    for part, count in {"train": 3, "val": 1, "test": 2}.items():
        arrays[f"{part}_images"] = np.arange(count * 28 * 28, dtype=np.uint8).reshape(count, 28, 28)
        arrays[f"{part}_labels"] = np.arange(count).reshape(count, 1) % 2
    np.savez(path, **(arrays | changed))
    return path


def test_medmnist_becomes_classification_questions_with_modality(tmp_path: Path) -> None:
    npz(tmp_path / "pneumoniamnist.npz")
    npz(tmp_path / "pneumoniamnist_64.npz", train_images=np.zeros(3))
    report = build_benchmark(Workspace(tmp_path / "w"), "pneumoniamnist", tmp_path)
    assert report.details["by"]["modality"] == {"chest_xray": 6}
    items = list(read_benchmark("pneumoniamnist", tmp_path))
    assert [item.answer for item in items if item.split == "train"] == ["normal", "pneumonia", "normal"]
    assert len(list(finetune_samples(items))) == 3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"val_images": np.zeros((1, 28, 28))}, "val_images is float64"),
        ({"val_labels": np.zeros((2, 1), dtype=np.uint8)}, "with 2 labels"),
        ({"train_labels": np.array([Trap(), Trap(), Trap()], dtype=object)}, "no MedMNIST archive"),
    ],
)
def test_medmnist_with_other_arrays_or_objects_is_refused(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        list(read_benchmark("pathmnist", npz(tmp_path / "pathmnist.npz", **changed).parent))
    assert not Trap.sprung


def test_a_label_without_a_name_is_dropped_and_a_broken_archive_refused(tmp_path: Path) -> None:
    labels = np.array([[0], [1], [7]])
    items = list(read_benchmark("pneumoniamnist", npz(tmp_path / "pneumoniamnist.npz", train_labels=labels).parent))
    assert sum(item.split == "train" for item in items) == 2
    (tmp_path / "pneumoniamnist.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(InputError, match="no MedMNIST archive"):
        list(read_benchmark("pneumoniamnist", tmp_path))
