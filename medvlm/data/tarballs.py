"""Old ``PMC<id>.tar.gz`` packages that people still keep, read as if they were a bucket.

Nothing is ever unpacked to disk: members are streamed, links, devices and folders are passed over,
and a member is known by its bare name only. The packages carry no metadata: licence, PMID and
title come from the article's XML. They know nothing of later retractions; ``medvlm recheck``
against the public bucket does.
"""

from __future__ import annotations

import asyncio
import bisect
import hashlib
import json
import re
import tarfile
import zlib
from collections.abc import Generator
from pathlib import Path
from typing import IO

from medvlm.data.jats import JatsError, parse_jats
from medvlm.data.objects import Answer, ByteBudget, Listed, Page, StoreLimits, StoreTally
from medvlm.data.pmc import FULL_SIZE, PUBLIC_BUCKET, version_of_key
from medvlm.errors import StoreError

__all__ = ["TarballStore", "holds_tarballs"]

PACKAGE_LIMIT_BYTES = 8 * 2**30
"""Unpacked bytes that are read of one package, at most."""
_PACKAGE = re.compile(r"(PMC[1-9]\d*)\.tar\.gz\Z")
_KEY = re.compile(r"(PMC\d+)\.1/(.+)\Z")
BROKEN = (tarfile.TarError, EOFError, OSError, zlib.error)


def holds_tarballs(root: Path) -> bool:
    """Whether a folder is one of packages rather than one laid out as the bucket."""
    return root.is_dir() and not (root / "metadata").is_dir() and next(root.rglob("PMC*.tar.gz"), None) is not None


class TarballStore:
    """A folder of packages, at any depth; each is version 1 of its article."""

    def __init__(self, root: Path, limits: StoreLimits) -> None:
        self.tally = StoreTally()
        self.budget = ByteBudget(limits.bytes_in_flight)
        found = ((_PACKAGE.match(path.name), path) for path in sorted(root.rglob("PMC*.tar.gz")))
        self._packages = {name[1]: path for name, path in found if name and path.is_file()}
        self._keys = sorted(f"metadata/{pmcid}.1.json" for pmcid in self._packages)
        if not self._keys:
            raise StoreError(
                "no PMC<id>.tar.gz is here", where=str(root), hint="give the folder that holds the packages"
            )

    async def page(self, prefix: str, *, after: str = "", limit: int = 1000) -> Page:
        """Metadata keys of the packages; size and time of a package stand for its ETag."""
        begin = max(bisect.bisect_left(self._keys, prefix), bisect.bisect_right(self._keys, after))
        keys = [key for key in self._keys[begin : begin + limit] if key.startswith(prefix)]
        more = begin + len(keys) < len(self._keys) and self._keys[begin + len(keys)].startswith(prefix)
        return Page("ok", tuple(Listed(key, self._stamp(key)) for key in keys), more)

    def _stamp(self, key: str) -> str:
        named = version_of_key(key)
        stat = self._packages[named[0] if named else ""].stat()
        return f"{stat.st_size:x}-{stat.st_mtime_ns:x}"

    async def get(self, key: str, *, limit_bytes: int) -> Answer:
        """A member of a package, or metadata made from its XML."""
        self.tally.requests += 1
        named = version_of_key(key)
        if named:
            return await asyncio.to_thread(self._metadata, named[0], limit_bytes)
        found = _KEY.match(key)
        package = self._packages.get(found[1]) if found else None
        if found is None or package is None:
            return Answer("absent", detail=f"no package holds {key}")
        name = found[2]
        # Some packages call the article's XML .nxml, and by other names than the bucket does.
        suffixes = (".nxml", ".xml") if name == f"{found[1]}.1.xml" else ()
        reserved = await self.budget.reserve(limit_bytes)
        answer = await asyncio.to_thread(self._member, package, name, suffixes, limit_bytes)
        if answer.status != "ok":
            await self.budget.release(reserved)
            return answer
        await self.budget.release(reserved - len(answer.body))
        self.tally.bytes_read += len(answer.body)
        return Answer("ok", answer.body, bytes_read=len(answer.body), reserved=min(reserved, len(answer.body)))

    def _member(self, package: Path, name: str, suffixes: tuple[str, ...], limit_bytes: int) -> Answer:
        try:
            for member, content in _members(package):
                if member == name or member.lower().endswith(suffixes or ("\0",)):
                    body = content.read(limit_bytes + 1)
                    if len(body) > limit_bytes:
                        return Answer("too_large", detail=f"{member} has more than {limit_bytes:,} bytes")
                    return Answer("ok", body)
        except BROKEN as error:
            return Answer("store_error", detail=f"{package.name} is broken: {error}")
        return Answer("absent", detail=f"{package.name} holds no {name}")

    def _metadata(self, pmcid: str, limit_bytes: int) -> Answer:
        """Metadata as the bucket has it, from one pass over the package."""
        package = self._packages.get(pmcid)
        if package is None:
            return Answer("absent", detail=f"no package of {pmcid}")
        media: list[str] = []
        article: bytes | None = None
        try:
            for name, content in _members(package):
                if name.lower().endswith((*FULL_SIZE, ".gif")):
                    digest = hashlib.file_digest(content, "md5").hexdigest()  # type: ignore[arg-type]
                    media.append(f"{PUBLIC_BUCKET}/{pmcid}.1/{name}?md5={digest}")
                elif name.lower().endswith((".nxml", ".xml")) and article is None:
                    article = content.read(limit_bytes)
            if article is None:
                return Answer("ok", f"{package.name} holds no article".encode())
            text = parse_jats(article)
        except (JatsError, *BROKEN) as error:
            return Answer("ok", f"{package.name} is broken: {error}".encode())
        md5 = hashlib.md5(article, usedforsecurity=False).hexdigest()
        metadata = {
            "pmcid": pmcid,
            "version": 1,
            "pmid": text.pmid,
            "title": text.title,
            "citation": "",
            "is_pmc_openaccess": True,
            "is_manuscript": False,
            "is_retracted": False,
            "license_code": text.licence,
            "xml_url": f"{PUBLIC_BUCKET}/{pmcid}.1/{pmcid}.1.xml?md5={md5}",
            "media_urls": media,
        }
        return Answer("ok", json.dumps(metadata).encode())

    async def close(self) -> None:
        """Nothing is held open."""


def _members(package: Path) -> Generator[tuple[str, IO[bytes]]]:
    """Bare names and contents of a package's regular files, streamed; a name counts once."""
    seen: set[str] = set()
    total = 0
    with tarfile.open(package, "r|gz") as tar:
        for member in tar:
            name = member.name.rsplit("/", 1)[-1]
            total += member.size
            if total > PACKAGE_LIMIT_BYTES:
                raise tarfile.ReadError(f"it unpacks to more than {PACKAGE_LIMIT_BYTES:,} bytes")
            if not member.isreg() or not name or name in seen or not name.isprintable():
                continue
            seen.add(name)
            content = tar.extractfile(member)
            if content is not None:
                yield name, content
