"""Bootstrap intervals that resample images, because questions about one image stand or fall together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["RESAMPLES", "Resamples", "interval"]

Floats = NDArray[np.float64]

RESAMPLES = 1000
_LEVEL = 0.95


@dataclass(frozen=True)
class Resamples:
    """Draws of images with replacement, made once and used for every rule, slice and model.

    Because all use the same draws, the difference of two models' resampled scores is a paired one.

    Shapes: B resamples, I items, G images (groups), R rules.
    """

    group: NDArray[np.intp]
    """Which image each item asks about (I)."""
    weight: Floats
    """How often each resample drew each image (B, G)."""

    @classmethod
    def draw(cls, image_ids: Sequence[str], *, resamples: int = RESAMPLES, seed: int = 0) -> Resamples:
        """Draw as many images as there are, ``resamples`` times.

        Args:
            image_ids: One for each item. The draws depend on the set of ids, not on their order.
            resamples: B.
            seed: Of numpy's PCG64; equal seeds give equal intervals.
        """
        ids, group_I = np.unique(np.asarray(image_ids, dtype=str), return_inverse=True)
        count = len(ids)
        if not count:
            return cls(group_I, np.zeros((resamples, 0)))
        draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
        return cls(group_I, draws.astype(np.float64))

    def means(self, value_IR: Floats, mask_I: NDArray[np.bool_] | None = None) -> Floats:
        """The mean of each rule in each resample (B, R); NaN where a resample counts no item.

        Args:
            value_IR: NaN where a rule does not count an item.
            mask_I: The slice; all items if None.
        """
        counted_IR = ~np.isnan(value_IR)
        if mask_I is not None:
            counted_IR &= mask_I[:, None]
        sum_GR = self._by_image(np.where(counted_IR, value_IR, 0.0))
        count_GR = self._by_image(counted_IR.astype(np.float64))
        with np.errstate(invalid="ignore", divide="ignore"):
            return (self.weight @ sum_GR) / (self.weight @ count_GR)

    def _by_image(self, value_IR: Floats) -> Floats:
        sum_GR = np.zeros((self.weight.shape[1], value_IR.shape[1]))
        np.add.at(sum_GR, self.group, value_IR)
        return sum_GR

    def images(self, mask_I: NDArray[np.bool_]) -> int:
        """How many images a slice spans. One gives no interval: every resample has the same mean."""
        return len(np.unique(self.group[mask_I]))


def interval(mean_B: Floats, *, around: float | None = None) -> tuple[float, float] | None:
    """The central 95 % of the resampled means (percentile interval), or None if all are NaN.

    Args:
        mean_B: Of one rule.
        around: The score itself. On a few images a percentile interval can miss it; then that end
            is moved to it.
    """
    valid = mean_B[~np.isnan(mean_B)]
    if not len(valid):
        return None
    low, high = np.quantile(valid, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    if around is not None:
        low, high = min(low, around), max(high, around)
    return float(low), float(high)
