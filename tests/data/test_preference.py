"""Preference pairs: published ones joined to figures, and those a model makes and a judge ranks."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from chat_server import chat_server
from click.testing import CliRunner
from figure_factory import figure, workspace_with
from hypothesis import given
from hypothesis import strategies as st

from medvlm.cli import cli
from medvlm.data.alignment import build_alignment
from medvlm.data.endpoint import ChatClient, Endpoint
from medvlm.data.judges import EndpointJudge, OverlapJudge, word_f1
from medvlm.data.preference import (
    GenerationRequest,
    build_preference,
    clean_question,
    join_preferences,
    self_preferences,
)
from medvlm.data.readers.source import Dropped
from medvlm.data.response_cache import ResponseCache
from medvlm.errors import InputError
from medvlm.records import PreferencePair, Sample, Turn
from medvlm.review import Journal, save_preference
from medvlm.store import Workspace, read_records, shard_paths


def published(path: Path, *rows: tuple[str, str, str]) -> Path:
    def turns(answer: str) -> list[dict[str, str]]:
        return [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": answer}]

    values = [
        {"image": image, "chosen_conversations": turns(chosen), "reject_conversations": turns(rejected)}
        for image, chosen, rejected in rows
    ]
    path.write_text(json.dumps(values))
    return path


def test_published_pairs_join_to_figures_and_misses_are_counted(tmp_path: Path) -> None:
    workspace_with(tmp_path, figure(1), figure(2, retracted=True))
    path = published(
        tmp_path / "dpo.json",
        ("10_F1.jpg", "A nodule.", "Nothing."),
        ("a/10_F1.jpg", "A large nodule.", "A cat."),
        ("10_F2.jpg", "A", "B"),
        ("9_F9.jpg", "A", "B"),
        ("10_F1.jpg", "A", "A"),
    )
    command = ["--workspace", str(tmp_path), "dataset", "build-preference", "--recipe", "tiny", "--official", str(path)]
    report = json.loads(CliRunner().invoke(cli, [*command, "--json"]).stdout)
    assert report["counts"] == {"pairs": 2, "dropped": 4, "missed": 2}
    pairs = read_records(Workspace(tmp_path).preference_pairs("tiny"), PreferencePair)
    assert [(pair.pair_id, pair.chosen, pair.rejected, pair.group_id) for pair in pairs] == [
        ("10_F1", "A nodule.", "Nothing.", "PMC1"),
        ("10_F1#2", "A large nodule.", "A cat.", "PMC1"),
    ]
    assert pairs[0].question == "What is it?"


def test_pairs_that_reviewers_reject_or_edit_are_so_in_the_next_build(tmp_path: Path) -> None:
    sample = alignment_samples(tmp_path, 2)[1]
    workspace = Workspace(tmp_path)
    same = (sample.image, sample.image_sha256, sample.image_phash, sample.group_id)
    pairs = [PreferencePair(f"p{n}", *same, "What?", f"good {n}", "bad", "chat") for n in range(4)]
    build_preference(workspace, "tiny", pairs)
    journal = Journal(workspace)
    shown = ("What?", "good 1", "bad")
    journal.decide("ann", "preference/tiny", "p0", "reject", reason="both are wrong")
    journal.decide("ann", "preference/tiny", "p1", "edit", before=shown, after=("What?", "better", "bad"))
    journal.decide("ann", "preference/tiny", "p2", "flag_privacy")
    journal.decide("ann", "preference/other", "p3", "reject", reason="of another recipe")
    report = build_preference(workspace, "tiny", pairs)
    built = read_records(workspace.preference_pairs("tiny"), PreferencePair)
    assert [(pair.pair_id, pair.chosen, pair.source) for pair in built] == [
        ("p1", "better", "review"),
        ("p3", "good 3", "chat"),
    ]
    assert {reason: lost["count"] for reason, lost in report.details["dropped"].items()} == {
        "review_rejected": 1,
        "review_privacy": 1,
    }


class ScriptedModel:
    """Asks and answers from lists, and remembers what it was asked."""

    def __init__(self, questions: list[str], answers: list[str]) -> None:
        self.texts = [questions, answers]
        self.calls: list[Sequence[GenerationRequest]] = []

    def ask(self, requests: Sequence[GenerationRequest]) -> Sequence[str]:
        self.calls.append(requests)
        return self.texts[0]

    def answer(self, requests: Sequence[GenerationRequest]) -> Sequence[str]:
        self.calls.append(requests)
        return self.texts[1]


class Echo:
    """Writes what a function makes of each request."""

    def __init__(self, write: Callable[[GenerationRequest], str]) -> None:
        self.ask = self.answer = lambda requests: [write(request) for request in requests]


def alignment_samples(tmp_path: Path, number: int) -> list[Sample]:
    workspace = workspace_with(tmp_path, *(figure(index) for index in range(number)))
    build_alignment(workspace)
    return read_records(workspace.samples("alignment"), Sample)


def test_the_model_asks_answers_twice_and_the_judge_ranks(tmp_path: Path) -> None:
    samples = alignment_samples(tmp_path, 6)
    model = ScriptedModel(
        ["What is seen?", "no question", "1. Where is it?", "Is it?", "Is it?", "Which lung?"],
        [
            "A large nodule in the left lung.", "A fracture.",  # the first is nearer to the caption
            "Bone", "The left lung shows a large nodule",  # the second is
            "yes", "Yes",  # equal
            "cat", "dog",  # a tie: neither overlaps
            "", "left",  # empty
        ],
    )  # fmt: skip
    rows = list(self_preferences(samples, model, OverlapJudge(), ask="model", seed=3))
    pairs = [row for row in rows if isinstance(row, PreferencePair)]
    assert [(pair.question, pair.chosen, pair.rejected) for pair in pairs] == [
        ("What is seen?", "A large nodule in the left lung.", "A fracture."),
        ("Where is it?", "The left lung shows a large nodule", "Bone"),
    ]
    assert {pair.source for pair in pairs} == {"judge:overlap-offline"}
    assert [row.reason for row in rows if isinstance(row, Dropped)] == [
        "question_malformed", "answers_equal", "tie", "answer_empty"
    ]  # fmt: skip
    asked, answered = model.calls
    assert all(request.prompt.count("<image>") == 1 for request in [*asked, *answered])
    assert answered[0].prompt == answered[1].prompt
    assert answered[0].seed != answered[1].seed
    assert answered[0].image == samples[0].image.bytes


def test_pairs_are_the_same_for_the_same_seed(tmp_path: Path) -> None:
    samples = alignment_samples(tmp_path, 20)

    def write(request: GenerationRequest) -> str:
        return f"A nodule of {request.seed} mm in the left lung. Is it?" * (1 + request.seed % 2)

    def built(name: str, seed: int) -> list[bytes]:
        workspace = Workspace(tmp_path / name)
        build_preference(
            workspace, "tiny", self_preferences(samples, Echo(write), OverlapJudge(0.0), questions=2, seed=seed)
        )
        return [path.read_bytes() for path in shard_paths(workspace.preference_pairs("tiny"))]

    assert built("a", 1) == built("b", 1)
    assert built("c", 2) != built("a", 1)


def test_questions_of_the_dataset_are_asked_where_the_model_cannot_ask(tmp_path: Path) -> None:
    (sample,) = alignment_samples(tmp_path, 1)
    turns = (*sample.turns, Turn("user", "Which side?"), Turn("assistant", "left"))
    sample = dataclasses.replace(sample, turns=turns)
    model = ScriptedModel([], ["A nodule.", "Chest X-ray.", "left", "A chest X-ray with a large nodule in the lung"])
    rows = list(self_preferences([sample], model, OverlapJudge(), ask="dataset", questions=2))
    pairs = [row for row in rows if isinstance(row, PreferencePair)]
    # The reference of the second question is its own answer, not the caption.
    assert [(pair.pair_id, pair.question, pair.chosen) for pair in pairs][-1] == ("10_F0-q2", "Which side?", "left")
    assert pairs[0].question == sample.turns[0].text.replace("<image>", "").strip()
    assert len(model.calls) == 1


def test_what_people_preferred_in_the_chat_is_added(tmp_path: Path) -> None:
    workspace = workspace_with(tmp_path, figure(1))
    (pair,) = (row for row in join_preferences(
        workspace.figure_shards, published(tmp_path / "dpo.json", ("10_F1.jpg", "A", "B"))
    ) if isinstance(row, PreferencePair))  # fmt: skip
    save_preference(workspace, dataclasses.replace(pair, pair_id="chat-1", source="chat"))
    report = build_preference(workspace, "tiny", [pair])
    assert report.details["by"]["source"] == {"chat": 1, "official": 1}
    assert [row.pair_id for row in read_records(workspace.preference_pairs("tiny"), PreferencePair)] == [
        "10_F1",
        "chat-1",
    ]


def test_where_the_model_asks_nothing_the_dataset_does(tmp_path: Path) -> None:
    first, second = alignment_samples(tmp_path, 2)
    turns = (*first.turns, Turn("user", "Which side?"), Turn("assistant", "left"))
    model = ScriptedModel(["which side", "What is it?"], ["left", "A chest X-ray", "nodule", "A cat"])
    asked: dict[str, int] = {}
    rows = list(
        self_preferences([dataclasses.replace(first, turns=turns), second], model, OverlapJudge(), asked_by=asked)
    )
    pairs = [row for row in rows if isinstance(row, PreferencePair)]
    assert asked == {"model": 1, "dataset": 1}
    assert pairs[0].question == first.turns[0].text.replace("<image>", "").strip()


def test_a_known_question_is_judged_by_its_own_answer(tmp_path: Path) -> None:
    (sample,) = alignment_samples(tmp_path, 1)
    turns = (*sample.turns, Turn("user", "Which side?"), Turn("assistant", "left"))
    model = ScriptedModel(["which  side?"], ["left", "A large nodule in the left lung"])
    (pair,) = self_preferences([dataclasses.replace(sample, turns=turns)], model, OverlapJudge())
    assert isinstance(pair, PreferencePair)
    assert pair.chosen == "left"


def test_no_pair_at_all_is_an_error_with_the_reasons(tmp_path: Path) -> None:
    samples = alignment_samples(tmp_path, 2)
    rows = self_preferences(samples, Echo(lambda request: "same?"), OverlapJudge())
    with pytest.raises(InputError, match="no preference pair came out; answers_equal: 2"):
        build_preference(Workspace(tmp_path), "tiny", rows)


@pytest.mark.parametrize(
    ("replies", "verdict"),
    [
        (["first", "second"], "first"),
        (["Second.", "first"], "second"),
        (["first", "first"], "tie"),  # the order decided
        (["tie", "tie"], "tie"),
        (["tie", "first"], "tie"),
    ],
)
def test_the_endpoint_judge_is_asked_in_both_orders(tmp_path: Path, replies: list[str], verdict: str) -> None:
    with chat_server(lambda body, number: replies[number]) as server, ResponseCache(tmp_path / "a.sqlite") as cache:
        judge = EndpointJudge(ChatClient(Endpoint(server.url, "judge-model"), cache))
        assert judge.rank("Q?", "reference", "one", "two") == verdict
        said = [request["messages"][1]["content"] for request in server.requests]
    assert "First: one\n\nSecond: two" in said[0]
    assert "First: two\n\nSecond: one" in said[1]
    assert judge.name == "judge-model"


def test_a_verdict_of_other_words_is_dropped_with_its_reason(tmp_path: Path) -> None:
    samples = alignment_samples(tmp_path, 1)
    texts: list[Any] = [["Is it?"], ["yes", "no"]]
    with (
        chat_server(lambda body, number: "Both first and second are fine") as server,
        ResponseCache(tmp_path / "a.sqlite") as cache,
    ):
        judge = EndpointJudge(ChatClient(Endpoint(server.url, "m"), cache))
        (row,) = self_preferences(samples, ScriptedModel(*texts), judge)
    assert isinstance(row, Dropped)
    assert row.reason == "verdict_malformed"


@given(st.text(), st.text())
def test_word_f1_is_symmetric_bounded_and_one_for_equals(first: str, second: str) -> None:
    assert 0 <= word_f1(first, second) <= 1
    assert word_f1(first, second) == word_f1(second, first)
    assert word_f1(first, first) in (0.0, 1.0)


def test_word_f1_counts_repeated_words_once_each_side() -> None:
    assert word_f1("a a b", "a b c") == pytest.approx(4 / 6)
    assert word_f1("肺部结节", "肺结节") == pytest.approx(6 / 7)


@pytest.mark.parametrize(
    ("text", "question"),
    [
        ("What is it?", "What is it?"),
        ("- Question: Where is  the mass? It is there.", "Where is the mass?"),
        ("Sure!\n2) Is it large?", "Is it large?"),
        ("这是什么器官?", "这是什么器官?"),
        ("A statement.", ""),
        ("<image>?", ""),
    ],
)
def test_the_first_question_is_taken(text: str, question: str) -> None:
    assert clean_question(text) == question
