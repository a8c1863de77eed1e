"""Answers to a benchmark: the same at any batch size, each image encoded once, blind ones without the image."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_factory import RECIPE, pictured_item, tiny_checkpoint

from medvlm.errors import CheckpointError, InputError
from medvlm.evaluation.answerer import Answerer, mean_image
from medvlm.evaluation.predict import predict_benchmark
from medvlm.models.checkpoint import Checkpoint, save_checkpoint
from medvlm.records import Prediction, VQAItem
from medvlm.store import Workspace, read_records, write_records


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return tiny_checkpoint()


@pytest.fixture
def workspace(tmp_path: Path, checkpoint: Checkpoint) -> Workspace:
    workspace = Workspace(tmp_path)
    save_checkpoint(workspace.checkpoint(RECIPE.name, 3, "vqa-rad"), checkpoint)
    items = [*(pictured_item(i, "train") for i in range(6)), *(pictured_item(i + 100) for i in range(9))]
    write_records(workspace.items("vqa-rad"), VQAItem, items)
    return workspace


def test_each_image_is_encoded_once(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = checkpoint.model
    encoded: list[int] = []
    original = type(model).get_image_features

    def count(self: Any, pixel_values: torch.Tensor, **options: Any) -> Any:
        encoded.append(len(pixel_values))
        return original(self, pixel_values=pixel_values, **options)

    monkeypatch.setattr(type(model), "get_image_features", count)
    subject = Answerer(checkpoint, "finetune", batch_size=2)
    for batch in subject.batches([pictured_item(i) for i in range(9)]):
        subject.answer(batch)
    assert sum(encoded) == 3


def test_blind_answers_do_not_depend_on_the_image(checkpoint: Checkpoint) -> None:
    mean = mean_image(checkpoint, [pictured_item(0).image.bytes, pictured_item(3).image.bytes])
    subject = Answerer(checkpoint, "finetune", mean=mean)
    same_question = [pictured_item(i) for i in (0, 3, 6)]
    blind = subject.answer(same_question, blind=True)
    assert len({answer.text for answer in blind}) == 1 and all(answer.blind for answer in blind)
    assert len({answer.text for answer in subject.answer(same_question)}) > 1


def test_the_step_writes_both_kinds_for_every_test_item(workspace: Workspace) -> None:
    report = predict_benchmark(workspace, RECIPE, "vqa-rad")
    folder = workspace.predictions(RECIPE.name, "vqa-rad")
    answers = read_records(folder / "answers", Prediction)
    assert report.counts["items"] == 9 and report.counts["answers"] == len(answers) == 18
    assert [(a.item_id, a.blind) for a in answers] == [(f"q{i + 100}", b) for b in (False, True) for i in range(9)]
    assert (folder / "report.json").is_file() and not list(workspace.scratch().rglob("*.jsonl"))
    before = [path.read_bytes() for path in sorted((folder / "answers").iterdir())]
    predict_benchmark(workspace, RECIPE, "vqa-rad", batch_size=4)
    assert [path.read_bytes() for path in sorted((folder / "answers").iterdir())] == before


def test_a_stopped_run_goes_on(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = predict_benchmark(workspace, RECIPE, "vqa-rad")
    calls: list[int] = []
    original = Answerer.answer

    def stop(self: Answerer, items: Any, **options: Any) -> Any:
        calls.append(len(items))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, items, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Answerer, "answer", stop)
        predict_benchmark(workspace, RECIPE, "vqa-rad", batch_size=4)
    resumed = predict_benchmark(workspace, RECIPE, "vqa-rad", batch_size=4)
    assert resumed.counts["resumed"] == 8 and resumed.fingerprint == whole.fingerprint


def test_a_missing_checkpoint_and_a_broken_image_are_named(workspace: Workspace, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no finished checkpoint"):
        predict_benchmark(workspace, RECIPE, "vqa-rad", stages=[2])
    write_records(workspace.items("vqa-rad"), VQAItem, [pictured_item(0, "train"), pictured_item(7, data=b"nonsense")])
    with pytest.raises(InputError) as caught:
        predict_benchmark(workspace, RECIPE, "vqa-rad")
    assert "q7" in caught.value.where


def test_answers_of_several_stages_lie_side_by_side(workspace: Workspace, checkpoint: Checkpoint) -> None:
    save_checkpoint(workspace.checkpoint(RECIPE.name, 2), checkpoint)
    report = predict_benchmark(workspace, RECIPE, "vqa-rad", stages=(3, 2))
    answers = read_records(workspace.predictions(RECIPE.name, "vqa-rad") / "answers", Prediction)
    assert [a.stage for a in answers] == ["instruct"] * 18 + ["finetune"] * 18
    assert set(report.details["checkpoints"]) == {"instruct", "finetune"}


def test_a_benchmark_that_stage_3_did_not_learn_is_answered_by_its_first_model(workspace: Workspace) -> None:
    items = [dataclasses.replace(pictured_item(i), benchmark="pneumoniamnist", answer="normal") for i in range(3)]
    write_records(workspace.items("pneumoniamnist"), VQAItem, items)
    report = predict_benchmark(workspace, RECIPE, "pneumoniamnist")
    answers = read_records(workspace.predictions(RECIPE.name, "pneumoniamnist") / "answers", Prediction)
    assert report.details["prompt"] == "question_first+options" and report.details["options_hint"]
    assert "options: [normal, pneumonia]\n<image>" in answers[0].prompt
    assert answers[0].options == ("normal", "pneumonia") and len(answers[0].option_logprobs) == 2


def test_another_prompt_is_another_run(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no prompt 'upside_down'"):
        predict_benchmark(workspace, RECIPE, "vqa-rad", prompt="upside_down")
    calls: list[int] = []
    original = Answerer.answer

    def stop_later(self: Answerer, items: Any, **options: Any) -> Any:
        calls.append(len(items))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, items, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Answerer, "answer", stop_later)
        predict_benchmark(workspace, RECIPE, "vqa-rad", batch_size=4)
    # What was answered to another prompt is not taken for an answer to this one.
    assert predict_benchmark(workspace, RECIPE, "vqa-rad", prompt="image_first").counts["resumed"] == 0


def test_a_recipe_that_puts_the_image_first_is_asked_so(workspace: Workspace) -> None:
    first = RECIPE.model_copy(update={"model": RECIPE.model.model_copy(update={"image_first": True})})
    report = predict_benchmark(workspace, first, "vqa-rad", limit=2)
    assert report.details["prompt"] == "image_first"
    with pytest.raises(InputError, match="always puts the image first"):
        predict_benchmark(workspace, first, "vqa-rad", prompt="question_first")
