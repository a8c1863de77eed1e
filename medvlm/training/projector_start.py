"""A projector that starts from what the tower gives for the images at hand, and not from a blind draw.

Features of a tower without a last norm (EfficientNet's are rectified, most of them 0) share a large mean and have
channels of very different spread: behind a projector drawn as usual, nearly half of an image's embedding is common to
all images. So the projector standardises its features, and its second layer is scaled so that an embedding is, in the
mean, as long as a word's and without a part common to all images: data-dependent initialisation (Krähenbühl et al.
2016, "Data-dependent Initializations of Convolutional Neural Networks"). It takes no step of training.

The standardisation stays a step of its own and is not folded into the first layer's weights: where features are never
negative, a step of Adam moves all images alike. An export folds it (``medvlm.models.export``). What was run with it
and without: docs/results-smol.md.

Shape letters: N images, P patches, V tower width, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from medvlm.models.features import tower_features

if TYPE_CHECKING:
    from torch import Tensor

    from medvlm.training.data import ImageStore, StageSample

__all__ = ["start_projector"]

IMAGES = 512
"""As many are looked at, at most: a mean over their patches needs no more."""
BATCH = 32
"""Images at once."""
FLOOR = 0.05
"""Added to a channel's spread, as a share of the mean spread: one that is nearly always 0 would else be blown up."""


def start_projector(
    model: Any,
    samples: Sequence[StageSample],
    images: ImageStore,
    *,
    seed: int,
    device: str = "cpu",
) -> dict[str, float]:
    """Draw a model's standardising projector for the features of some images; all else of the model stays.

    Deterministic on one device: every process of a job does it and comes to the same.

    Args:
        model: Changed in place, and back on the CPU afterwards.
        samples: Of the stage; up to ``IMAGES`` of their images count, drawn with the seed.
        images: Gives a sample's pixels or features.
        seed: Of the weights and of the images.
        device: Where it computes.

    Returns:
        ``images``; ``word``, the mean norm of a word's embedding; ``norm`` and ``common``, of an image's embeddings the
        mean norm and the norm of their mean, before: after it they are ``word`` and 0.

    Raises:
        InputError: An image does not decode.
    """
    import torch

    features = _features(model, samples, images, seed, device)
    projector = model.model.multi_modal_projector
    dtype = projector.linear_1.weight.dtype
    projector.float().to(device)
    with torch.no_grad():
        norm_before, common_D = _length(projector, features)
        mean_V, spread_V, count = _moments(features)
        projector.mean.copy_(mean_V)
        projector.spread.copy_(spread_V)
        _draw(projector, seed)
        _, centre_D = _length(projector, features)
        projector.linear_2.bias -= centre_D
        word = model.get_input_embeddings().weight.float().norm(dim=1).mean().item()
        scale = word / _length(projector, features)[0]
        projector.linear_2.weight *= scale
        projector.linear_2.bias *= scale
    projector.to("cpu", dtype)
    return {"images": count, "word": word, "norm": norm_before, "common": common_D.norm().item()}


def _draw(projector: Any, seed: int) -> None:
    """Weights that keep the variance of standardised features, and no biases."""
    import torch

    # On the CPU, so that every device draws the same.
    generator = torch.Generator().manual_seed(seed)
    for layer in (projector.linear_1, projector.linear_2):
        drawn = torch.randn(tuple(layer.weight.shape), generator=generator) * layer.in_features**-0.5
        layer.weight.copy_(drawn)
        layer.bias.zero_()


def _moments(features: Callable[[], Iterator[Tensor]]) -> tuple[Tensor, Tensor, int]:
    """Mean and spread (V,) of each channel over all patches, and the number of images."""
    import torch

    patches = images = 0
    total_V: Any = 0.0
    squares_V: Any = 0.0
    for batch_NPV in features():
        rows_RV = batch_NPV.flatten(0, 1).double()
        total_V, squares_V = total_V + rows_RV.sum(0), squares_V + rows_RV.square().sum(0)
        patches, images = patches + len(rows_RV), images + len(batch_NPV)
    mean_V = total_V / patches
    spread_V = (squares_V / patches - mean_V.square()).clamp(min=0).sqrt()
    floor = FLOOR * spread_V.mean()
    # All features constant: nothing to standardise.
    spread_V = torch.where(floor > 0, spread_V + floor, torch.ones_like(spread_V))
    return mean_V.float(), spread_V.float(), images


def _length(projector: Any, features: Callable[[], Iterator[Tensor]]) -> tuple[float, Tensor]:
    """Of the embeddings: the mean norm, and the mean (D,)."""
    norm, count = 0.0, 0
    total_D: Any = 0.0
    for batch_NPV in features():
        rows_RD = projector(batch_NPV).flatten(0, 1)
        norm, count, total_D = norm + rows_RD.norm(dim=1).sum().item(), count + len(rows_RD), total_D + rows_RD.sum(0)
    return norm / count, total_D / count


def _features(
    model: Any, samples: Sequence[StageSample], images: ImageStore, seed: int, device: str
) -> Callable[[], Iterator[Tensor]]:
    """Goes through what the tower makes of the images, float32 (N, P, V) at a time."""
    import numpy as np
    import torch

    first = {sample.image_sha256: sample for sample in reversed(samples)}
    names = sorted(first)
    chosen = [names[i] for i in np.random.default_rng(seed).permutation(len(names))[:IMAGES]]

    def batches() -> Iterator[Tensor]:
        for start in range(0, len(chosen), BATCH):
            stacked = torch.stack([images(first[name]) for name in chosen[start : start + BATCH]])
            if stacked.ndim == 3:
                yield stacked.to(device).float()
                continue
            tower = next(model.model.vision_tower.parameters())
            yield tower_features(model, stacked.to(tower.device, tower.dtype)).to(device).float()

    return batches
