"""A training whose machine died goes on elsewhere, from the checkpoint that was put into the bucket."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from buckets import KEYS, NAME, local_bucket
from click.testing import CliRunner
from failures.reliability import held
from twin_case import TINY, fill

from medvlm.cli import cli
from medvlm.s3 import Bucket
from medvlm.store import Workspace
from medvlm.working_copy import CACHE_VARIABLE, WorkingCopy


def test_another_machine_goes_on_with_a_training_whose_machine_died(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"s3://{NAME}/training"
    with local_bucket() as server:
        for name, value in {**KEYS, "AWS_ENDPOINT_URL": server}.items():
            monkeypatch.setenv(name, value)
        one, other = tmp_path / "one", tmp_path / "other"
        fill(Workspace(one))
        WorkingCopy(one, address).push()
        train = ["train", "--recipe", "tiny-llava-med", "--stage", "1", "--set", "checkpoints.every=0.1", "--json"]
        train += [part for text in TINY for part in ("--set", text)]
        killed = subprocess.run(
            [sys.executable, "-m", "medvlm.cli", "--workspace", address, *train],
            env={
                **os.environ, CACHE_VARIABLE: str(one), "MEDVLM_WORKSPACE_PUSH_S": "0.2",
                "MEDVLM_PROGRESS": "killed_when_saved:listen", "MEDVLM_TEST_BUCKET": address,
                "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
            },
            capture_output=True, text=True,
        )  # fmt: skip
        assert killed.returncode == -9, killed.stderr
        manifest = Bucket(address).read("manifests/scratch/train/tiny-llava-med/stage1/all.json")
        assert manifest and "complete.json" in manifest[0].decode()

        monkeypatch.setenv(CACHE_VARIABLE, str(other))
        finished = CliRunner().invoke(cli, ["--workspace", address, *train], catch_exceptions=False)
        assert finished.exit_code == 0, finished.output
        assert "going on from step" in finished.stderr
        seen = WorkingCopy(tmp_path / "third", address)
        seen.pull()
        assert (Workspace(seen.root).checkpoint("tiny-llava-med", 1) / "metadata.json").is_file()
        assert not (seen.root / "scratch" / "train").exists(), "nothing is left to go on from"
    held(
        "a machine that trains is lost for ever; its workspace is a bucket",
        lost="the steps since the last checkpoint that was put up: a look a minute",
        saw="nothing of the half-trained stage, only what it is resumed from",
        rerun="the same command on another machine brings in the data and the checkpoint, and goes on from it",
    )
