"""The dashboard in a real browser: every page opens, keys decide, foreign text stays text, nothing calls out."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Generator
from pathlib import Path

import pandas as pd
import pytest
from playwright.sync_api import Browser, Page, expect
from real_browser import REPOSITORY, dashboard, free_port, ready
from workspace_builder import HOSTILE, build_workspace, write_untrained_checkpoint

from medvlm import RESEARCH_USE_ONLY
from medvlm.review import Journal, agreement, saved_preferences
from medvlm.store import Workspace

VIEWS = {
    "": "Overview",
    "data": "Data",
    "data?section=Contracts": "Data",
    "data?section=Pictures": "Data",
    "data?section=Leakage": "Data",
    "review": "Review",
    "runs": "Runs",
    "benchmarks": "Benchmarks",
    "chat": "Chat",
}
HOSTILE_DOCS = """<h1>Data Docs</h1><img src='http://evil.example/p.png' onerror='document.body.dataset.owned=1'>
<script>document.body.dataset.owned = 1; parent.document.title = 'owned'</script>"""
SCREENSHOTS = os.environ.get("MEDVLM_SCREENSHOTS")
"""Folder where screenshots are kept; a test never writes into the repository by itself."""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    if SCREENSHOTS and os.environ.get("MEDVLM_WORKSPACE"):
        return Workspace(Path(os.environ["MEDVLM_WORKSPACE"]))
    workspace = build_workspace(tmp_path_factory.mktemp("browser") / "workspace")
    write_untrained_checkpoint(workspace)
    docs = workspace.contract("instruct") / "docs"
    docs.mkdir()
    (docs / "index.html").write_text(HOSTILE_DOCS)
    return workspace


@pytest.fixture(scope="module")
def address(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    port = free_port()
    with dashboard(workspace, tmp_path_factory.mktemp("log"), port):
        yield f"http://127.0.0.1:{port}"


def keep(page: Page, name: str) -> None:
    """A screenshot of the whole page, where a folder for them was given."""
    if not SCREENSHOTS:
        return
    page.wait_for_timeout(1500)  # charts and images fade in
    height = page.evaluate("document.querySelector('[data-testid=stMainBlockContainer]').scrollHeight")
    page.set_viewport_size({"width": 1360, "height": min(1800, max(760, height))})
    page.wait_for_timeout(800)
    page.screenshot(path=Path(SCREENSHOTS) / f"{name}.png")


@pytest.mark.parametrize("path", VIEWS)
def test_every_page_opens_by_its_address_with_the_notice_and_nothing_from_outside(
    path: str, address: str, page: tuple[Page, list[str]]
) -> None:
    tab, outside = page
    tab.goto(f"{address}/{path}")
    expect(tab.get_by_role("heading", level=1)).to_have_text(VIEWS[path])
    ready(tab)
    expect(tab.get_by_text(RESEARCH_USE_ONLY)).to_be_visible()
    expect(tab.get_by_test_id("stException")).to_have_count(0)
    expect(tab.get_by_role("dialog")).to_have_count(0)  # "Page not found" is one
    # st.navigation and not Streamlit's own list of files.
    expect(tab.get_by_test_id("stSidebarNavLink").first).to_have_text("Overview")
    # Hostile captions and answers are on these pages: no link, no script, no picture came of them.
    assert tab.title() != "owned"
    assert tab.locator("[href*='evil.example'], [src*='evil.example'], [href^='javascript']").count() == 0
    assert outside == []
    if path != "chat":  # shown with an answer, below
        keep(tab, path.replace("?section=", "-").lower() or "overview")


def test_keys_decide_and_typing_a_note_does_not(
    address: str, page: tuple[Page, list[str]], workspace: Workspace
) -> None:
    if SCREENSHOTS and os.environ.get("MEDVLM_WORKSPACE"):
        pytest.skip("a workspace that was given is not decided about")
    tab, _ = page
    tab.goto(f"{address}/review")
    expect(tab.get_by_role("button", name="Accept")).to_be_disabled()
    ready(tab)
    sign(tab, "ann")
    progress = tab.get_by_test_id("stProgress")
    expect(progress).to_contain_text("0 of 60")
    tab.keyboard.press("a")
    expect(progress).to_contain_text("1 of 60")
    ready(tab)
    tab.keyboard.press("4")
    expect(progress).to_contain_text("2 of 60")
    ready(tab)
    tab.get_by_label("Note").click()
    tab.keyboard.type("a paused pass 12")
    tab.keyboard.press("Enter")
    expect(tab.get_by_role("button", name="Reject: note")).to_be_enabled()
    ready(tab)
    assert [d.action for d in Journal(workspace).read()] == ["accept", "reject"]
    tab.get_by_role("heading", level=1).click()
    tab.keyboard.press("u")
    expect(progress).to_contain_text("1 of 60")
    assert [d.action for d in Journal(workspace).read()] == ["accept", "reject", "undo"]


def sign(tab: Page, name: str) -> None:
    """Give the review page a name, wait until decisions may be made, and leave the text field."""
    tab.get_by_label("Your name").fill(name)
    tab.get_by_label("Your name").press("Enter")
    expect(tab.get_by_role("button", name="Accept")).to_be_enabled()
    ready(tab)
    tab.get_by_role("heading", level=1).click()


def test_two_reviewers_at_once_lose_nothing_and_see_how_far_they_agree(
    built_workspace: Path, browser: Browser, tmp_path: Path
) -> None:
    shutil.copytree(built_workspace, tmp_path / "workspace")
    workspace, port = Workspace(tmp_path / "workspace"), free_port()
    with dashboard(workspace, tmp_path, port), browser.new_context() as first, browser.new_context() as second:
        tabs = {"ann": first.new_page(), "bo": second.new_page()}
        for who, tab in tabs.items():
            tab.set_default_timeout(30_000)
            tab.goto(f"http://127.0.0.1:{port}/review")
            ready(tab)
            sign(tab, who)
        for number in range(1, 5):
            for who, tab in tabs.items():
                tab.keyboard.press("a" if who == "ann" or number % 2 else "1")
            for tab in tabs.values():
                expect(tab.get_by_test_id("stProgress")).to_contain_text(f"{number} of 60")
                ready(tab)
        # Both were shown the same records in the same order.
        said = Journal(workspace).read()
        ann, bo = ([(d.record_id, d.action) for d in said if d.who == who] for who in tabs)
        assert [record for record, _ in ann] == [record for record, _ in bo]
        assert [action for _, action in bo] == ["accept", "reject"] * 2
        # Opened again, the page offers what both said; a click while it still runs would be lost.
        tabs["ann"].reload()
        ready(tabs["ann"])
        with tabs["ann"].expect_download() as download:
            tabs["ann"].get_by_role("button", name="Download the decisions as CSV").click()
        table = pd.read_csv(download.value.path())
    assert table["who"].value_counts().to_dict() == {"ann": 4, "bo": 4}
    (agreed,) = agreement(said, "instruct")
    assert (agreed.records, agreed.observed, agreed.kappa) == (4, 0.5, 0.0)


def test_data_docs_are_shown_and_nothing_in_them_runs(address: str, page: tuple[Page, list[str]]) -> None:
    if SCREENSHOTS and os.environ.get("MEDVLM_WORKSPACE"):
        pytest.skip("a workspace that was given has docs of its own")
    tab, outside = page
    blocked: list[tuple[str, str | None]] = []
    tab.on("requestfailed", lambda request: blocked.append((request.url, request.failure)))
    tab.goto(f"{address}/data?section=Contracts")
    ready(tab)
    tab.get_by_text("Show them here").click()
    docs = tab.frame_locator("iframe")
    expect(docs.get_by_role("heading", name="Data Docs")).to_be_visible()
    tab.wait_for_timeout(300)
    assert docs.locator("body").get_attribute("data-owned") is None
    assert tab.title() != "owned"
    # The browser tells of what the policy forbids before it forbids it.
    assert [(url, "csp") for url in outside] == blocked


def test_every_wrong_answer_comes_as_csv_beside_the_other_models(address: str, page: tuple[Page, list[str]]) -> None:
    if SCREENSHOTS and os.environ.get("MEDVLM_WORKSPACE"):
        pytest.skip("a workspace that was given has other answers")
    tab, _ = page
    tab.goto(f"{address}/benchmarks?benchmark=slake")
    ready(tab)
    with tab.expect_download() as download:
        tab.get_by_role("button", name="Download the wrong answers as CSV").click()
    table = pd.read_csv(download.value.path())
    assert download.value.suggested_filename == "slake-tiny-llava-med-wrong-answers.csv"
    assert len(table) == 14  # the page shows five
    assert table["prediction"][0] == HOSTILE
    assert table["prediction of tiny-cliva-med-phi2"].to_list() == table["prediction"].to_list()
    assert "image" not in table


def test_a_killed_dashboard_loses_nothing_that_it_confirmed(
    built_workspace: Path, page: tuple[Page, list[str]], tmp_path: Path
) -> None:
    shutil.copytree(built_workspace, tmp_path / "workspace")
    workspace, port = Workspace(tmp_path / "workspace"), free_port()
    tab, _ = page
    with dashboard(workspace, tmp_path, port) as server:
        tab.goto(f"http://127.0.0.1:{port}/review")
        ready(tab)
        sign(tab, "ann")
        tab.keyboard.press("p")
        expect(tab.get_by_text("Saved: flag privacy")).to_be_visible()
        server.kill()
        assert server.wait(30) == -signal.SIGKILL
    with dashboard(workspace, tmp_path, port):
        tab.goto(f"http://127.0.0.1:{port}/review")
        ready(tab)
        sign(tab, "ann")
        expect(tab.get_by_test_id("stProgress")).to_contain_text("1 of 60")
        tab.keyboard.press("a")  # and the journal takes more
        expect(tab.get_by_test_id("stProgress")).to_contain_text("2 of 60")
    assert [(d.who, d.action) for d in Journal(workspace).read()] == [("ann", "flag_privacy"), ("ann", "accept")]


def test_a_checkpoint_is_talked_to_and_its_answer_is_streamed(
    address: str, page: tuple[Page, list[str]], workspace: Workspace
) -> None:
    tab, outside = page
    tab.goto(f"{address}/chat")
    question = tab.get_by_test_id("stChatInputTextArea")
    # What the page shows while the answer is made, to see that it grows.
    tab.evaluate(
        """() => { window.seen = new Set(); new MutationObserver(() => {
             const texts = document.querySelectorAll('[data-testid=stText]');
             if (texts.length) window.seen.add(texts[texts.length - 1].textContent);
           }).observe(document.body, {subtree: true, childList: true, characterData: true}); }"""
    )
    question.fill("What is shown?")
    question.press("Enter")
    main = tab.get_by_test_id("stMainBlockContainer")
    expect(main.get_by_text("What is shown?")).to_be_visible()
    worse = tab.get_by_role("button", name="Write a better answer")
    expect(worse).to_be_visible(timeout=60_000)
    ready(tab)
    keep(tab, "chat")
    if not SCREENSHOTS:  # a trained model may answer in one word
        seen = tab.evaluate("[...window.seen]")
        assert [text for text in seen if text and seen[-1].startswith(text) and text != seen[-1]]
    if SCREENSHOTS and os.environ.get("MEDVLM_WORKSPACE"):
        return  # a workspace that was given learns nothing from a test
    worse.click()
    better = tab.get_by_role("textbox", name="Better answer")
    better.fill("A round lesion.")
    better.press("Control+Enter")
    tab.get_by_role("button", name="Save").click()
    expect(main.get_by_text("it was saved")).to_be_visible()
    (pair,) = saved_preferences(workspace)
    assert pair.chosen == "A round lesion."
    assert len(pair.rejected) > 10  # what the model said
    assert outside == []


SLOW_MODEL = """
import runpy, medvlm.serving.chat
class Slow:
    def stream(self, image, turns, sampling, *, stop):
        for number in range(2000):
            if stop.wait(0.05):
                return
            yield f"word{number} "
medvlm.serving.chat.ChatModel.load = lambda folder: Slow()
runpy.run_path(APP)
"""


def test_stop_ends_an_answer_that_would_go_on_for_minutes_and_what_was_said_stays(
    workspace: Workspace, page: tuple[Page, list[str]], tmp_path: Path
) -> None:
    if SCREENSHOTS and os.environ.get("MEDVLM_WORKSPACE"):
        pytest.skip("a workspace that was given is not talked about")
    script, port = tmp_path / "slow.py", free_port()
    script.write_text(SLOW_MODEL.replace("APP", repr(str(REPOSITORY / "dashboards" / "app.py"))))
    tab, _ = page
    with dashboard(workspace, tmp_path, port, script):
        tab.goto(f"http://127.0.0.1:{port}/chat")
        ready(tab)
        question = tab.get_by_test_id("stChatInputTextArea")
        question.fill("What is shown?")
        question.press("Enter")
        answer = tab.get_by_test_id("stMainBlockContainer").get_by_test_id("stText").last
        expect(answer).to_contain_text("word3 ")
        place = tab.get_by_role("button", name="Stop").bounding_box()
        tab.get_by_role("button", name="Stop").click()
        expect(tab.get_by_role("button", name="Write a better answer")).to_be_visible()
        ready(tab)
        said = answer.text_content() or ""
        assert said.startswith("word0 word1 word2 word3 ") and "word1999" not in said
        assert tab.get_by_role("button", name="Stop").count() == 0
        # It stands above the answer: one that is pushed down as the answer grows is hard to press.
        below = answer.bounding_box()
        assert place and below and place["y"] < below["y"] + below["height"]
        # And the conversation goes on.
        question.fill("And where?")
        question.press("Enter")
        expect(answer).to_have_text(re.compile("^word0 word1 "))
        tab.get_by_role("button", name="Stop").click()
        expect(tab.get_by_role("button", name="Write a better answer")).to_have_count(2)
