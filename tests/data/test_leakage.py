"""Leakage: what is known of the real releases is found, and each way of touching is told apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from medvlm.cli import cli
from medvlm.data.leakage import (
    ImagesUnderTest,
    LeakedItem,
    compare,
    compare_releases,
    compare_workspace,
    leaked_images,
    leaked_item_ids,
)
from medvlm.data.traces import Traces, normalise_question
from medvlm.errors import InputError, WorkspaceError
from medvlm.records import Image, PreferencePair, Sample, Turn, VQAItem
from medvlm.store import Workspace, read_records, read_report, write_records


def item(
    name: str, split: str, image: str, *, question: str = "What is it?", benchmark: str = "vqa-rad", **other: Any
) -> VQAItem:
    values: dict[str, Any] = {
        "item_id": name,
        "benchmark": benchmark,
        "split": split,
        "image": Image(b"", image),
        "image_id": image,
        "image_sha256": f"{image:0>64}",
        "image_phash": f"{hash_of(image):016x}",
        "question": question,
        "answer": "yes",
        "answer_type": "closed",
        "answer_type_derived": False,
        "question_type": "",
        "modality": "ct",
        "organ": "",
        "language": "en",
    }
    return VQAItem(**values | other)


def hash_of(image: str) -> int:
    """A perceptual hash far from those of other images."""
    import hashlib

    return int(hashlib.sha256(image.encode()).hexdigest()[:16], 16)


def sample(name: str, image: str, group: str, question: str = "Describe it.") -> Sample:
    return Sample(
        sample_id=name,
        dataset="alignment",
        image=Image(b"", image),
        image_sha256=f"{image:0>64}",
        image_phash=f"{hash_of(image):016x}",
        group_id=group,
        turns=(Turn("user", f"{question}\n<image>"), Turn("assistant", "What is it?")),
        modality="ct",
        language="en",
        licence="CC BY",
        source="caption",
    )


def build(root: Path, items: dict[str, list[VQAItem]], samples: list[Sample] | None = None) -> Workspace:
    workspace = Workspace(root)
    for name, rows in items.items():
        write_records(workspace.items(name), VQAItem, rows)
    if samples is not None:
        write_records(workspace.samples("alignment"), Sample, samples)
    return workspace


def rows_of(workspace: Workspace) -> set[tuple[str, str, str]]:
    compare_workspace(workspace)
    return {(row.item_id, row.training_set, row.way) for row in read_records(workspace.leaked_items, LeakedItem)}


@pytest.mark.parametrize(
    ("train", "test", "images", "leaked"),
    [
        ("slake:train:en", "slake:test:zh", 96, 70),
        ("slake:train:zh", "slake:test:en", 96, 72),
        ("slake:train", "slake:test:en", 96, 0),
    ],
)
def test_what_is_known_of_the_real_releases(real_data: Path, train: str, test: str, images: int, leaked: int) -> None:
    found = compare_releases(train, test, real_data)
    assert (found.test_images, found.leaked_images) == (images, leaked)
    assert found.ways["bytes"]["images"] == found.ways["image_id"]["images"] == leaked
    assert found.leaked_items + found.clean_items == found.test_items


def test_the_command_prints_one_object_for_a_release_folder(real_data: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        cli,
        [
            *("--workspace", str(tmp_path), "leakage", "--train", "vqa-rad:train", "--test", "vqa-rad:test"),
            *("--root", str(real_data / "vqa-rad"), "--json"),
        ],
        catch_exceptions=False,
    )
    printed = json.loads(result.stdout)
    assert (printed["test_images"], printed["leaked_images"]) == (203, 202)
    assert (printed["test_items"], printed["clean_items"]) == (451, 5)
    assert list(tmp_path.iterdir()) == []


def test_each_way_is_told_apart(tmp_path: Path) -> None:
    near = f"{hash_of('d.png') ^ 0b101:016x}"
    far = f"{hash_of('e.png') ^ 0b11111:016x}"
    test = [
        item("same", "test", "a.png", question="Where is the liver?"),
        item("renamed", "test", "z.png", image_sha256=f"{'b.png':0>64}", question="q2"),
        item("rewritten", "test", "c.png", image_sha256="1" * 64, image_phash="0" * 16, question="q3"),
        item("near", "test", "y.png", image_phash=near, question="q4"),
        item("far", "test", "x.png", image_phash=far, question="q5"),
        item("asked", "test", "w.png", question="IS it, large"),
        item("clean", "test", "v.png", question="q7"),
    ]
    train = [item(f"t{name}", "train", f"{name}.png", question="Is it large?") for name in "abcde"]
    workspace = build(tmp_path, {"vqa-rad": [*test, *train]})
    assert rows_of(workspace) == {
        ("same", "vqa-rad:train", "bytes"),
        ("same", "vqa-rad:train", "image_id"),
        ("same", "vqa-rad:train", "phash"),
        ("renamed", "vqa-rad:train", "bytes"),
        ("rewritten", "vqa-rad:train", "image_id"),
        ("near", "vqa-rad:train", "phash"),
        ("asked", "vqa-rad:train", "question"),
    }
    (row,) = (row for row in read_records(workspace.leaked_items, LeakedItem) if row.item_id == "near")
    assert row == LeakedItem("vqa-rad", "near", "y.png", "vqa-rad:train", "phash", "td", 2)
    report = read_report(workspace.leakage)
    assert report is not None
    assert report.counts == {"test_items": 7, "leaked_items": 3, "touched_items": 5, "comparisons": 1}
    (comparison,) = report.details["comparisons"]
    assert (comparison["leaked_images"], comparison["near_images"], comparison["clean_items"]) == (3, 1, 4)
    assert comparison["examples"] == ["a.png", "c.png", "z.png"]
    assert leaked_item_ids(workspace, "vqa-rad") == {"vqa-rad:train": {"same", "renamed", "rewritten"}}
    near_too = leaked_item_ids(workspace, "vqa-rad", ways=("phash",), radius=5)
    assert near_too == {"vqa-rad:train": {"same", "near", "far"}}


def test_articles_and_conversations_are_compared_with_benchmarks(tmp_path: Path) -> None:
    items = [
        item("article", "test", "PMC7_F2.jpg", benchmark="pmc-vqa", question="Is it so?"),
        item("asked", "test", "PMC8_F1.jpg", benchmark="pmc-vqa", question="Describe it"),
        item("answer", "test", "PMC9_F1.jpg", benchmark="pmc-vqa", question="What is it?"),
    ]
    workspace = build(tmp_path, {"pmc-vqa": items}, [sample("s1", "a.jpg", "PMC7"), sample("s2", "b.jpg", "PMC77")])
    # An assistant's turn asks nothing.
    assert rows_of(workspace) == {("article", "alignment", "case_id"), ("asked", "alignment", "question")}
    assert leaked_item_ids(workspace, "pmc-vqa") == {"alignment": set()}


def test_image_names_are_compared_within_a_release_only(tmp_path: Path) -> None:
    tests = [item("s", "test", "1", benchmark="slake-zh", image_sha256="1" * 64, image_phash="0" * 16, question="甲?")]
    trains = {
        "slake": [item("a", "train", "1", benchmark="slake")],
        "pathvqa": [item("b", "train", "1", benchmark="pathvqa")],
    }
    workspace = build(tmp_path, {"slake-zh": tests, **trains})
    assert rows_of(workspace) == {("s", "slake:train", "image_id")}


def test_preference_pairs_are_training_data(tmp_path: Path) -> None:
    workspace = build(tmp_path, {"vqa-rad": [item("q", "test", "a.png", question="Is it?")]})
    pair = PreferencePair(
        pair_id="p",
        image=Image(b"", "a.png"),
        image_sha256=f"{'a.png':0>64}",
        image_phash="0" * 16,
        group_id="PMC1",
        question="Is it?",
        chosen="yes",
        rejected="no",
        source="chat",
    )
    write_records(workspace.preference_pairs("tiny"), PreferencePair, [pair])
    assert rows_of(workspace) == {("q", "preference/tiny", "bytes"), ("q", "preference/tiny", "question")}


def test_what_builders_drop(tmp_path: Path) -> None:
    workspace = build(tmp_path, {"vqa-rad": [item("q", "test", "a.png"), item("t", "train", "b.png")]})
    tested = ImagesUnderTest(workspace)
    far = f"{hash_of('elsewhere'):016x}"
    assert tested.touched(f"{'a.png':0>64}", far) == ("vqa-rad", "leaked")
    assert tested.touched("1" * 64, f"{hash_of('a.png') ^ 0b1111:016x}") == ("vqa-rad", "leaked_near")
    assert tested.touched("1" * 64, f"{hash_of('a.png') ^ 0b11111:016x}") is None
    assert tested.touched(f"{'b.png':0>64}", f"{hash_of('b.png'):016x}") is None
    assert ImagesUnderTest(Workspace(tmp_path / "empty")).touched(f"{'a.png':0>64}", far) is None
    with pytest.raises(InputError, match="16 hex digits"):
        tested.touched("1" * 64, "abc")


def test_what_training_finds_in_shards(tmp_path: Path) -> None:
    tests = [item("q", "test", "a.png")]
    near = item("n", "train", "n.png", image_phash=f"{hash_of('a.png') ^ 1:016x}")
    trains = [item("t", "train", "b.png"), item("s", "train", "a.png"), near]
    workspace = build(tmp_path, {"vqa-rad": tests, "slake": trains})
    assert leaked_images(workspace, [workspace.items("slake")]) == {f"{'a.png':0>64}", f"{'n.png':0>64}"}


def test_pictures_of_one_patient_touch(tmp_path: Path) -> None:
    case = "https://medpix.nlm.nih.gov/case?id=1"
    rows = [item("q", "test", "a.png", case_id=case), item("t", "train", "b.png", case_id=case, question="Is it?")]
    workspace = build(tmp_path, {"vqa-rad": [*rows, item("u", "train", "c.png", question="Or?")]})
    assert rows_of(workspace) == {("q", "vqa-rad:train", "case_id")}
    assert leaked_item_ids(workspace, "vqa-rad") == {"vqa-rad:train": set()}


def test_cases_of_the_real_releases_are_in_the_workspace_too(real_data: Path, tmp_path: Path) -> None:
    from medvlm.data.benchmarks import build_benchmark

    workspace = Workspace(tmp_path)
    build_benchmark(workspace, "vqa-rad", real_data / "vqa-rad")
    compare_workspace(workspace)
    report = read_report(workspace.leakage)
    assert report is not None
    (found,) = (row for row in report.details["comparisons"] if row["train"] == "vqa-rad:train")
    assert (found["test_images"], found["leaked_images"]) == (203, 202)
    assert found["ways"]["case_id"]["images"] == 201


def test_the_table_is_the_same_twice(tmp_path: Path) -> None:
    workspace = build(tmp_path, {"vqa-rad": [item("q", "test", "a.png"), item("t", "train", "a.png")]})
    compare_workspace(workspace)
    first = {path.name: path.read_bytes() for path in workspace.leaked_items.iterdir()}
    compare_workspace(workspace)
    assert {path.name: path.read_bytes() for path in workspace.leaked_items.iterdir()} == first


def test_the_table_for_people_and_the_object_for_scripts(tmp_path: Path) -> None:
    build(tmp_path, {"vqa-rad": [item("q", "test", "a.png"), item("t", "train", "a.png")]})
    shown = CliRunner().invoke(cli, ["--workspace", str(tmp_path), "leakage"], catch_exceptions=False).stdout
    assert "vqa-rad:train" in shown
    assert "1 of 1 test items leaked" in shown
    printed = json.loads(CliRunner().invoke(cli, ["--workspace", str(tmp_path), "leakage", "--json"]).stdout)
    assert (printed["leaked_items"], printed["comparisons"][0]["leaked_images"]) == (1, 1)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError, match="no benchmark items"):
        compare_workspace(Workspace(tmp_path))
    workspace = build(tmp_path, {"vqa-rad": [item("q", "test", "a.png")]})
    with pytest.raises(WorkspaceError, match="no training set"):
        compare_workspace(workspace)
    with pytest.raises(WorkspaceError, match="no output yet"):
        leaked_item_ids(workspace, "slake")


@pytest.mark.parametrize(
    "name", ["vqa-rad", "vqa-rad:dev", "vqa:train", "slake:train:fr", "a:b:c:d", "vqa-rad:train:zh"]
)
def test_a_split_that_does_not_exist_is_refused_with_what_does(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="vqa-rad:train or slake:test:zh"):
        compare_releases(name, "vqa-rad:test", tmp_path)


def test_a_release_that_is_not_there_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"Public\.json"):
        compare_releases("vqa-rad:train", "vqa-rad:test", tmp_path)


def test_half_of_the_options_is_a_usage_error(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["leakage", "--train", "vqa-rad:train"])
    assert result.exit_code == 2
    assert "belong together" in result.stderr


def test_a_hash_of_another_length_names_the_sets() -> None:
    traces = Traces("a", "f", row_id=["r"], sha256=["s"], phash=["abc"], image_id=["i"], case_id=[""])
    with pytest.raises(InputError, match="not 3: 'abc'"):
        compare(traces, traces)


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        ("Is there  a Fracture?", "<image>\nis there a fracture", True),
        ("图中有肿瘤吗?", "图中有肿瘤吗?", True),
        ("Is it left?", "Is it right?", False),
        ("T1-weighted?", "t1 weighted", True),
    ],
)
def test_questions_are_compared_by_their_words(one: str, other: str, alike: bool) -> None:
    assert (normalise_question(one) == normalise_question(other)) is alike


@given(st.text())
def test_normalising_twice_changes_nothing(text: str) -> None:
    once = normalise_question(text)
    assert normalise_question(once) == once
