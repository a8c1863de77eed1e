"""Pictures of the synthetic sample corpus: phantoms of five modalities with findings that can be seen.

Nothing here is a picture of a patient. Each phantom is drawn from a ``Finding`` and a seed with Pillow's
shapes and integer noise only, so that equal input gives equal bytes. "Left" and "right" mean the left
and the right of the *image*, not of a body.
"""

from __future__ import annotations

import io
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

__all__ = [
    "MIN_PHASH_DISTANCE",
    "ORGANS",
    "SIZE_PX",
    "Finding",
    "Modality",
    "Side",
    "Size",
    "Sketchbook",
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
MIN_PHASH_DISTANCE = 10
"""Bits of 64 by which the perceptual hashes of a held-out picture and any other differ at least."""

ORGANS: dict[Modality, tuple[str, ...]] = {
    "chest_xray": ("chest",),
    "ct": ("chest", "head", "abdomen"),
    "mri": ("head", "abdomen"),
    "histology": ("skin", "liver", "kidney"),
    "gross": ("skin", "liver", "kidney"),
}

_Box = tuple[float, float, float, float]
_Colour = tuple[int, int, int]

_SIDES_SIZES: tuple[tuple[Side, Size], ...] = (
    ("left", "small"),
    ("left", "large"),
    ("right", "small"),
    ("right", "large"),
)
_CENTRE_X = {"left": 40, "right": 88}
_CENTRES_Y = (64, 33, 95)
"""Of the first, second and third lesion. The first place is always taken, so that presence is plain."""
_RADIUS = {"small": 8, "large": 13}
_SHADING = 24
"""Half range of the slow brightness changes. They keep perceptual hashes of two phantoms apart."""
_NOISE = 2

_TISSUE: dict[str, _Colour] = {"skin": (160, 104, 78), "liver": (112, 44, 34), "kidney": (158, 62, 92)}
_STAIN: dict[str, _Colour] = {"skin": (206, 124, 164), "liver": (188, 84, 112), "kidney": (140, 92, 172)}


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
    lesions: list[tuple[int, Side, Size]] = []
    for count in (1, 1, 2, 3):
        for side, size in _SIDES_SIZES:
            lesions.append((count, side, size))
    for _ in range(7):  # beside 16 combinations with a lesion: 30.4 %
        lesions.append((0, "none", "none"))
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
    if finding.modality != "histology":  # a slide fills the picture: nothing to turn
        image = _pose(image, rng)
    image = image.filter(ImageFilter.GaussianBlur(0.6 if colour else 1.2))
    image = _shade(image, rng)
    _draw_lesions(ImageDraw.Draw(image), finding, rng)
    return image.filter(ImageFilter.GaussianBlur(0.5))


def encode_jpeg(image: Image.Image) -> bytes:
    """JPEG bytes with every setting pinned, so that equal pictures have equal bytes."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=85, subsampling=2, optimize=False, progressive=False)
    return stream.getvalue()


def encode_png(image: Image.Image) -> bytes:
    """PNG bytes with every setting pinned."""
    stream = io.BytesIO()
    image.save(stream, "PNG", compress_level=6, optimize=False)
    return stream.getvalue()


class Sketchbook:
    """Draws phantoms so that a perceptual hash takes none for a held-out one.

    Without this, phantoms of equal findings would be near duplicates, and a leakage check that looks for
    those would rightly take the sample corpus apart. Held-out pictures have to be drawn first.
    """

    def __init__(self) -> None:
        self._held_out = np.zeros((0, 64), dtype=np.bool_)

    def draw(
        self, finding: Finding, seed: str, *, held_out: bool, encode: Callable[[Image.Image], bytes] = encode_jpeg
    ) -> bytes:
        """An encoded phantom at least ``MIN_PHASH_DISTANCE`` bits from every held-out one before it.

        Args:
            finding: What is shown.
            seed: Decides all that is not asked after.
            held_out: Whether it belongs to a validation or test split.
            encode: ``encode_jpeg`` or ``encode_png``.

        Raises:
            RuntimeError: 1,000 drawings were all too close: the phantoms vary too little.
        """
        import imagehash  # slow to import, and only the corpus needs it here

        for attempt in range(1000):
            picture = encode(draw_phantom(finding, f"{seed}/{attempt}"))
            with Image.open(io.BytesIO(picture)) as stored:  # the hash of what readers will see
                bits = np.asarray(imagehash.phash(stored).hash, dtype=np.bool_).reshape(1, 64)
            distances = (self._held_out ^ bits).sum(axis=1)
            if distances.min(initial=64) >= MIN_PHASH_DISTANCE:
                if held_out:
                    self._held_out = np.concatenate([self._held_out, bits])
                return picture
        raise RuntimeError(f"no picture of {finding} is {MIN_PHASH_DISTANCE} bits from the held-out ones")


def _grey(level: int) -> _Colour:
    return (level, level, level)


def _around(x: float, y: float, radius_x: float, radius_y: float | None = None) -> _Box:
    ry = radius_x if radius_y is None else radius_y
    return (x - radius_x, y - ry, x + radius_x, y + ry)


def _draw_chest_xray(image: Image.Image, draw: ImageDraw.ImageDraw, organ: str, rng: random.Random) -> None:
    draw.rectangle((0, 0, SIZE_PX, SIZE_PX), fill=_grey(120))
    jitter = rng.randint(-2, 2)
    for x in (38, 90):
        draw.ellipse(_around(x, 64 + jitter, 25, 50), fill=_grey(52))
    for y in range(22, 112, 15):  # ribs
        draw.arc(_around(38, y + 14 + jitter, 30, 14), 190, 350, fill=_grey(82), width=2)
        draw.arc(_around(90, y + 14 + jitter, 30, 14), 190, 350, fill=_grey(82), width=2)
    draw.rectangle((58, 0, 70, SIZE_PX), fill=_grey(145))  # spine
    draw.ellipse(_around(70, 84 + jitter, 17, 20), fill=_grey(140))  # heart
    draw.pieslice((0, 108, 64, 150), 180, 360, fill=_grey(138))  # diaphragm
    draw.pieslice((64, 108, SIZE_PX, 150), 180, 360, fill=_grey(138))


def _draw_ct(image: Image.Image, draw: ImageDraw.ImageDraw, organ: str, rng: random.Random) -> None:
    jitter = rng.randint(-2, 2)
    draw.rectangle((0, 0, SIZE_PX, SIZE_PX), fill=_grey(20))
    draw.arc((-20, 60, 148, 126), 20, 160, fill=_grey(150), width=3)  # the table, seen on CT only
    if organ == "head":
        draw.ellipse(_around(64, 62, 46 + jitter, 56), fill=_grey(180))  # skull
        draw.ellipse(_around(64, 62, 39 + jitter, 49), fill=_grey(95))
        draw.ellipse(_around(64, 60, 5, 16), fill=_grey(40))  # ventricle
        return
    draw.ellipse(_around(64, 62, 60 + jitter, 52), fill=_grey(110))
    if organ == "chest":
        for x in (38, 90):
            draw.ellipse(_around(x, 62, 22, 40), fill=_grey(28))
        draw.ellipse(_around(64, 60, 12, 18), fill=_grey(130))  # mediastinum
    else:
        draw.ellipse(_around(42, 60, 30, 36), fill=_grey(125))  # liver
        draw.ellipse(_around(92, 50, 16, 20), fill=_grey(70))  # stomach
    draw.ellipse(_around(64, 100, 9), fill=_grey(180))  # vertebra


def _draw_mri(image: Image.Image, draw: ImageDraw.ImageDraw, organ: str, rng: random.Random) -> None:
    jitter = rng.randint(-2, 2)
    draw.rectangle((0, 0, SIZE_PX, SIZE_PX), fill=_grey(20))
    if organ == "head":
        draw.ellipse(_around(64, 64, 50 + jitter, 60), fill=_grey(170))  # fat under the scalp
        draw.ellipse(_around(64, 64, 46 + jitter, 56), fill=_grey(12))  # bone gives no signal
        draw.ellipse(_around(64, 64, 42 + jitter, 52), fill=_grey(150))
        for x, start in ((57, 90), (71, 270)):  # ventricles
            draw.arc(_around(x, 62, 8, 20), start, start + 180, fill=_grey(20), width=5)
        for angle in range(0, 360, 24):  # cortex
            draw.arc(_around(64, 64, 40 + jitter, 50), angle, angle + 12, fill=_grey(70), width=5)
        return
    draw.rounded_rectangle((4 - jitter, 14, 124 + jitter, 114), 40, fill=_grey(170))
    draw.rounded_rectangle((12 - jitter, 22, 116 + jitter, 106), 34, fill=_grey(88))
    draw.ellipse(_around(42, 60, 28, 32), fill=_grey(112))
    for x in (52, 76):  # kidneys
        draw.ellipse(_around(x, 94, 8, 8), fill=_grey(130))
    draw.ellipse(_around(64, 92, 5), fill=_grey(10))  # aorta


def _draw_histology(image: Image.Image, draw: ImageDraw.ImageDraw, organ: str, rng: random.Random) -> None:
    draw.rectangle((0, 0, SIZE_PX, SIZE_PX), fill=_STAIN[organ])
    if organ == "skin":
        draw.rectangle((0, 0, SIZE_PX, rng.randint(12, 20)), fill=(120, 64, 150))  # epidermis
    for _ in range(9):
        x, y = rng.randint(0, SIZE_PX), rng.randint(0, SIZE_PX)
        if organ == "kidney":  # tubules
            draw.ellipse(_around(x, y, 10), outline=(70, 30, 110), width=2)
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
    draw.rectangle((0, 119, SIZE_PX, SIZE_PX), fill=(190, 190, 180))  # the ruler
    for x in range(4, SIZE_PX, 8):
        draw.line((x, 119, x, 123), fill=(20, 20, 20))


def _pose(image: Image.Image, rng: random.Random) -> Image.Image:
    """Turn, shift and stretch the body a little. Lesions are drawn later and keep their places."""
    angle = math.radians(rng.uniform(-7, 7))
    scale_x, scale_y = rng.uniform(0.94, 1.06), rng.uniform(0.94, 1.06)
    shift_x, shift_y = rng.uniform(-5, 5), rng.uniform(-5, 5)
    cos, sin, centre = math.cos(angle), math.sin(angle), SIZE_PX / 2
    a, b, d, e = cos * scale_x, sin * scale_x, -sin * scale_y, cos * scale_y
    c = centre - a * centre - b * centre + shift_x
    f = centre - d * centre - e * centre + shift_y
    fill = image.getpixel((0, 0))
    return image.transform(
        image.size, Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.BILINEAR, fillcolor=fill
    )


def _shade(image: Image.Image, rng: random.Random) -> Image.Image:
    """Add slow brightness changes and fine noise."""
    grid = np.array([[rng.randint(0, 255) for _ in range(9)] for _ in range(9)], dtype=np.uint8)
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
    for y in _CENTRES_Y[: finding.count]:
        radius = _RADIUS[finding.size] + rng.randint(-1, 1)
        box = _around(_CENTRE_X[finding.side] + rng.randint(-2, 2), y + rng.randint(-1, 1), radius, radius)
        draw.ellipse(box, fill=core, outline=rim, width=2)
