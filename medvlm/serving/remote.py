"""Images that a request only names by their address: fetched from public machines, small, or not at all."""

from __future__ import annotations

import ipaddress
import socket
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver

from medvlm.errors import InputError

__all__ = ["fetch_image", "is_public"]


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet: not this machine, not a private network."""
    found = ipaddress.ip_address(address)
    inner = getattr(found, "ipv4_mapped", None) or found
    return inner.is_global and not inner.is_multicast


class _PublicOnly(AbstractResolver):
    """Names to public addresses only; the connection goes to what was looked at, not to a second answer."""

    def __init__(self) -> None:
        self._resolver = ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        found = await self._resolver.resolve(host, port, family)
        public = [answer for answer in found if is_public(answer["host"])]
        if not public:
            raise OSError(f"{host} is not a public address")
        return public

    async def close(self) -> None:
        await self._resolver.close()


async def fetch_image(url: str, *, max_bytes: int, timeout_s: float) -> bytes:
    """The bytes behind an address, without following it anywhere else.

    Args:
        url: ``http`` or ``https``.
        max_bytes: More is refused.
        timeout_s: For all of it.

    Raises:
        InputError: The address is not public, cannot be read in time, answers otherwise than with 200,
            or sends too much.
    """

    def refused(what: str) -> InputError:
        return InputError(what, where="image_url", hint="send the image itself, as data:image/png;base64,…")

    try:
        parts = urlsplit(url)
        host, user = parts.hostname or "", parts.username
    except ValueError as error:
        raise refused("the image's address is not one") from error
    if parts.scheme not in ("http", "https") or not host or user is not None:
        raise refused("the image's address must be http:// or https:// and a host")
    # An address in numbers is not resolved, so it is looked at here.
    if _is_number(host) and not is_public(host.partition("%")[0]):
        raise refused("the image's address is not a public one")
    options: dict[str, Any] = {"connector": aiohttp.TCPConnector(resolver=_PublicOnly()), "trust_env": False}
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout, **options) as session,
            session.get(url, allow_redirects=False) as response,
        ):
            if response.status != 200:
                raise refused(f"the image's address answers with {response.status}")
            data = await response.content.read(max_bytes + 1)
            while len(data) <= max_bytes and (more := await response.content.read(max_bytes + 1 - len(data))):
                data += more
    except (aiohttp.ClientError, OSError, ValueError) as error:
        raise refused(f"the image's address cannot be read: {error or type(error).__name__}") from error
    if len(data) > max_bytes:
        raise refused(f"the image has more than {max_bytes} bytes")
    return data


def _is_number(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True
