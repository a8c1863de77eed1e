"""Decisions of people: none is lost, none is half, and datasets obey them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medvlm.errors import InputError, WorkspaceError
from medvlm.records import Image, Sample, Turn
from medvlm.review import Journal, agreement, cohen_kappa, obey, texts_of, verdicts
from medvlm.store import Workspace


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(Workspace(tmp_path))


def sample(sample_id: str, answer: str = "A nodule.") -> Sample:
    turns = (Turn("user", "<image>\nWhat?"), Turn("assistant", answer))
    return Sample(sample_id, "instruct", Image(b"", ""), "", "", "g", turns, "ct", "en", "CC BY", "caption")


WRITER = """
import sys
from pathlib import Path
from medvlm.review import Journal
from medvlm.store import Workspace
journal = Journal(Workspace(Path(sys.argv[1])))
for n in range(int(sys.argv[3])):
    journal.decide(sys.argv[2], "instruct", f"s{n}", "accept", before=["text " * 40])
    print(n, flush=True)
"""


def writer(root: Path, who: str, decisions: int, **options: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(root), who, str(decisions)], stdout=subprocess.PIPE, text=True, **options
    )


def test_eight_reviewers_with_500_decisions_each_lose_none(tmp_path: Path) -> None:
    running = [writer(tmp_path, f"reviewer-{n}", 500) for n in range(8)]
    for process in running:
        process.communicate()
        assert process.returncode == 0
    decisions = Journal(Workspace(tmp_path)).read()
    assert Counter(d.who for d in decisions) == {f"reviewer-{n}": 500 for n in range(8)}
    assert len({d.decision_id for d in decisions}) == 4000
    for n in range(8):
        mine = [d.record_id for d in decisions if d.who == f"reviewer-{n}"]
        assert mine == [f"s{i}" for i in range(500)]


def test_a_killed_writer_loses_no_confirmed_decision_and_the_next_goes_on(tmp_path: Path) -> None:
    confirmed, deadline = 0, time.monotonic() + 30
    with writer(tmp_path, "killed", 100_000) as process:
        assert process.stdout is not None
        while confirmed < 50 and time.monotonic() < deadline:
            confirmed = int(process.stdout.readline()) + 1
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().split()
    confirmed = max([confirmed, *(int(n) + 1 for n in rest)])
    journal = Journal(Workspace(tmp_path))
    assert confirmed <= len(journal.read()) <= confirmed + 1
    journal.decide("next", "instruct", "s", "accept")
    assert journal.read()[-1].who == "next"


def test_a_half_line_is_no_decision_and_is_cut_off_by_the_next(journal: Journal) -> None:
    journal.decide("ann", "figures", "a", "accept")
    with journal.path.open("ab") as file:
        file.write(b'{"decision_id": "half", "who": "bo')
    assert [d.who for d in journal.read()] == ["ann"]
    journal.decide("cy", "figures", "b", "accept")
    assert [d.who for d in journal.read()] == ["ann", "cy"]


def test_a_damaged_line_in_the_middle_is_named(journal: Journal) -> None:
    for record in "abc":
        journal.decide("ann", "figures", record, "accept")
    lines = journal.path.read_bytes().splitlines(keepends=True)
    journal.path.write_bytes(lines[0] + b"{}\n" + lines[2])
    with pytest.raises(InputError, match="not a decision") as caught:
        journal.read()
    assert "line 2" in caught.value.where


def test_an_action_of_a_newer_version_is_refused_by_name(journal: Journal) -> None:
    journal.decide("ann", "figures", "a", "accept")
    row = json.loads(journal.path.read_text())
    journal.path.write_text(json.dumps({**row, "action": "teleport"}) + "\n")
    with pytest.raises(InputError, match="teleport"):
        journal.read()


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "review").write_text("a file where the folder should be")
    with pytest.raises(WorkspaceError, match="was not saved"):
        Journal(Workspace(tmp_path)).decide("ann", "figures", "a", "accept")


def test_a_failed_write_leaves_the_journal_as_it_was(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    journal.decide("ann", "figures", "a", "accept")
    before = journal.path.read_bytes()

    def disk_full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("medvlm.append_only.os.fsync", disk_full)
    with pytest.raises(WorkspaceError, match="No space left"):
        journal.decide("ann", "figures", "b", "accept")
    assert journal.path.read_bytes() == before


@pytest.mark.parametrize(
    ("who", "action", "more"),
    [
        (" ", "accept", {}),
        ("ann", "reject", {"reason": " "}),
        ("ann", "edit", {"before": ["a"], "after": ["a"]}),
        ("ann", "edit", {}),
    ],
)
def test_a_decision_without_its_parts_is_refused(journal: Journal, who: str, action: str, more: dict) -> None:
    with pytest.raises(InputError):
        journal.decide(who, "figures", "a", action, **more)
    assert journal.read() == []


def test_undo_takes_back_ones_own_last_decision_and_then_the_one_before(journal: Journal) -> None:
    journal.decide("ann", "figures", "a", "accept")
    journal.decide("ann", "figures", "b", "reject", reason="wrong caption")
    journal.decide("bo", "figures", "c", "accept")
    assert journal.undo("ann").record_id == "b"
    assert set(verdicts(journal.read(), "figures")) == {"a", "c"}
    assert journal.undo("ann").record_id == "a"
    assert journal.undo("ann") is None
    assert set(verdicts(journal.read(), "figures")) == {"c"}
    assert len(journal.read()) == 5  # append-only: nothing was removed


def test_the_last_word_counts_but_a_privacy_flag_stays_until_it_is_taken_back(journal: Journal) -> None:
    journal.decide("ann", "figures", "a", "reject", reason="blurred")
    journal.decide("bo", "figures", "a", "accept")
    assert verdicts(journal.read(), "figures")["a"].keep
    journal.decide("cy", "figures", "a", "flag_privacy")
    journal.decide("ann", "figures", "a", "accept")
    assert not verdicts(journal.read(), "figures")["a"].keep
    journal.undo("cy")
    assert verdicts(journal.read(), "figures")["a"].keep
    assert verdicts(journal.read(), "instruct") == {}


def test_the_next_dataset_obeys(journal: Journal) -> None:
    samples = [sample(name) for name in ("kept", "rejected", "private", "edited", "stale", "untouched")]
    before = texts_of(samples[0])
    after = (before[0], "A mass, 3 cm.")
    journal.decide("ann", "instruct", "kept", "accept", before=before)
    journal.decide("ann", "instruct", "rejected", "reject", reason="not in the image", before=before)
    journal.decide("ann", "instruct", "private", "flag_privacy", before=before)
    journal.decide("ann", "instruct", "edited", "edit", before=before, after=after)
    journal.decide("bo", "instruct", "edited", "accept", before=after)
    journal.decide("ann", "instruct", "stale", "edit", before=("<image>\nWhat?", "Something older."), after=after)
    counts: Counter[str] = Counter()
    built = {s.sample_id: s for s in obey(samples, verdicts(journal.read(), "instruct"), counts)}
    assert list(built) == ["kept", "edited", "stale", "untouched"]
    assert texts_of(built["edited"]) == after
    assert built["edited"].source == "review"
    assert built["stale"] == samples[4]
    assert counts == {"review_rejected": 1, "review_privacy": 1, "review_edited": 1, "review_stale_edits": 1}


def test_kappa_of_the_textbook_example() -> None:
    # 50 grants, two readers: both yes 20, both no 15, 5 and 10 apart. Kappa 0.4.
    pairs = [("y", "y")] * 20 + [("y", "n")] * 5 + [("n", "y")] * 10 + [("n", "n")] * 15
    assert cohen_kappa(pairs) == pytest.approx(0.4)
    assert cohen_kappa([]) is None
    assert cohen_kappa([("y", "y")] * 3) is None


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("ab")), min_size=1))
def test_kappa_is_symmetric_and_bounded(pairs: list[tuple[str, str]]) -> None:
    kappa = cohen_kappa(pairs)
    assert kappa == cohen_kappa([(b, a) for a, b in pairs])
    if kappa is not None:
        assert -1 <= kappa <= 1
        assert (kappa == 1) == all(a == b for a, b in pairs)


def test_agreement_counts_only_what_both_judged_and_what_stands(journal: Journal) -> None:
    for record, ann, bo in [("a", "accept", "accept"), ("b", "reject", "reject"), ("c", "accept", "reject")]:
        journal.decide("ann", "figures", record, ann, reason="r")
        journal.decide("bo", "figures", record, bo, reason="r")
    journal.decide("ann", "figures", "only ann", "accept")
    (both,) = agreement(journal.read(), "figures")
    assert (both.first, both.second, both.records) == ("ann", "bo", 3)
    assert both.observed == pytest.approx(2 / 3)
    assert both.kappa == pytest.approx(0.4)
    journal.undo("bo")
    (both,) = agreement(journal.read())
    assert (both.records, both.kappa) == (2, 1.0)
