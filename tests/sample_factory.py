"""Samples for the tests of what the dashboards read."""

from __future__ import annotations

from pathlib import Path

from medvlm.records import Image, Sample, Turn
from medvlm.store import Workspace, write_records


def sample(n: int, **changes: object) -> Sample:
    values: dict = {
        "sample_id": f"s{n:06d}",
        "dataset": "instruct",
        "image": Image(b"bytes of image %d" % n, f"{n}.png"),
        "image_sha256": "",
        "image_phash": "",
        "group_id": f"g{n}",
        "turns": (Turn("user", "<image>\nWhat?"), Turn("assistant", f"Finding {n}")),
        "modality": ("ct", "mri")[n % 2],
        "language": "en",
        "licence": "CC BY",
        "source": "caption",
    }
    return Sample(**{**values, **changes})


def hundred_samples(root: Path) -> Workspace:
    """A workspace of a hundred instruct samples, in small shards, so that pages cross their borders."""
    workspace = Workspace(root)
    write_records(workspace.samples("instruct"), Sample, (sample(n) for n in range(100)), shard_bytes=1)
    return workspace
