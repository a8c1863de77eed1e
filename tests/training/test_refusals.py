"""Runs that cannot go on say what happened, where, and what to do next."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from twin_case import TINY, item, sample

from medvlm.config import load_recipe
from medvlm.errors import CheckpointError, InputError, MedVLMError, NonFiniteLoss, OutOfMemory, TrainingError
from medvlm.records import Image, Sample, Turn, VQAItem
from medvlm.store import Workspace, write_json, write_records
from medvlm.training import objectives
from medvlm.training.run import run_stage

RECIPE = load_recipe("tiny-llava-med", TINY)


def refused(kind: type[MedVLMError], workspace: Workspace, stage: int, *overrides: str) -> MedVLMError:
    with pytest.raises(kind) as caught:
        run_stage(workspace, load_recipe("tiny-llava-med", [*TINY, *overrides]), stage)
    assert not workspace.checkpoint("tiny-llava-med", stage).exists()
    return caught.value


def test_an_empty_dataset(workspace: Workspace) -> None:
    write_records(workspace.samples("alignment"), Sample, [])
    error = refused(InputError, workspace, 1)
    assert "nothing to learn in stage align" in error.what
    assert str(workspace.samples("alignment")) in error.where and "dataset build alignment" in error.hint


def test_a_benchmark_without_train_split(trained: Any, workspace: Workspace) -> None:
    write_records(workspace.items("slake"), VQAItem, (item(i, "slake") for i in range(40, 52)))
    link = workspace.stage("tiny-llava-med", 2)
    link.parent.mkdir(parents=True)
    link.symlink_to(trained.workspace.stage("tiny-llava-med", 2))
    assert "build-benchmark" in refused(InputError, workspace, 3, "benchmarks=[slake]").hint


def test_a_broken_contract(workspace: Workspace) -> None:
    write_json(workspace.contract("alignment") / "result.json", {"success": False})
    error = refused(TrainingError, workspace, 1)
    assert "contract 'alignment'" in error.what and "result.json" in error.where


def test_a_step_that_has_not_run(workspace: Workspace) -> None:
    assert "train it first" in refused(CheckpointError, workspace, 2).hint


def test_a_global_batch_that_does_not_split(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert "does not split over 3 processes" in refused(TrainingError, workspace, 1).what


def test_a_sample_that_does_not_decode_is_named(workspace: Workspace) -> None:
    good = [sample(i, "alignment") for i in range(4)]
    bad = Sample(**{**_fields(good[0]), "sample_id": "broken-1", "image": Image(b"no", "x"), "image_sha256": "0"})
    write_records(workspace.samples("alignment"), Sample, [*good, bad])
    assert "sample broken-1" in refused(InputError, workspace, 1).where


def test_a_malformed_conversation_is_named(workspace: Workspace) -> None:
    bad = Sample(**{**_fields(sample(0, "alignment")), "sample_id": "odd", "turns": (Turn("user", "<image>"),)})
    write_records(workspace.samples("alignment"), Sample, [bad])
    assert "sample odd" in refused(InputError, workspace, 1).where


def _fields(record: Any) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__dataclass_fields__}


def test_texts_that_the_length_limit_cuts_are_counted(workspace: Workspace) -> None:
    turns: list[Turn] = []
    for number in range(12):
        mark = "<image>\n" if number == 0 else ""
        turns += [
            Turn("user", f"{mark}Question {number}: what is shown here?"),
            Turn("assistant", f"A disc, {number}."),
        ]
    long = Sample(**{**_fields(sample(0, "instruct")), "sample_id": "long", "turns": tuple(turns)})
    short = [sample(i, "alignment") for i in range(20)]
    write_records(workspace.samples("alignment"), Sample, [long, *short])
    few = ["stages.align.template=vicuna_v1", "stages.align.max_steps=1", "stages.align.max_length=96"]
    report = run_stage(workspace, load_recipe("tiny-llava-med", [*TINY, *few]), 1)
    assert (report.counts["samples"], report.counts["truncated"]) == (21, 1)


def test_a_loss_that_is_not_a_number(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def explode(model: Any, batch: Any, tokens: Any) -> torch.Tensor:
        calls.append(1)
        loss = objectives.answer_loss(model, batch, tokens)
        return loss * float("nan") if len(calls) == 3 else loss

    monkeypatch.setitem(objectives.OBJECTIVES, "answer", explode)
    error = refused(NonFiniteLoss, workspace, 1, "checkpoints.every=0.05")
    assert "at step 3" in error.what and "s1" in error.what
    assert "checkpoint-2" in error.where and "learning_rate" in error.hint


def test_too_little_memory(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhaust(model: Any, batch: Any, tokens: Any) -> torch.Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 10 bytes")

    monkeypatch.setitem(objectives.OBJECTIVES, "answer", exhaust)
    error = refused(OutOfMemory, workspace, 1)
    assert "stages.align.micro_batch" in error.where and "--set stages.align.micro_batch=16" in error.hint


def test_another_model_than_the_stage_before(trained: Any) -> None:
    recipe = load_recipe("tiny-llava-med", [*TINY, "model.language_model.mlp_size=256"])
    with pytest.raises(CheckpointError, match=r"another model\.language_model\.mlp_size"):
        run_stage(trained.workspace, recipe, 2)
