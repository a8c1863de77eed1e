"""Records that hold every contract, for tests to break one field at a time."""

from __future__ import annotations

import functools
import hashlib
import io
from collections.abc import Sequence

from PIL import Image as PillowImage

from medvlm.records import FetchOutcome, Figure, Image, PreferencePair, Sample, Turn, VQAItem
from medvlm.store import Workspace, write_records

WIDTH, HEIGHT = 24, 20


@functools.cache
def png(index: int) -> bytes:
    """A small picture; another one for each index."""
    buffer = io.BytesIO()
    PillowImage.new("RGB", (WIDTH, HEIGHT), (index % 256, index // 256 % 256, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def figure(index: int) -> Figure:
    return Figure(
        figure_id=f"{index}_F1",
        pmcid=f"PMC{index + 1}",
        version=1,
        pmid=index,
        key=f"PMC{index + 1}.1/f.png",
        source_url=f"https://example.org/PMC{index + 1}.1/f.png",
        licence="CC BY",
        citation="A journal",
        article_title="A title",
        retracted=False,
        image=Image(png(index), "f.png"),
        width_px=WIDTH,
        height_px=HEIGHT,
        sha256=sha256(png(index)),
        phash="0123456789abcdef",
        label="Figure 1",
        caption=f"Caption number {index}.",
        mentions=("As Figure 1 shows.",),
    )


def outcome(row: int) -> FetchOutcome:
    return FetchOutcome(
        row=row,
        pair_id=f"{row}_F1",
        pmcid=f"PMC{row + 1}",
        status="ok",
        detail="",
        attempts=1,
        bytes_read=100,
        seconds=0.1,
        key=f"PMC{row + 1}.1/f.png",
        version=1,
        licence="CC BY",
        figures=1,
    )


def sample(index: int, dataset: str = "alignment") -> Sample:
    return Sample(
        sample_id=f"s{index}",
        dataset=dataset,
        image=Image(png(index), "f.png"),
        image_sha256=sha256(png(index)),
        image_phash="0123456789abcdef",
        group_id=f"PMC{index}",
        turns=(Turn("user", "<image>\nDescribe it."), Turn("assistant", f"Answer number {index}.")),
        modality="ct",
        language="en",
        licence="CC BY",
        source="caption",
    )


def item(index: int, split: str = "test") -> VQAItem:
    return VQAItem(
        item_id=f"q{index}",
        benchmark="vqa-rad",
        split="train" if split == "train" else "test",
        image=Image(png(index), f"i{index}.png"),
        image_id=f"i{index}.png",
        image_sha256=sha256(png(index)),
        image_phash="0123456789abcdef",
        question="Is the heart enlarged?",
        answer="no",
        answer_type="closed",
        answer_type_derived=False,
        question_type="presence",
        modality="ct",
        organ="chest",
        language="en",
    )


def pair(index: int) -> PreferencePair:
    return PreferencePair(
        pair_id=f"p{index}",
        image=Image(png(index), "f.png"),
        image_sha256=sha256(png(index)),
        image_phash="0123456789abcdef",
        group_id=f"PMC{index}",
        question=f"What is seen in picture {index}?",
        chosen="A fracture of the left rib.",
        rejected="A fracture of the right rib.",
        source="judge:offline",
    )


def write(workspace: Workspace, contract: str, records: Sequence[object]) -> None:
    """Write a contract's table, and for figures an outcome for each."""
    match contract:
        case "figures":
            write_records(workspace.figure_shards, Figure, records)
            if not workspace.fetch_outcomes.exists():
                write_records(workspace.fetch_outcomes, FetchOutcome, [outcome(row) for row in range(len(records))])
        case "preference":
            write_records(workspace.preference_pairs("tiny"), PreferencePair, records)
        case "benchmark-items":
            write_records(workspace.items("vqa-rad"), VQAItem, records)
        case _:
            write_records(workspace.samples(contract), Sample, records)


def sound(contract: str, count: int = 4) -> list[object]:
    """Records that hold a contract."""
    match contract:
        case "figures":
            return [figure(index) for index in range(count)]
        case "preference":
            return [pair(index) for index in range(count)]
        case "benchmark-items":
            return [item(index) for index in range(count)]
        case _:
            return [sample(index, contract) for index in range(count)]
