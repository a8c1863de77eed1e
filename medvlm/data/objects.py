"""Object stores to read figures from: a folder, an S3-speaking server, old tarballs; one interface."""

from __future__ import annotations

import asyncio
import bisect
import dataclasses
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from medvlm.errors import StoreError

__all__ = [
    "Answer",
    "ByteBudget",
    "FolderStore",
    "Listed",
    "ObjectStore",
    "Page",
    "StoreLimits",
    "StoreTally",
    "open_store",
]

AnswerStatus = Literal["ok", "absent", "too_large", "timeout", "store_error"]


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """How hard a store may be asked, and how long one request may take."""

    concurrency: int = 128
    """Requests in flight."""
    requests_per_s: float = 0.0
    """Over all requests of this process; 0 is no limit."""
    timeout_s: float = 30.0
    """Longest silence of a connection."""
    attempts: int = 5
    backoff_s: float = 0.5
    """First pause before a retry; it doubles, with jitter, up to 30 s."""
    max_pause_s: float = 120.0
    """Longest ``Retry-After`` that is obeyed."""
    bytes_in_flight: int = 256 * 2**20
    """Bodies held in memory at a time, over all requests."""


@dataclass(slots=True)
class StoreTally:
    """What was asked of a store."""

    requests: int = 0
    retries: int = 0
    bytes_read: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """What a store said to one GET, after all attempts."""

    status: AnswerStatus
    body: bytes = b""
    detail: str = ""
    attempts: int = 1
    bytes_read: int = 0
    reserved: int = 0
    """What the caller gives back to the store's budget when it is done with the body."""


class ByteBudget:
    """Bounds the bytes of bodies held in memory at a time, whatever their number."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = total
        self._changed = asyncio.Condition()

    async def reserve(self, size: int) -> int:
        """Wait for room and take it; a body larger than everything takes everything."""
        size = min(size, self.total)
        async with self._changed:
            await self._changed.wait_for(lambda: self._free >= size)
            self._free -= size
        return size

    async def release(self, size: int) -> None:
        """Give room back."""
        if size:
            async with self._changed:
                self._free += size
                self._changed.notify_all()


@dataclass(frozen=True, slots=True)
class Listed:
    """One object of a listing."""

    key: str
    etag: str
    """Changes when the object does; the MD5 on S3."""


@dataclass(frozen=True, slots=True)
class Page:
    """A page of a listing; ``status`` is as of a GET, and ``objects`` is empty unless it is ok."""

    status: AnswerStatus
    objects: tuple[Listed, ...] = ()
    more: bool = False
    detail: str = ""
    attempts: int = 1


class ObjectStore(Protocol):
    """What the fetch needs of a store."""

    tally: StoreTally
    budget: ByteBudget

    async def page(self, prefix: str, *, after: str = "", limit: int = 1000) -> Page:
        """Up to ``limit`` objects whose keys begin with ``prefix`` and come after ``after``, in key order."""
        ...

    async def get(self, key: str, *, limit_bytes: int) -> Answer:
        """An object's bytes, at most ``limit_bytes`` of them."""
        ...

    async def close(self) -> None:
        """Let go of connections."""
        ...


@dataclass
class FolderStore:
    """A folder laid out as the bucket is. Links that lead out of it are not followed."""

    root: Path
    limits: StoreLimits = field(default_factory=StoreLimits)
    tally: StoreTally = field(default_factory=StoreTally)
    _names: list[str] | None = None

    def __post_init__(self) -> None:
        """Refuse what is no folder."""
        self.budget = ByteBudget(self.limits.bytes_in_flight)
        self.root = self.root.resolve()
        if not self.root.is_dir():
            raise StoreError(
                "the store is not a folder", where=str(self.root), hint="give a folder, http(s)://… or s3://bucket"
            )
        inner = next(self.root.glob("*/metadata"), None)
        if inner is not None and not (self.root / "metadata").is_dir():
            raise StoreError(
                "the bucket lies one folder deeper", where=str(self.root), hint=f"give --store {inner.parent}"
            )

    async def page(self, prefix: str, *, after: str = "", limit: int = 1000) -> Page:
        """Objects by key; the folder ``metadata/`` is read once, others each time."""
        self.tally.requests += 1
        return await asyncio.to_thread(self._page, prefix, after, limit)

    def _page(self, prefix: str, after: str, limit: int) -> Page:
        folder, slash, _ = prefix.rpartition("/")
        if prefix.startswith("metadata/"):
            self._names = self._names if self._names is not None else list(self._keys("metadata"))
            names = self._names
        else:
            names = list(self._keys(folder)) if slash else sorted(self._keys(""))
        begin = max(bisect.bisect_left(names, prefix), bisect.bisect_right(names, after))
        end = begin
        while end < len(names) and end - begin < limit and names[end].startswith(prefix):
            end += 1
        more = end < len(names) and names[end].startswith(prefix)
        listed = [Listed(key, self._etag(key)) for key in names[begin:end]]
        return Page("ok", tuple(listed), more)

    def _keys(self, folder: str) -> Iterator[str]:
        top = self.root / folder
        if not top.is_dir():
            return
        prefix = f"{folder}/" if folder else ""
        for name in sorted(os.listdir(top)):  # noqa: PTH208  # names only: a bucket's folder may hold millions
            yield prefix + name

    def _etag(self, key: str) -> str:
        with (self.root / key).open("rb") as stream:
            return hashlib.file_digest(stream, "md5").hexdigest()

    async def get(self, key: str, *, limit_bytes: int) -> Answer:
        """A file's bytes."""
        self.tally.requests += 1
        path = self.root / key
        try:
            size = path.stat().st_size
        except OSError:
            size = 0
        if size > limit_bytes:
            return Answer("too_large", detail=f"{size:,} bytes are more than {limit_bytes:,}")
        reserved = await self.budget.reserve(size)
        answer = await asyncio.to_thread(self._get, key, limit_bytes)
        self.tally.bytes_read += answer.bytes_read
        return dataclasses.replace(answer, reserved=reserved)

    def _get(self, key: str, limit_bytes: int) -> Answer:
        path = self.root / key
        try:
            if not path.resolve().is_relative_to(self.root):
                return Answer("store_error", detail=f"{key} leads out of the folder")
            with path.open("rb") as stream:
                body = stream.read(limit_bytes + 1)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return Answer("absent", detail=f"no object {key}")
        except OSError as error:
            return Answer("store_error", detail=f"{key}: {error.strerror}")
        if len(body) > limit_bytes:
            return Answer("too_large", detail=f"more than {limit_bytes:,} bytes", bytes_read=len(body))
        return Answer("ok", body, bytes_read=len(body))

    async def close(self) -> None:
        """Nothing is held open."""


def open_store(address: str, limits: StoreLimits) -> ObjectStore:
    """The store of an address: a folder, a folder of tarballs, ``http(s)://…`` or ``s3://bucket``.

    Raises:
        StoreError: The address is none of these.
    """
    if address.startswith(("http://", "https://", "s3://")):
        from medvlm.data.bucket import BucketStore

        return BucketStore(address, limits)
    if "://" in address and not address.startswith("file://"):
        raise StoreError(
            f"stores of kind {address.split(':', 1)[0]} are not read",
            where=address,
            hint="give a folder, http(s) or s3",
        )
    folder = Path(address.removeprefix("file://"))
    from medvlm.data.tarballs import TarballStore, holds_tarballs

    return TarballStore(folder, limits) if holds_tarballs(folder) else FolderStore(folder, limits)
