"""Each lever alone: the losses of a stage with it are those without it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from twin_case import TINY, TrainedTwin

from medvlm.config import load_recipe
from medvlm.recipe_schema import Recipe
from medvlm.store import Workspace
from medvlm.training.run import run_stage

STEPS = 6


def losses(trained: TrainedTwin, folder: Path, *overrides: str, stage: int = 2) -> list[float]:
    """The first steps of a stage, from the same start."""
    workspace = Workspace(folder)
    for part in ("datasets", "benchmarks"):
        if not (folder / part).exists():
            shutil.copytree(trained.workspace.root / part, folder / part)
    recipe: Recipe = load_recipe("tiny-llava-med", [*TINY, *overrides])
    for number in range(1, stage):
        start = workspace.checkpoint(recipe.name, number)
        if not start.exists():
            shutil.copytree(trained.workspace.checkpoint(recipe.name, number), start)
    report = run_stage(workspace, recipe, stage, fresh=True)
    curve: Any = next(iter(report.details["curves"].values()))
    return [point["loss"] for point in curve]


def test_an_older_cache_gives_way_where_both_are_too_much(
    trained: TrainedTwin, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "ws/scratch/features/old"
    old.mkdir(parents=True)
    (old / "shard.bin").write_bytes(bytes(200_000))
    # 40 images take 492 KB.
    losses(trained, tmp_path / "ws", "stages.align.speed.feature_cache_gb=0.0005", "stages.align.max_steps=2", stage=1)
    assert "1 older removed" in capfd.readouterr().err and not old.exists()
    assert list((tmp_path / "ws/scratch/features").rglob("*.bin"))


# Dynamo looks at the gradients of what it traces.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
# DeepSpeed leaves its own linear function in place after a ZeRO-3 job; torch.compile looks into it.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_layers_leave_the_losses_as_they_are(
    trained: TrainedTwin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without the inductor, whose C++ takes a minute: what is compiled, and how the weights are saved, is the same.
    compiled = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled(self, backend="eager", **options))
    steps = f"stages.instruct.max_steps={STEPS}"
    off = losses(trained, tmp_path / "ws", steps)
    on = losses(trained, tmp_path / "ws", steps, "stages.instruct.speed.compile=true")
    torch.compiler.reset()
    assert on == pytest.approx(off, abs=1e-4)


@pytest.mark.parametrize("lever", ["feature_cache", "loss_at_labels", "packing", "onednn"])
def test_a_lever_leaves_the_losses_as_they_are(trained: TrainedTwin, tmp_path: Path, lever: str) -> None:
    steps = f"stages.instruct.max_steps={STEPS}"
    on = losses(trained, tmp_path / "ws", steps)
    off = losses(trained, tmp_path / "ws", steps, f"stages.instruct.speed.{lever}=false")
    assert on == pytest.approx(off, abs=1e-4)
    assert len(on) == STEPS and on[-1] < on[0]


def test_a_shared_prefix_leaves_the_losses_as_they_are(trained: TrainedTwin, tmp_path: Path) -> None:
    """Stage 1, so that one start serves: its samples are alone with their images but for what the recipe shares."""
    common = ["stages.align.template=vicuna_v1", "stages.align.samples_per_image=4", f"stages.align.max_steps={STEPS}"]
    common += ["stages.align.image_sharing=prefix", "model.image_first=true", "stages.align.trains=[projector]"]
    on, off = (
        losses(trained, tmp_path / name, *common, f"stages.align.speed.shared_prefix={name}", stage=1)
        for name in ("true", "false")
    )
    assert on == pytest.approx(off, abs=1e-4)


def test_stages_and_recipes_share_the_features(
    trained: TrainedTwin, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "ws"
    losses(trained, folder, f"stages.align.max_steps={STEPS}", stage=1)
    assert "feature cache: 40 images x 12 KB = 0.00 GB" in capfd.readouterr().err
    before = sorted(path.stat().st_mtime_ns for path in (folder / "scratch/features").rglob("*.bin"))
    losses(trained, folder, f"stages.instruct.max_steps={STEPS}")
    assert "feature cache" not in capfd.readouterr().err
    assert before == sorted(path.stat().st_mtime_ns for path in (folder / "scratch/features").rglob("*.bin"))


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("stages.instruct.trains=[projector, language_model, vision_tower]", ""),
        ("stages.instruct.speed.feature_cache=false", ""),
        ("stages.instruct.speed.feature_cache_gb=0.0001", "off: more than stages.instruct.speed.feature_cache_gb"),
        ("stages.instruct.max_steps=1", "off: each image is read about once"),
    ],
)
def test_the_cache_is_off_where_it_does_not_serve(
    trained: TrainedTwin, tmp_path: Path, capfd: pytest.CaptureFixture[str], override: str, word: str
) -> None:
    found = losses(trained, tmp_path / "ws", "stages.instruct.max_steps=4", override)
    assert found and all(torch.isfinite(torch.tensor(found)))
    assert not list((tmp_path / "ws").rglob("*.bin")) and not list((tmp_path / "ws/scratch").glob("features/*"))
    assert word in capfd.readouterr().err
