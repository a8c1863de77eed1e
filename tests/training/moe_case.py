"""A small workspace with labelled pictures of four domains, and a mixture's recipe of a few steps."""

from __future__ import annotations

import dataclasses
import hashlib
import io
from dataclasses import dataclass

from PIL import Image as PillowImage
from PIL import ImageDraw
from twin_case import item, sample

from medvlm.recipe_schema import Recipe
from medvlm.records import Image, Sample, VQAItem
from medvlm.store import Report, Workspace, write_records

RECIPE = "tiny-cliva-med-phi2"
MODALITIES = ("chest_xray", "ct", "mri", "histology", "gross", "unknown")
SMALL = [
    "stages.align.max_steps=2",
    "stages.instruct.max_steps=4",
    "stages.moe_tune.max_steps=6",
    *[
        f"stages.{stage}.{batch}_batch=8"
        for stage in ("align", "instruct", "moe_tune")
        for batch in ("micro", "global")
    ],
    "benchmarks=[vqa-rad, slake]",
    "model.language_model.hidden_size=48",
    "model.language_model.mlp_size=64",
    "model.vision_tower.hidden_size=64",
    "model.vision_tower.mlp_size=64",
]


def picture(index: int, modality: str) -> Image:
    """A ground whose grey level and pattern belong to the modality, and a disc."""
    kind = MODALITIES.index(modality)
    drawn = PillowImage.new("RGB", (96, 96), (40 * kind, 40 * kind, 255 - 40 * kind))
    pen = ImageDraw.Draw(drawn)
    for line in range(0, 96, 4 + 4 * kind):
        pen.line((0, line, 96, line), fill=(255, 255, 40 * kind))
    pen.ellipse((10 + index % 40, 20, 40 + index % 40, 50), fill=(9 * (index % 20), 0, 0))
    stream = io.BytesIO()
    drawn.save(stream, "PNG")
    return Image(stream.getvalue(), f"{index}.png")


def labelled_sample(index: int, dataset: str) -> Sample:
    modality = MODALITIES[index % len(MODALITIES)]
    image = picture(index, modality)
    digest = hashlib.sha256(image.bytes).hexdigest()
    return dataclasses.replace(sample(index, dataset), image=image, image_sha256=digest, modality=modality)


def labelled_item(index: int, benchmark: str) -> VQAItem:
    modality = ("ct", "mri")[index // 2 % 2]
    image = picture(index // 2, modality)
    digest = hashlib.sha256(image.bytes).hexdigest()
    return dataclasses.replace(item(index, benchmark), image=image, image_sha256=digest, modality=modality)


def fill_labelled(workspace: Workspace, images: int = 72) -> Workspace:
    for dataset in ("alignment", "instruct"):
        write_records(workspace.samples(dataset), Sample, (labelled_sample(i, dataset) for i in range(images)))
    for benchmark in ("vqa-rad", "slake"):
        write_records(workspace.items(benchmark), VQAItem, (labelled_item(i, benchmark) for i in range(52)))
    return workspace


@dataclass(frozen=True)
class TunedMixture:
    """All stages of the mixture's recipe, the router between the second and the third."""

    workspace: Workspace
    recipe: Recipe
    router: Report
    moe_tune: Report
