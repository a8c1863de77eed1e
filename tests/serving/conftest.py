"""A checkpoint of the twin before any training: it answers nonsense, through the real code."""

from __future__ import annotations

from pathlib import Path

import pytest

from medvlm.config import load_recipe


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from medvlm.models.checkpoint import Checkpoint, build_model, save_checkpoint
    from medvlm.models.tokenizer import train_tokenizer
    from medvlm.models.vision import ImageProcessor

    recipe = load_recipe("tiny-llava-med")
    tokenizer = train_tokenizer(recipe, ["What is shown? A chest radiograph with a nodule."] * 20)
    processor = ImageProcessor.of(recipe.model.vision_tower)
    metadata = {"stage": "finetune", "fingerprint": "f"}
    path = tmp_path_factory.mktemp("chat") / "checkpoint"
    save_checkpoint(path, Checkpoint(build_model(recipe, tokenizer), tokenizer, processor, recipe, metadata))
    return path
