"""Where a stage's images come from: pixels for a tower that runs, or features that a frozen tower made before."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from medvlm.models.feature_store import hold_features, kept_features, prune_features
from medvlm.models.features import FeatureCache, feature_key, tower_features
from medvlm.recipe_schema import Stage
from medvlm.store import Workspace
from medvlm.training.engine import Engine, quiet_libraries

if TYPE_CHECKING:
    from torch import Tensor

    from medvlm.models.checkpoint import Checkpoint
    from medvlm.training.data import ImageStore, StagePlan, StageSample

__all__ = ["image_store"]

_REUSE = 1.5
"""Readings of an image from which on keeping its features pays."""


def image_store(
    workspace: Workspace,
    stage: Stage,
    engine: Engine,
    start: Checkpoint,
    samples: Sequence[StageSample],
    plan: StagePlan,
    pixels: ImageStore,
) -> ImageStore:
    """Features from the workspace's cache where that pays, else pixels; says which, and what it takes.

    The cache is off where the tower learns, where each image is read about once, where the stage says so, and where
    the disk it needs is more than the stage allows or than is free. Caches of other towers that were used longest ago
    are removed where this one would not fit beside them.

    Args:
        workspace: The cache lies in its scratch.
        stage: Its ``speed`` allows the cache.
        engine: Its precision is that of the features: what the tower itself would hand on.
        start: The model.
        samples: Of the stage.
        plan: Which of them the run reads, and how often.
        pixels: Reads an image.

    Raises:
        InputError: An image does not decode; the sample is named.
        WorkspaceError: The disk is full.
    """
    if not stage.speed.feature_cache or "vision_tower" in stage.trains:
        return pixels
    wanted, readings = plan.images(samples)
    key = feature_key(start, engine.precision)
    shape = (start.recipe.model.image_tokens, start.recipe.model.vision_tower.hidden_size)
    folder = workspace.scratch("features", key)
    used = hold_features(folder, f"{start.recipe.name}, {start.recipe.model.vision_tower.weights}, {engine.precision}")
    cache = FeatureCache(folder, shape, engine.precision)

    def look() -> tuple[list[str], bool]:
        missing = cache.missing(list(wanted))
        return missing, not missing or _fits(workspace, stage, engine, cache, len(wanted), len(missing), readings)

    missing, kept = _agreed(engine, look)
    if not kept:
        used.close()
        if engine.rank == 0 and not cache.images:
            shutil.rmtree(folder, ignore_errors=True)
        return pixels
    own = missing[engine.rank :: engine.processes]
    if own:
        with _encoder(start, stage, engine) as encode:
            cache.fill(own, lambda sha256: pixels(samples[wanted[sha256]]), encode)
    if engine.processes > 1:
        import torch.distributed as dist

        dist.barrier()
        cache.refresh()

    def features(sample: StageSample) -> Tensor:
        return cache[sample.image_sha256]

    cache.held = used  # as long as the run can read from it
    return features


def _agreed(engine: Engine, look: Callable[[], tuple[list[str], bool]]) -> tuple[list[str], bool]:
    """What the first process sees, on all of them: a later look would miss what another has written meanwhile."""
    if engine.processes == 1:
        return look()
    import torch.distributed as dist
    from accelerate import PartialState

    quiet_libraries()  # else DeepSpeed compiles an operator that nothing needs, or waits for who was killed at it
    PartialState()  # sets the processes up, as the Trainer would
    seen: list[Any] = [look() if engine.rank == 0 else None]
    dist.broadcast_object_list(seen, src=0)
    return seen[0]


def _fits(
    workspace: Workspace, stage: Stage, engine: Engine, cache: FeatureCache, images: int, missing: int, readings: int
) -> bool:
    size, limit = missing * cache.image_bytes, stage.speed.feature_cache_gb * 1e9
    text = f"feature cache: {missing:,} images x {cache.image_bytes / 1e3:,.0f} KB = {size / 1e9:.2f} GB"
    where = f"stages.{stage.name}.speed.feature_cache_gb"
    removed = ""
    if readings < _REUSE * images:
        reason = "off: each image is read about once"
    elif size > limit:
        reason = f"off: more than {where}, {stage.speed.feature_cache_gb:g}"
    else:
        gone = prune_features(workspace, limit - size, spare=cache.folder.name)
        taken = sum(one.bytes for one in kept_features(workspace))
        if gone:
            removed = f"; {len(gone)} older removed, {sum(one.bytes for one in gone) / 1e9:.2f} GB"
        if taken + size > limit:
            reason = f"off: with {taken / 1e9:.2f} GB kept more than {where}, {stage.speed.feature_cache_gb:g}"
        elif size > 0.9 * cache.free_bytes():
            reason = f"off: only {cache.free_bytes() / 1e9:.2f} GB of disk are free"
        else:
            reason = ""
    if engine.rank == 0:
        click.echo(f"{text} in {cache.folder}{removed}{f'; {reason}' if reason else ''}", err=True)
    return not reason


@contextmanager
def _encoder(start: Checkpoint, stage: Stage, engine: Engine) -> Generator[Callable[[Tensor], Tensor]]:
    """The tower where it computes fastest, in float32; afterwards it is back on the CPU."""
    import torch

    from medvlm.training.onednn import onednn_serves, use_onednn

    model: Any = start.model
    tower = model.model.vision_tower.to(engine.device)
    # Not laid out: the copy would be the whole tower again, and an image has rows enough without.
    if engine.device == "cpu" and stage.speed.onednn and onednn_serves():
        use_onednn(tower)
    try:
        yield lambda pixels_NCHW: tower_features(model, pixels_NCHW.to(engine.device, torch.float32))
    finally:
        tower.cpu()
