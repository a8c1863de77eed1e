"""A model may be used when a person said so of exactly that model, and nobody took it back."""

from __future__ import annotations

from pathlib import Path

import pytest

from medvlm.approval import approval, approvals, approve
from medvlm.errors import InputError
from medvlm.store import Workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path)


def test_an_approval_holds_for_exactly_what_was_approved_until_it_is_withdrawn(workspace: Workspace) -> None:
    assert approval(workspace, "tiny-llava-med", "f1") is None
    given = approve(workspace, "tiny-llava-med", "f1", who=" ann ", note="read 50 answers")
    assert approval(workspace, "tiny-llava-med", "f1") == given
    assert (given.who, given.note) == ("ann", "read 50 answers")
    assert approval(workspace, "tiny-llava-med", "f2") is None
    assert approval(workspace, "llava-med", "f1") is None
    approve(workspace, "tiny-llava-med", "f1", who="bob", word="withdraw", note="unsafe on paediatric CT")
    assert approval(workspace, "tiny-llava-med", "f1") is None
    again = approve(workspace, "tiny-llava-med", "f1", who="ann")
    assert approval(workspace, "tiny-llava-med", "f1") == again
    assert [row.word for row in approvals(workspace)] == ["approve", "withdraw", "approve"]


def test_a_word_needs_a_person_a_model_and_a_withdrawal_a_reason(workspace: Workspace) -> None:
    for who, fingerprint, word, note, what in (
        ("", "f1", "approve", "", "needs a person"),
        ("ann", "", "approve", "", "needs a person and a model"),
        ("ann", "f1", "withdraw", "", "needs a reason"),
        ("ann", "f1", "withdraw", "why", "no approval to withdraw"),
    ):
        with pytest.raises(InputError, match=what):
            approve(workspace, "r", fingerprint, who=who, word=word, note=note)
    assert approvals(workspace) == []


@pytest.mark.parametrize(
    "line", ["{", '{"who": "ann"}', '{"who":"a","when":"","recipe":"r","fingerprint":"f","word":"maybe","note":""}']
)
def test_a_damaged_line_is_named(workspace: Workspace, line: str) -> None:
    approve(workspace, "r", "f", who="ann")
    path = workspace.review / "approvals.jsonl"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(InputError, match=r"not an approval|unknown") as caught:
        approval(workspace, "r", "f")
    assert caught.value.where.endswith("line 2")
