"""The fetch: from a list of wanted figures to shards of figures and one outcome a row."""

from __future__ import annotations

import asyncio
import dataclasses
import fcntl
import hashlib
import os
import shutil
import sys
import time
from collections.abc import AsyncIterator, Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from medvlm.data.articles import ArticleFetcher, FetchSettings, RowResult
from medvlm.data.attribution import write_attribution
from medvlm.data.blocks import BLOCK_ROWS, TRANSIENT, Blocks
from medvlm.data.fetch_report import fetch_report, plain_counts
from medvlm.data.figure_image import bomb_limit
from medvlm.data.lists import ArticleRows, ListIndex, index_list
from medvlm.data.objects import ObjectStore, StoreLimits, open_store
from medvlm.data.pmc import POLICIES, PUBLIC_BUCKET
from medvlm.data.versions import Versions, list_versions
from medvlm.errors import InputError, StoreError, WorkspaceError
from medvlm.progress import report_progress
from medvlm.records import Figure, schema_of
from medvlm.store import Report, atomic_folder, fingerprint, read_report, write_report

__all__ = ["fetch_figures", "hold_lock"]

FORMAT = 1
"""Raised when the same list, store and policy would yield other shards than before."""
LISTING_BATCH = 256
"""Articles whose versions are asked for together."""
BATCHES_AHEAD = 4
PROGRESS_EVERY_S = 1.0
SWITCH_INTERVAL_S = 0.0005
GIVE_UP_AFTER = 200
"""Results in a row that failed for a passing reason, before the store is called unreachable."""

Listener = Callable[[Mapping[str, Any]], None]


@dataclass
class _Run:
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
                if not self.blocks.is_done(outcome.row):
                    emit(RowResult(outcome))
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
                evidence = _evidence(found.stamps)
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


def fetch_figures(
    urls: Path,
    store: str,
    out: Path,
    *,
    scratch: Path | None = None,
    settings: FetchSettings | None = None,
    limits: StoreLimits | None = None,
    part: tuple[int, int] = (1, 1),
    fresh: bool = False,
    block_rows: int = BLOCK_ROWS,
    listen: Listener = report_progress,
) -> Report:
    """Fetch the figures of a list and write shards, outcomes and ``report.json``.

    ``out/shards`` holds ``Figure`` records in the order of the list, the same bytes whatever the
    network did; ``out/outcomes`` one ``FetchOutcome`` for each row. Both take their place only
    when every row has its outcome. A killed run continues where it stopped. A run on a list that
    is finished asks only whether the articles' metadata has changed, and fetches what did.

    Args:
        urls: The list, see ``medvlm.data.lists``.
        store: A folder, ``http(s)://…`` or ``s3://bucket``.
        out: Step folder.
        scratch: Where unfinished work is kept, on the same disk as ``out``; a hidden folder beside it if None.
        settings: Licence policy and image bounds.
        limits: Concurrency, rate, timeouts.
        part: ``(i, n)``: only the i-th of n parts. Its blocks wait in ``scratch``; a run without
            parts then fetches what is missing and puts everything in place.
        fresh: Forget everything fetched before.
        block_rows: Rows of a block: the unit of parts and of shards.
        listen: Called about once a second with ``done``, ``total`` and ``by_status``.

    Returns:
        The report, also written beside the data (for a part: counts of that part, not written).

    Raises:
        InputError: The list is missing or empty, or the policy is unknown.
        StoreError: The store is not there, is no PMC bucket, or stops answering.
        WorkspaceError: The disk is full or read-only, or another run works on this list.
    """
    settings, limits = settings or FetchSettings(), limits or StoreLimits()
    if settings.policy not in POLICIES:
        raise InputError(
            f"there is no policy {settings.policy!r}", where="--policy", hint=f"choose from {', '.join(POLICIES)}"
        )
    started = time.monotonic()
    index = index_list(urls, block_rows=block_rows, part=part)
    scratch = scratch or out.parent / f".{out.name}.fetch"
    inputs = fingerprint(FORMAT, block_rows, urls, store, settings.policy, settings.max_side_px, settings.max_bytes)
    inputs = fingerprint(inputs, settings.captions)
    folder = scratch / inputs
    with hold_lock(scratch, part):
        if fresh:
            shutil.rmtree(folder, ignore_errors=True)
        earlier = None if fresh else _earlier(out, inputs)
        share = _share(len(index.rows), block_rows, part)
        blocks = Blocks(folder, index.rows, share, earlier=earlier, block_rows=block_rows)
        opened = open_store(store, limits)
        total = share[1] - share[0]
        run = _Run(
            index, blocks, opened, settings, limits.concurrency, listen, total,
            _earlier_evidence(earlier, blocks) if earlier else None,
        )  # fmt: skip
        with bomb_limit(), _short_turns():
            asyncio.run(_fetch(run))
        rates = _rates(run, time.monotonic() - started)
        if part != (1, 1):
            details = {"by_status": plain_counts(blocks.by_status), "part": f"{part[0]}/{part[1]}"}
            return Report(step="fetch", counts={"rows": total}, metrics=rates, details=details)
        _put_in_place(folder, out)
        write_attribution(out / "shards", out)
        made = fetch_report(out)
        report = dataclasses.replace(
            made,
            metrics=made.metrics | rates,
            details=made.details | {"policy": settings.policy, "store": store, "inputs": inputs},
        )
        report = write_report(out, report, started=started, packages=("pyarrow", "pillow", "lxml"))
        shutil.rmtree(folder, ignore_errors=True)
        _drop_strangers(scratch)
    return report


@contextmanager
def _short_turns() -> Generator[None]:
    """Let threads take turns often: the event loop must not wait 5 ms for each of its many small steps."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


async def _fetch(run: _Run) -> None:
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


def _share(rows: int, block_rows: int, part: tuple[int, int]) -> tuple[int, int]:
    """Ordinals ``[begin, end)`` of a part: whole blocks, as even as they go."""
    blocks = -(-rows // block_rows)
    begin, end = (min(blocks * step // part[1] * block_rows, rows) for step in (part[0] - 1, part[0]))
    return begin, end


@contextmanager
def hold_lock(scratch: Path, part: tuple[int, int]) -> Generator[None]:
    """Hold this list's lock: alone for a whole run, beside other parts for a part.

    Raises:
        WorkspaceError: Another process holds it.
    """
    with ExitStack() as held:
        try:
            scratch.mkdir(parents=True, exist_ok=True)
            whole = held.enter_context((scratch / "lock").open("a"))
            fcntl.flock(whole, (fcntl.LOCK_EX if part == (1, 1) else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            if part != (1, 1):
                mine = held.enter_context((scratch / f"lock-{part[0]}-of-{part[1]}").open("a"))
                fcntl.flock(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise WorkspaceError(
                "another fetch is running here",
                where=str(scratch),
                hint="wait for it to end, or give this one another --out",
            ) from error
        except OSError as error:
            raise WorkspaceError(
                f"the folder cannot be written: {error.strerror}",
                where=str(scratch),
                hint="fix its permissions, or choose another folder with --workspace or --out",
            ) from error
        yield


def _earlier(out: Path, inputs: str) -> Path | None:
    """The step folder, if it holds a finished run on the same list, store and policy."""
    try:
        report = read_report(out)
    except InputError:
        return None
    if report is None or report.details.get("inputs") != inputs:
        return None
    return out if (out / "outcomes").is_dir() and (out / "shards").is_dir() else None


def _earlier_evidence(earlier: Path, blocks: Blocks) -> npt.NDArray[np.uint64]:
    """For each row, what its outcome rested on; 0 where it is to be fetched anew."""
    evidence = np.zeros(len(blocks.rows), np.uint64)
    for path in sorted((earlier / "outcomes").glob("part-*.parquet")):
        table = pq.read_table(path, columns=["row", "status", "metadata_etags"])
        for row, status, stamps in zip(*(table[name].to_pylist() for name in table.column_names), strict=True):
            if status not in TRANSIENT:
                evidence[blocks.ordinal(row)] = _evidence(tuple(stamps))
    return evidence


def _evidence(stamps: tuple[str, ...]) -> np.uint64:
    digest = hashlib.sha256("\n".join(stamps).encode()).digest()
    return np.uint64(int.from_bytes(digest[:8], "little") | 1)


def _put_in_place(folder: Path, out: Path) -> None:
    """Move finished shards and outcomes to where readers look, one folder after the other."""
    for name in ("shards", "outcomes"):
        made = folder / name
        if not made.is_dir():
            continue  # a run that was killed right here moved it already
        if name == "shards" and not any(made.glob("*.parquet")):
            # No figure is a result too: readers find an empty table with the right columns.
            pq.write_table(schema_of(Figure).empty_table(), made / "part-00000-000.parquet", compression="zstd")
        with atomic_folder(out / name) as temporary:
            temporary.rmdir()
            made.rename(temporary)


def _drop_strangers(scratch: Path) -> None:
    """Remove what runs on other lists left here; nothing else runs while the lock is held."""
    for entry in scratch.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)


def _rates(run: _Run, seconds: float) -> dict[str, float]:
    tally, figures = run.store.tally, run.blocks.by_status["ok"]
    return {
        "requests": float(tally.requests),
        "retries": float(tally.retries),
        "bytes_read": float(tally.bytes_read),
        "requests_per_figure": round(tally.requests / figures, 3) if figures else 0.0,
        "figures_per_s": round(figures / seconds, 2) if seconds else 0.0,
    }
