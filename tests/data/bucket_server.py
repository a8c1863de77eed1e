"""A small bucket over HTTP, in memory, that speaks S3's listing and fails on request.

Used by the tests of the fetch and by its benchmark.
"""

from __future__ import annotations

import asyncio
import bisect
import hashlib
import io
import json
import threading
import urllib.parse
from collections import Counter
from dataclasses import dataclass, field
from xml.sax.saxutils import escape

import numpy as np
from PIL import Image as PillowImage

NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"


@dataclass(frozen=True)
class Fault:
    """What to do in place of answering."""

    kind: str
    """``status``, ``stall``, ``reset``, ``long`` (Content-Length too large), ``short``, ``html`` or ``drip``."""
    status: int = 500
    headers: tuple[tuple[str, str], ...] = ()
    times: int = 1
    """How often, before the object is served as it is; -1 is always."""


@dataclass
class BucketServer:
    """Serves ``objects`` on a loopback port, from its own thread."""

    objects: dict[str, bytes]
    latency_s: float = 0.0
    """Of each round trip: an answer comes this late, the first one on a connection twice as late."""
    page_cap: int = 1000
    faults: dict[str, Fault] = field(default_factory=dict)
    """By key; ``?list`` stands for every listing."""
    speaks_s3: bool = True
    index: bool = True
    """Whether a server without S3 shows an HTML index."""
    requests: Counter[str] = field(default_factory=Counter)
    in_flight: int = 0
    most_in_flight: int = 0
    connections: int = 0
    port: int = 0

    def __enter__(self) -> BucketServer:
        self._etags: dict[str, str] = {}
        self._refresh()
        self._failed: Counter[str] = Counter()
        started = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(started,), daemon=True)
        self._thread.start()
        assert started.wait(10)
        return self

    def _refresh(self) -> None:
        self._names = sorted(self.objects)

    def put(self, key: str, body: bytes) -> None:
        """Add or replace an object while serving."""
        self.objects[key] = body
        self._etags.pop(key, None)
        self._refresh()

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/bucket"

    @property
    def total(self) -> int:
        return sum(self.requests.values())

    def _serve(self, started: threading.Event) -> None:
        asyncio.run(self._main(started))

    async def _main(self, started: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._open: set[asyncio.Transport] = set()
        server = await self._loop.create_server(lambda: _Connection(self), "127.0.0.1", self.port)
        self.port = server.sockets[0].getsockname()[1]
        started.set()
        await self._stop.wait()
        server.close()
        for transport in list(self._open):
            transport.abort()
        await asyncio.sleep(0)

    def fault_of(self, key: str) -> Fault | None:
        fault = self.faults.get(key)
        if fault is None or (fault.times >= 0 and self._failed[key] >= fault.times):
            return None
        self._failed[key] += 1
        return fault

    def answer(self, target: str) -> tuple[str, int, str, bytes]:
        """Key for the log, status, content type and body of a request."""
        path, _, query = target.partition("?")
        key = urllib.parse.unquote(path).removeprefix("/bucket").lstrip("/")
        values = urllib.parse.parse_qs(query)
        if "list-type" in values and self.speaks_s3:
            return "?list", 200, "application/xml", self._listing(values)
        if not key or key.endswith("/"):
            if not self.index:
                return key or "?index", 404, "text/html", b"<html>no</html>"
            names = [name for name in self._names if name.startswith(key)]
            links = "".join(f'<li><a href="{urllib.parse.quote(n[len(key) :])}">{escape(n)}</a></li>' for n in names)
            return "?index", 200, "text/html", f"<html><ul>{links}</ul></html>".encode()
        body = self.objects.get(key)
        if body is None:
            return key, 404, "application/xml", b"<Error><Code>NoSuchKey</Code></Error>"
        return key, 200, "application/octet-stream", body

    def _etag(self, name: str) -> str:
        if name not in self._etags:
            self._etags[name] = hashlib.md5(self.objects[name]).hexdigest()
        return self._etags[name]

    def _listing(self, values: dict[str, list[str]]) -> bytes:
        prefix = values.get("prefix", [""])[0]
        after = values.get("start-after", [""])[0]
        limit = min(int(values.get("max-keys", ["1000"])[0]), self.page_cap)
        begin = max(bisect.bisect_left(self._names, prefix), bisect.bisect_right(self._names, after))
        names = []
        for name in self._names[begin:]:
            if not name.startswith(prefix) or len(names) > limit:
                break
            names.append(name)
        more, names = len(names) > limit, names[:limit]
        entries = "".join(
            f"<Contents><Key>{escape(name)}</Key><LastModified>2026-10-01T00:00:00.000Z</LastModified>"
            f"<ETag>&quot;{self._etag(name)}&quot;</ETag><Size>{len(self.objects[name])}</Size></Contents>"
            for name in names
        )
        return (
            f'<?xml version="1.0" encoding="UTF-8"?>\n<ListBucketResult xmlns="{NAMESPACE}"><Name>bucket</Name>'
            f"<KeyCount>{len(names)}</KeyCount><IsTruncated>{str(more).lower()}</IsTruncated>{entries}</ListBucketResult>"
        ).encode()


class _Connection(asyncio.Protocol):
    def __init__(self, server: BucketServer) -> None:
        self.server = server
        self.buffer = b""
        self.known = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]
        self.server.connections += 1
        self.server._open.add(self.transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.server._open.discard(self.transport)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while b"\r\n\r\n" in self.buffer:
            head, self.buffer = self.buffer.split(b"\r\n\r\n", 1)
            target = head.split(b" ", 2)[1].decode("latin1")
            self.server.in_flight += 1
            self.server.most_in_flight = max(self.server.most_in_flight, self.server.in_flight)
            if self.server.latency_s:
                trips = 1 if self.known else 2  # a new connection takes a round trip of its own
                self.known = True
                asyncio.get_running_loop().call_later(trips * self.server.latency_s, self.reply, target)
            else:
                self.reply(target)

    def reply(self, target: str) -> None:
        server = self.server
        server.in_flight -= 1
        key, status, kind, body = server.answer(target)
        server.requests[key] += 1
        fault = server.fault_of(key)
        if self.transport.is_closing():
            return
        if fault is None:
            self.send(status, kind, body)
        elif fault.kind == "status":
            self.send(fault.status, "text/plain", b"no", fault.headers)
        elif fault.kind == "html":
            self.send(200, "text/html", b"<!doctype html><title>Sign in</title>")
        elif fault.kind == "reset":
            self.transport.abort()
        elif fault.kind == "long":
            self.send(200, kind, body, length=len(body) + 1000)
            self.transport.close()
        elif fault.kind == "short":
            self.send(200, kind, body, length=len(body) // 2)
        elif fault.kind == "stall":
            self.send(200, kind, body[: len(body) // 2], length=len(body))

    def send(
        self, status: int, kind: str, body: bytes, headers: tuple[tuple[str, str], ...] = (), length: int | None = None
    ) -> None:
        extra = "".join(f"{name}: {value}\r\n" for name, value in headers)
        size = len(body) if length is None else length
        head = f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {size}\r\n{extra}\r\n"
        self.transport.write(head.encode() + body)


def picture(seed: int = 0, size: tuple[int, int] = (64, 48), form: str = "JPEG", mode: str = "RGB") -> bytes:
    """A small image that differs with its seed."""
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    image = PillowImage.fromarray(noise)
    image.paste((seed * 37 % 256, seed * 91 % 256, seed * 53 % 256), (8, 8, 24 + seed % 16, 30))
    stream = io.BytesIO()
    image.convert(mode).save(stream, form)
    return stream.getvalue()


def jats(pmcid: str, pmid: int | None, graphics: list[str], *, body: str = "") -> bytes:
    """A JATS article with one figure for each graphic."""
    figures = "".join(
        f'<fig id="F{n}"><label>Figure {n}</label><caption><p>Caption {n} of {pmcid}.</p></caption>'
        f'<graphic xlink:href="{escape(name)}"/></fig>'
        for n, name in enumerate(graphics, 1)
    )
    said = "".join(
        f'<p>See <xref ref-type="fig" rid="F{n}">Figure {n}</xref>.</p>' for n in range(1, len(graphics) + 1)
    )
    pmid_element = f'<article-id pub-id-type="pmid">{pmid}</article-id>' if pmid else ""
    return (
        '<?xml version="1.0"?><article xmlns:xlink="http://www.w3.org/1999/xlink"><front><article-meta>'
        f'{pmid_element}<article-id pub-id-type="pmc">{pmcid}</article-id><title-group>'
        f"<article-title>About {pmcid}</article-title></title-group></article-meta></front>"
        f"<body><sec>{said}{body}{figures}</sec></body></article>"
    ).encode()


def article(
    pmcid: str,
    media: dict[str, bytes],
    *,
    version: int = 1,
    pmid: int | None = 1,
    xml: bytes | None = None,
    **changes: object,
) -> dict[str, bytes]:
    """The objects of one article version, metadata with true MD5 sums unless changed."""
    prefix = f"{pmcid}.{version}"
    xml = xml if xml is not None else jats(pmcid, pmid, [name.rsplit(".", 1)[0] for name in media])
    objects = {f"{prefix}/{name}": body for name, body in media.items()} | {f"{prefix}/{prefix}.xml": xml}

    def url(key: str) -> str:
        return f"s3://pmc-oa-opendata/{key}?md5={hashlib.md5(objects[key]).hexdigest()}"

    metadata = {
        "pmcid": pmcid,
        "version": version,
        "pmid": pmid,
        "doi": None,
        "mid": None,
        "title": f"About {pmcid}",
        "citation": f"Journal of {pmcid}. 2020",
        "is_pmc_openaccess": True,
        "is_manuscript": False,
        "is_historical_ocr": False,
        "is_retracted": False,
        "license_code": "CC BY",
        "xml_url": url(f"{prefix}/{prefix}.xml"),
        "media_urls": [url(f"{prefix}/{name}") for name in media],
    } | changes
    body = json.dumps(metadata).encode()
    return objects | {f"metadata/{prefix}.json": body, f"{prefix}/{prefix}.json": body}


def llava_row(pmcid: str, name: str, pair_id: str) -> str:
    """A row of the published list."""
    return json.dumps(
        {
            "pmc_tar_url": f"https://ftp.ncbi.nlm.nih.gov/pub/pmc/oa_package/00/11/{pmcid}.tar.gz",
            "image_file_path": f"{pmcid}/{name}",
            "pair_id": pair_id,
        }
    )
