"""LLaVA-Med's files: real ones with their counts, both spellings, and conversations that cannot train."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medvlm.data.modality import modality_of_caption, modality_of_domain
from medvlm.data.official import official_state
from medvlm.data.readers.llava_med import (
    Conversation,
    fault_of,
    read_captions,
    read_chat_questions,
    read_conversations,
)
from medvlm.data.readers.source import Dropped, object_rows
from medvlm.errors import InputError
from medvlm.records import Turn


def conversation(**changed: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": "32432162_F1",
        "image": "32432162_F1.jpg",
        "domain": {"chest_xray": False, "mri": False, "histology": False, "gross": True, "ct_scan": True},
        "conversations": [
            {"from": "human", "value": "Can you briefly describe the image?\n<image>"},
            {"from": "gpt", "value": "A resected kidney."},
        ],
    }
    return row | changed


def write(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value, ensure_ascii=False), "utf-8")
    return path


def test_the_real_chat_questions_have_their_counts_by_kind_and_domain(real_data: Path) -> None:
    path = real_data / "llava-med" / "llava_med_eval_qa50_qa.jsonl"
    questions = list(read_chat_questions(path))
    assert Counter(question.kind for question in questions) == {"conversation": 143, "detailed_description": 50}
    assert Counter(question.modality for question in questions) == {
        "chest_xray": 37,
        "mri": 38,
        "histology": 44,
        "gross": 34,
        "ct": 40,
    }
    assert questions[0].question == "What is the organ in the image?"
    # Eight questions carry two flags; each has one modality here, the first in the published order.
    flags = [json.loads(line)["domain"] for line in path.read_text("utf-8").splitlines()]
    assert sum(sum(map(bool, row.values())) == 2 for row in flags) == 8
    assert official_state(path)["official"] == "match"


def test_the_real_captions_have_mentions_that_can_be_null(real_data: Path) -> None:
    captions = list(read_captions(real_data / "llava-med" / "llava_med_eval_qa50_fig_captions.json"))
    assert len(captions) == 50
    assert sum(not caption.mentions for caption in captions) == 4
    agree = sum(modality_of_caption(caption.caption) == caption.modality for caption in captions)
    assert agree == 48  # the flags of the other two name what the caption names second


def test_both_spellings_and_both_places_of_the_image_are_read(tmp_path: Path) -> None:
    row = conversation()
    misspelt = conversation(id="2", domain=None)
    misspelt["conversatons"] = misspelt.pop("conversations")
    misspelt["conversatons"][0]["value"] = "<image>\nWhat is it?"
    first, second = read_conversations(write(tmp_path / "a.json", [row, misspelt]))
    assert isinstance(first, Conversation)
    assert isinstance(second, Conversation)
    assert (first.pair_id, first.modality) == ("32432162_F1", "gross")
    assert first.turns[0] == Turn("user", "Can you briefly describe the image?\n<image>")
    assert second.turns[0] == Turn("user", "<image>\nWhat is it?")
    assert second.modality is None


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([("human", "<image> Q")], "turns_incomplete"),
        ([], "turns_incomplete"),
        ([("gpt", "<image> Q"), ("human", "A")], "roles_not_alternating"),
        ([("human", "<image> Q"), ("human", "Q")], "roles_not_alternating"),
        ([("human", "<image>"), ("gpt", "A")], "turn_empty"),
        ([("human", "<image> Q"), ("gpt", "  ")], "turn_empty"),
        ([("human", "Q"), ("gpt", "A")], "image_slot_missing"),
        ([("human", "<image> Q <image>"), ("gpt", "A")], "image_slot_misplaced"),
        ([("human", "Q"), ("gpt", "A"), ("human", "<image> Q"), ("gpt", "A")], "image_slot_misplaced"),
    ],
)
def test_a_conversation_that_cannot_train_is_dropped_with_its_reason(
    tmp_path: Path, values: list[tuple[str, str]], reason: str
) -> None:
    turns = [{"from": speaker, "value": text} for speaker, text in values]
    (row,) = read_conversations(write(tmp_path / "a.json", [conversation(conversations=turns)]))
    assert isinstance(row, Dropped)
    assert (row.reason, row.value) == (reason, "32432162_F1")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([conversation(conversations="text")], "'conversations' is text"),
        ([conversation(conversations=[{"from": "system", "value": "x"}])], "'from' is 'system'"),
        ([conversation(conversations=[["human", "x"]])], "the turn is"),
        ([{"image": "a.jpg"}], "the key 'id' is absent; the keys are image"),
        ([conversation(), 3], "element is the number 3"),
    ],
)
def test_another_format_is_one_error_that_names_the_element(tmp_path: Path, rows: list[Any], message: str) -> None:
    path = write(tmp_path / "a.json", rows)
    with pytest.raises(InputError, match=message) as error:
        list(read_conversations(path))
    assert f"{path}, element" in error.value.where


def test_a_truncated_file_names_the_line_where_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "llava_med_instruct_10k.json"
    path.write_text(json.dumps([conversation(), conversation(id="2")], indent=1)[:-60])
    with pytest.raises(InputError, match="not JSON") as error:
        list(read_conversations(path))
    assert "line 3" in error.value.where
    assert official_state(path)["official"] == "mismatch"


@given(
    rows=st.lists(st.dictionaries(st.text(max_size=4), st.integers() | st.text(max_size=5), max_size=3), max_size=5),
    indent=st.sampled_from([None, 1]),
)
def test_objects_of_an_array_are_those_that_json_finds(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], indent: int | None
) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    path.write_text("\ufeff " + json.dumps(rows, indent=indent) + "\n", "utf-8")
    assert [row for _, row in object_rows(path)] == rows


@given(cut=st.integers(1, 60), tail=st.sampled_from(["", "]", "}]", ",", "x"]))
def test_no_cut_or_spoilt_array_passes_as_whole(tmp_path_factory: pytest.TempPathFactory, cut: int, tail: str) -> None:
    whole = json.dumps([conversation(), conversation(id="2")])
    text = whole[:-cut] + tail
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    path.write_text(text, "utf-8")
    try:
        expected = json.loads(text)
    except json.JSONDecodeError:
        with pytest.raises(InputError, match="not JSON"):
            list(object_rows(path))
    else:
        assert [row for _, row in object_rows(path)] == expected


@given(st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.sampled_from(["", "Q", "<image> Q"])), max_size=4))
def test_what_has_no_fault_alternates_and_holds_one_image(values: list[tuple[Any, str]]) -> None:
    turns = tuple(Turn(role, text) for role, text in values)
    if fault_of(turns) is None:
        assert [turn.role for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
        assert [turn.text.count("<image>") for turn in turns] == [1] + [0] * (len(turns) - 1)


def test_the_first_true_flag_wins_in_the_published_order() -> None:
    assert modality_of_domain({"ct_scan": True, "gross": True, "histology": True}) == "histology"
    assert modality_of_domain({"ct_scan": True, "chest_xray": 1}) == "ct"
    assert modality_of_domain({}) == "unknown"
