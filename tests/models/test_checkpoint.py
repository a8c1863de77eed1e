"""Models and checkpoints: transformers opens them, every key is accounted for, the tower carries the image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from medvlm.config import load_recipe
from medvlm.errors import CheckpointError, ImageTokenMismatch
from medvlm.models.checkpoint import Checkpoint, build_model, load_checkpoint, save_checkpoint
from medvlm.models.tokenizer import train_tokenizer
from medvlm.models.vision import ImageProcessor
from medvlm.models.vlm import merge_image_features


def made(*overrides: str) -> Checkpoint:
    recipe = load_recipe("tiny-llava-med", overrides)
    tokenizer = train_tokenizer(recipe, ["Is there a lesion?", "Yes"] * 3)
    processor = ImageProcessor.of(recipe.model.vision_tower)
    return Checkpoint(build_model(recipe, tokenizer).eval(), tokenizer, processor, recipe, {"fingerprint": "f"})


def batch(checkpoint: Checkpoint) -> dict[str, Any]:
    from medvlm.training.collate import ConversationEncoder

    encoder = ConversationEncoder(checkpoint.recipe, checkpoint.tokenizer, "vicuna_v1", 192)
    generator = torch.Generator().manual_seed(1)
    side = checkpoint.recipe.model.vision_tower.image_px
    return {
        "input_ids": torch.tensor([encoder.prompt("<image>\nIs there a lesion?")]),
        "pixel_values": torch.randn((1, 3, side, side), generator=generator),
    }


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu"])
def test_a_checkpoint_opens_with_transformers_and_gives_the_same_logits(tmp_path: Path, kind: str) -> None:
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    checkpoint = made(f"model.projector.kind={kind}")
    save_checkpoint(tmp_path / "c", checkpoint)
    inputs = batch(checkpoint)
    expected = checkpoint.model(**inputs).logits
    loaded = load_checkpoint(tmp_path / "c")
    assert loaded.recipe == checkpoint.recipe and loaded.metadata == {"fingerprint": "f"}
    assert torch.equal(loaded.model.eval()(**inputs).logits, expected)
    auto = AutoModelForImageTextToText.from_pretrained(tmp_path / "c").eval()
    assert type(auto) is type(checkpoint.model) and torch.equal(auto(**inputs).logits, expected)
    text = "Is there a 病变 lesion? ✓"
    auto_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "c")
    assert auto_tokenizer.decode(auto_tokenizer(text, add_special_tokens=False)["input_ids"]) == text


@pytest.mark.parametrize("damage", ["missing", "unexpected", "shape"])
def test_weights_that_do_not_cover_the_model_are_refused(tmp_path: Path, damage: str) -> None:
    checkpoint = made()
    save_checkpoint(tmp_path / "c", checkpoint)
    weights = load_file(tmp_path / "c/model.safetensors")
    name = "model.vision_tower.embeddings.position_embedding.weight"
    if damage == "missing":
        del weights[name]
    elif damage == "unexpected":
        weights[name := "model.language_model.layers.9.mlp.up_proj.weight"] = torch.zeros(2, 2)
    else:
        weights[name] = weights[name][:3].clone()
    save_file(weights, tmp_path / "c/model.safetensors", metadata={"format": "pt"})
    (tmp_path / "c/metadata.json").write_text("{}")  # else its hash would tell first
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path / "c")
    assert name.split(".")[-2] in caught.value.what and str(tmp_path / "c") in caught.value.where


def test_an_absent_or_truncated_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no finished checkpoint"):
        load_checkpoint(tmp_path)
    save_checkpoint(tmp_path / "c", made())
    path = tmp_path / "c/model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"not those that were written: model\.safetensors"):
        load_checkpoint(tmp_path / "c")
    (tmp_path / "c/metadata.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_checkpoint(tmp_path / "c")


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_checkpoint(tmp_path / name, made())
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
    assert not torch.equal(made("seed=1").model.lm_head.weight, made("seed=2").model.lm_head.weight)


def test_building_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    made()
    assert torch.equal(torch.rand(1), expected)


def test_a_frozen_random_tower_still_tells_where_something_is() -> None:
    """Linear read-out of a disc's column and row from the mean patch features of a tower that never learned."""
    checkpoint = made()
    side = checkpoint.recipe.model.vision_tower.image_px
    generator = torch.Generator().manual_seed(0)
    places = torch.rand((160, 2), generator=generator) * 0.7 + 0.15
    grid = torch.stack(torch.meshgrid(*[torch.linspace(0, 1, side)] * 2, indexing="xy"), -1)
    discs = ((grid[None] - places[:, None, None]).norm(dim=-1) < 0.12).float()[:, None].expand(-1, 3, -1, -1)
    with torch.no_grad():
        hidden = checkpoint.model.model.vision_tower(discs, output_hidden_states=True).hidden_states[-2]
    # What a projector and attention can do: pick patches by content, read their place.
    features = torch.cat([hidden[:, 1:].flatten(1), torch.ones(160, 1)], dim=1).double()
    train, test = slice(0, 120), slice(120, 160)
    gram = features[train].T @ features[train] + 0.1 * torch.eye(features.shape[1])
    weights = torch.linalg.solve(gram, features[train].T @ places[train].double())
    error = (features[test] @ weights - places[test]).abs().mean()
    assert error < 0.08  # a guess of the middle is off by 0.175


def test_merging_writes_images_over_placeholders_in_reading_order() -> None:
    text = torch.zeros(2, 4, 3)
    ids = torch.tensor([[1, 9, 9, 2], [9, 9, 1, 2]])
    images = torch.arange(12.0).reshape(2, 2, 3) + 1
    merged = merge_image_features(text, images, ids, image_token_id=9)
    assert torch.equal(merged[0, 1:3], images[0]) and torch.equal(merged[1, :2], images[1])
    assert not text.any()


@pytest.mark.parametrize("placeholders", [0, 3, 5])
def test_a_batch_with_another_number_of_placeholders_is_refused(placeholders: int) -> None:
    ids = torch.tensor([[9] * placeholders + [1] * (6 - placeholders)])
    with pytest.raises(ImageTokenMismatch, match=f"{placeholders} image placeholders.*4 features"):
        merge_image_features(torch.zeros(1, 6, 3), torch.zeros(2, 2, 3), ids, image_token_id=9)
    checkpoint = made()
    inputs = batch(checkpoint)
    with pytest.raises(ImageTokenMismatch):
        checkpoint.model(input_ids=inputs["input_ids"][:, :8], pixel_values=inputs["pixel_values"])


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_pictures_that_are_not_square(fit: str) -> None:
    import io

    from PIL import Image

    checkpoint = made(f"model.vision_tower.image_fit={fit}")
    picture = Image.new("RGB", (200, 100))
    picture.paste((255, 255, 255), (0, 0, 20, 100))
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    pixels = checkpoint.processor(stream.getvalue())
    assert pixels.shape == (3, 96, 96)
    # A white bar at the left edge: the crop loses it, the padded image keeps it.
    assert (pixels.max() > 1.5) == (fit == "pad")
