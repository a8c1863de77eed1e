"""A log-in with OpenID Connect, from Streamlit's button to a signed decision, in a real browser."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Generator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, WebSocketRoute, expect
from real_browser import dashboard, free_port, ready, serving
from streamlit.proto.BackMsg_pb2 import BackMsg
from streamlit.proto.ForwardMsg_pb2 import ForwardMsg

from medvlm.review import Journal
from medvlm.store import Workspace

PEOPLE = [
    {"sub": "reviewer-1", "email": "ann@example.org", "email_verified": True},
    {"sub": "viewer-1", "email": "vic@example.org", "email_verified": True},
    # Says that they are Ann, which nobody has checked.
    {"sub": "stranger-1", "email": "ann@example.org", "email_verified": False},
]


@pytest.fixture(scope="module")
def workspace(built_workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    folder = tmp_path_factory.mktemp("log-in") / "workspace"
    shutil.copytree(built_workspace, folder)
    return Workspace(folder)


@pytest.fixture(scope="module")
def address(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    """A dashboard with ``[auth]``, whose provider knows three people."""
    provider, port = free_port(), free_port()
    people = [word for person in PEOPLE for word in ("--user-claims", json.dumps(person))]
    command = [sys.executable, "-m", "oidc_provider_mock", "--port", str(provider), *people]
    folder = tmp_path_factory.mktemp("secrets")
    metadata = f"http://127.0.0.1:{provider}/.well-known/openid-configuration"
    (folder / ".streamlit").mkdir()
    (folder / ".streamlit/secrets.toml").write_text(f"""
        [auth]
        redirect_uri = "http://127.0.0.1:{port}/oauth2callback"
        cookie_secret = "sixty-four characters would be better, this is a test"
        client_id = "medvlm"
        client_secret = "none"
        server_metadata_url = "{metadata}"

        [roles]
        reviewers = ["ann@example.org"]
    """)
    with serving(command, metadata, tmp_path_factory.mktemp("provider")), dashboard(workspace, folder, port):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def tab(browser: Browser) -> Generator[Page]:
    """A tab of a browser that has no cookies yet."""
    context = browser.new_context(viewport={"width": 1360, "height": 900})
    context.set_default_timeout(30_000)
    expect.set_options(timeout=20_000)
    yield context.new_page()
    context.close()


class Wire:
    """The tab's web socket, read along, through which a changed page presses buttons that are off."""

    def __init__(self, tab: Page) -> None:
        self.buttons: dict[str, str] = {}
        self.last = BackMsg()
        tab.route_web_socket("**/_stcore/stream**", self._connect)

    def _connect(self, page: WebSocketRoute) -> None:
        self.server = page.connect_to_server()
        page.on_message(self._from_page)
        self.server.on_message(lambda data: self._from_server(page, data))

    def _from_page(self, data: str | bytes) -> None:
        message = BackMsg.FromString(data)
        if message.HasField("rerun_script"):
            self.last = message
        self.server.send(data)

    def _from_server(self, page: WebSocketRoute, data: str | bytes) -> None:
        element = ForwardMsg.FromString(data).delta.new_element
        if element.HasField("button"):
            self.buttons[element.button.label] = element.button.id
        page.send(data)

    def press(self, label: str) -> None:
        """Tell the server that a button was clicked."""
        message = BackMsg.FromString(self.last.SerializeToString())
        states = message.rerun_script.widget_states
        kept = [widget for widget in states.widgets if not widget.trigger_value]  # the click before is no part of it
        states.ClearField("widgets")
        states.widgets.extend(kept)
        states.widgets.add(id=self.buttons[label], trigger_value=True)
        self.server.send(message.SerializeToString())


def log_in(tab: Page, address: str, subject: str) -> Locator:
    """Log in as one of the provider's people and open the review page; returns the sidebar."""
    tab.goto(f"{address}/review")
    expect(tab.get_by_text("Log in to see this workspace.")).to_be_visible()
    expect(tab.get_by_test_id("stImage")).to_have_count(0)
    ready(tab)
    tab.get_by_role("button", name="Log in").click()
    tab.get_by_role("button", name=subject, exact=True).click()
    tab.wait_for_url(f"{address}/**")
    tab.goto(f"{address}/review")
    expect(tab.get_by_role("heading", level=1)).to_have_text("Review")
    ready(tab)
    return tab.get_by_test_id("stSidebar")


def test_a_reviewers_decision_is_signed_by_the_log_in(address: str, tab: Page, workspace: Workspace) -> None:
    before = len(Journal(workspace).read())
    wire = Wire(tab)
    sidebar = log_in(tab, address, "reviewer-1")
    expect(sidebar.get_by_text("Reviewer", exact=True)).to_be_visible()
    expect(sidebar.get_by_text("ann@example.org")).to_be_visible()
    expect(tab.get_by_label("Your name")).to_be_disabled()
    tab.get_by_role("button", name="Accept").click()
    expect(tab.get_by_text("Saved: accept")).to_be_visible()
    ready(tab)
    wire.press("Flag privacy")  # so a message as it is forged below does decide where that is allowed
    expect(tab.get_by_text("Saved: flag privacy")).to_be_visible()
    decisions = [(d.who, d.action) for d in Journal(workspace).read()[before:]]
    assert decisions == [("ann@example.org", "accept"), ("ann@example.org", "flag_privacy")]
    sidebar.get_by_role("button", name="Log out").click()
    tab.get_by_role("button", name="End session").click()  # the provider's
    expect(tab.get_by_role("button", name="Log in")).to_be_visible()
    expect(tab.get_by_role("button", name="Accept")).to_have_count(0)


@pytest.mark.parametrize(("subject", "name"), [("viewer-1", "vic@example.org"), ("stranger-1", "stranger-1")])
def test_who_may_only_look_is_offered_no_writing_and_refused_when_they_force_it(
    subject: str, name: str, address: str, tab: Page, workspace: Workspace
) -> None:
    before = Journal(workspace).read()
    wire = Wire(tab)
    sidebar = log_in(tab, address, subject)
    expect(sidebar.get_by_text("Viewer", exact=True)).to_be_visible()
    expect(sidebar.get_by_text(name)).to_be_visible()
    expect(tab.get_by_text("You may look, not decide.")).to_be_visible()
    expect(tab.get_by_role("button", name="Accept")).to_be_disabled()
    shown = tab.get_by_test_id("stImage").get_by_role("img").get_attribute("alt") or ""
    assert shown.startswith("instruct-")
    tab.get_by_role("heading", level=1).click()
    tab.keyboard.press("a")
    wire.press("Accept")
    wire.press("Skip")  # after it on the same socket, and allowed: once this was heard, that was
    expect(tab.get_by_role("img", name=shown)).to_have_count(0)
    ready(tab)
    assert Journal(workspace).read() == before
