"""Images that are larger than they look."""

from __future__ import annotations

import struct
import zlib


def bomb() -> bytes:
    """A PNG of 30,000 x 10,000 pixels in a few hundred bytes: only its head is honest."""

    def part(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", 30_000, 10_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", zlib.compress(bytes(9999))) + part(b"IEND", b"")
