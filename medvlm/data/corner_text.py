"""A cheap detector of text burned into the corners of an image, where scanners print names and dates.

It looks for what letters have in common: several small blobs of one height, side by side on one
line, that stand out from a calm background. It reads nothing. It is made to flag too much rather
than too little: what it flags is for people to look at, and nothing is dropped because of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PillowImage

__all__ = ["Corner", "TextRegion", "text_in_corners"]

Corner = Literal["top_left", "top_right", "bottom_left", "bottom_right"]

SIDE_PX = (384, 768)
"""Pictures are brought between these: burned-in text is at least a hundredth of the picture high."""
CORNER_WIDTH, CORNER_HEIGHT = 0.35, 0.22
"""The part of the picture's width and height that counts as a corner."""
CONTRAST = 48
"""Grey levels by which a letter stands out from its surroundings."""
SURROUNDINGS_PX = 25
MAX_INK = 0.25
"""Share of a corner that stands out: more is anatomy or texture, not print on a calm background."""
HEIGHT_PX = (5, 40)
MIN_LETTERS = 4
"""Blobs in a row that make a word."""


@dataclass(frozen=True, slots=True)
class TextRegion:
    """A line of letter-like blobs."""

    corner: Corner
    letters: int
    """Blobs in the longest line of this corner."""
    box: tuple[int, int, int, int]
    """Left, top, right, bottom of that line in pixels of the original image."""


def text_in_corners(picture: PillowImage.Image) -> list[TextRegion]:
    """Letter-like lines in the four corners of a picture, at most one for each corner.

    Args:
        picture: Any mode and size.

    Returns:
        The longest line of each corner that has one of at least ``MIN_LETTERS`` blobs.
    """
    grey = picture.convert("L")
    scale = min(SIDE_PX[1] / max(grey.size), max(1.0, SIDE_PX[0] / max(grey.size)))
    if scale != 1.0:
        how = PillowImage.Resampling.BOX if scale < 1.0 else PillowImage.Resampling.BICUBIC
        grey = grey.resize((max(1, round(grey.width * scale)), max(1, round(grey.height * scale))), how)
    pixels_HW = np.asarray(grey, dtype=np.int16)
    height, width = pixels_HW.shape
    tall, wide = round(height * CORNER_HEIGHT), round(width * CORNER_WIDTH)
    if tall < 2 * HEIGHT_PX[0] or wide < 2 * MIN_LETTERS:
        return []
    places: list[tuple[Corner, int, int]] = [
        ("top_left", 0, 0),
        ("top_right", 0, width - wide),
        ("bottom_left", height - tall, 0),
        ("bottom_right", height - tall, width - wide),
    ]
    regions: list[TextRegion] = []
    for corner, top, left in places:
        line = _longest_line(pixels_HW[top : top + tall, left : left + wide])
        if line is not None:
            box = (left + line.left, top + line.top, left + line.right, top + line.bottom)
            regions.append(TextRegion(corner, line.letters, _scaled(box, scale)))
    return regions


@dataclass(frozen=True, slots=True)
class _Line:
    letters: int
    left: int
    top: int
    right: int
    bottom: int


def _scaled(box: tuple[int, int, int, int], scale: float) -> tuple[int, int, int, int]:
    left, top, right, bottom = (round(value / scale) for value in box)
    return left, top, right, bottom


def _longest_line(pixels_HW: NDArray[np.int16]) -> _Line | None:
    """The line with the most letters, of print brighter or darker than what surrounds it."""
    from scipy import ndimage

    # A median of every fourth pixel is near enough for a background, and sixteen times as fast.
    calm_HW = ndimage.median_filter(pixels_HW[::4, ::4], size=SURROUNDINGS_PX // 4 + 1)
    calm_HW = calm_HW.repeat(4, 0).repeat(4, 1)[: pixels_HW.shape[0], : pixels_HW.shape[1]]
    best: _Line | None = None
    for ink_HW in (pixels_HW - calm_HW > CONTRAST, calm_HW - pixels_HW > CONTRAST):
        if not ink_HW.any() or ink_HW.mean() > MAX_INK:
            continue
        labels_HW: NDArray[np.int32] = np.empty(ink_HW.shape, dtype=np.int32)
        ndimage.label(ink_HW, structure=np.ones((3, 3), dtype=int), output=labels_HW)
        line = _best_line(_letters(labels_HW, ndimage.find_objects(labels_HW)))
        if line is not None and (best is None or line.letters > best.letters):
            best = line
    return best


def _letters(labels_HW: NDArray[np.int32], slices: list[tuple[slice, slice]]) -> NDArray[np.int64]:
    """Left, top, right, bottom of the blobs that are shaped as letters are, one a row."""
    boxes: list[tuple[int, int, int, int]] = []
    for number, (rows, columns) in enumerate(slices, start=1):
        height, width = rows.stop - rows.start, columns.stop - columns.start
        if not HEIGHT_PX[0] <= height <= HEIGHT_PX[1] or width > 1.6 * height:
            continue
        filled = float((labels_HW[rows, columns] == number).mean())
        # A thin "I" or "1" fills its box; rounder letters leave holes in it.
        if filled >= 0.9 and width > 0.5 * height:
            continue
        if filled >= 0.15:
            boxes.append((columns.start, rows.start, columns.stop, rows.stop))
    return np.array(sorted(boxes), dtype=np.int64).reshape(-1, 4)


def _best_line(boxes_N4: NDArray[np.int64]) -> _Line | None:
    """The longest run of boxes of like height, on one line and close together."""
    best: _Line | None = None
    for start in range(len(boxes_N4)):
        run = [boxes_N4[start]]
        for box in boxes_N4[start + 1 :]:
            last = run[-1]
            height = last[3] - last[1]
            if box[0] - last[2] > 2.0 * height:
                break
            level = abs((box[1] + box[3]) - (last[1] + last[3])) <= 0.5 * height
            alike = 0.6 <= (box[3] - box[1]) / height <= 1.67
            apart = box[0] >= last[2] - 1
            if level and alike and apart:
                run.append(box)
        if len(run) >= MIN_LETTERS and (best is None or len(run) > best.letters):
            found_N4 = np.array(run)
            left, top = found_N4[:, :2].min(axis=0)
            right, bottom = found_N4[:, 2:].max(axis=0)
            best = _Line(len(run), int(left), int(top), int(right), int(bottom))
    return best
