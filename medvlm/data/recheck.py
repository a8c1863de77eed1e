"""What was retracted, relicensed or changed since the fetch, and the shards without it."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from medvlm.data.articles import NEWEST_VERSIONS
from medvlm.data.attribution import write_attribution
from medvlm.data.fetch_report import fetch_report, fingerprint_of_shards
from medvlm.data.figures import hold_lock
from medvlm.data.inventory import read_inventory
from medvlm.data.objects import ObjectStore, StoreLimits, open_store
from medvlm.data.pmc import ArticleVersion, choose_versions, metadata_key, metadata_prefix, parse_metadata
from medvlm.data.versions import Versions, list_versions
from medvlm.errors import StoreError, WorkspaceError
from medvlm.records import FetchOutcome, FetchStatus, schema_of
from medvlm.store import Report, atomic_path, read_report, write_report

__all__ = ["Verdict", "recheck_figures"]

BATCH = 256
METADATA_LIMIT_BYTES = 8 * 2**20


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of an article since its figures were fetched."""

    kind: str
    """``retracted``, ``licence_refused``, ``article_absent``, ``relicensed``, ``changed`` or ``unknown``."""
    detail: str
    licence: str | None = None
    stamps: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Known:
    """What an article's figures rested on when they were fetched."""

    stamps: tuple[str, ...]
    licence: str


WITHDRAWN: Mapping[str, FetchStatus] = {
    "retracted": "retracted",
    "licence_refused": "licence_refused",
    "article_absent": "article_absent",
}
"""Verdicts that take the figures out of the shards, with the status that their rows get."""


def recheck_figures(
    out: Path,
    store: str,
    *,
    scratch: Path | None = None,
    inventory: bool = False,
    dry_run: bool = False,
    limits: StoreLimits | None = None,
) -> Report:
    """Look at every article that gave a figure once more, and mark what may no longer be used.

    Rows of articles that were retracted, vanished, or left the policy's licences get that status
    and their figures leave the shards, so that the next dataset build is without them. A licence
    that changed within the policy is written to the figures. What changed otherwise loses its
    ETag, so that the next fetch reads it anew.

    Args:
        out: Step folder of the fetch.
        store: The same store.
        scratch: Where the fetch keeps its lock; a hidden folder beside ``out`` if None.
        inventory: Read the bucket's daily inventory in place of listing.
        dry_run: Only say what would be done.
        limits: Concurrency, rate, timeouts.

    Returns:
        Counts of articles by verdict, also written to ``out/recheck/report.json``.

    Raises:
        WorkspaceError: The fetch has not run, or one is running.
        StoreError: The store does not answer, or has no inventory.
    """
    started = time.monotonic()
    before = read_report(out)
    if before is None:
        raise WorkspaceError("nothing was fetched here", where=str(out), hint="run 'medvlm fetch' first")
    with hold_lock(scratch or out.parent / f".{out.name}.fetch", (1, 1)):
        known = _known_articles(out)
        opened = open_store(store, limits or StoreLimits())
        verdicts = asyncio.run(_judge(opened, known, str(before.details["policy"]), inventory=inventory))
        rows = 0
        if verdicts and not dry_run:
            rows = sum(_mark(path, out, verdicts) for path in sorted((out / "outcomes").glob("*.parquet")))
            now = fetch_report(out)
            after = dataclasses.replace(now, metrics=before.metrics | now.metrics, details=before.details | now.details)
            write_attribution(out / "shards", out)
            write_report(out, after, started=started, packages=("pyarrow", "pillow", "lxml"))
    counts = Counter(verdict.kind for verdict in verdicts.values())
    report = Report(
        step="recheck",
        counts={"articles": len(known), "unchanged": len(known) - len(verdicts), "rows_marked": rows, **counts},
        metrics={"requests": float(opened.tally.requests)},
        details={
            "verdicts": {pmcid: f"{verdict.kind}: {verdict.detail}" for pmcid, verdict in sorted(verdicts.items())},
            "dry_run": dry_run,
        },
        fingerprint=fingerprint_of_shards(out),
    )
    return write_report(out / "recheck", report, started=started)


def _known_articles(out: Path) -> dict[str, _Known]:
    """Articles that gave a figure, in the order of their keys."""
    known: dict[str, _Known] = {}
    names = ["pmcid", "metadata_etags", "licence"]
    for path in sorted((out / "outcomes").glob("*.parquet")):
        table = pq.read_table(path, columns=names, filters=[("status", "=", "ok")])
        for pmcid, stamps, licence in zip(*(table[name].to_pylist() for name in names), strict=True):
            known[pmcid] = _Known(tuple(stamps), licence or "")
    return dict(sorted(known.items(), key=lambda item: metadata_prefix(item[0])))


async def _judge(store: ObjectStore, known: dict[str, _Known], policy: str, *, inventory: bool) -> dict[str, Verdict]:
    """Verdicts on the articles whose stamps have changed."""
    verdicts: dict[str, Verdict] = {}
    try:
        names = list(known)
        everything = (await read_inventory(store, known.keys()))[0] if inventory else None
        for begin in range(0, len(names), BATCH):
            batch = names[begin : begin + BATCH]
            now = everything or await list_versions(store, batch)
            suspects = [name for name in batch if now[name].stamps != known[name].stamps or "" in _etags(now[name])]
            judged = await asyncio.gather(*(_verdict(store, name, known[name], now[name], policy) for name in suspects))
            verdicts |= {name: verdict for name, verdict in zip(suspects, judged, strict=True) if verdict is not None}
    finally:
        await store.close()
    if known and sum(verdict.kind == "article_absent" for verdict in verdicts.values()) == len(known):
        raise StoreError(
            f"none of the {len(known):,} articles is in the store",
            where="--store",
            hint="give the store that the figures were fetched from; nothing was marked",
        )
    return verdicts


def _etags(versions: Versions) -> set[str]:
    return {etag for _, etag in versions.etags}


async def _verdict(store: ObjectStore, pmcid: str, before: _Known, now: Versions, policy: str) -> Verdict | None:
    if now.failure is not None:
        return Verdict("unknown", f"the store did not list it: {now.failure.detail}")
    read: list[ArticleVersion] = []
    for number, _ in now.etags[-NEWEST_VERSIONS:]:
        answer = await store.get(metadata_key(pmcid, number), limit_bytes=METADATA_LIMIT_BYTES)
        await store.budget.release(answer.reserved)
        parsed = parse_metadata(answer.body, pmcid, number) if answer.status == "ok" else answer.detail
        if isinstance(parsed, str):
            return Verdict("unknown", f"version {number}: {parsed}")
        read.append(parsed)
    usable, status, detail = choose_versions(read, policy)
    if status in WITHDRAWN:
        licence = max(read, key=lambda v: v.version).licence if read else None
        return Verdict(str(status), detail, licence, now.stamps)
    best = usable[0]
    if best.licence != before.licence:
        return Verdict("relicensed", f"from {before.licence} to {best.licence}", best.licence, now.stamps)
    if "" in _etags(now):
        return None  # this server gives no ETags, and what can be compared is as it was
    return Verdict("changed", f"version {best.version} is not what was fetched", best.licence, now.stamps)


def _mark(path: Path, out: Path, verdicts: Mapping[str, Verdict]) -> int:
    """Rewrite one block's outcomes, and its shards where figures leave or change their licence."""
    outcomes: list[dict[str, Any]] = pq.read_table(path, schema=schema_of(FetchOutcome)).to_pylist()
    hit = [row for row in outcomes if row["status"] == "ok" and row["pmcid"] in verdicts]
    hit = [row for row in hit if verdicts[row["pmcid"]].kind != "unknown"]
    if not hit:
        return 0
    gone: set[str] = set()
    licences: dict[str, str] = {}
    marked = 0
    for row in hit:
        verdict = verdicts[row["pmcid"]]
        if verdict.kind in WITHDRAWN:
            gone.add(row["pmcid"])
            row |= {"status": WITHDRAWN[verdict.kind], "detail": f"since the fetch: {verdict.detail}", "figures": 0}
            row |= {"licence": verdict.licence, "metadata_etags": list(verdict.stamps)}
            marked += 1
        else:
            if verdict.licence and verdict.licence != row["licence"]:
                licences[row["pmcid"]] = row["licence"] = verdict.licence
                marked += 1
            row["metadata_etags"] = []  # the next fetch reads the article anew
    block = path.name.removesuffix(".parquet")
    for shard in sorted((out / "shards").glob(f"{block}-*.parquet")):
        _rewrite_shard(shard, gone, licences)
    with atomic_path(path) as temporary:
        table = pa.Table.from_pylist(outcomes, schema=schema_of(FetchOutcome))
        pq.write_table(table, temporary, compression="zstd")
    return marked


def _rewrite_shard(path: Path, gone: set[str], licences: Mapping[str, str]) -> None:
    articles = set(pq.read_table(path, columns=["pmcid"])["pmcid"].to_pylist())
    if not articles & (gone | licences.keys()):
        return
    with (
        atomic_path(path) as temporary,
        pq.ParquetFile(path) as old,
        pq.ParquetWriter(temporary, old.schema_arrow, compression="zstd") as new,
    ):
        for group in range(old.num_row_groups):
            table = old.read_row_group(group)
            names = table["pmcid"].to_pylist()
            table = table.filter(pa.array(np.array([name not in gone for name in names], np.bool_)))
            names = [name for name in names if name not in gone]
            place = table.schema.get_field_index("licence")
            changed = [licences.get(name, code) for name, code in zip(names, table["licence"].to_pylist(), strict=True)]
            table = table.set_column(place, table.schema.field(place), pa.array(changed, pa.string()))
            new.write_table(table)
