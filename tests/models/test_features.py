"""The feature cache: what it hands out, when it is another one, and what a killed run leaves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from medvlm.config import load_recipe
from medvlm.models import features as module
from medvlm.models.checkpoint import Checkpoint, build_model
from medvlm.models.features import FeatureCache, feature_key, tower_features
from medvlm.models.tokenizer import train_tokenizer
from medvlm.models.vision import ImageProcessor

SHAPE = (4, 8)
IMAGES = [f"{index:064x}" for index in range(70)]


def pixels(sha256: str) -> torch.Tensor:
    return torch.full((3, 2, 2), float(int(sha256, 16)))


def encode(pixels_NCHW: torch.Tensor) -> torch.Tensor:
    return pixels_NCHW[:, 0, 0, 0].view(-1, 1, 1) + torch.arange(32.0).view(1, *SHAPE) / 7


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", "float32"), ("bf16", "bfloat16"), ("fp16", "float16")])
def test_what_was_kept_comes_back_in_the_precision_of_the_stage(tmp_path: Path, precision: str, dtype: str) -> None:
    cache = FeatureCache(tmp_path / "c", SHAPE, precision)
    cache.fill(IMAGES, pixels, encode)
    assert cache.image_bytes == 32 * (4 if precision == "fp32" else 2)
    for again in (cache, FeatureCache(tmp_path / "c", SHAPE, precision)):
        assert not again.missing(IMAGES)
        for sha256 in (IMAGES[0], IMAGES[33], IMAGES[-1]):
            expected = encode(pixels(sha256).unsqueeze(0))[0].to(getattr(torch, dtype))
            assert torch.equal(again[sha256], expected)


def test_shards_are_bounded_and_one_cut_short_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD_BYTES", 20 * 32 * 4)
    cache = FeatureCache(tmp_path / "c", SHAPE, "fp32")
    read: list[str] = []

    def failing(sha256: str) -> torch.Tensor:
        if len(read) == 66:
            raise KeyboardInterrupt
        read.append(sha256)
        return pixels(sha256)

    with pytest.raises(KeyboardInterrupt):
        cache.fill(IMAGES, failing, encode)
    again = FeatureCache(tmp_path / "c", SHAPE, "fp32")
    missing = again.missing(IMAGES)
    assert missing == IMAGES[60:]
    again.fill(missing, pixels, encode)
    assert len(list((tmp_path / "c").glob("*.bin"))) == 4 and not again.missing(IMAGES)
    assert torch.equal(again[IMAGES[65]], encode(pixels(IMAGES[65]).unsqueeze(0))[0])


def test_two_processes_that_share_the_work_see_it_all(tmp_path: Path) -> None:
    one, two = (FeatureCache(tmp_path / "c", SHAPE, "fp32") for _ in range(2))
    one.fill(IMAGES[0::2], pixels, encode)
    two.fill(IMAGES[1::2], pixels, encode)
    assert one.missing(IMAGES) == IMAGES[1::2]
    one.refresh()
    assert not one.missing(IMAGES) and torch.equal(one[IMAGES[1]], two[IMAGES[1]])


def test_an_index_that_another_process_still_writes_is_not_read(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    FeatureCache(folder, SHAPE, "fp32").fill(IMAGES[:3], pixels, encode)
    (index,) = folder.glob("[!.]*.json")
    whole = index.read_text()
    index.unlink()
    (folder / f".tmp-{'0' * 32}-{index.name}").write_text(whole)
    late = FeatureCache(folder, SHAPE, "fp32")
    assert late.missing(IMAGES[:3]) == IMAGES[:3]
    index.write_text(whole)
    late.refresh()
    assert torch.equal(late[IMAGES[1]], encode(pixels(IMAGES[1]).unsqueeze(0))[0])


def made(*overrides: str) -> Checkpoint:
    recipe = load_recipe("tiny-llava-med", overrides)
    tokenizer = train_tokenizer(recipe, ["Is there a lesion?", "Yes"] * 3)
    processor = ImageProcessor.of(recipe.model.vision_tower)
    return Checkpoint(build_model(recipe, tokenizer).eval(), tokenizer, processor, recipe, {"fingerprint": "f"})


def nudged(model: Any) -> None:
    with torch.no_grad():
        model.model.vision_tower.encoder.layers[0].mlp.fc1.bias[0] += 1e-3


def test_models_share_features_when_they_see_the_same() -> None:
    base = feature_key(made(), "fp32")
    assert feature_key(made("model.language_model.layers=2", "model.projector.kind=mlp2x_gelu"), "fp32") == base
    other: list[Callable[[], str]] = [
        lambda: feature_key(made(), "bf16"),
        lambda: feature_key(made("seed=7"), "fp32"),
        lambda: feature_key(made("model.vision_tower.feature_layer=-1"), "fp32"),
        lambda: feature_key(made("model.vision_tower.image_fit=pad"), "fp32"),
    ]
    changed = made()
    nudged(changed.model)
    keys = [base, feature_key(changed, "fp32"), *(key() for key in other)]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("select", ["patch", "all"])
def test_features_through_the_projector_are_what_the_model_makes_of_pixels(select: str) -> None:
    checkpoint = made(f"model.vision_tower.feature_select={select}")
    model: Any = checkpoint.model
    images = torch.randn((2, 3, 96, 96), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = tower_features(model, images)
        assert features.shape == (2, checkpoint.recipe.model.image_tokens, 192)
        projected = model.model.multi_modal_projector(features)
        expected = model.get_image_features(pixel_values=images).pooler_output
    assert torch.allclose(projected, torch.stack(list(expected)), atol=1e-6)
