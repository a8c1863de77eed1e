"""A fixed tiny workspace in both languages, and a recipe of twenty small steps a stage, for the stored losses.

Nothing here comes from the sample corpus: its wording may change, the stored losses may not.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

from twin_case import picture

from medvlm.config import load_recipe
from medvlm.recipe_schema import Recipe
from medvlm.records import PreferencePair, Sample, Turn, VQAItem
from medvlm.store import Workspace, write_records

__all__ = ["GOLDEN_STEPS", "fill_golden", "golden_overrides", "train_golden"]

GOLDEN_STEPS = 20
IMAGES = 40
MODALITIES = ("chest_xray", "ct", "mri", "histology", "gross")
WORDS = {
    "en": ("What is shown?", "A disc on the {side} side.", "Is the disc on the left side?", "Which side is it on?"),
    "zh": ("图中显示了什么?", "{side}有一个圆。", "圆在左侧吗?", "圆在哪一侧?"),
}
SIDES = {"en": ("left", "right"), "zh": ("左侧", "右侧")}
YES_NO = {"en": ("Yes", "No"), "zh": ("是的", "不是")}
Language = Literal["en", "zh"]


def _conversation(index: int, language: Language, dataset: str) -> Sample:
    shown, answer, closed, open_ = WORDS[language]
    side = SIDES[language][index % 2]
    turns = [Turn("user", f"<image>\n{shown}"), Turn("assistant", answer.format(side=side))]
    if dataset == "instruct":
        turns += [Turn("user", closed), Turn("assistant", YES_NO[language][index % 2])]
        turns += [Turn("user", open_), Turn("assistant", side)]
    image = picture(index)
    return Sample(
        sample_id=f"g{index}-{language}",
        dataset=dataset,
        image=image,
        image_sha256=hashlib.sha256(image.bytes).hexdigest(),
        image_phash="0" * 16,
        group_id=f"g{index}",
        turns=tuple(turns),
        modality=MODALITIES[index % len(MODALITIES)],
        language=language,
        licence="CC BY",
        source="generated-offline",
    )


def _item(index: int, language: Language, benchmark: str) -> VQAItem:
    _, _, closed, open_ = WORDS[language]
    place = index // 2
    image = picture(place)
    is_closed = index % 2 == 0
    return VQAItem(
        item_id=str(index),
        benchmark=benchmark,
        split="train",
        image=image,
        image_id=f"i{place}",
        image_sha256=hashlib.sha256(image.bytes).hexdigest(),
        image_phash="0" * 16,
        question=closed if is_closed else open_,
        answer=(YES_NO if is_closed else SIDES)[language][place % 2],
        answer_type="closed" if is_closed else "open",
        answer_type_derived=False,
        question_type="POS",
        modality=MODALITIES[place % len(MODALITIES)],
        organ="CHEST",
        language=language,
    )


def _pair(index: int) -> PreferencePair:
    image = picture(index)
    chosen, rejected = SIDES["en"][index % 2], SIDES["en"][(index + 1) % 2]
    digest = hashlib.sha256(image.bytes).hexdigest()
    return PreferencePair(
        f"p{index}", image, digest, "0" * 16, f"g{index}", WORDS["en"][3], chosen, rejected, "judge:overlap"
    )


def fill_golden(workspace: Workspace, recipe: Recipe) -> Workspace:
    """All that any recipe's stages read."""
    languages: tuple[Language, ...] = ("en", "zh")
    for dataset in ("alignment", "instruct"):
        samples = (_conversation(i, language, dataset) for i in range(IMAGES) for language in languages)
        write_records(workspace.samples(dataset), Sample, samples)
    for benchmark in recipe.benchmarks:
        language: Language = "zh" if benchmark.endswith("-zh") else "en"
        write_records(workspace.items(benchmark), VQAItem, (_item(i, language, benchmark) for i in range(2 * IMAGES)))
    write_records(workspace.preference_pairs(recipe.name), PreferencePair, (_pair(i) for i in range(IMAGES)))
    return workspace


def golden_overrides(name: str) -> list[str]:
    """Twenty steps of four sequences in each stage, one benchmark; everything else as the twin has it."""
    recipe = load_recipe(name)
    overrides = [f"benchmarks=[{recipe.benchmarks[0]}]"]
    for stage in recipe.stages:
        values = {"max_steps": GOLDEN_STEPS, "epochs": 1000, "global_batch": 4, "micro_batch": 4}
        overrides += [f"stages.{stage.name}.{field}={value}" for field, value in values.items()]
    return overrides


def train_golden(folder: Path, name: str) -> dict[str, list[float]]:
    """Loss of every step of every stage of a twin."""
    from medvlm.training.run import run_stage

    recipe = load_recipe(name, golden_overrides(name))
    workspace = fill_golden(Workspace(folder), recipe)
    losses: dict[str, list[float]] = {}
    for number, stage in enumerate(recipe.stages, start=1):
        if stage.name == "moe_tune":
            _train_router(workspace, recipe)
        (curve,) = run_stage(workspace, recipe, number).details["curves"].values()
        losses[stage.name] = [round(point["loss"], 6) for point in curve]
    return losses


def _train_router(workspace: Workspace, recipe: Recipe) -> None:
    import importlib

    router: Any = importlib.import_module("medvlm.training.router")
    router.train_router(workspace, recipe)
