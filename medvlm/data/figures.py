"""The fetch: from a list of wanted figures to shards of figures and one outcome a row."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import shutil
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from medvlm.data.articles import FetchSettings
from medvlm.data.attribution import write_attribution
from medvlm.data.blocks import BLOCK_ROWS, TRANSIENT, Blocks
from medvlm.data.fetch_report import fetch_report, plain_counts
from medvlm.data.fetch_run import FetchRun, Listener, evidence_of, run_fetch
from medvlm.data.lists import index_list
from medvlm.data.objects import StoreLimits, open_store
from medvlm.data.pmc import POLICIES
from medvlm.errors import InputError, WorkspaceError
from medvlm.progress import report_progress
from medvlm.records import Figure, schema_of
from medvlm.store import Report, atomic_folder, fingerprint, read_report, write_report

__all__ = ["fetch_figures", "hold_lock"]

FORMAT = 1
"""Raised when the same list, store and policy would yield other shards than before."""


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
    inputs = fingerprint(FORMAT, block_rows, urls, store, dataclasses.asdict(settings))
    folder, ready = scratch / inputs, scratch / f"{inputs}.ready"
    with hold_lock(scratch, part):
        if fresh:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.rmtree(ready, ignore_errors=True)
        rates: dict[str, float] = {}
        # A run that was killed while it put its work in place has nothing left to fetch.
        if not ready.is_dir():
            earlier = None if fresh else _earlier(out, inputs)
            share = _share(len(index.rows), block_rows, part)
            blocks = Blocks(folder, index.rows, share, earlier=earlier, block_rows=block_rows)
            evidence = _earlier_evidence(earlier, blocks) if earlier else None
            total = share[1] - share[0]
            run = FetchRun(
                index, blocks, open_store(store, limits), settings, limits.concurrency, listen, total, evidence
            )
            run_fetch(run)
            rates = run.rates(time.monotonic() - started)
            if part != (1, 1):
                return _report_of_part(part, total, blocks, rates)
            folder.rename(ready)
        _put_in_place(ready, out)
        report = _described(out, {"policy": settings.policy, "store": store, "inputs": inputs}, rates, started)
        _drop_leftovers(scratch)
    return report


def _report_of_part(part: tuple[int, int], rows: int, blocks: Blocks, rates: dict[str, float]) -> Report:
    details = {"by_status": plain_counts(blocks.by_status), "part": f"{part[0]}/{part[1]}"}
    return Report(step="fetch", counts={"rows": rows}, metrics=rates, details=details)


def _described(out: Path, details: dict[str, str], rates: dict[str, float], started: float) -> Report:
    """Write attribution and report of what is in place."""
    write_attribution(out / "shards", out)
    made = fetch_report(out)
    report = dataclasses.replace(made, metrics=made.metrics | rates, details=made.details | details)
    return write_report(out, report, started=started, packages=("pyarrow", "pillow", "lxml"))


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
                _agree_on_parts(held.enter_context((scratch / "lock-parts").open("a+")), part[1])
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


def _agree_on_parts(shared: IO[str], parts: int) -> None:
    """Let parts run side by side only where all cut the list into as many: others would overlap."""
    fcntl.flock(shared, fcntl.LOCK_SH | fcntl.LOCK_NB)
    shared.seek(0)
    if shared.read() != str(parts):
        fcntl.flock(shared, fcntl.LOCK_EX | fcntl.LOCK_NB)  # refused while another part holds it
        shared.truncate(0)
        shared.write(str(parts))
        shared.flush()
        fcntl.flock(shared, fcntl.LOCK_SH | fcntl.LOCK_NB)


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
                evidence[blocks.ordinal(row)] = evidence_of(tuple(stamps))
    return evidence


def _put_in_place(ready: Path, out: Path) -> None:
    """Move finished shards and outcomes to where readers look, one folder after the other."""
    for name in ("shards", "outcomes"):
        made = ready / name
        if not made.is_dir():
            continue  # a run that was killed right here moved it already
        if name == "shards" and not any(made.glob("*.parquet")):
            # No figure is a result too: readers find an empty table with the right columns.
            pq.write_table(schema_of(Figure).empty_table(), made / "part-00000-000.parquet", compression="zstd")
        with atomic_folder(out / name) as temporary:
            temporary.rmdir()
            try:
                made.rename(temporary)
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                shutil.copytree(made, temporary)  # the scratch folder lies on another disk


def _drop_leftovers(scratch: Path) -> None:
    """Remove what this run and runs on other lists left here; nothing else runs while the lock is held."""
    for entry in scratch.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
