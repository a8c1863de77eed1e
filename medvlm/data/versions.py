"""Which versions of each article a store holds, asked for many articles at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from medvlm.data.objects import Listed, ObjectStore, Page
from medvlm.data.pmc import metadata_prefix, version_of_key

__all__ = ["Versions", "list_versions"]

PAGE_KEYS = 1000
WORTHWHILE = 4
"""A page of a thousand keys is asked for as long as it answers for this many articles."""
AFTER_ANY_VERSION = "/"
"""Sorts after the dot, and before every digit: ``PMC12/`` stands between PMC12's keys and PMC123's."""


@dataclass(frozen=True, slots=True)
class Versions:
    """Version numbers of one article with the ETags of their metadata, ascending."""

    etags: tuple[tuple[int, str], ...]
    failure: Page | None = None
    """The listing's answer where the store did not list."""

    @property
    def stamps(self) -> tuple[str, ...]:
        """``<version>:<ETag>`` of each version: unchanged as long as nothing about the article changes."""
        return tuple(f"{version}:{etag}" for version, etag in self.etags)


async def list_versions(store: ObjectStore, pmcids: Sequence[str]) -> dict[str, Versions]:
    """Versions of articles, from few listings where the articles stand close together.

    The metadata keys of a bucket are sorted, so one page answers for every article between its
    first key and its last. Where the list picks one article in thousands, that does not pay, and
    each article is listed by its own prefix.

    Args:
        store: Where to look.
        pmcids: In the order of their keys, see ``ListIndex``.

    Returns:
        An entry for each article; absent ones have no versions.
    """
    found: dict[str, Versions] = {}
    place = 0
    while place < len(pmcids):
        if len(pmcids) - place < WORTHWHILE:
            break
        first = metadata_prefix(pmcids[place])
        page = await store.page("metadata/", after=first, limit=PAGE_KEYS)
        if page.status != "ok":
            break
        end = place
        last = page.objects[-1].key if page.objects else ""
        by_article = _grouped(page.objects)
        while end < len(pmcids) and (not page.more or f"metadata/{pmcids[end]}{AFTER_ANY_VERSION}" < last):
            found[pmcids[end]] = Versions(by_article.get(pmcids[end], ()))
            end += 1
        covered, place = end - place, end
        if covered < WORTHWHILE:
            break
    rest = pmcids[place:]
    found.update(zip(rest, await asyncio.gather(*(_versions_of(store, pmcid) for pmcid in rest)), strict=True))
    return found


async def _versions_of(store: ObjectStore, pmcid: str) -> Versions:
    """Versions of one article, over as many pages as the server makes of them."""
    objects: list[Listed] = []
    while True:
        page = await store.page(metadata_prefix(pmcid), after=objects[-1].key if objects else "", limit=PAGE_KEYS)
        if page.status != "ok":
            return Versions((), page)
        objects += page.objects
        if not page.more or not page.objects:
            return Versions(_grouped(objects).get(pmcid, ()))


def _grouped(objects: Sequence[Listed]) -> dict[str, tuple[tuple[int, str], ...]]:
    grouped: dict[str, list[tuple[int, str]]] = {}
    for listed in objects:
        named = version_of_key(listed.key)
        if named:
            grouped.setdefault(named[0], []).append((named[1], listed.etag))
    return {pmcid: tuple(sorted(versions)) for pmcid, versions in grouped.items()}
