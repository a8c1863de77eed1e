"""Objects that are what their metadata says: read, checked against the MD5, and worked on in a thread."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Generic, TypeVar

from medvlm.data.objects import Answer, ObjectStore
from medvlm.data.pmc import MediaObject

__all__ = ["VerifiedRead", "read_verified"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class VerifiedRead(Generic[T]):
    """An object after it was read, checked and worked on."""

    answer: Answer
    """Without its body."""
    value: T | None = None
    """What the work made of it; None if it was not read, not what it should be, or the work failed."""
    mismatch: str = ""
    """The MD5 that was found, where it is not the one expected."""
    error: Exception | None = None
    """Why the work failed."""


async def read_verified(
    store: ObjectStore, executor: Executor, media: MediaObject, work: Callable[[bytes], T], *, limit_bytes: int
) -> VerifiedRead[T]:
    """Read an object and give it to ``work``.

    It is read a second time where its MD5 is wrong, since a transfer may have failed. MD5 and work
    are one job in one thread, so that the event loop waits for neither.
    """
    attempts = bytes_read = 0
    for last in (False, True):
        answer = await store.get(media.key, limit_bytes=limit_bytes)
        attempts, bytes_read = attempts + answer.attempts, bytes_read + answer.bytes_read
        bare = Answer(answer.status, b"", answer.detail, attempts, bytes_read)
        if answer.status != "ok":
            return VerifiedRead(bare)
        try:
            run = asyncio.get_running_loop().run_in_executor
            read = await run(executor, _worked, answer.body, media.md5, work, bare)
        finally:
            await store.budget.release(answer.reserved)
        if not read.mismatch or last:
            return read
    raise AssertionError("the loop returns")


def _worked(body: bytes, md5: str, work: Callable[[bytes], T], answer: Answer) -> VerifiedRead[T]:
    found = hashlib.md5(body, usedforsecurity=False).hexdigest() if md5 else ""
    if found != md5:
        return VerifiedRead(answer, mismatch=found)
    try:
        return VerifiedRead(answer, work(body))
    except Exception as error:  # noqa: BLE001  # the fetch worker writes the row
        return VerifiedRead(answer, error=error)
