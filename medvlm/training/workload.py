"""How much there is to learn: samples and tokens of a stage, from the workspace or from the published sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from medvlm.errors import MedVLMError
from medvlm.models.template import IMAGE_MARK, TEMPLATES
from medvlm.recipe_schema import Recipe, Stage
from medvlm.store import Workspace

__all__ = ["Workload", "stage_workload"]


@dataclass(frozen=True, slots=True)
class _DataSize:
    """A published set: how many samples, and what is in one on average."""

    samples: int
    turns: float
    """Question-answer pairs of a sample."""
    text_tokens: float
    """Of questions and answers, without template and image."""
    source: str


@dataclass(frozen=True, slots=True)
class Workload:
    """What one target of a stage runs through."""

    target: str
    samples: int
    sequences: int
    """Of one epoch."""
    steps: int
    """Optimiser steps of the stage."""
    tokens: float
    """Mean of a sequence, image and template included."""
    source: str


# Characters a token, measured with Mistral's first tokenizer (32,000 entries, SentencePiece BPE as LLaMA's) on
# LLaVA-Med's chat-evaluation file, VQA-RAD and SLAKE: captions 3.55, GPT-4's answers 4.34, VQA-RAD 12.5 tokens a
# question with its answer, SLAKE-en 12.3, SLAKE-zh 19.5 (0.81 characters a token).
#
# Text of LLaVA-Med's files = bytes of the published file a row, less what json.dump(indent=2), which its
# instruct_postprocess.py calls, writes around the text: 359 characters (alignment), 873 (60K inline mentions).
# Chinese: a translation takes 0.35 characters for each English one (SLAKE zh against en), hence the tokens below.
_PUBLISHED: dict[tuple[str, str], _DataSize] = {
    ("en", "alignment"): _DataSize(500_000, 1, 101, "llava_med_alignment_500k.json: 500,000 pairs, 358,112,840 bytes"),
    ("en", "instruct"): _DataSize(
        60_017, 2.894, 201, "llava_med_instruct_60k_inline_mention.json: 60,017 conversations, 173,696 turns"
    ),
    ("zh", "alignment"): _DataSize(580_014, 1, 155, "ChiMed-VL-Alignment: 580,014 pairs claimed; length estimated"),
    ("zh", "instruct"): _DataSize(469_441, 1, 130, "ChiMed-VL-Instruction: 469,441 pairs claimed; length estimated"),
    ("en", "preference"): _DataSize(10_000, 1, 100, "STLLaVA-Med-DPO: about 10,000 pairs; length estimated"),
    ("en", "vqa-rad"): _DataSize(1_797, 1, 12.5, "VQA-RAD, official train split"),
    ("en", "slake"): _DataSize(4_919, 1, 12.3, "SLAKE-en train"),
    ("en", "pathvqa"): _DataSize(19_755, 1, 12.5, "PathVQA train, original pickles; VQA-RAD's length"),
    ("zh", "slake"): _DataSize(4_916, 1, 19.5, "SLAKE-zh train"),
}
_CHARACTERS_A_TOKEN = {"en": 4.0, "zh": 0.81}
_TURN_TOKENS = 8
"""What a template writes around one question and its answer: ``USER:``, ``ASSISTANT:``, the end mark."""
_CHARACTERS_A_TEMPLATE_TOKEN = 4.6
"""English prose, such as the system prompt: 36 tokens for Vicuna's."""


def stage_workload(
    recipe: Recipe, number: int, target: str, *, workspace: Workspace | None, samples: int | None = None
) -> Workload:
    """Samples, steps and mean tokens of one target of a stage.

    Args:
        recipe: The recipe.
        number: Of the stage, 1 to 3.
        target: As ``recipe.targets`` gives it.
        workspace: Where a dataset is looked for. A full-size recipe does not take the synthetic sample corpus.
        samples: Instead of those counted or published.
    """
    stage = recipe.stages[number - 1]
    own = _workspace_workload(recipe, stage, target, workspace) if samples is None else None
    return own or _published_workload(recipe, stage, target, samples)


def _published_workload(recipe: Recipe, stage: Stage, target: str, samples: int | None) -> Workload:
    names = (recipe.benchmarks if target == "all" else (target,)) if stage.data == "benchmarks" else (stage.data,)
    sizes = [_published_size(recipe.language, name) for name in names]
    total = sum(size.samples for size in sizes)
    turns = sum(size.turns * size.samples for size in sizes) / total
    text = sum(size.text_tokens * size.samples for size in sizes) / total
    kept = min(samples or total, stage.max_samples or samples or total)
    sequences = -(-kept // stage.samples_per_image)
    tokens = _sequence_tokens(recipe, stage, turns * stage.samples_per_image, text * stage.samples_per_image)
    source = "; ".join(size.source for size in sizes) if samples is None else f"{samples:,} samples, as asked"
    return Workload(target, kept, sequences, _steps(stage, sequences), tokens, source)


def _published_size(language: str, name: str) -> _DataSize:
    base = name.removesuffix(f"-{language}")
    size = _PUBLISHED.get((language, base)) or _PUBLISHED.get(("en", base))
    return size or _DataSize(5_000, 1, 20, f"{name}: no published size, 5,000 samples assumed")


def _workspace_workload(recipe: Recipe, stage: Stage, target: str, workspace: Workspace | None) -> Workload | None:
    twin = recipe.model.language_model.weights == "random"
    if workspace is None or (workspace.corpus.is_dir() and not twin):
        return None
    from medvlm.training import data

    try:
        folders = data.data_folders(workspace, recipe, stage, target)
        rows: Any = data.read_stage_samples(folders, stage, recipe.seed, language=recipe.language)
    except (MedVLMError, OSError):
        return None
    plan = data.StagePlan(rows, stage, recipe.seed)
    characters = sum(len(turn.text) for row in rows for turn in row.turns) / plan.sequences_per_epoch
    pairs = sum(len(row.turns) for row in rows) / 2 / plan.sequences_per_epoch
    tokens = _sequence_tokens(recipe, stage, pairs, characters / _CHARACTERS_A_TOKEN[recipe.language])
    return Workload(target, len(rows), plan.sequences_per_epoch, plan.steps, tokens, f"counted in {workspace.root}")


def _sequence_tokens(recipe: Recipe, stage: Stage, turns: float, text_tokens: float) -> float:
    around = TEMPLATES[stage.template].first.replace("{text}", "").replace(IMAGE_MARK, "")
    template = len(around) / _CHARACTERS_A_TEMPLATE_TOKEN + _TURN_TOKENS * max(0.0, turns - 1) + 1
    image = recipe.model.image_tokens + 2 * recipe.model.mm_use_im_start_end
    return round(min(image + template + text_tokens, stage.max_length), 1)


def _steps(stage: Stage, sequences: int) -> int:
    wanted = max(1, round(sequences * stage.epochs / stage.global_batch))
    return min(wanted, stage.max_steps or wanted)
