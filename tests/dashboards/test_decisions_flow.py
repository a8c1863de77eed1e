"""From a press on a page to the next dataset: what people decide is what models learn from."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest
from test_chat_page import Parrot, ask
from test_pages import open_page
from test_review_page import press

from medvlm.data.instruct import build_instruct
from medvlm.data.preference import build_preference
from medvlm.records import Figure, PreferencePair, Sample
from medvlm.store import Workspace, read_records, write_json

RECIPE = "tiny-stllava-med"


@pytest.fixture
def workspace(built_workspace: Path, tmp_path: Path) -> Workspace:
    """A copy whose instruction set was built from its figures."""
    shutil.copytree(built_workspace, tmp_path / "copy")
    workspace = Workspace(tmp_path / "copy")
    write_json(workspace.checkpoint("tiny-llava-med", 3) / "metadata.json", {"stage": 3})
    build_instruct(workspace)
    return workspace


@pytest.fixture
def opened(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> Callable[..., AppTest]:
    def page(name: str, **state: object) -> AppTest:
        return open_page(name, workspace.root, monkeypatch, reviewer="ann", **state)

    return page


def samples(workspace: Workspace) -> dict[str, Sample]:
    return {sample.sample_id: sample for sample in read_records(workspace.samples("instruct"), Sample)}


def focus(page: AppTest, record_id: str) -> AppTest:
    page.session_state["focus"] = record_id
    page.run()
    return page


def test_what_is_decided_about_samples_changes_the_next_instruct_dataset(
    workspace: Workspace, opened: Callable[..., AppTest]
) -> None:
    before = samples(workspace)
    rejected, edited, flagged, undone, *rest = list(before)
    page = opened("review", **{"review-table": "instruct"})
    focus(page, rejected).button(key="why-5").click().run()
    press(focus(page, edited), "Edit")
    page.text_area(key=f"edit-{edited}-1").set_value("What a person wrote.")
    press(page, "Save and accept")
    press(focus(page, flagged), "Flag privacy")
    focus(page, undone).button(key="why-4").click().run()
    press(page, "Undo")
    report = build_instruct(workspace)
    after = samples(workspace)
    assert set(after) == {edited, undone, *rest}
    assert after[edited].turns[1].text == "What a person wrote."
    assert all(after[sample_id] == before[sample_id] for sample_id in (undone, *rest))
    reasons = {name: lost["count"] for name, lost in report.details["dropped"].items()}
    assert (reasons["review_rejected"], reasons["review_privacy"]) == (1, 1)


def test_a_rejected_figure_is_in_no_next_dataset(workspace: Workspace, opened: Callable[..., AppTest]) -> None:
    figure = next(
        f.figure_id for f in read_records(workspace.figure_shards, Figure) if f.figure_id in samples(workspace)
    )
    page = opened("review", **{"review-table": "figures"})
    focus(page, figure).button(key="why-2").click().run()
    before = set(samples(workspace))
    build_instruct(workspace)
    assert before - set(samples(workspace)) == {figure}


def test_a_thumb_in_the_chat_is_in_the_next_preference_dataset(
    workspace: Workspace, opened: Callable[..., AppTest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medvlm.serving.chat.ChatModel.load", Parrot)
    write_json(workspace.checkpoint("tiny-llava-med", 2) / "metadata.json", {"stage": 2})
    page = opened("chat")
    page.selectbox(key="second-model").select("tiny-llava-med · stage 2").run()
    ask(page, "What is shown?")
    page.button(key="thumb-0-1").click().run()
    build_preference(workspace, RECIPE, [])
    (pair,) = read_records(workspace.preference_pairs(RECIPE), PreferencePair)
    assert (pair.question, pair.source) == ("What is shown?", "chat")
    assert pair.chosen.startswith("stage2")
    assert pair.rejected.startswith("stage3")


def test_images_to_test_with_are_marked_and_left_out(
    workspace: Workspace, opened: Callable[..., AppTest], monkeypatch: pytest.MonkeyPatch
) -> None:
    from medvlm.errors import InputError

    monkeypatch.setattr("medvlm.serving.chat.ChatModel.load", Parrot)
    page = opened("chat", **{"example-source": "benchmark/slake"})
    assert any("leaves out" in caption.value for caption in page.caption)
    ask(page, "What is shown?")
    page.text_area(key="better-0").set_value("A phantom.")
    page.button(key="save-0-0").click().run()
    with pytest.raises(InputError, match="no preference pair came out; leaked: 1"):
        build_preference(workspace, RECIPE, [])
