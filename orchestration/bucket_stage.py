"""One DVC stage on a workspace that lies in a bucket: inputs in, the stage, outputs up, its entry of dvc.lock last.

    python -m orchestration.bucket_stage bring|repro|commit STAGE

Run in the project folder, whose ``workspace`` is the bucket's local copy. Entries of dvc.lock travel through the bucket
beside the data, so that a stage that one machine has made is up to date on every other.
"""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import yaml

from medvlm.errors import InputError, MedVLMError
from medvlm.s3 import Changed, is_bucket
from medvlm.settings import Settings, read_settings
from medvlm.step_files import StepFiles, files_of_step, moving, working
from medvlm.store import read_json, write_json
from medvlm.units import unit_of
from medvlm.working_copy import WorkingCopy

COMMANDS = {"repro": ["--wait-for-lock", "repro", "--single-item"], "commit": ["--wait-for-lock", "commit", "--force"]}
LOCK = Path("dvc.lock")


@click.command()
@click.argument("action", type=click.Choice(["bring", *COMMANDS]))
@click.argument("stage")
def main(action: str, stage: str) -> None:
    """Bring in what STAGE reads and has made; with repro or commit also run that, and put up what came of it."""
    from dvc.repo import Repo

    settings = read_settings(Path("params.yaml"))
    address = bucket_of(settings)
    if not address:
        raise InputError(
            "no bucket is named", where="params.yaml, bucket", hint="set it, or MEDVLM_WORKSPACE=s3://bucket/prefix"
        )
    try:
        with moving() as listen:
            copy = WorkingCopy(Path(settings.workspace), address, listen)
            repo = Repo(_wait_for_lock=True)
            files = files_of_stage(repo, stage, copy.root.resolve())
            take_entries(copy, repo)
            if action == "bring":
                copy.pull(files.reads)
                return
            with working(copy, files):
                done = subprocess.run([sys.executable, "-m", "dvc", *COMMANDS[action], stage])
                if done.returncode:
                    sys.exit(done.returncode)
            put_entry(copy, stage)
    except MedVLMError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)


def bucket_of(settings: Settings) -> str:
    """The bucket that the workspace is a copy of: ``MEDVLM_WORKSPACE`` where it names one, else that of params.yaml."""
    named = os.environ.get("MEDVLM_WORKSPACE", "")
    return named if is_bucket(named) else settings.bucket


def files_of_stage(repo: Any, stage: str, root: Path) -> StepFiles:
    """The units that a stage reads and writes: what dvc.yaml says, and what its verb says of itself.

    dvc.yaml names for some stages a contract's result in the place of the data that it is the fingerprint of.
    """
    found = repo.stage.get_target(stage)
    reads, writes = (
        {unit for one in side if (unit := _unit(Path(one.fs_path), root))} for side in (found.deps, found.outs)
    )
    words = shlex.split(found.cmd)
    own = StepFiles()
    if words[:2] == ["medvlm", "--workspace"]:
        own = files_of_step(words[3:])
    written = writes | set(own.writes) | {"scratch/failed"}
    return StepFiles((*sorted(reads | written | set(own.reads)),), (*sorted(written),))


def _unit(path: Path, root: Path) -> str | None:
    return unit_of(f"{path.relative_to(root).as_posix()}/x") if path.is_relative_to(root) else None


def take_entries(copy: WorkingCopy, repo: Any) -> None:
    """Take over the entries of dvc.lock that other machines have put up since the last look."""
    seen_file = copy.root / ".bucket" / "stages.json"
    seen: dict[str, str] = read_json(seen_file) if seen_file.exists() else {}
    there = {key: entry.etag for key, entry in copy.bucket.list("stages/").items()}
    new = {key: etag for key, etag in there.items() if seen.get(key) != etag}
    if not new:
        return
    entries = {key.removesuffix(".json"): copy.bucket.read(f"stages/{key}") for key in new}
    with repo.lock:
        lock = _read_lock()
        lock["stages"] |= {stage: json.loads(read[0]) for stage, read in entries.items() if read}
        temporary = LOCK.with_name(".dvc.lock.new")
        temporary.write_text(yaml.safe_dump(lock, sort_keys=False), "utf-8")
        temporary.replace(LOCK)
    write_json(seen_file, seen | new)


def put_entry(copy: WorkingCopy, stage: str) -> None:
    """Put up a stage's entry of dvc.lock, the newest run's in the place of any other."""
    entry = _read_lock()["stages"].get(stage)
    if entry is None:
        return
    body = json.dumps(entry, indent=1, sort_keys=True).encode()
    while True:
        there = copy.bucket.read(f"stages/{stage}.json")
        if there and there[0] == body:
            return
        try:
            copy.bucket.replace(f"stages/{stage}.json", body, expected=there[1] if there else None)
        except Changed:
            continue
        return


def _read_lock() -> dict[str, Any]:
    lock = (yaml.safe_load(LOCK.read_text("utf-8")) if LOCK.exists() else None) or {"schema": "2.0"}
    lock.setdefault("stages", {})
    return lock


if __name__ == "__main__":
    main()
