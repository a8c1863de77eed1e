"""One checkpoint to make: what it is made of, where it goes, and the model that it begins with."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from medvlm.config import recipe_differences, stage_yaml
from medvlm.errors import CheckpointError
from medvlm.recipe_schema import Recipe, Stage
from medvlm.store import Workspace, fingerprint, read_json
from medvlm.training.engine import Engine
from medvlm.training.resume import Scratch

if TYPE_CHECKING:
    from medvlm.models.checkpoint import Checkpoint
    from medvlm.training.data import ImageStore, StageSample

__all__ = ["Job", "checkpoint_metadata", "fit_start", "make_job", "start_of"]


@dataclass(frozen=True, slots=True)
class Job:
    """One checkpoint to make."""

    workspace: Workspace
    recipe: Recipe
    number: int
    target: str
    engine: Engine
    fingerprint: str
    data: tuple[Path, ...]

    @property
    def stage(self) -> Stage:
        """That is trained."""
        return self.recipe.stages[self.number - 1]

    @property
    def folder(self) -> Path:
        """Of the finished checkpoint."""
        return self.workspace.checkpoint(self.recipe.name, self.number, self.target)

    @property
    def logs(self) -> Path:
        """Of the trackers."""
        # A folder a fingerprint: another recipe or other data is another curve, a resumed run the same one.
        return self.workspace.logs(self.recipe.name, self.number, self.target) / self.fingerprint[:12]

    @property
    def scratch(self) -> Scratch:
        """Of the interim checkpoints."""
        folder = self.workspace.scratch("train", self.recipe.name, f"stage{self.number}", self.target)
        return Scratch(folder, self.fingerprint, self.engine.processes)


def make_job(workspace: Workspace, recipe: Recipe, number: int, target: str, engine: Engine) -> Job:
    """The job of a target, with the fingerprint of all that decides it.

    Raises:
        CheckpointError: The stage before has no finished checkpoint.
        WorkspaceError: A step before has not run.
    """
    from medvlm.training.data import data_fingerprint, data_folders, left_out_rows

    stage = recipe.stages[number - 1]
    folders = data_folders(workspace, recipe, stage, target)
    data = data_fingerprint(folders, left_out_rows(workspace, stage, folders, recipe.name))
    start = "" if number == 1 else checkpoint_metadata(workspace.checkpoint(recipe.name, number - 1))["fingerprint"]
    parts = [start, target]
    if stage.name == "moe_tune":
        from medvlm.training.router import read_trained_router

        parts.append(read_trained_router(workspace, recipe, start).fingerprint)
    mark = fingerprint(stage_yaml(recipe, number), data, *parts)
    return Job(workspace, recipe, number, target, engine, mark, tuple(folders))


def checkpoint_metadata(folder: Path) -> dict[str, Any]:
    """What stands in a finished checkpoint's ``metadata.json``.

    Raises:
        CheckpointError: There is none.
    """
    path = folder / "metadata.json"
    if not path.is_file():
        raise CheckpointError(
            "the stage before has no finished checkpoint",
            where=str(folder),
            hint="train it first: medvlm train --recipe RECIPE --stage N, or 'dvc repro' for all that is missing",
        )
    return read_json(path)


def start_of(job: Job, samples: Sequence[StageSample]) -> Checkpoint:
    """Model, tokenizer and processor that the job begins with."""
    from medvlm.models.checkpoint import Checkpoint, build_model, load_checkpoint
    from medvlm.models.tokenizer import load_tokenizer, special_marks, train_tokenizer
    from medvlm.models.vision import ImageProcessor

    if job.number > 1:
        folder = job.workspace.checkpoint(job.recipe.name, job.number - 1)
        start = load_checkpoint(folder)
        changed = [path for path in recipe_differences(job.recipe, start.recipe) if path[0] == "model"]
        if job.stage.name == "moe_tune":
            # Experts and router begin here.
            changed = [path for path in changed if path[:2] != ("model", "moe")]
        if changed:
            raise CheckpointError(
                f"stage {job.number - 1} was trained with another {', '.join('.'.join(path) for path in changed)}",
                where=str(folder),
                hint=f"train stage {job.number - 1} again, or undo the change",
            )
        if job.stage.name == "moe_tune":
            from medvlm.training.router import start_of_mixture

            start_of_mixture(job.workspace, job.recipe, start)
        return dataclasses.replace(start, recipe=job.recipe)
    source = job.recipe.model.tokenizer.source
    if source == "train":
        tokenizer = train_tokenizer(job.recipe, (turn.text for sample in samples for turn in sample.turns))
    else:
        tokenizer = load_tokenizer(source, special_marks(job.recipe))
    processor = ImageProcessor.of(job.recipe.model.vision_tower)
    return Checkpoint(build_model(job.recipe, tokenizer), tokenizer, processor, job.recipe, {})


def fit_start(job: Job, start: Checkpoint, samples: Sequence[StageSample], images: ImageStore) -> None:
    """Fit a new model's projector to the tower's features of its first images, where it standardises them.

    A resumed run does it again, and then takes the weights of its checkpoint.
    """
    if job.number > 1 or not job.recipe.model.projector.standardised:
        return
    from medvlm.training.projector_start import start_projector

    fitted = start_projector(start.model, samples, images, seed=job.recipe.seed, device=job.engine.device)
    if job.engine.rank == 0:
        click.echo(
            f"the projector starts from {fitted['images']:g} images: a drawn one makes embeddings of norm "
            f"{fitted['norm']:.3g}, {fitted['common']:.3g} of it common to all; now {fitted['word']:.3g}, as of a "
            "word, and nothing in common",
            err=True,
        )
