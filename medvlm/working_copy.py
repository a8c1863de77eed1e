"""A workspace in a bucket, worked on in a local copy: brought in before a step, put up after it.

In the bucket lie

    manifests/<unit>.json        the files of a unit with their SHA-256: what counts
    files/<unit>/<file>@<hash>   their bytes

A unit is what takes its place whole, such as ``datasets/alignment`` or ``checkpoints/<recipe>/stage1``. Its files go up
under new keys, then its manifest is replaced in one request: whoever reads sees the old unit or the new one, never a
half of each, whatever was killed when. What nothing names any more is deleted after that.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
import threading
import uuid
from collections.abc import Callable, Collection, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from medvlm.errors import StoreError, WorkspaceError
from medvlm.s3 import Bucket, Changed
from medvlm.store import read_json, write_json
from medvlm.units import (
    MERGED,
    Files,
    UnitFile,
    alike,
    conflict,
    is_scratch,
    matches,
    merged_changes,
    scan,
    sha256_of,
    unit_of,
)

__all__ = ["Moved", "WorkingCopy", "copy_folder"]

CACHE_VARIABLE = "MEDVLM_WORKSPACE_CACHE"
"""Folder of the local copy; without it one in the user's cache folder."""
EVERY_VARIABLE = "MEDVLM_WORKSPACE_PUSH_S"
"""Seconds between looks for checkpoints that a running training has completed."""

_OWN = ".bucket"
_TRIES = 4
FILES_AT_ONCE = 8

T = TypeVar("T")
Listen = Callable[[str, int, int], None]
"""Told what moves (``brought in`` or ``put up``), bytes so far and bytes in all."""


@dataclass(slots=True)
class _Known:
    """What is known of a unit since it was last alike here and there."""

    etag: str
    files: dict[str, UnitFile]
    placing: bool = False
    """It is being replaced: what lies here may be half of it, and is nobody's work."""


@dataclass(slots=True)
class Moved:
    """What went over the wire."""

    units: list[str] = field(default_factory=list[str])
    files: int = 0
    bytes: int = 0


def copy_folder(address: str) -> Path:
    """The folder of a bucket's local copy: ``MEDVLM_WORKSPACE_CACHE``, or one of its own in the user's cache."""
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named)
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = address.removeprefix("s3://").strip("/").replace("/", "-")
    return base / "medvlm" / f"{name}-{hashlib.sha256(address.rstrip('/').encode()).hexdigest()[:8]}"


class WorkingCopy:
    """A local folder and the bucket that it is a copy of.

    Args:
        root: The folder; made where it is not there.
        address: ``s3://bucket/prefix``.
        listen: Told of progress.

    Raises:
        StoreError: The address names no bucket, or boto3 is not installed.
        WorkspaceError: The folder is the copy of another bucket.
    """

    def __init__(self, root: Path, address: str, listen: Listen = lambda what, done, total: None) -> None:
        self.root, self.bucket, self._listen = root, Bucket(address), listen
        self._own = root / _OWN
        self._own.mkdir(parents=True, exist_ok=True)
        about = self._own / "bucket.json"
        if about.exists() and read_json(about)["address"] != self.bucket.address:
            raise WorkspaceError(
                f"this folder is the local copy of {read_json(about)['address']}",
                where=str(root),
                hint=f"name another one in {CACHE_VARIABLE}",
            )
        if not about.exists():
            write_json(about, {"address": self.bucket.address})

    def pull(self, wanted: Collection[str] = ("*",)) -> Moved:
        """Bring in what has changed in the bucket.

        Args:
            wanted: Patterns of units, such as ``datasets/*``.

        Raises:
            WorkspaceError: A unit was changed here and there.
            StoreError: The bucket cannot be reached or refuses, or a file is damaged there.
        """
        moved = Moved()
        with self._locked():
            there = {key.removesuffix(".json"): entry.etag for key, entry in self.bucket.list("manifests/").items()}
            for unit in sorted(unit for unit in there if matches(unit, wanted)):
                self._bring(unit, there[unit], moved)
            for unit in self._known_units():
                if unit not in there and matches(unit, wanted):
                    self._forget(unit)
        return moved

    def _bring(self, unit: str, etag: str, moved: Moved) -> None:
        known, mine = self._known(unit), self._local(unit)
        if known and known.etag == etag and not known.placing and (mine or is_scratch(unit)):
            return
        for _ in range(_TRIES):
            read = self._manifest(unit)
            if read is None:
                return
            theirs, etag = read
            base = known.files if known else {}
            keep = {}
            if not (known and known.placing) and not alike(mine, theirs) and not alike(mine, base) and mine:
                if known and alike(theirs, base):
                    self._remember(unit, _Known(etag, base))
                    return  # only here something was done
                if matches(unit, MERGED):
                    keep = merged_changes(unit, base, mine, theirs)
                elif not is_scratch(unit):
                    raise conflict(unit, self.root)
            if self._place(unit, {**theirs, **keep}, theirs, mine, etag, moved):
                return
        raise StoreError(
            "files of this unit are missing in the bucket",
            where=f"{self.bucket.address}/manifests/{unit}.json",
            hint="put it up again from the machine that made it: medvlm workspace push",
        )

    def _place(self, unit: str, wanted: Files, theirs: Files, mine: Files, etag: str, moved: Moved) -> bool:
        """Make the local unit as wanted; False where a file has gone from the bucket meanwhile."""
        fetched = {name: one for name, one in wanted.items() if not one.is_like(mine.get(name))}
        staged = self._own / f"incoming-{uuid.uuid4().hex}"
        told = _Told(self._listen, f"brought in {unit}", sum(one.size for one in fetched.values()))

        def fetch(entry: tuple[str, UnitFile]) -> bool:
            name, one = entry
            (staged / name).parent.mkdir(parents=True, exist_ok=True)
            if not self.bucket.download(_key(unit, name, one), staged / name, told):
                return False
            if sha256_of(staged / name) != one.sha256:
                raise StoreError(
                    "this file is damaged: its bytes have another SHA-256 than the manifest says",
                    where=f"{self.bucket.address}/{_key(unit, name, one)}",
                    hint="put it up again from the machine that made it: medvlm workspace push",
                )
            return True

        try:
            if not all(_in_parallel(fetch, fetched.items())):
                return False
            # From here to the end a kill leaves a half, which the next pull replaces and no push puts up.
            self._remember(unit, _Known(etag, {}, placing=True))
            for name in mine.keys() - wanted.keys():
                (self.root / unit / name).unlink(missing_ok=True)
            for name in fetched:
                (self.root / unit / name).parent.mkdir(parents=True, exist_ok=True)
                (staged / name).replace(self.root / unit / name)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
        now = self._local(unit)
        # What stays to be put up differs from theirs.
        alike_now = {name: now[name] if one.is_like(now.get(name)) else one for name, one in theirs.items()}
        self._remember(unit, _Known(etag, alike_now))
        if fetched:
            moved.units.append(unit)
            moved.files += len(fetched)
            moved.bytes += sum(one.size for one in fetched.values())
        return True

    def _known_units(self) -> list[str]:
        folder = self._own / "units"
        return sorted(path.relative_to(folder).as_posix().removesuffix(".json") for path in folder.rglob("*.json"))

    def _forget(self, unit: str) -> None:
        """A unit is no more in the bucket: a training that was finished elsewhere leaves no scratch here either."""
        if is_scratch(unit):
            shutil.rmtree(self.root / unit, ignore_errors=True)
        self._state(unit).unlink(missing_ok=True)

    def push(self, wanted: Collection[str] = ("*",), *, mine: bool = False) -> Moved:
        """Put up what has changed here.

        Args:
            wanted: Patterns of units.
            mine: Also over what another machine has put up meanwhile.

        Raises:
            WorkspaceError: Another machine has put up the same unit meanwhile.
            StoreError: The bucket cannot be reached or refuses.
        """
        moved = Moved()
        with self._locked():
            gone = {unit for unit in self._known_units() if is_scratch(unit)}
            for unit in sorted(scan(self.root).keys() | gone):
                if matches(unit, wanted):
                    # A training goes on meanwhile and drops its oldest checkpoint; the next look sees it whole.
                    with contextlib.suppress(FileNotFoundError):
                        self._put(unit, moved, force=mine or is_scratch(unit))
        return moved

    def _put(self, unit: str, moved: Moved, *, force: bool) -> None:
        known, mine = self._known(unit), self._local(unit)
        base, etag = (known.files, known.etag) if known else ({}, None)
        if (known and known.placing) or (alike(mine, base) and not (force and not is_scratch(unit))):
            return
        if not mine and not is_scratch(unit):
            return  # deleted here to save room, or to have it brought in anew
        for _ in range(_TRIES):
            goal, read = dict(mine), self._manifest(unit)
            theirs, now = read or ({}, None)
            if now != etag and matches(unit, MERGED):
                goal = {**theirs, **merged_changes(unit, base, mine, theirs)}
            elif now != etag and not force and not alike(mine, theirs):
                raise conflict(unit, self.root)
            etag = now
            self._upload(unit, {name: one for name, one in goal.items() if name in mine}, moved)
            try:
                etag = self._replace_manifest(unit, goal, etag)
            except Changed:
                continue
            self._clear(unit, goal, theirs)
            if goal:
                # What only others have added is brought in by the next pull.
                self._remember(unit, _Known(etag if alike(mine, goal) else "", mine))
            else:
                self._state(unit).unlink(missing_ok=True)
            return
        raise conflict(unit, self.root)

    def _replace_manifest(self, unit: str, files: Files, etag: str | None) -> str:
        key = f"manifests/{unit}.json"
        if not files:
            self.bucket.delete([key])
            return ""
        body = {"unit": unit, "files": {n: {"sha256": one.sha256, "size": one.size} for n, one in files.items()}}
        text = json.dumps(body, indent=1, sort_keys=True, ensure_ascii=False)
        return self.bucket.replace(key, text.encode(), expected=etag)

    def _upload(self, unit: str, files: Files, moved: Moved) -> None:
        there = {key: entry.size for key, entry in self.bucket.list(f"files/{unit}/").items()}
        missing = {name: one for name, one in files.items() if there.get(f"{name}@{one.sha256[:16]}") != one.size}
        told = _Told(self._listen, f"put up {unit}", sum(one.size for one in missing.values()))

        def put(entry: tuple[str, UnitFile]) -> None:
            path = self.root / unit / entry[0]
            self.bucket.upload(path, _key(unit, *entry), told)
            if path.stat().st_mtime_ns != entry[1].mtime_ns:
                raise FileNotFoundError(path)  # replaced meanwhile: its bytes are not those of the hash

        _in_parallel(put, missing.items())
        moved.units.append(unit)
        moved.files += len(missing)
        moved.bytes += sum(one.size for one in missing.values())

    def _clear(self, unit: str, kept: Files, before: Files) -> None:
        """Delete what no manifest names: what was replaced, and what a killed upload left."""
        needed = {f"{name}@{one.sha256[:16]}" for name, one in kept.items()}
        stale = {f"{name}@{one.sha256[:16]}" for name, one in before.items()}
        if not matches(unit, MERGED):
            # Nobody else is about to name one: their own manifest would now be refused.
            stale |= self.bucket.list(f"files/{unit}/").keys()
        self.bucket.delete(f"files/{unit}/{name}" for name in sorted(stale - needed))

    @contextlib.contextmanager
    def pushing(self, wanted: Collection[str]) -> Generator[None]:
        """Look every minute for what is complete and put it up, until the block ends."""
        done = threading.Event()

        def look() -> None:
            while not done.wait(float(os.environ.get(EVERY_VARIABLE) or 60)):
                try:
                    self.push(wanted)
                except (StoreError, WorkspaceError, OSError) as error:
                    # The step goes on; what could not be put up now is put up at its end.
                    print(f"not put up yet: {error}", file=sys.stderr)  # noqa: T201

        thread = threading.Thread(target=look, name="workspace-push", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _manifest(self, unit: str) -> tuple[dict[str, UnitFile], str] | None:
        read = self.bucket.read(f"manifests/{unit}.json")
        if read is None:
            return None
        try:
            values: dict[str, Any] = json.loads(read[0])["files"]
            files = {name: UnitFile(str(one["sha256"]), int(one["size"])) for name, one in values.items()}
        except (ValueError, KeyError, TypeError) as error:
            where = f"{self.bucket.address}/manifests/{unit}.json"
            raise StoreError("this is no manifest of a workspace", where=where, hint="check the address") from error
        if any(unit_of(f"{unit}/{name}") != unit or name.startswith("/") for name in files):
            where = f"{self.bucket.address}/manifests/{unit}.json"
            raise StoreError("this manifest names files outside its unit", where=where, hint="delete it")
        return files, read[1]

    def _local(self, unit: str) -> dict[str, UnitFile]:
        """The unit's files here; one is read only where size or time differ from what is known."""
        known = self._known(unit)
        before = known.files if known else {}
        found: dict[str, UnitFile] = {}
        for name in scan(self.root, unit).get(unit, ()):
            path = self.root / unit / name
            about, old = path.stat(), before.get(name)
            if old and (old.size, old.mtime_ns) == (about.st_size, about.st_mtime_ns):
                found[name] = old
            else:
                found[name] = UnitFile(sha256_of(path), about.st_size, about.st_mtime_ns)
        return found

    def _state(self, unit: str) -> Path:
        return self._own / "units" / f"{unit}.json"

    def _known(self, unit: str) -> _Known | None:
        path = self._state(unit)
        if not path.exists():
            return None
        values: dict[str, Any] = read_json(path)
        return _Known(values["etag"], {n: UnitFile(**one) for n, one in values["files"].items()}, values["placing"])

    def _remember(self, unit: str, known: _Known) -> None:
        write_json(self._state(unit), asdict(known))

    @contextlib.contextmanager
    def _locked(self) -> Generator[None]:
        """One process moves at a time; the kernel frees the lock of a dead one."""
        with (self._own / "lock").open("a") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            for left in self._own.glob("incoming-*"):
                shutil.rmtree(left, ignore_errors=True)
            yield


class _Told:
    """Adds up the bytes of parallel parts and tells the listener."""

    def __init__(self, listen: Listen, what: str, total: int) -> None:
        self._listen, self._what, self._total, self._done = listen, what, total, 0
        self._lock = threading.Lock()

    def __call__(self, count: int) -> None:
        with self._lock:
            self._done += count
            self._listen(self._what, self._done, self._total)


def _in_parallel(move: Callable[[tuple[str, UnitFile]], T], files: Iterable[tuple[str, UnitFile]]) -> list[T]:
    """Move files beside each other; the first error ends it."""
    pool = ThreadPoolExecutor(FILES_AT_ONCE)
    try:
        return list(pool.map(move, files))
    finally:
        pool.shutdown(cancel_futures=True)


def _key(unit: str, name: str, one: UnitFile) -> str:
    return f"files/{unit}/{name}@{one.sha256[:16]}"
