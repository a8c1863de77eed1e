"""Review as a person does it: one record after the other, by button, with undo and two people."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest
from test_pages import everything, open_page
from workspace_builder import HOSTILE

from medvlm.data.privacy import PrivacyFlag
from medvlm.records import Figure, PreferencePair, Sample
from medvlm.results import Results
from medvlm.review import Journal, obey, texts_of, verdicts
from medvlm.store import Workspace, read_records, write_records

Opened = Callable[..., AppTest]


@pytest.fixture
def workspace(built_workspace: Path, tmp_path: Path) -> Workspace:
    """A copy that may be decided about."""
    shutil.copytree(built_workspace, tmp_path / "copy")
    return Workspace(tmp_path / "copy")


@pytest.fixture
def review(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> Opened:
    def opened(who: str = "ann", **state: object) -> AppTest:
        return open_page("review", workspace.root, monkeypatch, reviewer=who, **state)

    return opened


def press(page: AppTest, label: str) -> AppTest:
    next(button for button in page.button if button.label == label).click().run()
    assert not page.exception
    return page


def shown(page: AppTest) -> str:
    """The id of the record on the page."""
    return next(c.value for c in page.caption if "instruct\\-" in c.value).split(" ")[0].replace("\\", "")


def test_nobody_decides_without_a_name(review: Opened, workspace: Workspace) -> None:
    page = review(who="")
    assert next(b for b in page.button if b.label == "Accept").disabled
    assert "Enter your name" in page.info[0].value


def test_each_decision_is_saved_with_what_was_seen_and_the_next_record_comes(
    review: Opened, workspace: Workspace
) -> None:
    page = review()
    queue = Results(workspace.root).source("instruct").ids()
    assert shown(page) == queue[0]
    press(page, "Accept")
    assert shown(page) == queue[1]
    page.text_input(key="note").set_value("arrow is missing")
    page.button(key="why-1").click().run()
    assert shown(page) == queue[2]
    press(page, "Flag privacy")
    decisions = Journal(workspace).read()
    assert [(d.who, d.record_id, d.action) for d in decisions] == [
        ("ann", queue[0], "accept"),
        ("ann", queue[1], "reject"),
        ("ann", queue[2], "flag_privacy"),
    ]
    assert decisions[1].reason == "the text does not fit the image: arrow is missing"
    assert decisions[2].reason == ""  # the note belonged to the record before
    samples = {s.sample_id: s for s in read_records(workspace.samples("instruct"), Sample)}
    assert all(d.before == texts_of(samples[d.record_id]) for d in decisions)
    assert "3 of 60 judged by you" in page.get("progress")[0].proto.text


def test_a_press_on_a_page_that_is_no_longer_true_is_not_counted(review: Opened, workspace: Workspace) -> None:
    page, stale = review(), review()  # two tabs of one person, or a key pressed while the page still draws
    record = shown(page)
    press(page, "Accept")
    stale.button(key="why-1").click().run()
    assert [(d.record_id, d.action) for d in Journal(workspace).read()] == [(record, "accept")]
    assert "not counted" in stale.toast[0].value
    assert shown(stale) == shown(page) != record


def test_an_edit_reaches_the_next_dataset(review: Opened, workspace: Workspace) -> None:
    page = review()
    record = shown(page)
    press(page, "Edit")
    page.text_area(key=f"edit-{record}-1").set_value("A corrected answer.")
    press(page, "Save and accept")
    assert shown(page) != record
    samples = read_records(workspace.samples("instruct"), Sample)
    built = {s.sample_id: s for s in obey(samples, verdicts(Journal(workspace).read(), "instruct"))}
    assert built[record].turns[1].text == "A corrected answer."
    assert built[record].turns[0].text.startswith("<image>\n")


def test_an_edit_that_breaks_the_sample_is_refused_and_nothing_is_saved(review: Opened, workspace: Workspace) -> None:
    page = review()
    record = shown(page)
    press(page, "Edit")
    page.text_area(key=f"edit-{record}-0").set_value("What is this?")
    press(page, "Save and accept")
    assert "<image" not in page.error[0].value.replace("\\<", "") and "mark" in page.error[0].value
    assert shown(page) == record
    assert Journal(workspace).read() == []
    press(page, "Cancel")
    press(page, "Edit")
    press(page, "Save and accept")
    assert "changes nothing" in page.error[0].value


def test_a_preference_pair_is_reviewed_and_keeps_two_different_answers(review: Opened, workspace: Workspace) -> None:
    sample = read_records(workspace.samples("instruct"), Sample)[3]
    same = (sample.image, sample.image_sha256, sample.image_phash, sample.group_id)
    pair = PreferencePair("instruct-0003-q1", *same, "Where?", "Left.", "Right.", "judge:overlap-offline")
    write_records(workspace.preference_pairs("tiny"), PreferencePair, [pair])
    page = review(**{"review-table": "preference/tiny"})
    assert [text.value for text in page.text][:3] == ["Where?", "Left.", "Right."]
    press(page, "Edit")
    page.text_area(key="edit-instruct-0003-q1-1").set_value("right. ")
    press(page, "Save and accept")
    assert "both answers of the pair would be the same" in page.error[0].value
    page.text_area(key="edit-instruct-0003-q1-1").set_value("On the left.")
    press(page, "Save and accept")
    (decision,) = Journal(workspace).read()
    assert (decision.source, decision.after) == ("preference/tiny", ("Where?", "On the left.", "Right."))


def test_undo_brings_the_record_back_and_skip_leaves_it_for_later(review: Opened, workspace: Workspace) -> None:
    page = review()
    first = shown(page)
    press(page, "Accept")
    second = shown(page)
    press(page, "Skip")
    third = shown(page)
    press(page, "Undo")
    assert shown(page) == first
    press(page, "Accept")
    assert shown(page) == third
    assert second not in {d.record_id for d in Journal(workspace).read()}


def test_two_people_see_their_own_progress_and_how_far_they_agree(review: Opened, workspace: Workspace) -> None:
    ann = review("ann")
    press(ann, "Accept")
    ann.button(key="why-2").click().run()
    bo = review("bo", queue="opinion")
    assert "0 of 2 judged by you" in bo.get("progress")[0].proto.text
    press(bo, "Accept")
    press(bo, "Accept")
    assert "This queue is done." in bo.success[0].value
    people, pairs = bo.dataframe[0].value, bo.dataframe[1].value
    assert people.to_dict("list") == {
        "Reviewer": ["ann", "bo"],
        "Accepted": [1, 2],
        "Edited": [0, 0],
        "Rejected": [1, 0],
        "Privacy": [0, 0],
    }
    assert pairs["Both judged"].to_list() == [2]
    assert pairs["Agree"].to_list() == [50.0]
    assert pairs["Cohen's kappa"].to_list() == [0.0]


def test_the_contract_queue_and_the_disagreement_queue(review: Opened) -> None:
    page = review(queue="flagged")
    assert shown(page) == "instruct-0000"
    assert HOSTILE in [text.value for text in page.text]
    assert "<script" not in everything(page).replace(HOSTILE, "")
    page = review(**{"review-table": "benchmark/slake", "queue": "disagree"})
    assert "This queue is empty." in page.success[0].value  # both models say the same in the fixture


def test_a_conversation_is_judged_beside_its_figures_caption_mentions_and_source(
    review: Opened, workspace: Workspace
) -> None:
    figure = next(f for f in read_records(workspace.figure_shards, Figure) if f.figure_id == "30000003_F1")
    page = review(focus="instruct-0003")
    assert shown(page) == "instruct-0003"
    said = [text.value for text in page.text]
    assert figure.caption in said and figure.mentions[0] in said
    assert page.get("link_button")[0].proto.url == figure.source_url
    # The figure of record 0 has markup for a caption, and no address of the web.
    page = review(focus="instruct-0000")
    assert [text.value for text in page.text].count(HOSTILE) == 2
    assert not page.get("link_button")
    assert "javascript:alert(1)" in [text.value for text in page.text]


def test_pictures_with_print_in_a_corner_are_a_queue_of_their_own(review: Opened, workspace: Workspace) -> None:
    page = review(queue="privacy")
    assert "medvlm privacy flag" in [code.value for code in page.code]
    sample = next(s for s in read_records(workspace.samples("instruct"), Sample) if s.sample_id == "instruct-0007")
    flag = PrivacyFlag("figures", "f", sample.image_sha256, "text_in_corner", "top_left", 9, 0, 0, 9, 9)
    write_records(workspace.privacy_flags, PrivacyFlag, [flag])
    (workspace.privacy / "report.json").write_text("{}")
    page = review(queue="privacy")
    assert "0 of 1 judged by you" in page.get("progress")[0].proto.text
    assert "Perhaps print: top left" in page.warning[0].value
    press(page, "Flag privacy")
    assert [(d.record_id, d.action) for d in Journal(workspace).read()] == [("instruct-0007", "flag_privacy")]
    assert "This queue is done." in page.success[0].value


def test_a_benchmark_says_that_it_stays_as_it_was_published(review: Opened) -> None:
    said = "stays as it was published"
    assert any(said in caption.value for caption in review(**{"review-table": "benchmark/slake"}).caption)
    assert not any(said in caption.value for caption in review().caption)


def test_a_full_disk_keeps_the_record_on_the_page(
    review: Opened, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = review()
    record = shown(page)

    def disk_full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("medvlm.append_only.os.fsync", disk_full)
    press(page, "Accept")
    assert "was not saved" in page.error[0].value
    assert shown(page) == record
