"""Who may look and who may decide, where a log-in is configured and where not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest
from test_chat_page import Parrot, ask
from test_pages import DASHBOARDS, PAGES, everything, open_page

from dashboards.access import person
from medvlm.review import Journal, saved_preferences
from medvlm.store import Workspace, write_json

ANN = {"is_logged_in": True, "email": "ann@example.org", "email_verified": True, "sub": "1"}
VIC = {"is_logged_in": True, "email": "vic@example.org", "sub": "2", "groups": ["staff"]}
ROLES = {"reviewers": ["Ann@example.org"], "claim": "groups", "reviewer_values": ["review"]}
Login = Callable[[dict[str, Any]], None]


@pytest.fixture
def login(monkeypatch: pytest.MonkeyPatch) -> Login:
    """Makes somebody the user of the pages, as Streamlit does from its signed cookie."""
    monkeypatch.setattr("streamlit.secrets", {"roles": ROLES})

    def become(user: dict[str, Any]) -> None:
        monkeypatch.setattr("streamlit.user", user)

    return become


@pytest.fixture
def workspace(built_workspace: Path, tmp_path: Path) -> Workspace:
    shutil.copytree(built_workspace, tmp_path / "copy")
    workspace = Workspace(tmp_path / "copy")
    write_json(workspace.checkpoint("tiny-llava-med", 3) / "metadata.json", {"stage": 3})
    return workspace


@pytest.mark.parametrize(
    ("user", "name", "writes"),
    [
        ({}, "", True),
        ({"is_logged_in": False}, "", False),
        (ANN, "ann@example.org", True),
        (VIC, "vic@example.org", False),
        (VIC | {"groups": ["review"]}, "vic@example.org", True),
        (VIC | {"groups": "review"}, "vic@example.org", True),
        # An address that nobody verified could be anybody's.
        (ANN | {"email_verified": False}, "1", False),
        ({"is_logged_in": True}, "", False),
    ],
)
def test_the_log_in_names_and_the_settings_allow(login: Login, user: dict[str, Any], name: str, writes: bool) -> None:
    login(user)
    assert (person().name, person().may_write) == (name, writes)


def test_with_a_log_in_but_no_roles_everybody_looks(login: Login, monkeypatch: pytest.MonkeyPatch) -> None:
    login(ANN)
    monkeypatch.setattr("streamlit.secrets", {})
    assert not person().may_write


@pytest.mark.parametrize("name", [*PAGES, "app"])
def test_who_is_not_logged_in_sees_nothing(
    name: str, login: Login, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    login({"is_logged_in": False})
    if name == "app":
        monkeypatch.setenv("MEDVLM_WORKSPACE", str(workspace.root))
        page = AppTest.from_file(str(DASHBOARDS / "app.py"), default_timeout=30).run()
    else:
        page = open_page(name, workspace.root, monkeypatch)
    assert [button.label for button in page.button] == ["Log in"]
    assert everything(page).split("\n") == ["medvlm", "Log in to see this workspace."]


def test_a_reviewer_signs_with_the_name_of_the_log_in(
    login: Login, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    login(ANN)
    page = open_page("review", workspace.root, monkeypatch, reviewer="somebody else")
    assert page.text_input(key="reviewer-logged-in").disabled
    next(button for button in page.button if button.label == "Accept").click().run()
    assert [(d.who, d.action) for d in Journal(workspace).read()] == [("ann@example.org", "accept")]


def test_a_viewer_decides_nothing(login: Login, workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    login(VIC)
    page = open_page("review", workspace.root, monkeypatch)
    assert "You may look, not decide." in [info.value for info in page.info]
    decisions = [button for button in page.button if button.label != "Skip"]
    assert len(decisions) > 8
    assert all(button.disabled for button in decisions)


def test_who_has_lost_the_role_since_the_page_was_drawn_decides_nothing(
    login: Login, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    login(ANN)
    page = open_page("review", workspace.root, monkeypatch)
    accept = next(button for button in page.button if button.label == "Accept")
    login(VIC)
    accept.click().run()
    assert "may look, not decide" in page.error[0].value
    assert Journal(workspace).read() == []


def test_a_viewer_may_talk_but_teaches_nothing(
    login: Login, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medvlm.serving.chat.ChatModel.load", Parrot)
    login(VIC)
    page = open_page("chat", workspace.root, monkeypatch)
    assert ask(page, "What?")[-1].endswith("What?")
    assert not [button for button in page.button if "thumb" in str(button.key) or "save" in str(button.key)]
    login(ANN)
    page = open_page("chat", workspace.root, monkeypatch)
    ask(page, "What?")
    page.text_area(key="better-0").set_value("A nodule.")
    save = page.button(key="save-0-0")
    login(VIC)
    save.click().run()
    assert "may look, not decide" in page.error[0].value
    assert saved_preferences(workspace) == []
