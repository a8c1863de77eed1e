"""Many figures on one page, to look at."""

from __future__ import annotations

import io
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image as PillowImage
from PIL import ImageDraw

from medvlm.data.images import decode_image
from medvlm.records import Figure, Image
from medvlm.store import shard_paths

__all__ = ["contact_sheet", "sheet_of_shards"]

LABEL_PX = 14
GAP_PX = 4


def contact_sheet(
    figures: Iterable[Figure | tuple[str, Image]], *, columns: int = 8, thumbnail_px: int = 128, most: int = 64
) -> bytes:
    """A PNG of figures as thumbnails with their ids, row by row.

    Args:
        figures: Figures, or ids with images; only the first ``most`` are taken.
        columns: Thumbnails in a row.
        thumbnail_px: Side of the square that each fits in.
        most: Longest sheet.

    Returns:
        PNG bytes; one grey tile where there is no figure.

    Raises:
        InputError: An image does not decode.
    """
    named = [(f.figure_id, f.image) if isinstance(f, Figure) else f for f in islice(figures, most)]
    across = max(1, min(columns, len(named)))
    down = max(1, -(-len(named) // across))
    step_x, step_y = thumbnail_px + GAP_PX, thumbnail_px + LABEL_PX + GAP_PX
    sheet = PillowImage.new("RGB", (across * step_x + GAP_PX, down * step_y + GAP_PX), "#eeeeee")
    draw = ImageDraw.Draw(sheet)
    for place, (name, image) in enumerate(named):
        left, top = GAP_PX + place % across * step_x, GAP_PX + place // across * step_y
        picture = decode_image(image.bytes).convert("RGB")
        picture.thumbnail((thumbnail_px, thumbnail_px))
        sheet.paste(picture, (left + (thumbnail_px - picture.width) // 2, top + (thumbnail_px - picture.height) // 2))
        # Pillow's own font knows Latin letters only; ids are made of them.
        label = name.encode("ascii", "replace").decode()[: thumbnail_px // 6]
        draw.text((left, top + thumbnail_px + 1), label, fill="#333333", font_size=10)
    stream = io.BytesIO()
    sheet.save(stream, "PNG")
    return stream.getvalue()


def sheet_of_shards(shards: Path, *, columns: int = 8, thumbnail_px: int = 128, most: int = 64) -> bytes:
    """The contact sheet of figures spread evenly over a folder of shards.

    Raises:
        WorkspaceError: The fetch has not run yet.
    """
    paths = shard_paths(shards)
    totals = [pq.read_metadata(path).num_rows for path in paths]
    step = max(1, -(-sum(totals) // most))
    chosen: list[tuple[str, Image]] = []
    seen = 0
    for path, total in zip(paths, totals, strict=True):
        wanted = {row - seen for row in range(-(-seen // step) * step, seen + total, step)}
        chosen += _rows(path, wanted)
        seen += total
    return contact_sheet(chosen, columns=columns, thumbnail_px=thumbnail_px, most=most)


def _rows(path: Path, wanted: set[int]) -> list[tuple[str, Image]]:
    found: list[tuple[str, Image]] = []
    place = 0
    with pq.ParquetFile(path) as shard:
        for group in range(shard.num_row_groups):
            rows = shard.metadata.row_group(group).num_rows
            inside = [row - place for row in sorted(wanted) if place <= row < place + rows]
            place += rows
            if inside:
                table = shard.read_row_group(group, columns=["figure_id", "image"]).take(inside)
                found += [(row["figure_id"], Image(**row["image"])) for row in table.to_pylist()]
    return found
