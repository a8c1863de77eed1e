"""Phantoms: equal input gives equal bytes, and what a finding says can be seen where it says."""

from __future__ import annotations

import io
import random
from collections import Counter

import imagehash
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from medvlm.data import phantoms
from medvlm.data.phantoms import (
    MIN_PHASH_DISTANCE,
    ORGANS,
    SIZE_PX,
    Finding,
    Modality,
    Sketchbook,
    balanced_findings,
    draw_phantom,
    encode_jpeg,
    encode_png,
)

PLACES = [(modality, organ) for modality, organs in ORGANS.items() for organ in organs]


def lesion_mask(finding: Finding, seed: int) -> np.ndarray:
    """Pixels (128, 128) that differ from the same body without a lesion."""
    with_lesions = np.asarray(draw_phantom(finding, seed), dtype=int)
    without = np.asarray(draw_phantom(Finding(finding.modality, finding.organ, 0, "none", "none"), seed), dtype=int)
    # Closed by a pixel: a nucleus under a lesion's dark rim would else cut it into two.
    return ndimage.binary_closing(np.abs(with_lesions - without).max(axis=2) > 40, iterations=2)


@pytest.mark.parametrize(("modality", "organ"), PLACES)
def test_lesions_are_on_their_side_and_as_many_as_said(modality: Modality, organ: str) -> None:
    for count in (1, 2, 3):
        for side in ("left", "right"):
            mask = lesion_mask(Finding(modality, organ, count, side, "small"), seed=count)
            assert ndimage.label(mask)[1] == count
            here, there = np.split(mask, 2, axis=1)[:: 1 if side == "left" else -1]
            assert here.sum() > 60 * count
            assert there.sum() == 0


@pytest.mark.parametrize(("modality", "organ"), PLACES)
def test_large_lesions_are_more_than_twice_as_large_as_small_ones(modality: Modality, organ: str) -> None:
    areas = {
        size: [lesion_mask(Finding(modality, organ, 1, "left", size), seed).sum() for seed in range(8)]
        for size in ("small", "large")
    }
    assert min(areas["large"]) > 1.5 * max(areas["small"])
    assert np.mean(areas["large"]) > 2 * np.mean(areas["small"])


@pytest.mark.parametrize(("modality", "organ"), PLACES)
def test_radiology_is_grey_and_pathology_is_coloured(modality: Modality, organ: str) -> None:
    picture = draw_phantom(Finding(modality, organ, 1, "left", "large"), 3)
    assert picture.size == (SIZE_PX, SIZE_PX) and picture.mode == "RGB"
    saturation = np.asarray(picture.convert("HSV"))[:, :, 1].mean()
    assert (saturation > 40) == (modality in ("histology", "gross"))


def test_equal_input_gives_equal_bytes_and_another_seed_does_not() -> None:
    finding = Finding("ct", "head", 2, "right", "large")
    assert encode_jpeg(draw_phantom(finding, "a")) == encode_jpeg(draw_phantom(finding, "a"))
    assert encode_jpeg(draw_phantom(finding, "a")) != encode_jpeg(draw_phantom(finding, "b"))


def test_png_keeps_every_pixel() -> None:
    picture = draw_phantom(Finding("gross", "liver", 3, "left", "small"), 5)
    with Image.open(io.BytesIO(encode_png(picture))) as read:
        assert read.format == "PNG"
        assert np.array_equal(np.asarray(read), np.asarray(picture))


def test_findings_are_evenly_spread() -> None:
    findings = balanced_findings(random.Random(0), ("ct", "mri", "gross"), 23 * 3 * 4 + 1)
    modalities = Counter(f.modality for f in findings)
    assert max(modalities.values()) - min(modalities.values()) <= 1
    organs = Counter(f.organ for f in findings if f.modality == "ct")
    assert max(organs.values()) - min(organs.values()) <= 1
    counts = Counter(f.count for f in findings if f.modality == "mri")
    assert counts == {0: 28, 1: 32, 2: 16, 3: 16}
    assert Counter((f.side, f.size) for f in findings if f.count == 1 and f.modality == "mri") == {
        (side, size): 8 for side in ("left", "right") for size in ("small", "large")
    }


def test_findings_without_a_lesion_have_neither_side_nor_size() -> None:
    for finding in balanced_findings(random.Random(1), tuple(ORGANS), 200):
        assert (finding.count == 0) == (finding.side == "none") == (finding.size == "none")


def test_no_picture_looks_like_a_held_out_one_to_a_perceptual_hash() -> None:
    book = Sketchbook()
    finding = Finding("ct", "abdomen", 1, "left", "large")  # all alike: the hardest case
    held_out = [book.draw(finding, f"test/{i}", held_out=True) for i in range(8)]
    train = [book.draw(finding, f"train/{i}", held_out=False) for i in range(30)]

    def phash(picture: bytes) -> imagehash.ImageHash:
        return imagehash.phash(Image.open(io.BytesIO(picture)))

    for test in held_out:
        assert min(phash(test) - phash(other) for other in train) >= MIN_PHASH_DISTANCE


def test_phantoms_that_vary_too_little_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    finding = Finding("ct", "abdomen", 1, "left", "large")
    same = draw_phantom(finding, 0)
    monkeypatch.setattr(phantoms, "draw_phantom", lambda finding, seed: same)
    book = Sketchbook()
    book.draw(finding, "a", held_out=True)
    with pytest.raises(RuntimeError, match="is 10 bits from"):
        book.draw(finding, "b", held_out=False)
