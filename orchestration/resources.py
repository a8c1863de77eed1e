"""The one resource: a DVC project whose stages Dagster reproduces, supervised and watched."""

import multiprocessing
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import yaml

from medvlm.settings import Settings, read_settings
from medvlm.store import Workspace
from medvlm.working_copy import CACHE_VARIABLE
from orchestration.bucket_stage import bucket_of
from orchestration.inputs import Inputs
from orchestration.launchers import (
    TrainingLauncher,
    default_client,
    pipes_session,
    run_in_pod,
    session_environment,
)

POLL_S = 0.5
CANCEL_LOOKS = 10
"""Of so many looks at the command one asks whether its run was terminated, where nobody else says so."""
LAST_LINES = 25
END_S = 20.0
"""Patience with the supervisor, which itself ends everything within 13 s."""


@dataclass(frozen=True)
class StageRun:
    """What became of one DVC stage."""

    stage: str
    ran: bool
    """False where DVC found it up to date."""
    data_version: str
    """Hash over DVC's hashes of the stage's outputs, reports (which hold times) left out."""


class DvcProject(dg.ConfigurableResource):
    """The project folder: dvc.yaml, params.yaml and the workspace they name."""

    root: str
    launcher: TrainingLauncher

    @property
    def settings(self) -> Settings:
        """The sources of this workspace, from params.yaml."""
        return read_settings(Path(self.root) / "params.yaml")

    @property
    def workspace(self) -> Workspace:
        """The workspace that params.yaml names."""
        return Workspace(Path(self.root) / self.settings.workspace)

    @property
    def bucket(self) -> str:
        """The bucket that the workspace is the local copy of; empty where it is a folder and no more."""
        return bucket_of(self.settings)

    def medvlm(self, *arguments: str) -> list[str]:
        """The command line of a verb on this workspace, for ``run``."""
        return ["medvlm", "--workspace", self.bucket or self.settings.workspace, *arguments]

    def reproduce(self, context: Any, stage: str, *, watch: bool = False, train: bool = False) -> StageRun:
        """Bring one DVC stage up to date: run it if its inputs changed, else leave it.

        Args:
            context: Of the asset or check; cancelling its run ends every process of the stage.
            stage: Name in dvc.yaml, such as ``stage1@tiny-llava-med``.
            watch: Open a Pipes session, so that a long job's progress appears in the UI live.
            train: Run it where the launcher says: other hosts, a Slurm job or a pod.

        Raises:
            dagster.Failure: The stage failed; the message ends with the command's own last words.
        """
        self.workspace.ensure()
        # DVC holds its lock for its own bookkeeping only, not while the stage's command runs.
        command = ["python", "-m", "dvc", "--wait-for-lock", "repro", "--single-item", stage]
        if self.bucket:
            self.run(context, ["python", "-m", "orchestration.bucket_stage", "bring", stage])
            command = ["python", "-m", "orchestration.bucket_stage", "repro", stage]
        before = self._locked(stage)
        if train and self.launcher.kind == "kubernetes":
            run_in_pod(default_client(), self.launcher, context, Path(self.root), command)
        else:
            self.run(context, command, watch=watch, environment=self.launcher.environment if train else {})
        after = self._locked(stage)
        return StageRun(stage, ran=after != before, data_version=_data_version(after))

    def run(
        self, context: Any, arguments: list[str], *, watch: bool = False, environment: Mapping[str, str] | None = None
    ) -> None:
        """Run a command in the project folder, supervised; its output is passed on as it comes.

        Args:
            context: Of the asset, check or op; cancelling its run ends every process of the command.
            arguments: Program and arguments, found in this environment first; never given to a shell.
            watch: Open a Pipes session, so that a long job's progress appears in the UI live.
            environment: Added to this process's own.

        Raises:
            dagster.Failure: It failed; the message ends with the command's own last words.
        """
        with ExitStack() as stack:
            shared = None if self.launcher.kind == "local" else self.workspace.scratch("pipes")
            session = stack.enter_context(pipes_session(context, shared)) if watch else None
            told = {**(environment or {}), **(session_environment(session) if session else {})}
            if self.bucket:
                told[CACHE_VARIABLE] = str(self.workspace.root)
            command = stack.enter_context(_supervised(Path(self.root), arguments, told, _run_worker(context)))
            seen, looks = 0, 0
            while command.wait(POLL_S) is None:
                seen = _observe(context, session, seen)
                looks += 1
                if looks % CANCEL_LOOKS == 0 and _is_cancelled(context):
                    raise dg.Failure("the run was terminated", allow_retries=False)
            _observe(context, session, seen)
        if command.returncode:
            raise dg.Failure(
                f"{' '.join(arguments)} ended with exit code {command.returncode}:\n{command.last_words}",
                metadata={"exit_code": command.returncode},
            )

    def changed_inputs(self, stage: str) -> list[str]:
        """Inputs of a stage that another stage has made anew since it last ran.

        Read from dvc.lock, so that it is quick and never waits for DVC's own lock. A stage
        that has not run yet has no inputs and so none that changed.
        """
        stages = self._lock().get("stages", {})
        now = Inputs(Path(self.root), stages)
        return [dep["path"] for dep in stages.get(stage, {}).get("deps", ()) if now.has_changed(dep)]

    def made_stages(self) -> dict[str, str]:
        """Data version of each stage whose inputs are as it read them, found without DVC and its own lock."""
        stages = self._lock().get("stages", {})
        now = Inputs(Path(self.root), stages)
        return {
            name: _data_version(entry)
            for name, entry in stages.items()
            if not any(now.has_changed(dep) for dep in entry.get("deps", ()))
        }

    @property
    def lock_file(self) -> Path:
        """DVC's record of what each stage read and wrote."""
        return Path(self.root) / "dvc.lock"

    def _locked(self, stage: str) -> dict[str, Any]:
        """A stage's entry in dvc.lock: the hashes of what it read and wrote."""
        return self._lock().get("stages", {}).get(stage, {})

    def _lock(self) -> dict[str, Any]:
        path = self.lock_file
        return (yaml.safe_load(path.read_text("utf-8")) or {}) if path.exists() else {}


def _executor(context: Any) -> str:
    job = context.op_execution_context.job_def if hasattr(context, "op_execution_context") else context.job_def
    return job.executor_def.name


def _run_worker(context: Any) -> int | None:
    """The run worker's process id, where this step has a process of its own; a killed worker cannot end that one."""
    own = _executor(context) == "multiprocess" and multiprocessing.parent_process() is not None
    return os.getppid() if own else None


def _is_cancelled(context: Any) -> bool:
    """Whether the run was terminated; dagster-celery takes back only steps that no worker has begun."""
    if _executor(context) != "celery":
        return False
    try:
        run = context.instance.get_run_by_id(context.run.run_id)
    except _errors_of_storage():
        return False
    return run is not None and run.status in (dg.DagsterRunStatus.CANCELING, dg.DagsterRunStatus.CANCELED)


def _observe(context: Any, session: dg.PipesSession | None, seen: int) -> int:
    """Log what the job reported since the last look as observations of the asset.

    Returns:
        How many messages are told. A database that is away ends no training: what could not be told is told later.
    """
    if session is None:
        return 0
    for message in session.get_custom_messages()[seen:]:
        progress = message.get("progress", {})
        metadata = {key: value for key, value in progress.items() if isinstance(value, int | float | str)}
        partition = context.partition_key if context.has_partition_key else None
        try:
            for key in context.selected_asset_keys:
                context.log_event(dg.AssetObservation(asset_key=key, partition=partition, metadata=metadata))
        except _errors_of_storage() as error:
            print(f"Dagster's database does not answer, the job goes on: {error}", file=sys.stderr)  # noqa: T201
            return seen
        seen += 1
    return seen


def _errors_of_storage() -> tuple[type[Exception], ...]:
    """What Dagster raises where its database is away; PostgreSQL's part has an error of its own after its retries."""
    from sqlalchemy.exc import SQLAlchemyError

    if "dagster_postgres" not in sys.modules:
        return (SQLAlchemyError,)
    from dagster_postgres.utils import DagsterPostgresException

    return (SQLAlchemyError, DagsterPostgresException)


def _data_version(locked: Mapping[str, Any]) -> str:
    hashes = [out["md5"] for out in locked.get("outs", ()) if not out["path"].endswith("report.json")]
    return "-".join(h[:12] for h in hashes) or "none"


class _Command:
    """A supervised command whose output is passed on as it comes; its last lines are kept."""

    def __init__(self, arguments: list[str], folder: Path, environment: Mapping[str, str]) -> None:
        # The stage's own commands (`medvlm`, `python`) must be those of this environment.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        self._process = subprocess.Popen(
            arguments,
            cwd=folder,
            env={**os.environ, "PATH": path, "DVC_NO_ANALYTICS": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self._tail: deque[str] = deque(maxlen=LAST_LINES)
        self._reader = threading.Thread(target=self._pass_on, daemon=True)
        self._reader.start()

    def _pass_on(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._tail.append(line.rstrip())
            sys.stdout.write(line)
            sys.stdout.flush()

    def wait(self, seconds: float) -> int | None:
        """The exit code, or None if the command still runs after this time."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        self._reader.join()
        return self._process.returncode

    def end(self) -> None:
        """Tell the supervisor to end everything, if it still runs, and wait until it has."""
        if self._process.poll() is None:
            self._process.terminate()
            self._process.wait(END_S)
        self._reader.join(timeout=1.0)
        if self._process.stdout is not None:
            self._process.stdout.close()

    @property
    def returncode(self) -> int:
        return self._process.returncode

    @property
    def last_words(self) -> str:
        return "\n".join(line for line in self._tail if line)


@contextmanager
def _supervised(
    root: Path, arguments: list[str], environment: Mapping[str, str], worker: int | None
) -> Iterator[_Command]:
    companion = ["--with", str(worker)] if worker else []
    supervisor = [sys.executable, "-m", "orchestration.supervisor", *companion, "--", *arguments]
    command = _Command(supervisor, root, environment)
    try:
        yield command
    finally:
        command.end()
