"""The workspace that the dashboard's tests look at."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright
from real_browser import CHROMIUM, FLAGS
from workspace_builder import build_workspace


@pytest.fixture(scope="session")
def built_workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of a workspace that nothing writes to."""
    return build_workspace(tmp_path_factory.mktemp("dashboards") / "workspace").root


# One a file, not one a session: while Playwright is open, the thread counts as inside an event loop, and
# every later test that starts one of its own (each fetch does) would fail.
@pytest.fixture(scope="module")
def browser() -> Generator[Browser]:
    if CHROMIUM is None:
        pytest.skip("chromium is not installed: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Generator[tuple[Page, list[str]]]:
    """A page, with nobody's cookies, and the addresses outside this machine that it asked for."""
    page = browser.new_page(viewport={"width": 1360, "height": 900})
    page.set_default_timeout(30_000)
    expect.set_options(timeout=20_000)
    outside: list[str] = []
    page.on(
        "request",
        lambda r: None if r.url.startswith(("http://127.0.0.1", "data:", "blob:")) else outside.append(r.url),
    )
    yield page, outside
    page.close()
