"""What each verb reads and writes in the workspace: what the copy of a bucket brings in before it and puts up after."""

from __future__ import annotations

import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from medvlm.config import load_recipe
from medvlm.errors import MedVLMError
from medvlm.working_copy import Listen, Moved, WorkingCopy, copy_folder

__all__ = ["STEP_FILES", "StepFiles", "files_of_step", "moving", "opened_copy", "working"]


@dataclass(frozen=True, slots=True)
class StepFiles:
    """Patterns of units, see ``medvlm.units``; ``{recipe}`` and the like are taken from the command."""

    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    """What was begun or made before is read too, so that it is gone on from or kept."""


_RECIPE = ("recipes/{recipe}", "contracts/*")
_BEGUN = "scratch/train/{recipe}/stage{stage}"
_LEARNED = ("checkpoints/{recipe}/stage{stage}", "logs/{recipe}/stage{stage}", _BEGUN)

STEP_FILES: dict[str, StepFiles] = {
    "configure": StepFiles(),
    "corpus": StepFiles(writes=("corpus",)),
    "fetch": StepFiles(("corpus", "inbox"), ("figures", "scratch/fetch")),
    "find": StepFiles(),
    "recheck": StepFiles(("corpus",), ("figures",)),
    "dataset": StepFiles(("corpus", "figures", "review", "contracts/*", "benchmarks/*", "datasets/*")),
    "dataset build": StepFiles(("corpus", "figures", "review", "contracts/*", "benchmarks/*"), ("datasets/{name}",)),
    "dataset build-benchmark": StepFiles(("corpus",), ("benchmarks/{name}",)),
    "dataset build-preference": StepFiles(
        ("checkpoints/{recipe}/stage2", "datasets/instruct", "benchmarks/*", "review", *_RECIPE),
        ("datasets/preference/{recipe}",),
    ),
    "dataset split": StepFiles(writes=("datasets/{name}",)),
    "dataset card": StepFiles(("figures",), ("datasets/*", "benchmarks/*")),
    "leakage": StepFiles(("datasets/*", "benchmarks/*"), ("leakage",)),
    "privacy": StepFiles(("figures", "datasets/*", "benchmarks/*"), ("privacy",)),
    "recipe": StepFiles(writes=("recipes/*",)),
    "plan": StepFiles(("datasets/*", "benchmarks/*")),
    "train": StepFiles(("datasets/*", "benchmarks/*", "checkpoints/{recipe}", "routers/{recipe}", *_RECIPE), _LEARNED),
    "train 1": StepFiles(("datasets/alignment", *_RECIPE), _LEARNED),
    "train 2": StepFiles(("datasets/instruct", "checkpoints/{recipe}/stage1", *_RECIPE), _LEARNED),
    "train 3": StepFiles(
        (
            "datasets/instruct", "datasets/preference/{recipe}", "benchmarks/*", "checkpoints/{recipe}/stage2",
            "routers/{recipe}", *_RECIPE,
        ),
        _LEARNED,
    ),
    "delta": StepFiles(),
    "import-checkpoint": StepFiles(writes=("checkpoints/{recipe}/stage{stage}",)),
    "train-router": StepFiles(("checkpoints/{recipe}/stage2", "datasets/instruct", *_RECIPE), ("routers/{recipe}",)),
    # Each machine keeps its own: what is not there is made again.
    "features": StepFiles(),
    "export": StepFiles(("checkpoints/{checkpoint}",)),
    "predict": StepFiles(("checkpoints/{recipe}", "benchmarks/{benchmark}"), ("predictions/*/{benchmark}",)),
    "score": StepFiles(("predictions/*/{benchmark}", "benchmarks/{benchmark}", "leakage"), ("scores/*/{benchmark}",)),
    "compare": StepFiles(("predictions/*/{benchmark}", "benchmarks/{benchmark}")),
    "chat-eval": StepFiles(),
    "export-benchmark": StepFiles(("benchmarks/*",)),
    "leaderboard": StepFiles(("scores/*", "predictions/*"), ("leaderboard",)),
    "chat": StepFiles(("checkpoints/{checkpoint}",)),
    "serve": StepFiles(("checkpoints/{checkpoint}",)),
    "release": StepFiles(
        (
            "checkpoints/{recipe}", "scores/*", "predictions/*", "leakage", "figures", "datasets/*", "benchmarks/*",
            "review", *_RECIPE,
        ),
        ("releases/{recipe}",),
    ),
    # It moves what it is told to.
    "workspace": StepFiles(),
    # Of `python -m data_contracts`.
    "contract": StepFiles(("figures", "datasets/*", "benchmarks/*", "predictions/*", "scores/*"), ("contracts/*",)),
}  # fmt: skip


def files_of_step(command: Sequence[str]) -> StepFiles:
    """What a command reads and writes.

    Args:
        command: The verb and its arguments, as typed.
    """
    verb, rest = command[0], [word for word in command[1:] if not word.startswith("-")]
    words = {"recipe": _option(command, "--recipe"), "benchmark": _option(command, "--benchmark")}
    stage = _option(command, "--stage")
    try:
        words["stage"] = str(load_recipe(words["recipe"]).stage(stage)[0]) if verb == "train" else stage
        words["recipe"] = (
            load_recipe(words["recipe"]).name if words["recipe"].endswith((".yaml", ".yml")) else (words["recipe"])
        )
    except MedVLMError:
        words["stage"] = "*"  # the verb itself says what is wrong
    # The verbs that are given a folder: the recipe that it is of.
    given = [word.partition("checkpoints/")[2] for word in command if "checkpoints/" in word]
    words["checkpoint"] = given[0].split("/")[0] if given else ""
    words["name"] = rest[1] if len(rest) > 1 else ""
    longer = f"{verb} {words['stage'] if verb == 'train' else next(iter(rest), '')}"
    found = STEP_FILES.get(longer) or STEP_FILES[verb]
    chosen = {name: word or "*" for name, word in words.items()}
    reads, writes = ([pattern.format(**chosen) for pattern in patterns] for patterns in (found.reads, found.writes))
    # A dashboard on any machine says what failed.
    return StepFiles((*reads, *writes), (*writes, "scratch/failed"))


def _option(command: Sequence[str], name: str) -> str:
    for index, word in enumerate(command):
        if word == name and index + 1 < len(command):
            return command[index + 1]
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return ""


@contextmanager
def opened_copy(address: str, command: Sequence[str]) -> Generator[Path]:
    """The local copy of a bucket's workspace, for one command: inputs brought in, what it makes put up.

    Args:
        address: ``s3://bucket/prefix``.
        command: The verb and its arguments.

    Raises:
        StoreError: The bucket cannot be reached or refuses.
        WorkspaceError: A unit was changed here and in the bucket.
    """
    folder = copy_folder(address)
    files = StepFiles() if "--help" in command or command[0] not in STEP_FILES else files_of_step(command)
    if not files.reads:
        yield folder
        return
    with moving() as listen:
        copy = WorkingCopy(folder, address, listen)
        with working(copy, files):
            yield folder


@contextmanager
def working(copy: WorkingCopy, files: StepFiles) -> Generator[None]:
    """Bring in what a step reads, put up what is complete while it runs, and all it made when it ends.

    What it made is put up after a failure too: each unit is whole, and a stopped training is saved in one.
    """
    _tell("brought in", copy.pull(files.reads))
    saved = tuple(pattern for pattern in files.writes if pattern.startswith("scratch/train/"))
    try:
        if saved:
            with copy.pushing(saved):
                yield
        else:
            yield
    except BaseException:
        try:
            _tell("put up", copy.push(files.writes))
        except MedVLMError as error:
            print(f"not put up: {error}", file=sys.stderr)  # noqa: T201
        raise
    _tell("put up", copy.push(files.writes))


@contextmanager
def moving() -> Generator[Listen]:
    """A listener that draws a bar of bytes where standard error is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    tasks: dict[str, object] = {}
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:

        def listen(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, visible=done < total)  # type: ignore[arg-type]

        yield listen


def _tell(what: str, moved: Moved) -> None:
    if moved.files:
        units = ", ".join(moved.units[:4]) + (f" and {len(moved.units) - 4} more" if len(moved.units) > 4 else "")
        print(f"{what} {moved.files:,} files, {moved.bytes / 2**20:,.1f} MB: {units}", file=sys.stderr)  # noqa: T201
