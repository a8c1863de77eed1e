"""Scratch of a training job: what a killed run resumes from, and never from the wrong thing."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from medvlm.errors import TrainingError
from medvlm.store import read_json, write_json

__all__ = ["Scratch"]

_COMPLETE = "complete.json"
_JOB = "job.json"


class Scratch:
    """The folder of a job's intermediate checkpoints.

    A checkpoint counts only once its ``complete.json`` is there, which is written last: a run that was
    killed while writing leaves a folder that nobody resumes from.

    Args:
        folder: Belongs to one recipe, stage and target.
        fingerprint: Of what decides the run: recipe's stage, data and start checkpoint.
        processes: Of the run; the optimiser's state is sharded over them.
    """

    def __init__(self, folder: Path, fingerprint: str, processes: int) -> None:
        self.folder = folder
        self._job = {"fingerprint": fingerprint, "processes": processes}

    def open(self, *, fresh: bool) -> str:
        """Make the folder fit for this job; call on one process, before the others look.

        Args:
            fresh: Discard what is there.

        Returns:
            What was done with an earlier run's scratch, for people; empty if there was none.

        Raises:
            TrainingError: The same job was begun with another number of processes.
        """
        message = ""
        job_file = self.folder / _JOB
        if job_file.is_file() and not fresh:
            earlier = read_json(job_file)
            if earlier.get("fingerprint") != self._job["fingerprint"]:
                message = (
                    "the recipe, the data or the start checkpoint has changed: the earlier run's scratch is discarded"
                )
            elif earlier != self._job:
                raise TrainingError(
                    f"this job was begun with {earlier.get('processes')} processes, not {self._job['processes']}; "
                    "the optimiser's state is sharded over them",
                    where=str(self.folder),
                    hint=f"go on with --processes {earlier.get('processes')}, or begin anew with --fresh",
                )
            else:
                self._drop_incomplete()
                return message
        shutil.rmtree(self.folder, ignore_errors=True)
        write_json(job_file, self._job)
        return message

    def _drop_incomplete(self) -> None:
        for _, folder in self._checkpoints():
            if not (folder / _COMPLETE).is_file():
                shutil.rmtree(folder, ignore_errors=True)

    def _checkpoints(self) -> list[tuple[int, Path]]:
        found = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in self.folder.glob("checkpoint-*")]
        return sorted((int(match[1]), path) for match, path in found if match)

    def latest(self) -> tuple[int, Path] | None:
        """Step and folder of the newest complete checkpoint."""
        complete = [(step, path) for step, path in self._checkpoints() if (path / _COMPLETE).is_file()]
        return complete[-1] if complete else None

    def mark_complete(self, step: int, keep: int) -> None:
        """Make the checkpoint of a step the one to resume from, then delete all but the newest ``keep``."""
        write_json(self.folder / f"checkpoint-{step}" / _COMPLETE, {"step": step})
        for _, path in self._checkpoints()[:-keep]:
            # First the mark: a deletion that is cut short must not leave a checkpoint that looks whole.
            (path / _COMPLETE).unlink(missing_ok=True)
            shutil.rmtree(path, ignore_errors=True)

    def remove(self) -> None:
        """Delete everything: the job is done."""
        shutil.rmtree(self.folder, ignore_errors=True)
