"""A folder of an S3 bucket: read, list, replace only what is as expected, and large files in parts."""

from __future__ import annotations

import contextlib
import urllib.parse
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medvlm.errors import StoreError

__all__ = ["Bucket", "Changed", "Listing", "is_bucket"]

PART_BYTES = 64 * 2**20
"""Larger files go up in parts of this size; such an object is seen only once its last part is there."""
ATTEMPTS = 8
_ABSENT = frozenset({"404", "NoSuchKey", "NotFound"})
_NOT_AS_EXPECTED = frozenset({"412", "PreconditionFailed", "409", "ConditionalRequestConflict"})

Listen = Callable[[int], None]
"""Told the number of bytes since the last call."""


class Changed(Exception):
    """Somebody else replaced the object meanwhile."""


@dataclass(frozen=True, slots=True)
class Listing:
    """One object."""

    etag: str
    size: int


def is_bucket(workspace: str) -> bool:
    """Whether a workspace's address names a bucket instead of a folder."""
    return workspace.startswith("s3://")


class Bucket:
    """``s3://bucket/prefix``, signed as every AWS tool does it: environment, profile, role of the machine.

    Another server than Amazon's is named by ``AWS_ENDPOINT_URL``.

    Args:
        address: Keys are given below its prefix.

    Raises:
        StoreError: It names no bucket, or boto3 is not installed.
    """

    def __init__(self, address: str) -> None:
        parts = urllib.parse.urlsplit(address)
        if parts.scheme != "s3" or not parts.netloc:
            raise StoreError("this names no bucket", where=address, hint="such as s3://bucket/medvlm")
        self.address = address.rstrip("/")
        self._name = parts.netloc
        self._prefix = parts.path.strip("/") + "/" if parts.path.strip("/") else ""
        try:
            import boto3.session
            from boto3.s3.transfer import TransferConfig
            from botocore.config import Config
        except ImportError as error:
            raise StoreError("boto3 is missing", where=address, hint="pip install 'medvlm[s3]'") from error
        retries = {"max_attempts": ATTEMPTS, "mode": "standard"}
        with self._told(""):
            self._client: Any = boto3.session.Session().client("s3", config=Config(retries=retries))
        self._transfer: Any = TransferConfig(multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES)

    def list(self, folder: str) -> dict[str, Listing]:
        """Every object below ``folder``, by its key without it.

        Raises:
            StoreError: The bucket is not there, cannot be reached or refuses.
        """
        prefix = self._prefix + folder
        found: dict[str, Listing] = {}
        with self._told(folder):
            for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=self._name, Prefix=prefix):
                for entry in page.get("Contents", ()):
                    found[entry["Key"].removeprefix(prefix)] = Listing(entry["ETag"], entry["Size"])
        return found

    def read(self, key: str) -> tuple[bytes, str] | None:
        """A small object's bytes and its ETag; None where it is not there.

        Raises:
            StoreError: The bucket cannot be reached or refuses.
        """
        with self._told(key):
            try:
                answer = self._client.get_object(Bucket=self._name, Key=self._prefix + key)
            except Exception as error:
                if _code(error) in _ABSENT - {"NotFound"}:
                    return None
                raise
            return answer["Body"].read(), answer["ETag"]

    def replace(self, key: str, body: bytes, *, expected: str | None) -> str:
        """Put a small object in the place of the one expected there; whoever reads sees the old one or the new.

        Args:
            key: The object.
            body: Its new bytes.
            expected: ETag of the object to replace; None where there shall be none.

        Returns:
            The new ETag.

        Raises:
            Changed: There is another object, or one where none was expected.
            StoreError: The bucket cannot be reached or refuses.
        """
        condition = {"IfMatch": expected} if expected else {"IfNoneMatch": "*"}
        with self._told(key):
            try:
                return self._put(key, body, condition)
            except Exception as error:
                code = _code(error)
                if code in _NOT_AS_EXPECTED or (expected and code in _ABSENT):
                    raise Changed(key) from error
                if code not in {"501", "NotImplemented"}:
                    raise
            # A server without conditional writes: looked at just before, which leaves a gap of milliseconds.
            now = self.read(key)
            if (now[1] if now else None) != expected:
                raise Changed(key)
            return self._put(key, body, {})

    def _put(self, key: str, body: bytes, condition: Mapping[str, str]) -> str:
        answer = self._client.put_object(Bucket=self._name, Key=self._prefix + key, Body=body, **condition)
        return answer["ETag"]

    def upload(self, path: Path, key: str, listen: Listen) -> None:
        """Put up a file, in parts where it is large.

        Raises:
            StoreError: The bucket cannot be reached or refuses.
            FileNotFoundError: The file has gone.
        """
        with self._told(key):
            self._client.upload_file(str(path), self._name, self._prefix + key, Callback=listen, Config=self._transfer)

    def download(self, key: str, path: Path, listen: Listen) -> bool:
        """Write an object into a file.

        Returns:
            False where the object is not there.

        Raises:
            StoreError: The bucket cannot be reached or refuses.
        """
        with self._told(key):
            try:
                self._client.download_file(
                    self._name, self._prefix + key, str(path), Callback=listen, Config=self._transfer
                )
            except Exception as error:
                if _code(error) in _ABSENT:
                    return False
                raise
        return True

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; those that are not there are no error.

        Raises:
            StoreError: The bucket cannot be reached or refuses.
        """
        for key in keys:
            with self._told(key):
                self._client.delete_object(Bucket=self._name, Key=self._prefix + key)

    @contextlib.contextmanager
    def _told(self, key: str) -> Generator[None]:
        """Turn what boto3 raises into an error that names the object and the next step."""
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except (BotoCoreError, ClientError, Boto3Error) as error:
            hints = {
                "NoSuchBucket": "make the bucket, or mend the address",
                "AccessDenied": "give this machine's role the right to list, get, put and delete there",
                "403": "give this machine's role the right to list, get, put and delete there",
            }
            hint = hints.get(_code(error), "check AWS_* in the environment and the network; then run the command again")
            raise StoreError(str(error), where=f"{self.address}/{key}", hint=hint) from error


def _code(error: Exception) -> str:
    response: Mapping[str, Any] = getattr(error, "response", {})
    return str(response.get("Error", {}).get("Code", ""))
