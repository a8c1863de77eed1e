"""One process's share of a fetch: listings ahead, articles in flight, blocks finished behind."""

from __future__ import annotations

import asyncio
import hashlib
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from medvlm.data.articles import ArticleFetcher, FetchSettings, RowResult
from medvlm.data.blocks import TRANSIENT, Blocks
from medvlm.data.figure_image import bomb_limit
from medvlm.data.lists import ArticleRows, ListIndex
from medvlm.data.objects import ObjectStore
from medvlm.data.pmc import PUBLIC_BUCKET
from medvlm.data.versions import Versions, list_versions
from medvlm.errors import StoreError, WorkspaceError

__all__ = ["FetchRun", "Listener", "evidence_of", "run_fetch"]

LISTING_BATCH = 256
"""Articles whose versions are asked for together."""
BATCHES_AHEAD = 4
PROGRESS_EVERY_S = 1.0
SWITCH_INTERVAL_S = 0.0005
GIVE_UP_AFTER = 200
"""Results in a row that failed for a passing reason, before the store is called unreachable."""


Listener = Callable[[Mapping[str, Any]], None]


@dataclass
class FetchRun:
    """One process's share of a fetch."""

    index: ListIndex
    blocks: Blocks
    store: ObjectStore
    settings: FetchSettings
    concurrency: int
    listen: Listener
    total: int
    earlier: npt.NDArray[np.uint64] | None
    """Hash of each row's evidence in the earlier run; 0 where its outcome is not to be kept."""
    finishing: set[asyncio.Future[None]] = field(default_factory=set[asyncio.Future[None]])
    failures_in_a_row: int = 0
    last_event: float = 0.0

    async def everything(self) -> None:
        """Fetch every row of this share that has no result yet."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[tuple[ArticleRows, Versions] | None] = asyncio.Queue(self.concurrency)
        with ThreadPoolExecutor(_cores(), "decode") as decoders, ThreadPoolExecutor(1, "shards") as writer:

            def finish(block: int) -> None:
                self.finishing.add(loop.run_in_executor(writer, self.blocks.finish, block))

            def emit(result: RowResult) -> None:
                full = self.blocks.add(result)
                if full is not None:
                    finish(full)
                self._note(result.outcome.status, result.outcome.detail)

            fetcher = ArticleFetcher(self.store, self.settings, decoders, emit)

            async def work() -> None:
                while (job := await queue.get()) is not None:
                    await fetcher.fetch(*job)

            for block in self.blocks.unfinished():
                finish(block)
            for outcome in self.index.bad_rows():
                if self.blocks.is_done(outcome.row):
                    continue
                if self.earlier is None:
                    emit(RowResult(outcome))
                elif (full := self.blocks.keep(outcome.row, outcome.status)) is not None:
                    finish(full)
            async with asyncio.TaskGroup() as tasks:
                for _ in range(self.concurrency):
                    tasks.create_task(work())
                async for job in self._jobs(finish):
                    await queue.put(job)
                for _ in range(self.concurrency):
                    await queue.put(None)
            await asyncio.gather(*self.finishing)
        self._send()

    async def _jobs(self, finish: Callable[[int], None]) -> AsyncIterator[tuple[ArticleRows, Versions]]:
        """Articles with rows still to fetch and their versions, listings running ahead."""
        pending: list[tuple[list[ArticleRows], asyncio.Task[dict[str, Versions]]]] = []
        try:
            for batch in self._batches():
                names = [article.pmcid for article in batch]
                pending.append((batch, asyncio.create_task(list_versions(self.store, names))))
                if len(pending) > BATCHES_AHEAD:
                    for job in self._open(*await _first(pending), finish):
                        yield job
            while pending:
                for job in self._open(*await _first(pending), finish):
                    yield job
        finally:
            for _, listing in pending:
                listing.cancel()

    def _batches(self) -> Generator[list[ArticleRows]]:
        batch: list[ArticleRows] = []
        for article in self.index.articles():
            refs = tuple(ref for ref in article.refs if not self.blocks.is_done(ref.row))
            if refs:
                batch.append(ArticleRows(article.pmcid, refs))
            if len(batch) >= LISTING_BATCH:
                yield batch
                batch = []
        if batch:
            yield batch

    def _open(
        self, batch: list[ArticleRows], versions: dict[str, Versions], finish: Callable[[int], None]
    ) -> Generator[tuple[ArticleRows, Versions]]:
        """Articles of a batch, without the rows that the earlier run settled and nothing has changed since."""
        for article in batch:
            found = versions[article.pmcid]
            refs = article.refs
            # Servers without S3 give no ETag, and then nothing says that an article is unchanged.
            if self.earlier is not None and found.failure is None and all(etag for _, etag in found.etags):
                evidence = evidence_of(found.stamps)
                settled = [ref for ref in refs if self.earlier[self.blocks.ordinal(ref.row)] == evidence]
                refs = tuple(ref for ref in refs if ref not in settled)
                for ref in settled:
                    full = self.blocks.keep(ref.row, "kept")
                    if full is not None:
                        finish(full)
            if refs:
                yield ArticleRows(article.pmcid, refs), found

    def _note(self, status: str, detail: str) -> None:
        failed = status in TRANSIENT
        self.failures_in_a_row = self.failures_in_a_row + 1 if failed else 0
        if self.failures_in_a_row >= GIVE_UP_AFTER:
            raise StoreError(
                f"the last {GIVE_UP_AFTER} rows all failed: {detail}",
                where="the store",
                hint="check the network and --store, then run the same command again; finished figures are kept",
            )
        for done in [future for future in self.finishing if future.done()]:
            self.finishing.discard(done)
            done.result()
        if time.monotonic() - self.last_event >= PROGRESS_EVERY_S:
            self._send()

    def rates(self, seconds: float) -> dict[str, float]:
        """What the run asked of the store, and how fast figures came."""
        tally, figures = self.store.tally, self.blocks.by_status["ok"]
        return {
            "requests": float(tally.requests),
            "retries": float(tally.retries),
            "bytes_read": float(tally.bytes_read),
            "requests_per_figure": round(tally.requests / figures, 3) if figures else 0.0,
            "figures_per_s": round(figures / seconds, 2) if seconds else 0.0,
        }

    def _send(self) -> None:
        self.last_event = time.monotonic()
        by_status = dict(self.blocks.by_status)
        self.listen({"done": sum(by_status.values()), "total": self.total, "by_status": by_status})


async def _first(
    pending: list[tuple[list[ArticleRows], asyncio.Task[dict[str, Versions]]]],
) -> tuple[list[ArticleRows], dict[str, Versions]]:
    batch, listing = pending.pop(0)
    return batch, await listing


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _short_turns() -> Generator[None]:
    """Let threads take turns often: the event loop must not wait 5 ms for each of its many small steps."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def run_fetch(run: FetchRun) -> None:
    """Fetch everything of a share.

    Raises:
        StoreError: The store does not answer, or is no PMC bucket.
        WorkspaceError: The disk is full or read-only.
    """
    with bomb_limit(), _short_turns():
        asyncio.run(_fetch(run))


async def _fetch(run: FetchRun) -> None:
    try:
        page = await run.store.page("metadata/", limit=1)
        if page.status != "ok":
            raise StoreError(f"the store does not answer: {page.detail}", where="--store", hint="check the address")
        if not page.objects:
            raise StoreError(
                "the store holds nothing under metadata/",
                where="--store",
                hint=f"give the root of a bucket laid out as {PUBLIC_BUCKET} is",
            )
        await run.everything()
    except* (StoreError, WorkspaceError) as group:
        raise group.exceptions[0] from None
    finally:
        await run.store.close()


def evidence_of(stamps: tuple[str, ...]) -> np.uint64:
    """A number that stands for what an outcome rested on; never 0."""
    digest = hashlib.sha256("\n".join(stamps).encode()).digest()
    return np.uint64(int.from_bytes(digest[:8], "little") | 1)
