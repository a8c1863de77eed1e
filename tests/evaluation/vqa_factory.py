"""Benchmark items and predictions for the tests of scores: small, with no real image."""

from __future__ import annotations

from medvlm.records import Image, Prediction, VQAItem

QUESTIONS = [
    ("Is the heart enlarged?", "Yes", "closed", "CHEST", "one.png"),
    ("Is there a fracture?", "no", "closed", "CHEST", "one.png"),
    ("Is this a CT or an MRI?", "MRI", "closed", "HEAD", "two.png"),
    ("Where is the lesion?", "left upper lobe", "open", "CHEST", "three.png"),
    ("Which organ is shown?", "the brain", "open", "HEAD", "two.png"),
    ("How many nodules?", "two", "open", "CHEST", "four.png"),
]


def make_item(item_id: str, question: str, answer: str, answer_type: str, organ: str, image: str) -> VQAItem:
    return VQAItem(
        item_id=item_id,
        benchmark="vqa-rad",
        split="test",
        image=Image(image.encode(), image),
        image_id=image,
        image_sha256=f"sha-{image}",
        image_phash="0" * 16,
        question=question,
        answer=answer,
        answer_type="closed" if answer_type == "closed" else "open",
        answer_type_derived=False,
        question_type="PRES",
        modality="CT",
        organ=organ,
        language="en",
    )


def make_prediction(item: VQAItem, text: str, *, blind: bool = False, stage: str = "finetune") -> Prediction:
    return Prediction(item.item_id, item.benchmark, "tiny-llava-med", stage, blind, item.question, text)
