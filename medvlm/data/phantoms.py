"""Pictures of the synthetic sample corpus: phantoms of five modalities with findings that can be seen.

Nothing here is a picture of a patient. Each phantom is drawn from a ``Finding`` and a seed with Pillow's
shapes and integer noise only, so that equal input gives equal bytes. "Left" and "right" mean the left
and the right of the *image*, not of a body.
"""

from __future__ import annotations

import io
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

__all__ = [
    "ORGANS",
    "SIZE_PX",
    "Finding",
    "Modality",
    "Side",
    "Size",
    "balanced_findings",
    "draw_phantom",
    "encode_jpeg",
    "encode_png",
]

Modality = Literal["chest_xray", "ct", "mri", "histology", "gross"]
Side = Literal["left", "right", "none"]
Size = Literal["small", "large", "none"]

SIZE_PX = 128
"""Width and height of every phantom."""

ORGANS: dict[Modality, tuple[str, ...]] = {
    "chest_xray": ("chest",),
    "ct": ("chest", "head", "abdomen"),
    "mri": ("head", "abdomen"),
    "histology": ("skin", "liver", "kidney"),
    "gross": ("skin", "liver", "kidney"),
}

_Box = tuple[float, float, float, float]
_Colour = tuple[int, int, int]

_CENTRE_X = {"left": 40, "right": 88}
_CENTRES_Y = {1: (64,), 2: (42, 86), 3: (32, 64, 96)}
_RADIUS = {"small": 7, "large": 13}
_SHADING = 22
"""Half range of the slow brightness changes. They keep perceptual hashes of two phantoms apart."""
_NOISE = 4

_TISSUE: dict[str, _Colour] = {"skin": (186, 128, 100), "liver": (112, 44, 34), "kidney": (158, 62, 92)}
_STAIN: dict[str, _Colour] = {"skin": (222, 160, 186), "liver": (206, 112, 140), "kidney": (168, 116, 190)}


@dataclass(frozen=True, slots=True)
class Finding:
    """What a phantom shows. All lesions of one picture lie on one side and have one size."""

    modality: Modality
    organ: str
    count: int
    """Lesions, 0 to 3."""
    side: Side
    """Of the image. ``none`` where there is no lesion."""
    size: Size


def balanced_findings(rng: random.Random, modalities: Sequence[Modality], number: int) -> list[Finding]:
    """Findings in random order whose attributes are independent of each other and evenly spread.

    Three in ten pictures show no lesion. Of the others, half show one lesion and a quarter each two and three.

    Args:
        rng: Decides the order and which combinations fill the rest that does not divide evenly.
        modalities: Those to draw; each gets the same share, within one.
        number: How many findings.
    """
    sides: tuple[Side, ...] = ("left", "right")
    sizes: tuple[Size, ...] = ("small", "large")
    lesions: list[tuple[int, Side, Size]] = [
        (count, side, size)
        for count, times in ((1, 2), (2, 1), (3, 1))
        for side, size in itertools.product(sides, sizes)
        for _ in range(times)
    ]
    # 16 combinations with a lesion and 7 without: 30.4 % without.
    lesions += [(0, "none", "none")] * 7
    findings: list[Finding] = []
    for index, modality in enumerate(modalities):
        share = len(range(index, number, len(modalities)))
        deck: list[tuple[int, Side, Size]] = []
        organs: list[str] = []
        while len(deck) < share:
            deck += rng.sample(lesions, len(lesions))
        while len(organs) < share:
            organs += rng.sample(ORGANS[modality], len(ORGANS[modality]))
        for (count, side, size), organ in zip(deck[:share], organs[:share], strict=True):
            findings.append(Finding(modality, organ, count, side, size))
    rng.shuffle(findings)
    return findings


def draw_phantom(finding: Finding, seed: int | str) -> Image.Image:
    """The picture of a finding, ``SIZE_PX`` squared, 8-bit RGB.

    Args:
        finding: What is shown.
        seed: Decides position jitter, shading and noise; nothing that a question asks about.
    """
    rng = random.Random(seed)  # noqa: S311  # pictures, not secrets
    draw_body = {
        "chest_xray": _draw_chest_xray,
        "ct": _draw_ct,
        "mri": _draw_mri,
        "histology": _draw_histology,
        "gross": _draw_gross,
    }[finding.modality]
    image = Image.new("RGB", (SIZE_PX, SIZE_PX))
    draw_body(image, ImageDraw.Draw(image), finding.organ, rng)
    colour = finding.modality in ("histology", "gross")
    image = _shade(image.filter(ImageFilter.GaussianBlur(0.6 if colour else 1.2)), rng)
    _draw_lesions(ImageDraw.Draw(image), finding, rng)
    return image.filter(ImageFilter.GaussianBlur(0.5))


def encode_jpeg(image: Image.Image) -> bytes:
    """JPEG bytes with every setting pinned, so that equal pictures have equal bytes."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=90, subsampling=0, optimize=False, progressive=False)
    return stream.getvalue()


def encode_png(image: Image.Image) -> bytes:
    """PNG bytes with every setting pinned."""
    stream = io.BytesIO()
    image.save(stream, "PNG", compress_level=6, optimize=False)
    return stream.getvalue()


def _grey(level: int) -> _Colour:
    return (level, level, level)


def _around(x: float, y: float, radius_x: float, radius_y: float | None = None) -> _Box:
    ry = radius_x if radius_y is None else radius_y
    return (x - radius_x, y - ry, x + radius_x, y + ry)


def _draw_chest_xray(image: Image.Image, draw: ImageDraw.ImageDraw, organ: str, rng: random.Random) -> None:
    draw.rectangle((0, 0, SIZE_PX, SIZE_PX), fill=_grey(150))
    jitter = rng.randint(-2, 2)
    for x in (38, 90):
        draw.ellipse(_around(x, 64 + jitter, 25, 50), fill=_grey(52))
    for y in range(22, 112, 15):  # ribs
        draw.arc(_around(38, y + 14 + jitter, 30, 14), 190, 350, fill=_grey(82), width=2)
        draw.arc(_around(90, y + 14 + jitter, 30, 14), 190, 350, fill=_grey(82), width=2)
    draw.rectangle((58, 0, 70, SIZE_PX), fill=_grey(176))  # spine
    draw.ellipse(_around(70, 84 + jitter, 17, 20), fill=_grey(172))  # heart
    draw.pieslice((0, 108, 64, 150), 180, 360, fill=_grey(168))  # diaphragm
    draw.pieslice((64, 108, SIZE_PX, 150), 180, 360, fill=_grey(168))


def _draw_ct(image: Image.Image, draw: ImageDraw.ImageDraw, organ: str, rng: random.Random) -> None:
    jitter = rng.randint(-2, 2)
    draw.arc((-20, 60, 148, 126), 20, 160, fill=_grey(150), width=3)  # the table, seen on CT only
    if organ == "head":
        draw.ellipse(_around(64, 62, 46 + jitter, 56), fill=_grey(215))  # skull
        draw.ellipse(_around(64, 62, 39 + jitter, 49), fill=_grey(95))
        draw.ellipse(_around(64, 60, 5, 16), fill=_grey(40))  # ventricle
        return
    draw.ellipse(_around(64, 62, 60 + jitter, 52), fill=_grey(110))
    if organ == "chest":
        for x in (38, 90):
            draw.ellipse(_around(x, 62, 22, 40), fill=_grey(28))
        draw.ellipse(_around(64, 60, 12, 18), fill=_grey(130))  # mediastinum
    else:
        draw.ellipse(_around(42, 60, 30, 36), fill=_grey(136))  # liver
        draw.ellipse(_around(92, 50, 16, 20), fill=_grey(70))  # stomach
    draw.ellipse(_around(64, 100, 9), fill=_grey(220))  # vertebra


def _draw_mri(image: Image.Image, draw: ImageDraw.ImageDraw, organ: str, rng: random.Random) -> None:
    jitter = rng.randint(-2, 2)
    if organ == "head":
        draw.ellipse(_around(64, 64, 50 + jitter, 60), fill=_grey(205))  # fat under the scalp
        draw.ellipse(_around(64, 64, 46 + jitter, 56), fill=_grey(12))  # bone gives no signal
        draw.ellipse(_around(64, 64, 42 + jitter, 52), fill=_grey(150))
        for x, start in ((57, 90), (71, 270)):  # ventricles
            draw.arc(_around(x, 62, 8, 20), start, start + 180, fill=_grey(20), width=5)
        for angle in range(0, 360, 24):  # cortex
            draw.arc(_around(64, 64, 40 + jitter, 50), angle, angle + 12, fill=_grey(95), width=5)
        return
    draw.rounded_rectangle((4 - jitter, 14, 124 + jitter, 114), 40, fill=_grey(205))
    draw.rounded_rectangle((12 - jitter, 22, 116 + jitter, 106), 34, fill=_grey(88))
    draw.ellipse(_around(42, 60, 28, 32), fill=_grey(138))
    for x in (52, 76):  # kidneys
        draw.ellipse(_around(x, 94, 8, 8), fill=_grey(160))
    draw.ellipse(_around(64, 92, 5), fill=_grey(10))  # aorta


def _draw_histology(image: Image.Image, draw: ImageDraw.ImageDraw, organ: str, rng: random.Random) -> None:
    draw.rectangle((0, 0, SIZE_PX, SIZE_PX), fill=_STAIN[organ])
    if organ == "skin":
        draw.rectangle((0, 0, SIZE_PX, 12), fill=(150, 90, 170))  # epidermis
    for _ in range(9):
        x, y = rng.randint(0, SIZE_PX), rng.randint(0, SIZE_PX)
        if organ == "kidney":  # tubules
            draw.ellipse(_around(x, y, 10), outline=(150, 90, 170), width=2)
        else:  # fibres
            draw.line((x, y, x + rng.randint(-40, 40), y + rng.randint(-12, 12)), fill=(220, 120, 160), width=2)
    for _ in range(120):  # nuclei
        x, y = rng.randint(0, SIZE_PX), rng.randint(0, SIZE_PX)
        draw.ellipse(_around(x, y, rng.choice((1.5, 2.0))), fill=(92, 44, 130))


def _draw_gross(image: Image.Image, draw: ImageDraw.ImageDraw, organ: str, rng: random.Random) -> None:
    draw.rectangle((0, 0, SIZE_PX, SIZE_PX), fill=(40, 96, 118))  # the cloth
    jitter = rng.randint(-2, 2)
    if organ == "skin":
        draw.rounded_rectangle((8 - jitter, 8, 120 + jitter, 114), 10, fill=_TISSUE[organ])
    elif organ == "liver":
        draw.ellipse(_around(64, 62, 58 + jitter, 52), fill=_TISSUE[organ])
    else:
        draw.ellipse(_around(64, 62, 54 + jitter, 56), fill=_TISSUE[organ])
        draw.ellipse(_around(64, 2, 14, 16), fill=(40, 96, 118))  # hilum
    draw.rectangle((0, 119, SIZE_PX, SIZE_PX), fill=(235, 235, 225))  # the ruler
    for x in range(4, SIZE_PX, 8):
        draw.line((x, 119, x, 123), fill=(20, 20, 20))


def _shade(image: Image.Image, rng: random.Random) -> Image.Image:
    """Add slow brightness changes and fine noise."""
    grid = np.array([[rng.randint(0, 255) for _ in range(6)] for _ in range(6)], dtype=np.uint8)
    slow = np.asarray(Image.fromarray(grid).resize((SIZE_PX, SIZE_PX), Image.Resampling.BICUBIC), dtype=np.int32)
    slow = (slow - 128) * _SHADING // 128
    fine = np.frombuffer(rng.randbytes(SIZE_PX * SIZE_PX), dtype=np.uint8).astype(np.int32)
    fine = (fine.reshape(SIZE_PX, SIZE_PX) - 128) * _NOISE // 128
    pixels = np.asarray(image, dtype=np.int32) + (slow + fine)[:, :, None]
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _draw_lesions(draw: ImageDraw.ImageDraw, finding: Finding, rng: random.Random) -> None:
    if finding.count == 0:
        return
    rim, core = {
        "histology": ((88, 30, 110), (255, 250, 225)),
        "gross": ((235, 205, 120), (255, 248, 215)),
    }.get(finding.modality, (_grey(225), _grey(252)))
    for y in _CENTRES_Y[finding.count]:
        radius = _RADIUS[finding.size] + rng.randint(-1, 1)
        box = _around(_CENTRE_X[finding.side] + rng.randint(-3, 3), y + rng.randint(-2, 2), radius, radius)
        draw.ellipse(box, fill=core, outline=rim, width=2)
