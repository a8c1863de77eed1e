"""Answers of chat endpoints, kept by the content of the question: a second run costs nothing."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from medvlm.errors import WorkspaceError

__all__ = ["Completion", "ResponseCache"]


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer of a chat endpoint."""

    text: str
    finish_reason: str
    """``stop``; ``length`` where it was cut; ``content_filter`` where it was withheld."""
    prompt_tokens: int
    completion_tokens: int


class ResponseCache:
    """One SQLite file of answers, safe to use from many threads and processes.

    Args:
        path: Created if needed. Safe to delete; then every question is asked again.

    Raises:
        WorkspaceError: The file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(path, check_same_thread=False, timeout=60, isolation_level=None)
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute(
                "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, text TEXT NOT NULL,"
                " finish_reason TEXT NOT NULL, prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL)"
            )
        except (sqlite3.Error, OSError) as error:
            raise WorkspaceError(
                f"the response cache cannot be opened: {error}", where=str(path), hint="fix or delete the file"
            ) from error

    def __enter__(self) -> ResponseCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Under the lock: a thread that still asks gets an error afterwards, where SQLite would crash the process.
        with self._lock:
            self._connection.close()

    @staticmethod
    def key(body: Mapping[str, Any]) -> str:
        """The key of a request: everything in it counts, model and sampling settings too."""
        return hashlib.sha256(json.dumps(body, sort_keys=True, ensure_ascii=False).encode()).hexdigest()

    def get(self, key: str) -> Completion | None:
        """The answer that was given to this request, if there is one.

        Raises:
            WorkspaceError: The file is no longer readable, or the cache was closed.
        """
        try:
            with self._lock:
                row = self._connection.execute(
                    "SELECT text, finish_reason, prompt_tokens, completion_tokens FROM answers WHERE key = ?", (key,)
                ).fetchone()
        except sqlite3.Error as error:
            raise WorkspaceError(
                f"a kept answer cannot be read: {error}", where=str(self._path), hint="fix or delete the file"
            ) from error
        return Completion(*row) if row else None

    def put(self, key: str, answer: Completion) -> Completion:
        """Keep an answer, unless one is kept already; it is on disk when this returns.

        Returns:
            The answer that is kept: the first one.

        Raises:
            WorkspaceError: The disk is full or read-only.
        """
        self.put_all({key: answer})
        return self.get(key) or answer

    def put_all(self, answers: Mapping[str, Completion]) -> None:
        """Keep several answers by key, those that are not kept already; they are on disk when this returns.

        Raises:
            WorkspaceError: The disk is full or read-only.
        """
        rows = [(key, a.text, a.finish_reason, a.prompt_tokens, a.completion_tokens) for key, a in answers.items()]
        try:
            # One transaction, so that a batch waits for the disk once.
            with self._lock, self._connection:
                self._connection.execute("BEGIN")
                self._connection.executemany("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?)", rows)
        except sqlite3.Error as error:
            raise WorkspaceError(
                f"an answer cannot be kept: {error}",
                where=str(self._path),
                hint="free some space, then run the same command again: finished answers are kept",
            ) from error
