"""Answers to a benchmark: the same at any batch size, each image encoded once, blind ones without the image."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image as PillowImage

from medvlm.config import load_recipe
from medvlm.errors import CheckpointError, InputError
from medvlm.evaluation.answerer import Answerer, mean_image
from medvlm.evaluation.predict import predict_benchmark
from medvlm.models.checkpoint import Checkpoint, build_model, save_checkpoint
from medvlm.models.tokenizer import train_tokenizer
from medvlm.models.vision import ImageProcessor
from medvlm.records import Image, Prediction, VQAItem
from medvlm.store import Workspace, read_records, write_records

RECIPE = load_recipe("tiny-llava-med")


def item(index: int, split: Any = "test", data: bytes | None = None) -> VQAItem:
    colour = PillowImage.new("RGB", (40, 40), (60 * (index // 3) % 255, 90, 200 - 40 * (index // 3)))
    stream = io.BytesIO()
    colour.save(stream, "PNG")
    image = stream.getvalue() if data is None else data
    return VQAItem(
        item_id=f"q{index}",
        benchmark="vqa-rad",
        split=split,
        image=Image(image, f"{index}.png"),
        image_id=f"i{index // 3}",
        image_sha256=hashlib.sha256(image).hexdigest(),
        image_phash="0" * 16,
        question="What is shown" + " in this very picture" * (index % 3) + "?",
        answer="yes",
        answer_type="closed",
        answer_type_derived=False,
        question_type="PRES",
        modality="CT",
        organ="CHEST",
        language="en",
    )


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    tokenizer = train_tokenizer(RECIPE, ["What is shown in this very picture?", "A lesion", "Yes"] * 3)
    model = build_model(RECIPE, tokenizer)
    processor = ImageProcessor.of(RECIPE.model.vision_tower)
    return Checkpoint(model, tokenizer, processor, RECIPE, {"fingerprint": "f"})


@pytest.fixture
def workspace(tmp_path: Path, checkpoint: Checkpoint) -> Workspace:
    workspace = Workspace(tmp_path)
    save_checkpoint(workspace.checkpoint(RECIPE.name, 3, "vqa-rad"), checkpoint)
    items = [*(item(i, "train") for i in range(6)), *(item(i + 100) for i in range(9))]
    write_records(workspace.items("vqa-rad"), VQAItem, items)
    return workspace


def test_the_same_answers_at_any_batch_size(checkpoint: Checkpoint) -> None:
    items = [item(i) for i in range(9)]
    answers: dict[int, dict[str, str]] = {}
    for size in (1, 4, 64):
        subject = Answerer(checkpoint, "finetune", batch_size=size)
        predictions = [p for batch in subject.batches(items) for p in subject.answer(batch)]
        answers[size] = {p.item_id: p.text for p in predictions}
    assert answers[1] == answers[4] == answers[64]
    assert set(answers[1]) == {f"q{i}" for i in range(9)}
    # A random model says something, and not the same of everything: else the comparison would be empty.
    assert len(set(answers[1].values())) > 1


def test_each_image_is_encoded_once(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = checkpoint.model
    encoded: list[int] = []
    original = type(model).get_image_features

    def count(self: Any, pixel_values: torch.Tensor, **options: Any) -> Any:
        encoded.append(len(pixel_values))
        return original(self, pixel_values=pixel_values, **options)

    monkeypatch.setattr(type(model), "get_image_features", count)
    subject = Answerer(checkpoint, "finetune", batch_size=2)
    for batch in subject.batches([item(i) for i in range(9)]):
        subject.answer(batch)
    assert sum(encoded) == 3


def test_blind_answers_do_not_depend_on_the_image(checkpoint: Checkpoint) -> None:
    mean = mean_image(checkpoint, [item(0).image.bytes, item(3).image.bytes])
    subject = Answerer(checkpoint, "finetune", mean=mean)
    same_question = [item(i) for i in (0, 3, 6)]
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
    write_records(workspace.items("vqa-rad"), VQAItem, [item(0, "train"), item(7, data=b"nonsense")])
    with pytest.raises(InputError) as caught:
        predict_benchmark(workspace, RECIPE, "vqa-rad")
    assert "q7" in caught.value.where
