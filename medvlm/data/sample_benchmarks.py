"""The sample corpus' question sets, in the official formats of VQA-RAD, SLAKE and PathVQA."""

from __future__ import annotations

import json
import random
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medvlm.data.phantoms import Finding, Modality, Sketchbook, balanced_findings
from medvlm.data.sample_questions import Asked, Language, ask, word
from medvlm.records import Split

__all__ = ["BenchmarkSize", "Panel", "draw_panels", "write_pathvqa", "write_rows", "write_slake", "write_vqa_rad"]

_RADIOLOGY: tuple[Modality, ...] = ("chest_xray", "ct", "mri")
_PATHOLOGY: tuple[Modality, ...] = ("histology", "gross")

_BENCHMARKS: dict[str, tuple[Modality, ...]] = {"vqa-rad": _RADIOLOGY, "slake": _RADIOLOGY, "pathvqa": _PATHOLOGY}

_RAD_TYPES = {
    "lesion": "PRES",
    "side": "POS",
    "size": "SIZE",
    "count": "COUNT",
    "modality": "MODALITY",
    "organ": "ORGAN",
}
_RAD_ORGANS = {"chest": "CHEST", "head": "HEAD", "abdomen": "ABD"}
_SLAKE_TYPES = {
    "lesion": "Abnormality",
    "side": "Position",
    "size": "Size",
    "count": "Quantity",
    "modality": "Modality",
    "organ": "Organ",
}
_SLAKE_LOCATIONS = {"chest": "Lung", "head": "Brain", "abdomen": "Abdomen"}
_SLAKE_MODALITIES = {"chest_xray": "X-Ray", "ct": "CT", "mri": "MRI"}


@dataclass(frozen=True, slots=True)
class BenchmarkSize:
    """Pictures of one question set, and questions a picture."""

    train: int = 600
    validation: int = 60
    test: int = 60
    closed_per_image: float = 4
    open_per_image: int = 2

    def images(self, split: Split) -> int:
        """Pictures of one split."""
        return {"train": self.train, "validation": self.validation, "test": self.test}[split]


@dataclass(frozen=True, slots=True)
class Panel:
    """The pictures of one split, and what is asked about them."""

    findings: list[Finding]
    pictures: list[bytes]
    asked: list[Asked]


def draw_panels(sketchbook: Sketchbook, seed: int, size: BenchmarkSize) -> dict[tuple[str, Split], Panel]:
    """Pictures and questions of every benchmark and split, the held-out splits first.

    Args:
        sketchbook: Keeps the training pictures apart from the held-out ones of all benchmarks.
        seed: Decides findings, pictures and questions.
        size: Of each benchmark.
    """
    splits: tuple[Split, ...] = ("test", "validation", "train")
    return {
        (name, split): _draw_panel(sketchbook, f"{name}/{seed}", split, modalities, size)
        for split in splits
        for name, modalities in _BENCHMARKS.items()
    }


def _draw_panel(
    sketchbook: Sketchbook, seed: str, split: Split, modalities: Sequence[Modality], size: BenchmarkSize
) -> Panel:
    rng = random.Random(f"{seed}/{split}")  # noqa: S311  # pictures, not secrets
    findings = balanced_findings(rng, modalities, size.images(split))
    pictures = [
        sketchbook.draw(finding, f"{seed}/{split}/{index}", held_out=split != "train")
        for index, finding in enumerate(findings)
    ]
    return Panel(findings, pictures, ask(rng, findings, closed=size.closed_per_image, open_=size.open_per_image))


def _text(asked: Asked, language: Language = "en") -> str:
    text = asked.short_answer(language)
    return text.capitalize() if asked.answer in ("yes", "no") else text


def write_rows(path: Path, rows: Sequence[Any]) -> None:
    """Write a JSON list, one row a line and keys in the given order, as the releases have them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text(f"[\n{lines}\n]\n", "utf-8")


def write_vqa_rad(folder: Path, panels: Mapping[tuple[str, Split], Panel]) -> dict[str, int]:
    """Write ``VQA_RAD Dataset Public.json`` and its image folder.

    Returns:
        Questions by split. As in the release there is no validation split, and the quirks that readers
        must survive are there: the first ``qid`` is a string, one ``answer_type`` ends in a blank.
    """
    images = folder / "VQA_RAD Image Folder"
    images.mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    counts: dict[str, int] = {}
    first_names: dict[Split, int] = {"train": 10001, "test": 90001}
    for split, first in first_names.items():
        panel = panels["vqa-rad", split]
        counts[split] = len(panel.asked)
        for index, picture in enumerate(panel.pictures):
            (images / f"synpic{first + index}.jpg").write_bytes(picture)
        for asked in panel.asked:
            name = f"synpic{first + asked.picture}.jpg"
            rows.append(_rad_row(len(rows), split, name, asked, panel.findings[asked.picture]))
    rows[0]["qid"] = "0"
    next(row for row in rows if row["answer_type"] == "CLOSED")["answer_type"] = "CLOSED "
    write_rows(folder / "VQA_RAD Dataset Public.json", rows)
    return counts


def _rad_row(qid: int, split: str, name: str, asked: Asked, finding: Finding) -> dict[str, Any]:
    return {
        "qid": qid,
        "phrase_type": "test_freeform" if split == "test" else "freeform",
        "qid_linked_id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"medvlm/sample/{name}/{asked.text('en')}")),
        "image_case_url": f"https://example.org/synthetic/{name}",
        "image_name": name,
        "image_organ": _RAD_ORGANS[finding.organ],
        "evaluation": "not evaluated",
        "question": asked.text("en"),
        "question_rephrase": "NULL",
        "question_relation": "NULL",
        "question_frame": "NULL",
        "question_type": _RAD_TYPES[asked.question.subject],
        "answer": _text(asked),
        "answer_type": asked.answer_type.upper(),
    }


def write_slake(folder: Path, panels: Mapping[tuple[str, Split], Panel]) -> dict[str, int]:
    """Write ``Slake1.0/{train,validate,test}.json`` and ``imgs/xmlabN/source.jpg``.

    Returns:
        Questions by split and language, such as ``train_en``. Both languages ask about the same pictures.
    """
    root = folder / "Slake1.0"
    counts: dict[str, int] = {}
    first_image = qid = 0
    splits: tuple[tuple[Split, str], ...] = (("train", "train"), ("validation", "validate"), ("test", "test"))
    for split, file_name in splits:
        panel = panels["slake", split]
        for index, picture in enumerate(panel.pictures):
            image = root / "imgs" / f"xmlab{first_image + index}" / "source.jpg"
            image.parent.mkdir(parents=True)
            image.write_bytes(picture)
        rows: list[dict[str, Any]] = []
        for language in ("en", "zh"):
            for asked in panel.asked:
                rows.append(
                    _slake_row(qid, first_image + asked.picture, asked, panel.findings[asked.picture], language)
                )
                qid += 1
            counts[f"{split}_{language}"] = len(panel.asked)
        write_rows(root / f"{file_name}.json", rows)
        first_image += len(panel.pictures)
    return counts


def _slake_row(qid: int, image: int, asked: Asked, finding: Finding, language: Language) -> dict[str, Any]:
    return {
        "img_id": image,
        "img_name": f"xmlab{image}/source.jpg",
        "question": asked.text(language),
        "answer": _text(asked, language),
        "q_lang": language,
        "location": _SLAKE_LOCATIONS[finding.organ],
        "modality": _SLAKE_MODALITIES[finding.modality],
        "answer_type": asked.answer_type.upper(),
        "base_type": "vqa",
        "content_type": _SLAKE_TYPES[asked.question.subject],
        "triple": ["vhead", "_", "_"],
        "qid": qid,
    }


def write_pathvqa(folder: Path, panels: Mapping[tuple[str, Split], Panel]) -> dict[str, int]:
    """Write ``pvqa_{train,val,test}.json`` and ``images/<split>_NNNN.jpg``.

    Returns:
        Questions by split. As in the release, one record a split has an empty question list.
    """
    images = folder / "images"
    images.mkdir(parents=True)
    counts: dict[str, int] = {}
    splits: tuple[tuple[Split, str], ...] = (("train", "train"), ("validation", "val"), ("test", "test"))
    for split, name in splits:
        panel = panels["pathvqa", split]
        # The release's first record has no questions; its picture is not among the images either.
        records: list[dict[str, Any]] = [{"img_id": f"{name}_0000", "labelf": {"pvqa": []}, "sentf": {"pvqa": []}}]
        for index, picture in enumerate(panel.pictures, start=1):
            records.append({"img_id": f"{name}_{index:04d}", "labelf": {"pvqa": []}, "sentf": {"pvqa": []}})
            (images / f"{name}_{index:04d}.jpg").write_bytes(picture)
        for asked in panel.asked:
            record = records[asked.picture + 1]
            record["labelf"]["pvqa"].append({word(asked.answer, "en"): 1})
            record["sentf"]["pvqa"].append(asked.text("en"))
        counts[split] = len(panel.asked)
        write_rows(folder / f"pvqa_{name}.json", records)
    return counts
