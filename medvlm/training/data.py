"""What a stage reads: samples without their images in memory, and the order in which a run sees them."""

from __future__ import annotations

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
from medvlm.recipe_schema import Recipe, Stage
from medvlm.records import PreferencePair, Sample, Turn, VQAItem, from_row
from medvlm.store import Workspace, fingerprint, read_json, read_report, shard_paths
from medvlm.training.collate import ConversationEncoder
from medvlm.training.order import StagePlan
from medvlm.training.packing import Encoded, share_prefix
from medvlm.training.pixels import PixelStore

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
