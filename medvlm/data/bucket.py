"""A bucket over HTTP: the public one, any S3-speaking server, or a plain web server over a mirror."""

from __future__ import annotations

import asyncio
import bisect
import html
import os
import re
import urllib.parse
from typing import Any

from lxml import etree  # pyright: ignore[reportAttributeAccessIssue]  # lxml ships no types

from medvlm.data.objects import Answer, Listed, Page, StoreLimits
from medvlm.data.transport import Transport
from medvlm.errors import StoreError

__all__ = ["BucketStore", "base_url"]

LISTING_LIMIT_BYTES = 16 * 2**20
INDEX_LIMIT_BYTES = 2**30
PROBED_VERSIONS = 3
"""Without any listing, versions 1 to 3 are tried by name."""


def base_url(address: str) -> str:
    """The HTTP address of a bucket, ending in a slash.

    ``s3://bucket`` is read without signing, from ``AWS_ENDPOINT_URL`` where that is set.

    Raises:
        StoreError: The address names no bucket or host.
    """
    parts = urllib.parse.urlsplit(address)
    if not parts.netloc:
        raise StoreError("the address names no host", where=address, hint="such as s3://pmc-oa-opendata")
    if parts.scheme != "s3":
        return address.rstrip("/") + "/"
    bucket, path = parts.netloc, parts.path.strip("/")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        base = f"{endpoint.rstrip('/')}/{bucket}/"
    elif "." in bucket:
        base = f"https://s3.amazonaws.com/{bucket}/"  # a dot would not match the certificate's wildcard
    else:
        base = f"https://{bucket}.s3.amazonaws.com/"
    return f"{base}{path}/" if path else base


class BucketStore:
    """Objects of a bucket, read without signing.

    Listings use the S3 API where the server speaks it. A plain web server shows HTML there: its
    index page of ``metadata/`` is read instead, and where it has none, versions are tried by name.
    """

    def __init__(self, address: str, limits: StoreLimits) -> None:
        self.base = base_url(address)
        # In S3's path style the bucket's own prefix is not part of the keys, but a folder in it is.
        self._transport = Transport(limits)
        self.tally = self._transport.tally
        self.budget = self._transport.budget
        self._index: list[str] | None = None
        self._speaks_s3: bool | None = None
        self._choosing = asyncio.Lock()

    def url_of(self, key: str) -> str:
        """The address of an object; every character of a file name but the slash is encoded."""
        return self.base + urllib.parse.quote(key, safe="/-_.~")

    async def get(self, key: str, *, limit_bytes: int) -> Answer:
        """An object's bytes."""
        return await self._transport.get(self.url_of(key), limit_bytes=limit_bytes)

    async def page(self, prefix: str, *, after: str = "", limit: int = 1000) -> Page:
        """A page of keys, by whichever kind of listing the server has."""
        if self._speaks_s3 is None:
            async with self._choosing:
                if self._speaks_s3 is None:
                    return await self._first_page(prefix, after, limit)
        if self._speaks_s3:
            return await self._s3_page(prefix, after, limit)
        return await self._plain_page(prefix, after, limit)

    async def close(self) -> None:
        """Close every connection."""
        await self._transport.close()

    async def _first_page(self, prefix: str, after: str, limit: int) -> Page:
        page = await self._s3_page(prefix, after, limit)
        if page.status == "ok":
            self._speaks_s3 = True
            return page
        if page.status != "absent" and page.detail != NO_S3:
            return page
        index = await self._transport.get(self.base + "metadata/", limit_bytes=INDEX_LIMIT_BYTES, html=True)
        await self.budget.release(index.reserved)
        if index.status in {"timeout", "store_error"} and not index.detail.startswith("HTTP 4"):
            return Page(index.status, detail=index.detail, attempts=index.attempts)
        names = re.findall(r"""href\s*=\s*["']?(?:[^"'>]*/)?(PMC\d+\.\d+\.json)["'\s>]""", html.unescape(_text(index)))
        self._index = sorted({f"metadata/{name}" for name in names}) or None
        self._speaks_s3 = False
        return await self._plain_page(prefix, after, limit)

    async def _s3_page(self, prefix: str, after: str, limit: int) -> Page:
        query = {"list-type": "2", "prefix": prefix, "max-keys": str(limit)} | ({"start-after": after} if after else {})
        url = f"{self.base}?{urllib.parse.urlencode(query, quote_via=urllib.parse.quote)}"
        answer = await self._transport.get(url, limit_bytes=LISTING_LIMIT_BYTES, html=True)
        await self.budget.release(answer.reserved)
        if answer.status != "ok":
            return Page(answer.status, detail=f"listing {prefix}: {answer.detail}", attempts=answer.attempts)
        return _parse_listing(answer)

    async def _plain_page(self, prefix: str, after: str, limit: int) -> Page:
        if self._index is None:
            return await self._probed(prefix)
        names = self._index
        begin = max(bisect.bisect_left(names, prefix), bisect.bisect_right(names, after))
        end = begin
        while end < len(names) and end - begin < limit and names[end].startswith(prefix):
            end += 1
        more = end < len(names) and names[end].startswith(prefix)
        return Page("ok", tuple(Listed(name, "") for name in names[begin:end]), more)

    async def _probed(self, prefix: str) -> Page:
        """Versions of one article on a server that lists nothing."""
        if not re.fullmatch(r"metadata/PMC\d+\.", prefix):
            return Page("ok", (Listed("metadata/", ""),), more=True)
        found: list[Listed] = []
        for version in range(1, PROBED_VERSIONS + 1):
            key = f"{prefix}{version}.json"
            answer = await self.get(key, limit_bytes=LISTING_LIMIT_BYTES)
            await self.budget.release(answer.reserved)
            if answer.status == "ok":
                found.append(Listed(key, ""))
            elif answer.status != "absent":
                return Page(answer.status, detail=f"{key}: {answer.detail}", attempts=answer.attempts)
        return Page("ok", tuple(found))


NO_S3 = "the server does not speak S3"


def _text(answer: Answer) -> str:
    return answer.body.decode("utf-8", "replace")


def _parse_listing(answer: Answer) -> Page:
    """A page from the answer to ``list-type=2``, in S3's namespace or in none."""
    parser = etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False)
    try:
        root: Any = etree.fromstring(answer.body, parser)
    except (etree.XMLSyntaxError, ValueError):
        root = None
    if root is None or etree.QName(root).localname != "ListBucketResult":
        return Page("store_error", detail=NO_S3, attempts=answer.attempts)
    objects = tuple(
        Listed(entry.findtext("{*}Key") or "", (entry.findtext("{*}ETag") or "").strip('"'))
        for entry in root.iterfind("{*}Contents")
    )
    return Page("ok", objects, root.findtext("{*}IsTruncated") == "true", attempts=answer.attempts)
