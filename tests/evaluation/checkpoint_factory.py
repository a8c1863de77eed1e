"""A tiny checkpoint with random weights, and items with real pictures, for the tests of answers."""

from __future__ import annotations

import functools
import hashlib
import io
from typing import Any

from PIL import Image as PillowImage

from medvlm.config import load_recipe
from medvlm.models.checkpoint import Checkpoint, build_model
from medvlm.models.tokenizer import train_tokenizer
from medvlm.models.vision import ImageProcessor
from medvlm.records import Image, VQAItem

RECIPE = load_recipe("tiny-llava-med")


@functools.cache
def tiny_checkpoint(name: str = RECIPE.name) -> Checkpoint:
    """Random weights: it says something, and not the same of everything."""
    recipe = load_recipe(name)
    tokenizer = train_tokenizer(recipe, ["What is shown in this very picture?", "A lesion", "Yes"] * 3)
    metadata = {"stage": "finetune", "fingerprint": "f"}
    processor = ImageProcessor.of(recipe.model.vision_tower)
    return Checkpoint(build_model(recipe, tokenizer), tokenizer, processor, recipe, metadata)


def picture(index: int) -> bytes:
    colour = PillowImage.new("RGB", (40, 40), (60 * index % 255, 90, (200 - 40 * index) % 255))
    stream = io.BytesIO()
    colour.save(stream, "PNG")
    return stream.getvalue()


def pictured_item(index: int, split: Any = "test", data: bytes | None = None, answer: str = "yes") -> VQAItem:
    """Three questions about each picture, of three lengths."""
    image = picture(index // 3) if data is None else data
    return VQAItem(
        item_id=f"q{index}",
        benchmark="vqa-rad",
        split=split,
        image=Image(image, f"{index}.png"),
        image_id=f"i{index // 3}",
        image_sha256=hashlib.sha256(image).hexdigest(),
        image_phash="0" * 16,
        question="What is shown" + " in this very picture" * (index % 3) + "?",
        answer=answer,
        answer_type="closed" if answer in ("yes", "no") else "open",
        answer_type_derived=False,
        question_type="PRES",
        modality="CT",
        organ="CHEST",
        language="en",
    )
