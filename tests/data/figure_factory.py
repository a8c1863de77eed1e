"""Fetched figures for the tests of what is built from them."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

from PIL import Image as PillowImage

from medvlm.records import Figure, Image
from medvlm.store import Workspace, write_records


def jpeg(shade: int) -> bytes:
    """A small picture whose bytes depend on the shade."""
    picture = PillowImage.new("L", (32, 32), shade)
    picture.putpixel((3, 4), 255 - shade)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG")
    return buffer.getvalue()


def figure(number: int, **changed: Any) -> Figure:
    """The figure ``10_F<number>`` of article ``PMC1``."""
    data = jpeg(number % 256)
    values: dict[str, Any] = {
        "figure_id": f"10_F{number}",
        "pmcid": "PMC1",
        "version": 1,
        "pmid": 10,
        "key": f"PMC1.1/f{number}.jpg",
        "source_url": "https://example.org",
        "licence": "CC BY",
        "citation": "A. et al.",
        "article_title": "Title",
        "retracted": False,
        "image": Image(data, f"f{number}.jpg"),
        "width_px": 32,
        "height_px": 32,
        "sha256": hashlib.sha256(data).hexdigest(),
        "phash": f"{number:016x}",
        "label": f"Figure {number}",
        "caption": "Chest X-ray with a large nodule in the left lung.",
        "mentions": ("The nodule had grown (Fig. 1).",),
    }
    return Figure(**(values | changed))


def workspace_with(root: Path, *figures: Figure) -> Workspace:
    """A workspace whose fetch ended with these figures."""
    workspace = Workspace(root)
    write_records(workspace.figure_shards, Figure, figures)
    return workspace
