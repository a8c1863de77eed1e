"""The order in which a run sees its samples."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from medvlm.recipe_schema import Stage
from medvlm.training.collate import self_questions

if TYPE_CHECKING:
    from medvlm.training.data import StageSample

__all__ = ["StagePlan"]

_WINDOW_BATCHES = 16


class StagePlan:
    """Which samples make up each sequence of a run, in order: a pure function of samples, stage and seed.

    Every epoch is a new permutation. With ``samples_per_image`` above 1, an epoch's samples of one image are
    shuffled and cut into sequences. Within windows of 16 batches, sequences of like length share a batch (LLaVA's
    ``group_by_modality_length``), and the batches are shuffled. Position k of the run does not depend on how
    far a run got or on how many processes it has, so that resuming is exact.

    Args:
        samples: As ``read_stage_samples`` gives them.
        stage: Batch sizes, epochs and steps.
        seed: Of the permutations.
    """

    def __init__(self, samples: Sequence[StageSample], stage: Stage, seed: int) -> None:
        self.stage = stage
        self._per_image = stage.samples_per_image
        self._batch = stage.global_batch
        self._seed = seed
        self._ratio = stage.self_question_ratio
        # A pair counts with both answers: grouped by the chosen one alone, batches would hold one kind of choice.
        self._lengths = [sum(len(turn.text) for turn in s.turns) + len(s.rejected) for s in samples]
        groups: dict[str, list[int]] = {}
        for index, sample in enumerate(samples):
            groups.setdefault(sample.image_sha256 if self._per_image > 1 else str(index), []).append(index)
        self._groups = list(groups.values())
        self.sequences_per_epoch = sum(-(-len(group) // self._per_image) for group in self._groups)
        wanted = max(1, round(self.sequences_per_epoch * stage.epochs / stage.global_batch))
        self.steps = min(wanted, stage.max_steps or wanted)
        self.length = self.steps * stage.global_batch

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, position: int) -> tuple[int, ...]:
        """Indices of the samples that share the run's sequence number ``position``."""
        epoch, place = divmod(position, self.sequences_per_epoch)
        return self._epoch(epoch)[place]

    def images(self, samples: Sequence[StageSample]) -> tuple[dict[str, int], int]:
        """Images that the run reads, each with a sample that has it, and how often it reads one.

        Args:
            samples: Those that the plan was made of.
        """
        positions = range(min(self.length, self.sequences_per_epoch))
        found: dict[str, int] = {}
        for index in range(len(samples)) if len(positions) < self.length else (self[p][0] for p in positions):
            found.setdefault(samples[index].image_sha256, index)
        return found, self.length

    def asked(self, turns: int, name: str, epoch: int) -> frozenset[int]:
        """Indices of the turns of a conversation that the model asks itself in an epoch."""
        return self_questions(turns, name, epoch, ratio=self._ratio, seed=self._seed)

    @functools.lru_cache(maxsize=2)  # noqa: B019  # a plan lives as long as its run
    def _epoch(self, epoch: int) -> list[tuple[int, ...]]:
        rng = np.random.default_rng((self._seed, epoch))
        sequences: list[tuple[int, ...]] = []
        for group in self._groups:
            order = [group[i] for i in rng.permutation(len(group))] if len(group) > 1 else group
            sequences += [tuple(order[i : i + self._per_image]) for i in range(0, len(order), self._per_image)]
        shuffled = [sequences[i] for i in rng.permutation(len(sequences))]
        if not self.stage.speed.length_groups:
            return shuffled
        window = _WINDOW_BATCHES * self._batch
        return [s for i in range(0, len(shuffled), window) for s in self._bucketed(shuffled[i : i + window], rng)]

    def _bucketed(self, sequences: list[tuple[int, ...]], rng: np.random.Generator) -> list[tuple[int, ...]]:
        ordered = sorted(sequences, key=lambda sequence: sum(self._lengths[index] for index in sequence))
        batches = [ordered[i : i + self._batch] for i in range(0, len(ordered), self._batch)]
        return [sequence for i in rng.permutation(len(batches)) for sequence in batches[i]]
