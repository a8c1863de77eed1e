"""Event files that TensorBoard reads, beside the data and not in it; other trackers only where configured."""

from __future__ import annotations

import importlib.util
import socket
from pathlib import Path
from typing import Any

import pytest
from twin_case import TINY

from medvlm.config import load_recipe
from medvlm.errors import TrainingError
from medvlm.store import Workspace
from medvlm.training import objectives
from medvlm.training.run import run_stage
from medvlm.training.tracking import configured_trackers

SMALL = [*TINY, *(f"stages.align.{value}" for value in ("max_steps=4", "global_batch=4", "micro_batch=4"))]
RECIPE = load_recipe("tiny-llava-med", SMALL)


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    """(step, value) of a tag, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def event_folders(workspace: Workspace) -> list[Path]:
    return sorted({path.parent for path in workspace.root.rglob("events.out.tfevents*")})


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Addresses beyond this machine that somebody asked for."""
    asked: list[Any] = []
    look_up = socket.getaddrinfo

    def noted(host: Any, *rest: Any, **named: Any) -> Any:
        if host not in (None, "localhost", "127.0.0.1", "::1", socket.gethostname()):
            asked.append(host)
            raise OSError(f"no network in tests: {host}")
        return look_up(host, *rest, **named)

    monkeypatch.setattr(socket, "getaddrinfo", noted)
    return asked


def test_the_curve_is_in_event_files_outside_the_checkpoint(workspace: Workspace, no_network: list[Any]) -> None:
    report = run_stage(workspace, RECIPE, 1)
    (folder,) = event_folders(workspace)
    assert folder.parent == workspace.logs(RECIPE.name, 1)
    assert workspace.stage(RECIPE.name, 1) not in folder.parents
    curve = report.details["curves"]["all"]
    assert scalars(folder, "train/loss") == [(p["step"], pytest.approx(p["loss"], abs=1e-5)) for p in curve]
    assert len(scalars(folder, "train/learning_rate")) == len(curve) == 4
    assert no_network == []


def test_a_resumed_run_draws_one_curve(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def fail_once(model: Any, batch: Any, tokens: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("a failure between two checkpoints")
        return objectives.answer_loss(model, batch, tokens)

    monkeypatch.setitem(objectives.OBJECTIVES, "answer", fail_once)
    # A checkpoint after step 2; the third step is written down, lost, and done again.
    recipe = load_recipe(RECIPE.name, [*SMALL, "checkpoints.every=0.5"])
    with pytest.raises(RuntimeError, match="between two checkpoints"):
        run_stage(workspace, recipe, 1)
    report = run_stage(workspace, recipe, 1)
    (folder,) = event_folders(workspace)
    assert [step for step, _ in scalars(folder, "train/loss")] == [1, 2, 3, 4]
    assert [point["step"] for point in report.details["curves"]["all"]] == [1, 2, 3, 4]


def test_nothing_but_tensorboard_unless_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert configured_trackers({}) == []
    assert configured_trackers({"MLFLOW_TRACKING_URI": "http://mlflow:5000"}) == ["mlflow"]
    assert configured_trackers({"WANDB_API_KEY": "k", "MLFLOW_TRACKING_URI": "u"}) == ["mlflow", "wandb"]
    assert configured_trackers({"WANDB_MODE": "offline"}) == ["wandb"]
    assert configured_trackers({"WANDB_API_KEY": "k", "WANDB_MODE": "disabled"}) == []
    assert configured_trackers({"WANDB_API_KEY": "k", "WANDB_DISABLED": "true"}) == []
    assert configured_trackers({"WANDB_API_KEY": ""}) == []


def test_a_configured_tracker_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TrainingError, match="MLFLOW_TRACKING_URI is set") as caught:
        configured_trackers({"MLFLOW_TRACKING_URI": "http://mlflow:5000"})
    assert "medvlm[tracking]" in caught.value.hint
