"""Samples to train on: real questions of SLAKE and VQA-RAD, and conversations in the manner of LLaVA-Med's."""

from __future__ import annotations

import hashlib
import io
import json
import random
import re
from pathlib import Path
from typing import Any

__all__ = ["captions", "conversations", "questions"]


def questions(workspace: Any, data: Path, name: str, images: int, per_image: int) -> list[Any]:
    """Train questions of a benchmark's official release, so many each of so many images, in the release's order."""
    from medvlm.data.benchmarks import build_benchmark, finetune_samples
    from medvlm.records import VQAItem
    from medvlm.store import iterate_records

    build_benchmark(workspace, name, data / {"vqa-rad": "vqa-rad", "slake": "slake/Slake1.0"}[name])
    by_image: dict[str, list[Any]] = {}
    for sample in finetune_samples(iterate_records(workspace.items(name), VQAItem)):
        by_image.setdefault(sample.image_sha256, []).append(sample)
    full = [group[:per_image] for group in by_image.values() if len(group) >= per_image]
    return [sample for group in full[:images] for sample in group]


def captions(data: Path | None, count: int) -> list[Any]:
    """Captions of LLaVA-Med's evaluation figures beside drawn pictures, as stage 1 reads them."""
    texts = _figures(data)
    short = "Provide a brief description of the given image.\n<image>"
    return [_sample(index, [short, texts[index % len(texts)][0]]) for index in range(count)]


def conversations(data: Path | None, count: int, *, longest: int = 10, seed: int = 0) -> list[Any]:
    """Conversations of one to ``longest`` questions about drawn pictures: many short ones and a few long ones.

    The logarithm of the number of questions is uniform. Questions and answers are GPT-4's of LLaVA-Med's evaluation
    set; without the data, words.
    """
    rng = random.Random(seed)
    pairs = _pairs(data)
    made: list[Any] = []
    for index in range(count):
        turns: list[str] = []
        for turn, (question, answer) in enumerate(rng.sample(pairs, k=min(round(longest ** rng.random()), len(pairs)))):
            turns += [question if turn else f"{question}\n<image>", answer]
        made.append(_sample(index, turns))
    return made


def _sample(index: int, texts: list[str]) -> Any:
    from PIL import Image as Picture

    from medvlm.records import Image, Sample, Turn

    stream = io.BytesIO()
    Picture.frombytes("RGB", (64, 64), random.Random(index).randbytes(3 * 64 * 64)).save(stream, "PNG")
    image = Image(stream.getvalue(), f"{index}.png")
    turns = tuple(Turn(("user", "assistant")[place % 2], text) for place, text in enumerate(texts))
    digest = hashlib.sha256(image.bytes).hexdigest()
    where = (image, digest, "0" * 16, f"g{index}", turns, "ct", "en", "CC BY", "generated-offline")
    return Sample(f"s{index}", "instruct", *where)


def _rows(data: Path | None) -> list[dict[str, Any]]:
    path = data / "llava-med" / "llava_med_eval_qa50_qa.jsonl" if data else None
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path and path.is_file() else []


def _figures(data: Path | None) -> list[tuple[str, str]]:
    found = {row["pair_id"]: row["fig_caption"] for row in _rows(data) if row.get("fig_caption")}
    return [(text, key) for key, text in found.items()] or [(answer, "") for _, answer in _words()]


def _pairs(data: Path | None) -> list[tuple[str, str]]:
    def clean(text: str) -> str:
        return re.sub(r"\s+", " ", text.replace("<image>", "")).strip()

    return [(clean(row["text"]), clean(row["gpt4_answer"])) for row in _rows(data)] or _words()


def _words() -> list[tuple[str, str]]:
    rng = random.Random(1)
    words = [f"{a}{b}" for a in ("lesion", "lung", "liver", "bone", "left", "large") for b in ("", "s", "ish", "al")]
    return [
        (f"What is {' '.join(rng.choices(words, k=rng.randint(2, 12)))}?", f"{' '.join(rng.choices(words, k=n))}.")
        for n in (rng.randint(2, 120) for _ in range(200))
    ]
