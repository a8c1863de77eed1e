"""Published files of conversations, each recognised by its form, and a folder of them as one dataset."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from figure_factory import figure, workspace_with

from medvlm.cli import cli
from medvlm.data.conversations import language_of
from medvlm.data.describe import describe
from medvlm.data.official_texts import official_files, read_official
from medvlm.data.readers.llava_med import Conversation
from medvlm.errors import InputError
from medvlm.records import Sample
from medvlm.store import Workspace, read_records

ENGLISH = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A chest X-ray."}]
CHINESE = [{"from": "human", "value": "<image>\n这是什么?"}, {"from": "gpt", "value": "一张胸片。"}]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.suffix == ".jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows), "utf-8")
    return path


def folder_of_both(root: Path) -> Path:
    write(root / "b_llava.json", [{"id": "10_F1", "image": "10_F1.jpg", "conversatons": ENGLISH}])
    write(root / "a_lines.jsonl", [{"id": "x", "image": "10_F1.jpg", "conversations": CHINESE}])
    write(root / "c_array.json", [{"image": "panels/10_F2.jpg", "caption": "胸部X线片,未见异常。"}])
    (root / "README.md").write_text("not read")
    (root / ".hidden.json").write_text("not read")
    return root


@pytest.mark.parametrize("name", ["alignment", "instruct"])
def test_a_folder_of_files_makes_one_dataset_of_both_languages(tmp_path: Path, name: str) -> None:
    workspace = workspace_with(tmp_path / "w", figure(1), figure(2))
    source = folder_of_both(tmp_path / "texts")
    command = ["--workspace", str(tmp_path / "w"), "dataset", "build", name, "--official", str(source), "--json"]
    report = json.loads(CliRunner().invoke(cli, command).stdout)
    built = read_records(workspace.samples(name), Sample)
    assert [(one.sample_id, one.language, one.turns[1].text) for one in built] == [
        ("10_F1", "zh", "一张胸片。"),
        ("10_F1#2", "en", "A chest X-ray."),
        ("10_F2", "zh", "胸部X线片,未见异常。"),
    ]
    assert report["details"]["by"]["language"] == {"en": 1, "zh": 2}
    assert [file["file"] for file in report["details"]["files"]] == ["a_lines.jsonl", "b_llava.json", "c_array.json"]
    assert [one.name for one in describe(workspace, str(source))] == ["a_lines.jsonl", "b_llava.json", "c_array.json"]


def test_a_file_under_chimeds_name_joins_by_the_image(tmp_path: Path) -> None:
    rows = [{"id": "0", "image": "PMC1_Fig6_46.jpg", "conversations": CHINESE}]
    (one,) = read_official(write(tmp_path / "ChiMed-VL-Instruction.json", rows))
    (other,) = read_official(write(tmp_path / "else.json", rows))
    assert isinstance(one, Conversation) and isinstance(other, Conversation)
    assert (one.pair_id, other.pair_id) == ("PMC1_Fig6_46", "0")


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        ([], "the file has no rows"),
        ([{"pair_id": "1", "fig_caption": "A"}], "the keys are fig_caption, pair_id"),
        ([{"image": "1.jpg", "chosen_conversations": ENGLISH}], "preference pairs, not conversations"),
    ],
)
def test_a_file_of_another_form_is_refused_by_name(tmp_path: Path, rows: list[dict[str, Any]], what: str) -> None:
    path = write(tmp_path / "a.json", rows)
    with pytest.raises(InputError, match=what) as caught:
        list(read_official(path))
    assert "a.json" in caught.value.where


def test_a_folder_without_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no published file"):
        official_files(tmp_path)


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("这是什么? CT", "zh"),
        ("是", "zh"),
        ("A tablet of Huang Qi (黄芪) was given.", "en"),
        ("", "en"),
        ("42", "en"),
    ],
)
def test_the_language_is_the_one_that_most_of_the_text_is_in(text: str, language: str) -> None:
    assert language_of(text) == language


def test_figures_of_the_workspace_are_named_apart_from_texts(tmp_path: Path) -> None:
    workspace = workspace_with(tmp_path, figure(1))
    command = ["--workspace", str(tmp_path), "dataset", "build", "alignment"]
    mixed = ["--official", str(workspace.figure_shards), "--official", str(tmp_path)]
    assert CliRunner().invoke(cli, [*command, *mixed]).exit_code == 2
    assert Workspace(tmp_path).samples("alignment").exists() is False
