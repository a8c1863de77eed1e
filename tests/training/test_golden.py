"""Twenty steps of each stage of each twin give the losses that are stored beside this file.

A new twin needs its file: ``MEDVLM_UPDATE_GOLDEN=1 pytest tests/training/test_golden.py -k NAME`` writes it. The same
writes a changed one; a change needs its cause said in the commit.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from golden_case import GOLDEN_STEPS, train_golden

from medvlm.config import recipe_names

GOLDEN = Path(__file__).with_name("golden")
TWINS = [name for name in recipe_names() if name.startswith("tiny-")]
COMMAND = "MEDVLM_UPDATE_GOLDEN=1 pytest tests/training/test_golden.py -k"


@pytest.mark.parametrize("name", TWINS)
def test_twenty_steps_give_the_stored_losses(name: str, tmp_path: Path) -> None:
    losses = train_golden(tmp_path, name)
    path = GOLDEN / f"{name}.json"
    if os.environ.get("MEDVLM_UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        lines = [f' "{stage}": {json.dumps(values)}' for stage, values in losses.items()]
        path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    assert path.exists(), f"no stored losses of {name}; write them with {COMMAND} {name}"
    stored = json.loads(path.read_text())
    assert set(losses) == set(stored)
    for stage, values in stored.items():
        assert len(values) == GOLDEN_STEPS
        assert losses[stage] == pytest.approx(values, abs=1e-4), stage
        assert losses[stage][-1] < losses[stage][0], stage


def test_no_stored_losses_without_their_twin() -> None:
    assert sorted(path.stem for path in GOLDEN.glob("*.json")) == sorted(TWINS)
