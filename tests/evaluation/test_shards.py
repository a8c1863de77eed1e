"""Several processes answer together: the same answers as one, and never fewer."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from checkpoint_factory import RECIPE, pictured_item, tiny_checkpoint

from medvlm.errors import PredictionMismatch, TrainingError
from medvlm.evaluation import shards
from medvlm.evaluation.journal import AnswerJournal, merged_answers
from medvlm.evaluation.predict import predict_benchmark
from medvlm.models.checkpoint import save_checkpoint
from medvlm.records import Prediction, VQAItem
from medvlm.store import Workspace, write_records


def die(event: Mapping[str, Any]) -> None:
    """A progress listener of one process of two: it is killed after its first batch."""
    if os.environ.get("RANK") == "0":
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    workspace = Workspace(tmp_path)
    save_checkpoint(workspace.checkpoint(RECIPE.name, 3, "vqa-rad"), tiny_checkpoint())
    write_records(workspace.items("vqa-rad"), VQAItem, [pictured_item(i) for i in range(12)])
    return workspace


def answered(workspace: Workspace) -> list[bytes]:
    folder = workspace.predictions(RECIPE.name, "vqa-rad") / "answers"
    return [path.read_bytes() for path in sorted(folder.iterdir())]


def test_two_processes_give_the_bytes_of_one_and_a_killed_one_is_an_error(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict_benchmark(workspace, RECIPE, "vqa-rad", batch_size=2)
    alone = answered(workspace)
    with monkeypatch.context() as killing:
        killing.setenv("MEDVLM_PROGRESS", "test_shards:die")
        killing.setenv("PYTHONPATH", f"{Path(__file__).parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        with pytest.raises(TrainingError, match="ended early"):
            predict_benchmark(workspace, RECIPE, "vqa-rad", batch_size=2, processes=2)
    # What stood there before still stands: no shorter test set in its place.
    assert answered(workspace) == alone
    journals = workspace.scratch("predict", RECIPE.name, "vqa-rad-stage3")
    # Whole lines below the first: the other process was ended wherever it was, perhaps before its first line.
    kept = sum(max(0, path.read_text("utf-8").count("\n") - 1) for path in journals.glob("*.jsonl"))
    assert kept >= 2
    resumed = predict_benchmark(workspace, RECIPE, "vqa-rad", batch_size=2, processes=2)
    assert resumed.counts["answers"] == 24 and resumed.counts["resumed"] == kept
    assert answered(workspace) == alone and not journals.exists()


def test_each_image_is_one_processs_and_all_are_covered(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(
        shards, "answer_all", lambda backend, items, journal, **rest: seen.append([i.item_id for i in items])
    )
    shard = shards.Shard(
        checkpoint=str(workspace.checkpoint(RECIPE.name, 3, "vqa-rad")),
        model=RECIPE.name,
        stage="finetune",
        items=str(workspace.items("vqa-rad")),
        journal=str(workspace.scratch("x")),
        inputs="i",
        benchmark="vqa-rad",
        order="question_first",
        options=False,
        likelihoods=False,
        limit=None,
        batch_size=4,
    )
    for rank in range(3):
        shards.answer_shard(shard, rank=rank, processes=3)
    assert sorted(name for share in seen for name in share) == sorted(f"q{i}" for i in range(12))
    images = [{int(name[1:]) // 3 for name in share} for share in seen]
    assert not images[0] & images[1] and not images[1] & images[2] and not images[0] & images[2]


def answer(item_id: str) -> Prediction:
    return Prediction(item_id, "vqa-rad", "m", "finetune", False, "p", "yes", ("yes", "no"), (-0.5, -1.0))


def test_journals_are_merged_by_id_whatever_wrote_them(tmp_path: Path) -> None:
    items = [pictured_item(i) for i in range(4)]
    for rank, ids in enumerate((["q3", "q0"], ["q1"])):
        with AnswerJournal.of(tmp_path, "inputs", rank=rank) as journal:
            journal.append([answer(item_id) for item_id in ids])
    with pytest.raises(PredictionMismatch, match="1 of 4 answers are missing: q2"):
        merged_answers(tmp_path, "inputs", items, (False,))
    with AnswerJournal.of(tmp_path, "inputs", rank=0) as journal:
        assert [item.item_id for item in journal.todo(items, blind=False)] == ["q2"]
        assert len(journal.todo(items, blind=True)) == 4
        journal.append([answer("q2")])
    with (tmp_path / "1.jsonl").open("a") as stream:
        stream.write('{"item_id": "q1", "benchm')  # killed while writing
    assert merged_answers(tmp_path, "inputs", items, (False,)) == [answer(f"q{i}") for i in range(4)]
    with AnswerJournal.of(tmp_path, "other inputs") as journal:
        assert not journal.answers
