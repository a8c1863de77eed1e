"""What `make audit` says where nothing could be looked up, and where something was found."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "audit.py"
SKIPPED = {"name": "a", "version": "1", "skip_reason": "Dependency not found on PyPI and could not be audited"}
SOUND = {"name": "b", "version": "1", "vulns": []}
BROKEN = {"name": "c", "version": "1", "vulns": [{"id": "GHSA-1"}]}


def audit(monkeypatch: pytest.MonkeyPatch, document: Path, said: str) -> Result:
    spec = importlib.util.spec_from_file_location("audit_script", SCRIPT)
    assert spec is not None and spec.loader is not None
    script: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: SimpleNamespace(stdout=said, stderr="no route to host"))
    return CliRunner().invoke(script.main, [str(document)])


@pytest.mark.parametrize(
    ("said", "code", "words"),
    [
        (json.dumps({"dependencies": [SKIPPED]}), 1, "nothing was audited: pip-audit needs a network"),
        ("", 1, "no route to host"),
        (json.dumps({"dependencies": [SKIPPED, SOUND]}), 0, "1 packages audited, 1 could not be looked up"),
        (json.dumps({"dependencies": [SOUND, BROKEN]}), 1, "c 1: GHSA-1"),
    ],
)
def test_what_was_not_audited_is_never_called_sound(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: str, code: int, words: str
) -> None:
    done = audit(monkeypatch, tmp_path / "licences.md", said)
    assert done.exit_code == code, done.output
    assert words in done.output
    assert "pyarrow" in (tmp_path / "licences.md").read_text(), "licences need no network"
