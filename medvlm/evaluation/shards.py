"""One stage's checkpoint answers a benchmark, in this process or in several that torchrun starts.

``python -m medvlm.evaluation.shards JOB`` is what each of those runs: it answers the questions about
its share of the images and appends them to a journal of its own. Nothing is exchanged between them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medvlm.errors import MedVLMError, TrainingError, WorkspaceError
from medvlm.evaluation.backends import answer_all
from medvlm.evaluation.journal import AnswerJournal
from medvlm.evaluation.prompts import PromptStyle
from medvlm.records import VQAItem
from medvlm.store import iterate_records
from medvlm.training.launch import wait_for

if TYPE_CHECKING:
    from torch import Tensor

    from medvlm.models.checkpoint import Checkpoint

__all__ = ["KINDS", "Shard", "answer_shard", "items_to_answer", "launch_shards"]

KINDS = (False, True)
"""Seeing, then blind."""


@dataclass(frozen=True, slots=True)
class Shard:
    """All that a process needs to answer its share. Every process gets the same."""

    checkpoint: str
    model: str
    stage: str
    items: str
    """Folder of the benchmark's items."""
    journal: str
    inputs: str
    """Fingerprint that the journals bear."""
    benchmark: str
    order: str
    options: bool
    likelihoods: bool
    limit: int | None
    batch_size: int


def items_to_answer(folder: Path, benchmark: str, limit: int | None) -> tuple[list[VQAItem], dict[str, bytes]]:
    """The test items, and the images whose mean is the blind model's: of the train split, or of the
    test split where there is no other.

    Raises:
        WorkspaceError: The benchmark was not built, or has no test items.
    """
    test: list[VQAItem] = []
    train_images: dict[str, bytes] = {}
    for item in iterate_records(folder, VQAItem):
        if item.split == "test":
            test.append(item)
        elif item.split == "train":
            train_images.setdefault(item.image_sha256, item.image.bytes)
    if not test:
        raise WorkspaceError(
            f"the benchmark {benchmark} has no test items",
            where=str(folder),
            hint=f"build it again: medvlm dataset build-benchmark {benchmark} --source DIR",
        )
    return test[:limit], train_images or {item.image_sha256: item.image.bytes for item in test}


def answer_shard(shard: Shard, *, rank: int = 0, processes: int = 1) -> None:
    """Answer every image's questions whose turn it is, and keep the answers in this process's journal.

    Args:
        shard: What is answered by whom.
        rank: Of this process.
        processes: That share the images: each takes every so-manieth.

    Raises:
        CheckpointError: There is no finished checkpoint, or it does not load.
        WorkspaceError: There are no items, or the disk is full.
        InputError: An image does not decode; the item is named.
    """
    from medvlm.evaluation.answerer import Answerer
    from medvlm.models.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(Path(shard.checkpoint))
    items, shown_blind = items_to_answer(Path(shard.items), shard.benchmark, shard.limit)
    places = {image: place for place, image in enumerate(dict.fromkeys(item.image_sha256 for item in items))}
    share = [item for item in items if places[item.image_sha256] % processes == rank]
    answerer = Answerer(
        checkpoint,
        shard.stage,
        style=PromptStyle(shard.order, shard.options),
        batch_size=shard.batch_size,
        mean=_mean(checkpoint, shown_blind.values()),
        likelihoods=shard.likelihoods,
        model=shard.model,
    )
    with AnswerJournal.of(Path(shard.journal), shard.inputs, rank=rank) as journal:
        what = f"{shard.benchmark}, {shard.stage}"
        answer_all(answerer, share, journal, kinds=KINDS, what=what, shown=rank == 0)


def _mean(checkpoint: Checkpoint, images: Iterable[bytes]) -> Tensor:
    from medvlm.evaluation.answerer import mean_image

    return mean_image(checkpoint, images)


def launch_shards(shard: Shard, processes: int) -> None:
    """Have ``torchrun`` start the processes of this machine, and wait for all of them.

    Raises:
        TrainingError: One of them died or failed; torchrun then stops the others. What they had
            answered is in their journals.
    """
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
        "--module",
        "medvlm.evaluation.shards",
        json.dumps(dataclasses.asdict(shard)),
    ]
    with subprocess.Popen(command, stdout=sys.stderr) as job:
        code = wait_for(job)
    if code:
        raise TrainingError(
            f"a process that answers {shard.benchmark} ended early (torchrun's code is {code})",
            where=f"{processes} processes, checkpoint {shard.checkpoint}",
            hint="read its message above; finished answers are kept, the same command goes on from them",
        )


def main() -> None:
    """Answer the share that torchrun's environment variables name."""
    # A job is what this very program wrote: a field too many or too few is a bug, not an input.
    values: dict[str, Any] = json.loads(sys.argv[1])
    try:
        answer_shard(Shard(**values), rank=int(os.environ["RANK"]), processes=int(os.environ["WORLD_SIZE"]))
    except MedVLMError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(1)


if __name__ == "__main__":
    main()
