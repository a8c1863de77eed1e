"""The dashboard as a process of its own, and a tab of a real browser that looks at it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from playwright.sync_api import Page, expect

from medvlm.store import Workspace

REPOSITORY = Path(__file__).resolve().parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
Server = subprocess.Popen[bytes]
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def serving(
    command: Sequence[str], health: str, folder: Path, **environment: str
) -> Generator[subprocess.Popen[bytes]]:
    """A server that has answered at ``health``; it writes into ``folder``/server.log and is ended afterwards."""
    log = folder / "server.log"
    with log.open("ab") as out:
        server = subprocess.Popen(
            command, cwd=folder, env={**os.environ, **environment}, stdout=out, stderr=subprocess.STDOUT
        )
    try:
        for _ in range(300):
            try:
                with urllib.request.urlopen(health, timeout=5):
                    break
            except OSError:
                assert server.poll() is None, log.read_text()
                time.sleep(0.1)
        yield server
    finally:
        server.terminate()
        server.wait(30)


def dashboard(
    workspace: Workspace, folder: Path, port: int, script: Path = REPOSITORY / "dashboards" / "app.py"
) -> AbstractContextManager[Server]:
    """A running dashboard, started as the README says but from another folder, which may hold its secrets."""
    command = [sys.executable, "-m", "streamlit", "run", str(script), "--server.port", str(port)]
    # A script elsewhere does not have the settings that lie beside the dashboard.
    command += ["--server.address", "127.0.0.1", "--server.headless", "true", "--browser.gatherUsageStats", "false"]
    health = f"http://127.0.0.1:{port}/_stcore/health"
    return serving(command, health, folder, MEDVLM_WORKSPACE=str(workspace.root))


def ready(page: Page) -> None:
    """Wait until the script has run to its end."""
    expect(page.get_by_test_id("stApp")).to_have_attribute("data-test-script-state", "notRunning")
