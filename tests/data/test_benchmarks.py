"""VQA-RAD, SLAKE and PathVQA from their official files to items, and what broken files get."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from figure_factory import jpeg

from medvlm.cli import cli
from medvlm.data.benchmarks import build_benchmark, finetune_samples, read_benchmark
from medvlm.errors import InputError
from medvlm.records import VQAItem
from medvlm.store import Workspace, read_records, read_report, shard_paths


def by_split_and_type(items: list[VQAItem]) -> Counter[tuple[str, str]]:
    return Counter((item.split, item.answer_type) for item in items)


def vqa_rad_row(**changed: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "qid": 1,
        "phrase_type": "freeform",
        "image_name": "a.jpg",
        "image_organ": "CHEST",
        "question": "Is the heart enlarged?",
        "question_type": "SIZE",
        "answer": "Yes",
        "answer_type": "CLOSED ",
    }
    return row | changed


def vqa_rad_folder(root: Path, rows: list[dict[str, Any]], images: dict[str, bytes]) -> Path:
    (root / "VQA_RAD Image Folder").mkdir(parents=True)
    (root / "VQA_RAD Dataset Public.json").write_text(json.dumps(rows), "utf-8")
    for name, data in images.items():
        (root / "VQA_RAD Image Folder" / name).write_bytes(data)
    return root


# --- real files -------------------------------------------------------------------------------


def test_vqa_rad_has_the_published_counts_and_every_image(real_data: Path) -> None:
    items = list(read_benchmark("vqa-rad", real_data / "vqa-rad"))
    assert by_split_and_type(items) == {
        ("train", "closed"): 1027,
        ("train", "open"): 770,
        ("test", "closed"): 272,
        ("test", "open"): 179,
    }
    assert len({item.image_id for item in items}) == 314  # synpic35356.jpg belongs to no question
    assert all(item.image.bytes and len(item.image_sha256) == 64 and len(item.image_phash) == 16 for item in items)
    by_id = {item.item_id: item for item in items}
    assert by_id["0"].question == "Are regions of the brain infarcted?"  # its qid is the string "0"
    assert by_id["2156"].answer_type == by_id["2157"].answer_type == "closed"  # "CLOSED " in the file
    rows = json.loads((real_data / "vqa-rad" / "VQA_RAD Dataset Public.json").read_text("utf-8"))
    numbers = {str(row["qid"]): row["answer"] for row in rows if isinstance(row["answer"], int)}
    assert {qid: by_id[qid].answer for qid in numbers} == {qid: str(answer) for qid, answer in numbers.items()}
    assert len(numbers) == 5
    assert by_id["0"].case_id == "https://medpix.nlm.nih.gov/case?id=48e1dd0e-8552-46ad-a354-5eb55be86de6"
    assert len({item.case_id for item in items}) == 320  # a few images are listed under two cases
    closed_words = [item for item in items if item.answer_type == "closed" and item.answer.lower() not in ("yes", "no")]
    assert len(closed_words) == 106
    test_images = {item.image_id for item in items if item.split == "test"}
    train_images = {item.image_id for item in items if item.split == "train"}
    assert (len(test_images), len(test_images & train_images)) == (203, 202)


def test_slake_has_the_published_counts_in_both_languages(real_data: Path) -> None:
    english = list(read_benchmark("slake", real_data / "slake", images=False))
    chinese = list(read_benchmark("slake-zh", real_data / "slake", images=False))
    assert by_split_and_type(english) == {
        ("train", "open"): 2975,  # 2,976 published; qid 1622 has no answer and is dropped
        ("train", "closed"): 1943,
        ("validation", "open"): 631,
        ("validation", "closed"): 422,
        ("test", "open"): 645,
        ("test", "closed"): 416,
    }
    assert by_split_and_type(chinese) == {
        ("train", "open"): 2978,
        ("train", "closed"): 1938,
        ("validation", "open"): 624,
        ("validation", "closed"): 422,
        ("test", "open"): 613,
        ("test", "closed"): 420,
    }
    assert len(english) + len(chinese) == 14_028 - 1
    assert len({item.image_id for item in english}) == 642
    assert Counter(item.modality for item in english) + Counter(item.modality for item in chinese) == {
        "ct": 6638,  # 6,639 without qid 1622
        "chest_xray": 4214,
        "mri": 3175,
    }

    def images(items: list[VQAItem], split: str) -> set[str]:
        return {item.image_id for item in items if item.split == split}

    assert len(images(chinese, "test") & images(english, "train")) == 70
    assert len(images(english, "test") & images(chinese, "train")) == 72
    odd = [i for i in english if i.split == "test" and i.answer_type == "closed" and i.answer not in ("Yes", "No")]
    assert len(odd) == 61


def test_slake_images_are_read_from_the_release(real_data: Path, tmp_path: Path) -> None:
    release = real_data / "slake" / "Slake1.0"
    rows = [row for row in json.loads((release / "test.json").read_text("utf-8")) if row["img_id"] == 102]
    for name, content in {"train.json": [], "validate.json": [], "test.json": rows}.items():
        (tmp_path / name).write_text(json.dumps(content), "utf-8")
    (tmp_path / "imgs").symlink_to(release / "imgs")
    items = list(read_benchmark("slake", tmp_path))
    assert {item.image.path for item in items} == {"xmlab102/source.jpg"}
    assert items[0].image.bytes == (release / "imgs" / "xmlab102" / "source.jpg").read_bytes()
    assert {item.language for item in items} == {"en"}
    assert {item.case_id for item in items} == {"xmlab102"}


def test_pathvqa_has_the_published_counts_and_is_not_built_without_images(real_data: Path, tmp_path: Path) -> None:
    items = list(read_benchmark("pathvqa", real_data / "pathvqa" / "pvqa_test.json"))
    assert by_split_and_type(items) == {("test", "open"): 3370, ("test", "closed"): 3391}
    assert len({item.image_id for item in items}) == 858
    assert all(item.answer_type_derived for item in items)
    assert items[0].item_id == "test_0001_0"
    records = json.loads((real_data / "pathvqa" / "pvqa_test.json").read_text("utf-8"))
    assert (len(records), sum(not record["sentf"]["pvqa"] for record in records)) == (991, 133)  # images without any
    with pytest.raises(InputError, match=r"6761 of 6761 questions have no usable image: test_0001\.jpg"):
        build_benchmark(Workspace(tmp_path), "pathvqa", real_data / "pathvqa")
    assert not Workspace(tmp_path).items("pathvqa").exists()


# --- building ---------------------------------------------------------------------------------


def test_building_twice_gives_the_same_bytes_and_groups_items_by_image(tmp_path: Path) -> None:
    rows = [
        vqa_rad_row(qid=index, image_name=f"{'ab'[index % 2]}.jpg", phrase_type=("freeform", "test_para")[index // 3])
        for index in range(6)
    ]
    source = vqa_rad_folder(tmp_path / "vqa-rad", rows, {"a.jpg": jpeg(10), "b.jpg": jpeg(200)})
    first, second = Workspace(tmp_path / "one"), Workspace(tmp_path / "two")
    report = build_benchmark(first, "vqa-rad", source)
    build_benchmark(second, "vqa-rad", source)
    assert [p.read_bytes() for p in shard_paths(first.items("vqa-rad"))] == [
        p.read_bytes() for p in shard_paths(second.items("vqa-rad"))
    ]
    items = read_records(first.items("vqa-rad"), VQAItem)
    assert [item.item_id for item in items] == ["0", "2", "4", "1", "3", "5"]
    assert report.counts == {
        "items": 6, "dropped": 0, "train": 3, "test": 3, "train_closed": 3, "test_closed": 3
    }  # fmt: skip
    assert read_report(first.benchmark("vqa-rad")) == report
    changed = vqa_rad_folder(tmp_path / "changed", rows, {"a.jpg": jpeg(11), "b.jpg": jpeg(200)})
    assert build_benchmark(second, "vqa-rad", changed).fingerprint != report.fingerprint


def test_missing_and_broken_images_are_named_counted_and_fail_above_the_tolerance(tmp_path: Path) -> None:
    rows = [
        vqa_rad_row(qid=1),
        vqa_rad_row(qid=2, image_name="absent.jpg"),
        vqa_rad_row(qid=3, image_name="cut.jpg"),
        vqa_rad_row(qid=4, image_name="../outside.jpg"),
    ]
    source = vqa_rad_folder(tmp_path / "vqa-rad", rows, {"a.jpg": jpeg(10), "cut.jpg": jpeg(10)[:-40]})
    (source / "outside.jpg").write_bytes(jpeg(1))
    workspace = Workspace(tmp_path / "w")
    with pytest.raises(InputError, match="3 of 4 questions have no usable image: absent"):
        build_benchmark(workspace, "vqa-rad", source, tolerance=0.5)
    assert not workspace.items("vqa-rad").exists()
    report = build_benchmark(workspace, "vqa-rad", source, tolerance=0.75)
    assert report.counts["items"] == 1
    assert {reason: lost["count"] for reason, lost in report.details["dropped"].items()} == {
        "image_missing": 1,
        "image_undecodable": 1,
        "image_outside_folder": 1,
    }


def test_finetune_samples_are_the_train_split_with_the_image_after_the_question(tmp_path: Path) -> None:
    rows = [vqa_rad_row(), vqa_rad_row(qid=2, phrase_type="test_freeform")]
    source = vqa_rad_folder(tmp_path / "vqa-rad", rows, {"a.jpg": jpeg(10)})
    (sample,) = finetune_samples(read_benchmark("vqa-rad", source))
    assert [dataclasses.astuple(turn) for turn in sample.turns] == [
        ("user", "Is the heart enlarged?\n<image>"),
        ("assistant", "Yes"),
    ]
    assert (sample.dataset, sample.group_id, sample.licence) == ("vqa-rad", "a.jpg", "CC0 1.0")


def test_pathvqa_images_are_found_in_split_folders_too(tmp_path: Path) -> None:
    record = {
        "img_id": "test_0007",
        "labelf": {"pvqa": [{"yes": 1}, {"2": 1}]},
        "sentf": {"pvqa": ["Is it red?", "How many cells are there?"]},
    }
    (tmp_path / "pvqa_test.json").write_text(json.dumps([record, {**record, "img_id": "val_1"} | {
        "labelf": {"pvqa": []}, "sentf": {"pvqa": []}}]))  # fmt: skip
    (tmp_path / "images" / "test").mkdir(parents=True)
    (tmp_path / "images" / "test" / "test_0007.jpg").write_bytes(jpeg(3))
    items = list(read_benchmark("pathvqa", tmp_path))
    assert [(i.item_id, i.answer, i.answer_type, i.question_type) for i in items] == [
        ("test_0007_0", "yes", "closed", "yes/no"),
        ("test_0007_1", "2", "open", "number"),
    ]
    assert items[0].image.bytes == jpeg(3)


def test_what_vqa_rad_spells_null_is_missing(tmp_path: Path) -> None:
    rows = [vqa_rad_row(answer="NULL"), vqa_rad_row(qid=2, image_case_url="NULL")]
    source = vqa_rad_folder(tmp_path / "vqa-rad", rows, {"a.jpg": jpeg(10)})
    report = build_benchmark(Workspace(tmp_path / "w"), "vqa-rad", source)
    assert report.details["dropped"]["answer_empty"]["count"] == 1
    (kept,) = read_records(Workspace(tmp_path / "w").items("vqa-rad"), VQAItem)
    assert (kept.item_id, kept.case_id) == ("2", "")


def test_the_first_ten_missing_images_are_named(tmp_path: Path) -> None:
    rows = [vqa_rad_row(qid=index, image_name=f"absent{index}.jpg") for index in range(12)]
    with pytest.raises(InputError, match="12 of 12 questions have no usable image") as error:
        build_benchmark(Workspace(tmp_path / "w"), "vqa-rad", vqa_rad_folder(tmp_path / "r", rows, {}))
    assert [f"absent{index}.jpg" in error.value.what for index in range(12)] == [True] * 10 + [False] * 2


# --- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"qid": 1', "is not JSON"),
        ("[{\"question\": \"Où?\"}]".encode("latin1"), "is not UTF-8"),
        (b"{}", r"begins with '{}'"),
        (b"[1]", "element is the number 1"),
        (b"[]", "no question was found"),
        (json.dumps([vqa_rad_row(answer_type="MAYBE")]).encode(), "'answer_type' is 'MAYBE'"),
        (json.dumps([vqa_rad_row(qid=None)]).encode(), "'qid' is None"),
        (json.dumps([vqa_rad_row(answer=["Yes"])]).encode(), "'answer' is an array"),
        (b'[{"b": 1, "a": 2}]', "the key 'image_organ' is absent; the keys are a, b"),
        (json.dumps([vqa_rad_row(), vqa_rad_row()]).encode(), "the question id '1' is there twice"),
    ],
)  # fmt: skip
def test_a_file_in_another_format_is_one_error_that_names_the_place(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "VQA_RAD Dataset Public.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        list(read_benchmark("vqa-rad", path))
    assert str(path) in error.value.where


def test_an_incomplete_slake_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text("[]")
    with pytest.raises(InputError) as error:
        list(read_benchmark("slake", tmp_path))
    assert error.value.where.endswith("validate.json")


def test_pathvqa_with_an_answer_too_few_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pvqa_test.json"
    path.write_text(json.dumps([{"img_id": "test_1", "labelf": {"pvqa": []}, "sentf": {"pvqa": ["Is it?"]}}]))
    with pytest.raises(InputError, match="1 questions and 0 answers"):
        list(read_benchmark("pathvqa", path))


def test_the_verb_prints_one_json_object_and_fails_with_a_hint(tmp_path: Path) -> None:
    source = vqa_rad_folder(tmp_path / "vqa-rad", [vqa_rad_row()], {"a.jpg": jpeg(10)})
    base = ["--workspace", str(tmp_path / "w"), "dataset", "build-benchmark"]
    result = CliRunner().invoke(cli, [*base, "vqa-rad", "--source", str(source), "--json"])
    assert result.exit_code == 0
    assert json.loads(result.output)["counts"]["train_closed"] == 1
    unknown = CliRunner().invoke(cli, [*base, "vqa-rat", "--source", str(source)])
    assert isinstance(unknown.exception, InputError)
    assert "pathvqa" in unknown.exception.hint
