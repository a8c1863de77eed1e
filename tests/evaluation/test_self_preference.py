"""Pairs from a recipe's own model: which images are asked about, and what a stopped run keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from medvlm.config import load_recipe
from medvlm.data.preference import GenerationRequest
from medvlm.errors import InputError
from medvlm.evaluation.self_preference import Asking, build_self_preference, drawn_samples
from medvlm.records import Image, PreferencePair, Sample, Turn
from medvlm.store import Workspace, read_records, shard_paths, write_records


def sample(index: int, language: str = "en") -> Sample:
    turns = (Turn("user", "<image>\nWhich side?"), Turn("assistant", f"the left side of picture {index}"))
    return Sample(
        f"s{index}", "instruct", Image(str(index).encode(), "a.png"), f"{index:064x}", f"{index:016x}",
        f"PMC{index}", turns, "ct", language, "CC BY", "official",  # type: ignore[arg-type]
    )  # fmt: skip


class Writer:
    """Answers by the seed, and stops after so many answers as a killed process does."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.asked: list[GenerationRequest] = []
        self.answered: list[GenerationRequest] = []
        self.stop_after = stop_after

    def ask(self, requests: Sequence[GenerationRequest]) -> list[str]:
        self.asked += requests
        return ["Which side?" if request.seed % 2 else "left" for request in requests]

    def answer(self, requests: Sequence[GenerationRequest]) -> list[str]:
        if self.stop_after is not None and len(self.answered) >= self.stop_after:
            raise KeyboardInterrupt
        self.answered += requests
        return [f"the left side of picture {request.image.decode()} {request.seed % 3}" for request in requests]


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    checkpoint = SimpleNamespace(metadata={"fingerprint": "f"}, recipe=load_recipe("tiny-llava-med"))
    monkeypatch.setattr("medvlm.models.checkpoint.load_checkpoint", lambda folder: checkpoint)
    monkeypatch.setattr("medvlm.data.preference.BATCH", 8)
    workspace = Workspace(tmp_path)
    write_records(workspace.samples("instruct"), Sample, [*map(sample, range(40)), sample(99, "zh")])
    return workspace


def shards(workspace: Workspace) -> list[bytes]:
    return [path.read_bytes() for path in shard_paths(workspace.preference_pairs("tiny"))]


class Contrary:
    """A judge for whom no two answers are a tie."""

    name = "contrary"

    def rank(self, question: str, reference: str, first: str, second: str) -> str:
        return "first" if first > second else "second"


def build(workspace: Workspace, writer: Writer, **asking: object):  # type: ignore[no-untyped-def]
    return build_self_preference(
        workspace,
        "tiny",
        writer=lambda checkpoint, asked: writer,
        judge=Contrary(),  # type: ignore[arg-type]
        asking=Asking(**asking),  # type: ignore[arg-type]
    )


def test_a_stopped_run_goes_on_where_it_was(workspace: Workspace) -> None:
    whole = Writer()
    report = build(workspace, whole)
    expected = shards(workspace)
    assert report.details["images"] == 40
    assert report.details["asked_by"]["model"] + report.details["asked_by"]["dataset"] == 40
    assert report.counts["pairs"] + report.counts["dropped"] == 40

    stopped = Writer(stop_after=30)
    with pytest.raises(KeyboardInterrupt):
        build(workspace, stopped)
    assert shards(workspace) == expected
    resumed = Writer()
    build(workspace, resumed)
    assert shards(workspace) == expected
    assert len(stopped.answered) + len(resumed.answered) == len(whole.answered) == 80
    assert len(stopped.asked) + len(resumed.asked) == 40
    assert not list(workspace.scratch("preference").iterdir())


def test_other_settings_do_not_reuse_what_was_written(workspace: Workspace) -> None:
    with pytest.raises(KeyboardInterrupt):
        build(workspace, Writer(stop_after=30))
    resumed = Writer()
    build(workspace, resumed, temperature=0.5)
    assert len(resumed.answered) == 80


def test_a_limit_draws_images_by_the_seed(workspace: Workspace) -> None:
    writer = Writer()
    report = build(workspace, writer, limit=10, seed=1)
    assert report.details["images"] == len({request.image for request in writer.answered}) == 10
    drawn, number = drawn_samples(workspace.samples("instruct"), "en", 10, 1)
    ids = [one.sample_id for one in drawn]
    assert number == 10 and ids == sorted(ids, key=lambda one: int(one[1:]))
    other, _ = drawn_samples(workspace.samples("instruct"), "en", 10, 2)
    assert ids != [one.sample_id for one in other]
    pairs = read_records(workspace.preference_pairs("tiny"), PreferencePair)
    assert {pair.group_id.replace("PMC", "s") for pair in pairs} <= set(ids)


def test_only_samples_in_the_recipes_language_are_asked_about(workspace: Workspace) -> None:
    drawn, number = drawn_samples(workspace.samples("instruct"), "zh", None, 0)
    assert ([one.sample_id for one in drawn], number) == (["s99"], 1)
    chinese = dataclasses.replace(sample(1), language="zh")
    write_records(workspace.samples("instruct"), Sample, [chinese])
    with pytest.raises(InputError, match="no sample in the recipe's language, en"):
        build(workspace, Writer())


@pytest.mark.parametrize(("template", "taught"), [("vicuna_v1", False), ("vicuna_v1_sq", True)])
def test_a_model_without_the_role_is_asked_for_a_question_in_words(
    monkeypatch: pytest.MonkeyPatch, template: str, taught: bool
) -> None:
    from medvlm.evaluation import self_preference

    class Questioner(Writer):
        def __init__(self, checkpoint: object, **sampling: float) -> None:
            super().__init__()
            self.sampling = sampling

    monkeypatch.setattr("medvlm.evaluation.self_question.SelfQuestioner", Questioner)
    recipe = load_recipe("tiny-llava-med", [f"stages.instruct.template={template}"])
    checkpoint = SimpleNamespace(metadata={"stage": "instruct"}, recipe=recipe)
    writer = self_preference._questioner(checkpoint, Asking(max_tokens=7))  # type: ignore[arg-type]
    (text,) = writer.ask([GenerationRequest(b"1", "<image>\nAsk.", 1)])
    assert text == ("Which side?" if taught else "the left side of picture 1 1")
