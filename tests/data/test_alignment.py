"""Alignment and instruction samples from figures: prompts, the join by pair_id, and every loss with its reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from figure_factory import figure, workspace_with
from hypothesis import given
from hypothesis import strategies as st

from medvlm.cli import cli
from medvlm.data.alignment import alignment_turns, build_alignment
from medvlm.data.benchmarks import build_benchmark, finetune_samples, read_benchmark
from medvlm.data.conversations import pick, prompts
from medvlm.data.instruct import build_instruct
from medvlm.data.offline_instruct import offline_turns, split_sentences
from medvlm.data.readers.llava_med import fault_of
from medvlm.errors import InputError, WorkspaceError
from medvlm.records import Sample, Turn
from medvlm.review import Journal
from medvlm.store import Workspace, read_records, shard_paths


def official(path: Path, *ids: str, **changed: Any) -> Path:
    rows = [
        {
            "id": pair_id,
            "image": f"{pair_id}.jpg",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat is it?"},
                {"from": "gpt", "value": f"It is {pair_id}."},
            ],
        }
        | changed
        for pair_id in ids
    ]
    path.write_text(json.dumps(rows), "utf-8")
    return path


def samples(workspace: Workspace, name: str) -> list[Sample]:
    return read_records(workspace.samples(name), Sample)


def test_there_are_27_different_prompts() -> None:
    pool = [*prompts("alignment_brief"), *prompts("alignment_detailed")]
    assert len(set(pool)) == len(pool) == 27


def test_captions_become_samples_and_losses_become_reasons(tmp_path: Path) -> None:
    workspace = workspace_with(
        tmp_path,
        figure(1),
        figure(2, retracted=True),
        figure(3, caption=" \n "),
        figure(1),
        figure(4, pmcid="PMC2", licence="CC0", caption="Axial CT"),
    )
    report = build_alignment(workspace)
    first, second = samples(workspace, "alignment")
    assert (first.sample_id, first.group_id, first.modality, first.source) == ("10_F1", "PMC1", "chest_xray", "caption")
    assert first.turns[1] == Turn("assistant", "Chest X-ray with a large nodule in the left lung.")
    assert (second.group_id, second.licence, second.modality) == ("PMC2", "CC0", "ct")
    assert report.counts == {"samples": 2, "dropped": 3, "missed": 0}
    assert {reason: lost["first"] for reason, lost in report.details["dropped"].items()} == {
        "caption_empty": ["10_F3 (PMC1)"],
        "figure_repeated": ["10_F1 (PMC1)"],
        "retracted": ["10_F2 (PMC1)"],
    }


@given(words=st.integers(1, 60), number=st.integers(0, 200), seed=st.integers(0, 3))
def test_short_captions_get_brief_prompts_and_long_ones_detailed_prompts(words: int, number: int, seed: int) -> None:
    turns = alignment_turns(figure(number, caption="word " * words), seed)
    assert not isinstance(turns, str)
    assert fault_of(turns) is None
    prompt = turns[0].text.replace("<image>", "").strip()
    assert prompt in prompts("alignment_brief" if words < 30 else "alignment_detailed")


def test_every_prompt_and_both_places_of_the_image_come_up() -> None:
    asked = [alignment_turns(figure(number), 0)[0] for number in range(400)]
    texts = {turn.text for turn in asked if isinstance(turn, Turn)}
    assert len(texts) == 2 * len(prompts("alignment_brief"))


def test_same_seed_same_bytes_and_another_seed_other_bytes(tmp_path: Path) -> None:
    workspace = workspace_with(tmp_path, *(figure(number) for number in range(20)))

    def built(seed: int) -> tuple[str, list[bytes]]:
        report = build_alignment(workspace, seed=seed)
        return report.fingerprint, [path.read_bytes() for path in shard_paths(workspace.samples("alignment"))]

    first = built(1)
    assert built(1) == first
    other = built(2)
    assert other[0] != first[0]
    assert other[1] != first[1]


def test_a_fingerprint_changes_with_the_codes_version_and_only_with_that_or_the_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (workspace_with(tmp_path / name, figure(1), figure(2)) for name in ("a", "b"))
    marks = [build_alignment(workspace).fingerprint for workspace in (first, second, first)]
    assert len(set(marks)) == 1
    content = [path.read_bytes() for path in shard_paths(first.samples("alignment"))]
    monkeypatch.setattr("medvlm.__version__", "0.2.0")
    assert build_alignment(first).fingerprint != marks[0]
    assert [path.read_bytes() for path in shard_paths(first.samples("alignment"))] == content


def test_a_figure_more_does_not_change_the_prompts_of_the_others(tmp_path: Path) -> None:
    few = workspace_with(tmp_path / "few", figure(1), figure(2))
    more = workspace_with(tmp_path / "more", figure(0), figure(1), figure(2))
    build_alignment(few)
    build_alignment(more)
    assert samples(more, "alignment")[1:] == samples(few, "alignment")


def test_official_texts_join_by_pair_id_and_misses_are_counted(tmp_path: Path) -> None:
    workspace = workspace_with(tmp_path, figure(1), figure(2), figure(3, retracted=True))
    absent = [f"9_F{number}" for number in range(12)]
    path = official(tmp_path / "a.json", "10_F2", *absent, "10_F1", "10_F3", "10_F2")
    report = build_instruct(workspace, official=path)
    built = samples(workspace, "instruct")
    assert [sample.sample_id for sample in built] == ["10_F1", "10_F2", "10_F2#2"]
    assert built[1].turns[1].text == "It is 10_F2."
    assert built[1].image == figure(2).image
    assert {sample.source for sample in built} == {"official"}
    assert report.counts == {"samples": 3, "dropped": 13, "missed": 12}
    missed = report.details["dropped"]["figure_absent"]
    assert (missed["count"], len(missed["first"])) == (12, 10)
    assert missed["first"][0].startswith("9_F0 ")
    assert report.details["dropped"]["retracted"]["count"] == 1
    assert report.details["files"][0]["official"] == "unknown"


def test_domain_flags_decide_the_modality_before_the_caption_does(tmp_path: Path) -> None:
    workspace = workspace_with(tmp_path, figure(1))
    build_alignment(workspace, official=official(tmp_path / "a.json", "10_F1", domain={"mri": True}))
    assert samples(workspace, "alignment")[0].modality == "mri"


def test_chinese_texts_are_marked_chinese(tmp_path: Path) -> None:
    workspace = workspace_with(tmp_path, figure(1))
    turns = [{"from": "human", "value": "<image>\n这是什么?"}, {"from": "gpt", "value": "一张胸片。"}]
    build_alignment(workspace, official=official(tmp_path / "a.json", "10_F1", conversations=turns))
    assert samples(workspace, "alignment")[0].language == "zh"


def test_reviewers_take_figures_and_samples_out_and_edit_them(tmp_path: Path) -> None:
    workspace = workspace_with(tmp_path, figure(1), figure(2), figure(3), figure(4))
    build_alignment(workspace)
    caption = figure(1).caption
    before = tuple(turn.text for turn in samples(workspace, "alignment")[3].turns)
    journal = Journal(workspace)
    journal.decide("ann", "figures", "10_F1", "reject", reason="collage", before=(caption,))
    journal.decide("ann", "figures", "10_F2", "edit", before=(caption,), after=("Chest X-ray.",))
    journal.decide("ann", "alignment", "10_F3", "flag_privacy", before=before)
    journal.decide("ann", "alignment", "10_F4", "edit", before=before, after=(before[0], "A nodule."))
    report = build_alignment(workspace)
    edited, reworded = samples(workspace, "alignment")
    assert (edited.sample_id, edited.turns[1].text, edited.source) == ("10_F2", "Chest X-ray.", "caption")
    assert (reworded.sample_id, reworded.turns[1].text, reworded.source) == ("10_F4", "A nodule.", "review")
    assert {reason: lost["count"] for reason, lost in report.details["dropped"].items()} == {
        "review_rejected": 1,
        "review_privacy": 1,
    }


def test_a_picture_flagged_with_one_text_is_out_of_every_dataset_until_that_is_taken_back(tmp_path: Path) -> None:
    workspace = workspace_with(tmp_path, *(figure(number) for number in range(5)))
    build_alignment(workspace)
    everything = {sample.sample_id for sample in samples(workspace, "alignment")}
    journal = Journal(workspace)
    journal.decide("ann", "instruct", "10_F1#2", "flag_privacy")
    journal.decide("ann", "preference/tiny", "10_F2-q1", "flag_privacy")
    journal.decide("ann", "instruct", "10_F3", "reject", reason="only this text is wrong")
    journal.decide("ann", "benchmark/slake", "10_F4", "flag_privacy")
    report = build_alignment(workspace)
    assert {sample.sample_id for sample in samples(workspace, "alignment")} == everything - {"10_F1", "10_F2"}
    assert report.details["dropped"]["review_privacy"]["count"] == 2
    journal.undo("ann")  # the benchmark's
    journal.undo("ann")  # the rejection
    journal.undo("ann")
    build_alignment(workspace)
    assert {sample.sample_id for sample in samples(workspace, "alignment")} == everything - {"10_F1"}


def test_images_that_a_benchmark_tests_with_are_dropped_unless_kept(tmp_path: Path) -> None:
    workspace = workspace_with(tmp_path, figure(1), figure(2))
    release = tmp_path / "release"
    (release / "images").mkdir(parents=True)
    for name, number in (("test_1", 1), ("train_2", 2)):
        (release / "images" / f"{name}.jpg").write_bytes(figure(number).image.bytes)
        record = {"img_id": name, "labelf": {"pvqa": [{"yes": 1}]}, "sentf": {"pvqa": ["Is it?"]}}
        (release / f"pvqa_{name.split('_')[0]}.json").write_text(json.dumps([record]))
    build_benchmark(workspace, "pathvqa", release)
    report = build_alignment(workspace)
    assert [sample.sample_id for sample in samples(workspace, "alignment")] == ["10_F2"]
    assert report.details["dropped"]["leaked"]["first"] == ["10_F1 (test image of pathvqa)"]
    assert "1 with the very image, 0 with one that looks like it" in (
        workspace.dataset("alignment") / "README.md"
    ).read_text("utf-8")
    assert build_alignment(workspace, keep_leaked=True).counts["samples"] == 2
    items = list(read_benchmark("pathvqa", release))
    assert len(list(finetune_samples(items))) == 1
    assert not list(finetune_samples(items, without={figure(2).sha256}))


def test_several_files_make_one_dataset_of_both_languages(tmp_path: Path) -> None:
    workspace = workspace_with(tmp_path, figure(1))
    turns = [{"from": "human", "value": "<image>\n这是什么?"}, {"from": "gpt", "value": "一张胸片。"}]
    files = [official(tmp_path / "en.json", "10_F1"), official(tmp_path / "zh.json", "10_F1", conversations=turns)]
    report = build_instruct(workspace, official=files)
    assert [(one.sample_id, one.language) for one in samples(workspace, "instruct")] == [
        ("10_F1", "en"),
        ("10_F1#2", "zh"),
    ]
    assert [file["file"] for file in report.details["files"]] == ["en.json", "zh.json"]


def test_nothing_in_common_is_an_error_and_the_last_dataset_stays(tmp_path: Path) -> None:
    workspace = workspace_with(tmp_path, figure(1))
    build_alignment(workspace)
    with pytest.raises(InputError, match=r"no alignment sample came out of 1 rows; figure_absent: 1 \(first 9_F1"):
        build_alignment(workspace, official=official(tmp_path / "a.json", "9_F1"))
    assert len(samples(workspace, "alignment")) == 1
    with pytest.raises(WorkspaceError):
        build_alignment(Workspace(tmp_path / "empty"))


def test_rules_write_a_conversation_from_caption_and_mention() -> None:
    turns = offline_turns(
        figure(1, caption="Figure 1. Chest X-ray of Dr. A. There is no pleural effusion. A nodule is seen at left."), 0
    )
    assert not isinstance(turns, str)
    assert fault_of(turns) is None
    dialogue = {turns[index].text: turns[index + 1].text for index in range(0, len(turns), 2)}
    assert turns[1].text == "Chest X-ray of Dr. A. There is no pleural effusion."
    assert dialogue["Is there a pleural effusion in the image?"] == "No."
    assert "It is a chest X-ray." in dialogue.values()
    assert turns[-1].text == "The nodule had grown."
    assert offline_turns(figure(1, caption="Gross specimen"), 0) == "caption_too_short"


@pytest.mark.parametrize(
    ("caption", "said"),
    [
        ("Axial CT shows a mass.", {"Is there a mass in the image?": "Yes."}),
        ("Axial CT without evidence of fracture.", {"Is there a fracture in the image?": "No."}),
        ("Axial CT with no mass or nodule.", {"Is there a mass in the image?": "No."}),
        ("Axial CT shows that a mass was not found.", {}),
        ("Schematic of CT imaging of a tumour.", {}),
        ("Axial CT with marked oedema.", {"Is there oedema in the image?": "Yes."}),
    ],
)
def test_presence_is_asked_only_where_the_caption_is_plain(caption: str, said: dict[str, str]) -> None:
    turns = offline_turns(figure(1, caption=caption), 0)
    assert not isinstance(turns, str)
    asked = {turns[i].text: turns[i + 1].text for i in range(0, len(turns), 2) if turns[i].text.startswith("Is there")}
    asked.pop("Is there more to note in the image?", None)
    assert asked == said


@given(caption=st.text(max_size=200), mentions=st.lists(st.text(max_size=80), max_size=3), seed=st.integers(0, 5))
def test_whatever_the_text_rules_write_a_sound_conversation_or_give_a_reason(
    caption: str, mentions: list[str], seed: int
) -> None:
    turns = offline_turns(figure(1, caption=caption, mentions=tuple(mentions)), seed)
    assert turns in ("caption_empty", "caption_too_short") if isinstance(turns, str) else fault_of(turns) is None


@given(st.text(min_size=1).filter(str.strip))
def test_sentences_lose_nothing(text: str) -> None:
    joined = " ".join(text.split())
    assert " ".join(split_sentences(joined)) == joined


@given(st.integers(), st.text(), st.integers(1, 50))
def test_a_picked_number_is_below_the_choices(seed: int, key: str, choices: int) -> None:
    assert 0 <= pick(seed, key, choices) < choices


def test_the_verb_builds_from_captions_or_from_a_file(tmp_path: Path) -> None:
    workspace = workspace_with(tmp_path / "w", figure(1))
    base = ["--workspace", str(tmp_path / "w"), "dataset", "build"]
    made = CliRunner().invoke(cli, [*base, "instruct", "--json"])
    assert json.loads(made.output)["details"]["by"]["source"] == {"generated-offline": 1}
    joined = CliRunner().invoke(cli, [*base, "instruct", "--from", str(official(tmp_path / "a.json", "10_F1"))])
    assert joined.exit_code == 0
    assert samples(workspace, "instruct")[0].source == "official"
    shards = CliRunner().invoke(cli, [*base, "alignment", "--from", str(workspace.figure_shards), "--json"])
    assert json.loads(shards.output)["counts"]["samples"] == 1
