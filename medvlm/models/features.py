"""What a frozen tower makes of images, kept on disk: made once, read by every stage and recipe with that tower.

Shape letters: N images, P patches of an image, V tower width, C channels, H and W pixels.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medvlm.data.watched import watched
from medvlm.store import atomic_path, read_json, write_json

if TYPE_CHECKING:
    from torch import Tensor

    from medvlm.models.checkpoint import Checkpoint
    from medvlm.models.feature_store import Hold

__all__ = ["FeatureCache", "feature_key", "tower_features"]

SHARD_BYTES = 256 * 2**20
BATCH = 32
"""Images encoded at once."""

_STORED = {"fp32": ("<f4", "float32"), "fp16": ("<f2", "float16"), "bf16": ("<u2", "bfloat16")}
"""Precision → type on disk (numpy has no bfloat16: its bits are kept) and in torch."""


def feature_key(checkpoint: Checkpoint, precision: str) -> str:
    """A name that two models share when and only when they see the same features.

    It follows from the tower's weights, what is read from it, the image processor and the precision.

    Args:
        checkpoint: The model that would see them.
        precision: Of what is kept.
    """
    import torch

    model: Any = checkpoint.model
    config = model.config
    digest = hashlib.sha256()
    for name, value in sorted(model.model.vision_tower.state_dict().items()):
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(memoryview(flat.numpy()))
    read = [config.vision_feature_layer, config.vision_feature_select_strategy, checkpoint.processor.fit, precision]
    pixels = checkpoint.processor.clip.to_dict()
    digest.update(json.dumps([read, pixels], sort_keys=True, default=str).encode())
    return digest.hexdigest()[:32]


def tower_features(model: Any, pixels_NCHW: Tensor) -> Tensor:
    """What the projector reads of images: features (N, P, V) of the layer and the patches that the model takes."""
    outputs = model.model.vision_tower(pixels_NCHW, output_hidden_states=True, return_dict=True)
    features = outputs.hidden_states[model.config.vision_feature_layer]
    return features[:, 1:] if model.config.vision_feature_select_strategy == "default" else features


@dataclasses.dataclass(frozen=True, slots=True)
class _Place:
    shard: Path
    slot: int


class FeatureCache:
    """Features of images by their SHA-256, in memory-mapped shards that appear whole or not at all.

    Args:
        folder: Belongs to one ``feature_key``.
        shape: Patches and width (P, V).
        precision: ``fp32``, ``bf16`` or ``fp16``.
    """

    def __init__(self, folder: Path, shape: tuple[int, int], precision: str) -> None:
        self.folder = folder
        self.shape = shape
        self._disk, self._torch = _STORED[precision]
        self._mapped: dict[Path, Any] = {}
        self._places: dict[str, _Place] = {}
        self.held: Hold | None = None
        """What keeps it from being pruned, see ``hold_features``."""
        self.refresh()

    def refresh(self) -> None:
        """See what other processes have added."""
        # Not the temporary files of a process that writes just now.
        for index in sorted(self.folder.glob("[!.]*.json")):
            shard = index.with_suffix(".bin")
            for slot, sha256 in enumerate(read_json(index)["images"]):
                self._places.setdefault(sha256, _Place(shard, slot))

    def __contains__(self, sha256: str) -> bool:
        return sha256 in self._places

    def missing(self, images: Sequence[str]) -> list[str]:
        """Those that are not kept yet, in their order, each once."""
        return [sha256 for sha256 in dict.fromkeys(images) if sha256 not in self._places]

    @property
    def images(self) -> int:
        """How many images are kept."""
        return len(self._places)

    @property
    def image_bytes(self) -> int:
        """Disk that one image takes."""
        return math.prod(self.shape) * np.dtype(self._disk).itemsize

    def free_bytes(self) -> int:
        """Disk that is free where the cache lies."""
        return shutil.disk_usage(next(path for path in (self.folder, *self.folder.parents) if path.is_dir())).free

    def fill(self, images: Sequence[str], pixels: Callable[[str], Tensor], encode: Callable[[Tensor], Tensor]) -> None:
        """Encode images and keep them; what a run that was stopped kept stays.

        Args:
            images: SHA-256 of images that are not kept yet.
            pixels: Gives the pixels (3, H, W) of one.
            encode: Pixels (N, 3, H, W) to features (N, P, V).

        Raises:
            WorkspaceError: The disk is full or read-only.
        """
        per_shard = max(1, SHARD_BYTES // self.image_bytes)
        rows = watched(self._encoded(images, pixels, encode), len(images), "images of the feature cache")
        for start in range(0, len(images), per_shard):
            names = images[start : start + per_shard]
            name = hashlib.sha256("".join(names).encode()).hexdigest()[:16]
            with atomic_path(self.folder / f"{name}.bin") as temporary:
                shard = np.memmap(temporary, dtype=self._disk, mode="w+", shape=(len(names), *self.shape))
                for slot in range(len(names)):
                    shard[slot] = next(rows)
                shard.flush()
                del shard
            # Last: a shard without an index is not there.
            write_json(self.folder / f"{name}.json", {"images": names})
        for _ in rows:
            pass
        self.refresh()

    def _encoded(
        self, images: Sequence[str], pixels: Callable[[str], Tensor], encode: Callable[[Tensor], Tensor]
    ) -> Iterator[Any]:
        import torch

        for start in range(0, len(images), BATCH):
            batch_NCHW = torch.stack([pixels(sha256) for sha256 in images[start : start + BATCH]])
            with torch.inference_mode():
                features = encode(batch_NCHW).cpu().to(getattr(torch, self._torch))
            bits = features.view(torch.uint16) if self._disk == "<u2" else features
            yield from bits.numpy()

    def __getitem__(self, sha256: str) -> Tensor:
        """Features (P, V) of an image.

        Raises:
            KeyError: It is not kept.
        """
        import torch

        place = self._places[sha256]
        if place.shard not in self._mapped:
            self._mapped[place.shard] = np.memmap(place.shard, dtype=self._disk, mode="r").reshape(-1, *self.shape)
        features = torch.from_numpy(self._mapped[place.shard][place.slot].copy())
        return features.view(torch.bfloat16) if self._disk == "<u2" else features
