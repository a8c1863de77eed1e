"""What a stage reads: samples without their images in memory, and the order in which a run sees them."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq

from medvlm.data.benchmarks import finetune_samples
from medvlm.data.leakage import leaked_images
from medvlm.errors import InputError, TrainingError
from medvlm.models.template import IMAGE_MARK
from medvlm.models.vision import ImageProcessor
from medvlm.recipe_schema import Recipe, Stage
from medvlm.records import PreferencePair, Sample, Turn, VQAItem, from_row
from medvlm.store import Workspace, fingerprint, read_json, read_report, shard_paths
from medvlm.training.collate import ConversationEncoder, self_questions
from medvlm.training.packing import Encoded, share_prefix

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "PixelStore",
    "StagePlan",
    "StageSample",
    "TrainingSet",
    "check_contract",
    "data_fingerprint",
    "leaked_rows",
    "left_out_rows",
    "quarantined_rows",
    "read_stage_samples",
    "stage_samples",
]

ImageStore = Callable[["StageSample"], "Tensor"]
"""Gives a sample's pixels (3, H, W), or what a frozen tower made of them (P, V)."""

PIXEL_CACHE_BYTES = 512 * 2**20
_WINDOW_BATCHES = 16


@dataclass(frozen=True, slots=True)
class StageSample:
    """A sample without its image, and where that is."""

    sample_id: str
    image_sha256: str
    turns: tuple[Turn, ...]
    shard: Path
    row: int
    modality: str = "unknown"
    rejected: str = ""
    """Of a preference pair, the answer that was not chosen; ``turns`` hold the chosen one."""


def data_folders(workspace: Workspace, recipe: Recipe, stage: Stage, target: str) -> list[Path]:
    """Folders of all shards of one training job; several where benchmarks are learned together."""
    if stage.data == "benchmarks":
        return [workspace.items(name) for name in (recipe.benchmarks if target == "all" else [target])]
    if stage.data == "preference":
        return [workspace.preference_pairs(recipe.name)]
    return [workspace.samples(stage.data)]


def data_fingerprint(folders: Sequence[Path], left_out: Collection[str] = ()) -> str:
    """Changes when and only when the bytes of a shard do, or which of its rows or images are left out."""
    without = [sorted(left_out)] if left_out else []
    return fingerprint(*[path for folder in folders for path in shard_paths(folder)], *without)


def check_contract(workspace: Workspace, stage: Stage, recipe: str = "") -> None:
    """Refuse a dataset that broke its contract; one that was never checked passes.

    Args:
        workspace: Holds the contracts' results.
        stage: Says which dataset.
        recipe: Whose preference pairs, for a stage that learns from them.

    Raises:
        TrainingError: The last result says that the contract is broken.
    """
    name = _contract(stage, recipe)
    result = workspace.contract(name) / "result.json"
    if result.is_file() and read_json(result).get("success") is False:
        raise TrainingError(
            f"the dataset does not hold the contract {name!r}",
            where=str(result),
            hint="read what broke there, mend the data and run 'python -m data_contracts "
            f"{f'preference --recipe {recipe}' if stage.data == 'preference' else name}' again",
        )


def _contract(stage: Stage, recipe: str) -> str:
    if stage.data == "preference":
        return f"preference/{recipe}"
    return "benchmark-items" if stage.data == "benchmarks" else stage.data


def quarantined_rows(workspace: Workspace, stage: Stage, recipe: str = "") -> frozenset[str]:
    """Ids of the rows that broke a row-level rule of the stage's contract, as tolerated: they do not train.

    Of benchmarks an id is ``<benchmark>/<item_id>``. Rules that only warn quarantine nothing here.
    """
    folder = workspace.contract(_contract(stage, recipe))
    if not (folder / "result.json").is_file() or not (folder / "quarantine.parquet").is_file():
        return frozenset()
    checks: list[dict[str, Any]] = read_json(folder / "result.json")["checks"]
    warnings = {check["name"] for check in checks if check["severity"] == "warn"}
    table = pq.read_table(folder / "quarantine.parquet", columns=["rule", "row_id"])
    rows = zip(table["rule"].to_pylist(), table["row_id"].to_pylist(), strict=True)
    return frozenset(row_id for rule, row_id in rows if rule not in warnings)


def leaked_rows(workspace: Workspace, stage: Stage, folders: Sequence[Path]) -> frozenset[str]:
    """SHA-256 of images that a benchmark of the workspace tests with, where the stage does not keep them.

    Builders have dropped them already, unless their report says that they were told to keep them.
    """
    benchmarks = stage.data == "benchmarks"
    keep = benchmarks if stage.keep_leaked is None else stage.keep_leaked
    report = None if keep or benchmarks else read_report(folders[0].parent)
    if keep or not (benchmarks or (report and report.details.get("keep_leaked"))):
        return frozenset()
    return leaked_images(workspace, folders)


def left_out_rows(workspace: Workspace, stage: Stage, folders: Sequence[Path], recipe: str = "") -> frozenset[str]:
    """What of the data a stage does not learn from: ids of rows and SHA-256 of images."""
    return quarantined_rows(workspace, stage, recipe) | leaked_rows(workspace, stage, folders)


def stage_samples(
    workspace: Workspace, recipe: Recipe, stage: Stage, folders: Sequence[Path]
) -> tuple[list[StageSample], Counter[str]]:
    """The samples that a stage of a recipe learns from, and how many were left out for which reason.

    Raises:
        InputError: There are none.
        WorkspaceError: A step before has not run.
    """
    counts = Counter[str]()
    samples = read_stage_samples(
        folders,
        stage,
        recipe.seed,
        language=recipe.language,
        quarantined=quarantined_rows(workspace, stage, recipe.name),
        leaked=leaked_rows(workspace, stage, folders),
        left_out=counts,
    )
    return samples, counts


def read_stage_samples(
    folders: Sequence[Path],
    stage: Stage,
    seed: int,
    *,
    language: str | None = None,
    quarantined: Collection[str] = (),
    leaked: Collection[str] = (),
    left_out: Counter[str] | None = None,
) -> list[StageSample]:
    """The samples that a stage learns from, in the order of their shards.

    Args:
        folders: Of ``Sample`` or ``PreferencePair`` records, or of ``VQAItem`` records, whose train split is taken.
        stage: ``data`` says which; ``max_samples`` draws a part.
        seed: Of that draw.
        language: Only samples in it; None for all. A benchmark's items are taken in theirs: its name chose it.
        quarantined: Row ids that are left out.
        leaked: SHA-256 of images that are left out.
        left_out: Gets ``other_language``, ``quarantined`` and ``leaked``.

    Raises:
        InputError: There are none.
        WorkspaceError: A step before has not run.
    """
    counts = left_out if left_out is not None else Counter[str]()
    samples: list[StageSample] = []
    for path in itertools.chain.from_iterable(map(shard_paths, folders)):
        for record, row in _shard_records(path, stage):
            if _row_id(record) in quarantined and _trains(record):
                counts["quarantined"] += 1
            elif isinstance(record, Sample) and language not in (None, record.language):
                counts["other_language"] += 1
            elif record.image_sha256 in leaked and _trains(record):
                counts["leaked"] += 1
            else:
                samples += _stage_samples(record, path, row)
    if not samples:
        left = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in sorted(counts.items()))
        commands = {"benchmarks": "build-benchmark NAME", "preference": "build-preference --recipe NAME"}
        build = f"dataset {commands.get(stage.data, f'build {stage.data}')}"
        raise InputError(
            f"there is nothing to learn in stage {stage.name}: no training samples"
            + (f" in the recipe's language, {language}" if language else "")
            + (f" ({left})" if left else ""),
            where=", ".join(map(str, folders)),
            hint=f"look at the report.json beside it for what was dropped, then run 'medvlm {build}' again",
        )
    if stage.max_samples is not None and stage.max_samples < len(samples):
        kept = np.random.default_rng(seed).permutation(len(samples))[: stage.max_samples]
        samples = [samples[index] for index in sorted(kept)]
    return samples


_Record = Sample | VQAItem | PreferencePair
_KINDS: dict[str, type[_Record]] = {"benchmarks": VQAItem, "preference": PreferencePair}


def _shard_records(path: Path, stage: Stage) -> Iterator[tuple[_Record, int]]:
    """The records of a shard without their images, and their rows."""
    kind = _KINDS.get(stage.data, Sample)
    with pq.ParquetFile(path) as shard:
        names = [name for name in shard.schema_arrow.names if name != "image"]
        row = 0
        for batch in shard.iter_batches(batch_size=4096, columns=names):
            for values in batch.to_pylist():
                record: Any = from_row(kind, {**values, "image": None})
                yield record, row
                row += 1


def _trains(record: _Record) -> bool:
    return not isinstance(record, VQAItem) or record.split == "train"


def _row_id(record: _Record) -> str:
    """As the quarantine names the row."""
    if isinstance(record, PreferencePair):
        return record.pair_id
    return f"{record.benchmark}/{record.item_id}" if isinstance(record, VQAItem) else record.sample_id


def _stage_samples(record: _Record, path: Path, row: int) -> Iterator[StageSample]:
    if isinstance(record, PreferencePair):
        # The question, then the image: as the answers were asked for, and as benchmarks ask.
        turns = (Turn("user", f"{record.question}\n{IMAGE_MARK}"), Turn("assistant", record.chosen))
        yield StageSample(record.pair_id, record.image_sha256, turns, path, row, rejected=record.rejected)
        return
    for sample in finetune_samples([record]) if isinstance(record, VQAItem) else [record]:
        yield StageSample(sample.sample_id, sample.image_sha256, sample.turns, path, row, sample.modality)


class PixelStore:
    """Pixels of samples, read from their shards and kept in memory as far as a budget goes."""

    def __init__(self, processor: ImageProcessor, budget_bytes: int = PIXEL_CACHE_BYTES) -> None:
        self._processor = processor
        self._budget_bytes = budget_bytes
        self._pixels: dict[str, Tensor] = {}
        # A row group is about 16 MB; a few of them serve neighbours that share one.
        self._row_group = functools.lru_cache(maxsize=4)(_read_row_group)

    def __call__(self, sample: StageSample) -> Tensor:
        """Pixels (3, H, W).

        Raises:
            InputError: The image does not decode; the sample is named, never replaced.
        """
        pixels = self._pixels.get(sample.image_sha256)
        if pixels is not None:
            return pixels
        try:
            pixels = self._processor(self._image(sample))
        except InputError as error:
            raise InputError(
                error.what, where=f"sample {sample.sample_id} in {sample.shard}", hint=error.hint
            ) from error
        if self._budget_bytes >= pixels.nbytes:
            self._budget_bytes -= pixels.nbytes
            self._pixels[sample.image_sha256] = pixels
        return pixels

    def _image(self, sample: StageSample) -> bytes:
        group, offset = _locate(sample.shard, sample.row)
        return self._row_group(sample.shard, group)[offset].as_py()


@functools.lru_cache(maxsize=1024)
def _row_group_ends(path: Path) -> np.ndarray[Any, np.dtype[np.int64]]:
    metadata = pq.read_metadata(path)
    return np.cumsum([metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)])


def _locate(path: Path, row: int) -> tuple[int, int]:
    ends = _row_group_ends(path)
    group = int(np.searchsorted(ends, row, side="right"))
    return group, row - (int(ends[group - 1]) if group else 0)


def _read_row_group(path: Path, group: int) -> Any:
    with pq.ParquetFile(path) as shard:
        return shard.read_row_group(group, columns=["image"])["image"].combine_chunks().field("bytes")


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


class TrainingSet:
    """The sequences of a run as a map-style dataset; ``collate`` takes its rows."""

    def __init__(
        self,
        samples: Sequence[StageSample],
        plan: StagePlan,
        encoder: ConversationEncoder,
        images: ImageStore,
        *,
        shared_prefix: bool = True,
    ) -> None:
        self._shared_prefix = shared_prefix and plan.stage.speed.shared_prefix
        self.samples = samples
        self._plan = plan
        self._encoder = encoder
        self._images = images
        self.references: dict[str, tuple[float, float]] = {}
        """Of preference pairs, by id: log-probabilities of both answers before training."""

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, position: int) -> dict[str, Any]:
        """One sequence.

        Raises:
            InputError: Its image does not decode or its turns are malformed; the sample is named.
        """
        samples = [self.samples[index] for index in self._plan[position]]
        return self.row(samples, position // self._plan.sequences_per_epoch)

    def row(self, samples: Sequence[StageSample], epoch: int = 0) -> dict[str, Any]:
        """Samples of one image for ``collate``, with a preference pair's reference once it is known.

        Raises:
            InputError: As for any row.
        """
        image = self._images(samples[0])
        reference = self.references.get(samples[0].sample_id)
        row = {
            "sequences": self.sequences(samples, epoch),
            ("pixels" if image.ndim == 3 else "features"): image,
            "sample_ids": [sample.sample_id for sample in samples],
        }
        return row if reference is None else {**row, "reference": reference}

    def sequences(self, samples: Sequence[StageSample], epoch: int = 0) -> list[Encoded]:
        """Samples of one image as the stage's ``image_sharing`` has it: one conversation, or apart from each other.

        Of a preference pair, the chosen answer and the rejected one.
        """
        if samples[0].rejected:
            (pair,) = samples
            answers = (pair.turns, (*pair.turns[:-1], Turn("assistant", pair.rejected)))
            return [self._encoder.encode(turns, pair.sample_id) for turns in answers]
        if self._plan.stage.image_sharing == "turns":
            return [self.encode(samples, epoch)]
        apart = [self.encode([sample], epoch) for sample in samples]
        shared = share_prefix(apart, self._encoder.image_id) if self._shared_prefix else None
        return apart if shared is None else [shared]

    def encode(self, samples: Sequence[StageSample], epoch: int = 0) -> Encoded:
        """Samples of one image as one conversation: later ones lose the image mark that the first has."""
        turns = list(samples[0].turns)
        for sample in samples[1:]:
            question, *rest = sample.turns
            turns += [Turn("user", question.text.replace(IMAGE_MARK, "").strip()), *rest]
        name = ", ".join(sample.sample_id for sample in samples)
        return self._encoder.encode(turns, name, self._plan.asked(len(turns), name, epoch))
