"""A small workspace with drawn samples, and a recipe of a few steps."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass

from PIL import Image as PillowImage
from PIL import ImageDraw

from medvlm.recipe_schema import Recipe
from medvlm.records import Image, Sample, Turn, VQAItem
from medvlm.store import Report, Workspace, write_records

STEPS = 20
TINY = [
    f"stages.align.max_steps={STEPS}",
    f"stages.instruct.max_steps={STEPS}",
    "stages.finetune.max_steps=3",
    "stages.instruct.global_batch=16",
    "stages.instruct.micro_batch=8",
    "benchmarks=[vqa-rad, slake]",
]


def picture(index: int) -> Image:
    """A disc whose side and colour follow from the index."""
    drawn = PillowImage.new("RGB", (100, 80), (20 + 9 * (index % 7), 30, 40))
    x = 25 if index % 2 else 75
    ImageDraw.Draw(drawn).ellipse((x - 12, 28, x + 12, 52), fill=(250, 240, 20 * (index % 5)))
    stream = io.BytesIO()
    drawn.save(stream, "PNG")
    return Image(stream.getvalue(), f"{index}.png")


def sample(index: int, dataset: str) -> Sample:
    side = "left" if index % 2 else "right"
    turns = (
        Turn("user", "<image>\nWhat is shown?" if index % 3 else "What is shown?\n<image>"),
        Turn("assistant", f"A disc on the {side} side."),
    )
    if dataset == "instruct":
        turns += (Turn("user", f"Is the disc on the {side} side?"), Turn("assistant", "Yes"))
    image = picture(index)
    digest = hashlib.sha256(image.bytes).hexdigest()
    return Sample(
        f"s{index}", dataset, image, digest, "0" * 16, f"g{index}", turns, "ct", "en", "CC BY", "generated-offline"
    )


def item(index: int, benchmark: str) -> VQAItem:
    image = picture(index // 2)
    side = "left" if (index // 2) % 2 else "right"
    digest = hashlib.sha256(image.bytes).hexdigest()
    return VQAItem(
        item_id=str(index),
        benchmark=benchmark,
        split="train" if index < 40 else "test",
        image=image,
        image_id=f"i{index // 2}",
        image_sha256=digest,
        image_phash="0" * 16,
        question="Is the disc on the left side?" if index % 2 else "Which side is the disc on?",
        answer=("yes" if side == "left" else "no") if index % 2 else side,
        answer_type="closed" if index % 2 else "open",
        answer_type_derived=False,
        question_type="POS",
        modality="CT",
        organ="CHEST",
        language="en",
    )


def fill(workspace: Workspace) -> Workspace:
    for dataset in ("alignment", "instruct"):
        write_records(workspace.samples(dataset), Sample, (sample(i, dataset) for i in range(40)))
    for benchmark in ("vqa-rad", "slake"):
        write_records(workspace.items(benchmark), VQAItem, (item(i, benchmark) for i in range(52)))
    return workspace


@dataclass(frozen=True)
class TrainedTwin:
    workspace: Workspace
    recipe: Recipe
    reports: tuple[Report, Report, Report]
