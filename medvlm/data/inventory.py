"""The daily inventory of the bucket's metadata: one cheap look at what has changed since a day."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Collection
from datetime import date, timedelta
from typing import Any

from medvlm.data.objects import ObjectStore
from medvlm.data.pmc import version_of_key
from medvlm.data.versions import Versions
from medvlm.errors import StoreError

__all__ = ["read_inventory"]

MANIFEST = "inventory-reports/pmc-oa-opendata/metadata/{day:%Y-%m-%d}T01-00Z/manifest.json"
DAYS_BACK = 4
"""The newest folder may still be incomplete."""
MANIFEST_LIMIT_BYTES = 2**20
PART_LIMIT_BYTES = 200 * 2**20


async def read_inventory(
    store: ObjectStore, pmcids: Collection[str], *, today: date | None = None
) -> tuple[dict[str, Versions], date]:
    """Versions of articles as the newest complete inventory has them.

    Args:
        store: The bucket.
        pmcids: The articles to look for; the others' rows are passed over.
        today: Where to begin looking back; the day it is if None.

    Returns:
        An entry for each article, without versions where the inventory has none; and its day.

    Raises:
        StoreError: There is no complete inventory of the last days.
    """
    newest = today or date.today()
    for back in range(DAYS_BACK):
        day = newest - timedelta(days=back)
        found = await _inventory_of(store, MANIFEST.format(day=day), pmcids)
        if found is not None:
            return {pmcid: Versions(tuple(sorted(found.get(pmcid, {}).items()))) for pmcid in pmcids}, day
    raise StoreError(
        f"there is no complete inventory from {newest - timedelta(days=DAYS_BACK - 1)} to {newest}",
        where="inventory-reports/",
        hint="leave --inventory off; then each article's listing is asked",
    )


async def _inventory_of(
    store: ObjectStore, manifest_key: str, pmcids: Collection[str]
) -> dict[str, dict[int, str]] | None:
    """ETags of one day by article and version; None if the day is absent or incomplete."""
    answer = await store.get(manifest_key, limit_bytes=MANIFEST_LIMIT_BYTES)
    await store.budget.release(answer.reserved)
    if answer.status != "ok":
        return None
    try:
        manifest: Any = json.loads(answer.body)
        columns = [name.strip() for name in manifest["fileSchema"].split(",")]
        key_column, etag_column = columns.index("Key"), columns.index("ETag")
        parts = [(str(part["key"]), str(part["MD5checksum"])) for part in manifest["files"]]
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    found: dict[str, dict[int, str]] = {}
    for key, md5 in parts:
        part = await store.get(key, limit_bytes=PART_LIMIT_BYTES)
        try:
            if part.status != "ok" or hashlib.md5(part.body, usedforsecurity=False).hexdigest() != md5:
                return None
            _read_part(part.body, key_column, etag_column, pmcids, found)
        except (OSError, EOFError, zlib.error, csv.Error, UnicodeDecodeError, IndexError):
            return None
        finally:
            await store.budget.release(part.reserved)
    return found


def _read_part(
    body: bytes, key_column: int, etag_column: int, pmcids: Collection[str], found: dict[str, dict[int, str]]
) -> None:
    with gzip.open(io.BytesIO(body), "rt", encoding="utf-8", newline="") as lines:
        for row in csv.reader(lines):
            named = version_of_key(row[key_column])
            if named and named[0] in pmcids:
                found.setdefault(named[0], {})[named[1]] = row[etag_column].strip('"')
