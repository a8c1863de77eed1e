"""DVC as a team uses it: a fresh clone pulls and runs nothing; two stages at once; diffs and plots."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from buckets import KEYS, local_bucket
from projects import copy_project

STAGE = "benchmark@vqa-rad"
"""A stage with its own upstream (the corpus) that takes seconds."""


def dvc(folder: Path, *arguments: str, check: bool = True, **environment: str) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *arguments],
        cwd=folder,
        env={**os.environ, "PATH": path, "DVC_NO_ANALYTICS": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with the corpus and one benchmark built."""
    folder = copy_project(tmp_path_factory.mktemp("dvc") / "project")
    dvc(folder, "repro", STAGE)
    return folder


def fresh_clone(built: Path, folder: Path) -> Path:
    """What git has of the project, and its dvc.lock, as a colleague clones it."""
    clone = copy_project(folder)
    shutil.copy2(built / "dvc.lock", clone / "dvc.lock")
    shutil.copy2(built / ".dvc" / "config", clone / ".dvc" / "config")
    return clone


def runs_nothing(clone: Path) -> None:
    said = dvc(clone, "repro", STAGE)
    assert "Running stage" not in said
    assert "up to date" in said


def test_a_fresh_clone_pulls_from_a_folder_and_runs_nothing(built: Path, tmp_path: Path) -> None:
    dvc(built, "remote", "add", "--default", "--force", "store", str(tmp_path / "remote"))
    dvc(built, "push")
    clone = fresh_clone(built, tmp_path / "clone")
    dvc(clone, "pull", STAGE, "corpus")
    runs_nothing(clone)
    report = json.loads((clone / "workspace" / "benchmarks" / "vqa-rad" / "report.json").read_text())
    assert report["counts"]["items"] > 0, "reports travel too"


@pytest.fixture
def bucket() -> Iterator[str]:
    with local_bucket() as address:
        yield address


def test_a_fresh_clone_pulls_from_s3_and_runs_nothing(built: Path, tmp_path: Path, bucket: str) -> None:
    dvc(built, "remote", "add", "--default", "--force", "bucket", "s3://medvlm/data")
    dvc(built, "remote", "modify", "bucket", "endpointurl", bucket)
    dvc(built, "push", **KEYS)
    clone = fresh_clone(built, tmp_path / "clone")
    dvc(clone, "pull", STAGE, "corpus", **KEYS)
    runs_nothing(clone)


def small_project(folder: Path, dvc_yaml: str, **files: str) -> Path:
    folder.mkdir()
    subprocess.run(["git", "init", "-q", str(folder)], check=True)
    for name, text in {"dvc.yaml": dvc_yaml, **files}.items():
        (folder / name.replace("_", ".")).write_text(text)
    dvc(folder, "init", "-q")
    subprocess.run(["git", "-C", str(folder), "add", "-A"], check=True)
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run(["git", "-C", str(folder), *identity, "commit", "-qm", "start"], check=True)
    return folder


TRAIN = """
import sys, time, pathlib
me, other = sys.argv[1:]
pathlib.Path(f"started-{me}").touch()
deadline = time.monotonic() + 60
while not pathlib.Path(f"started-{other}").exists():
    assert time.monotonic() < deadline, "the other training never began"
    time.sleep(0.01)
pathlib.Path(f"out-{me}").write_text(me)
"""


def test_two_recipes_train_at_once_and_both_are_in_the_lock(tmp_path: Path) -> None:
    stages = "\n".join(
        f"  {me}:\n    cmd: python train.py {me} {other}\n    deps: [train.py]\n    outs: [out-{me}]"
        for me, other in (("a", "b"), ("b", "a"))
    )
    folder = small_project(tmp_path / "p", f"stages:\n{stages}\n", train_py=TRAIN)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item"]
    started = [
        subprocess.Popen([*command, name], cwd=folder, env={**os.environ, "PATH": path}, stdout=subprocess.DEVNULL)
        for name in ("a", "b")
    ]
    assert [process.wait(120) for process in started] == [0, 0]
    lock = (folder / "dvc.lock").read_text()
    assert "out-a" in lock
    assert "out-b" in lock


PLOTTED = """
stages:
  train:
    cmd: python train.py
    deps: [train.py]
    params: [rate]
    metrics: [report.json]
    plots:
    - curve.csv: {x: step, y: loss}
"""
REPORTS = """
import json, yaml, pathlib
from medvlm.training.curve import write_curve
rate = yaml.safe_load(open("params.yaml"))["rate"]
pathlib.Path("report.json").write_text(json.dumps({"metrics": {"closed.whole_word": 50.0 + rate}}))
write_curve(pathlib.Path("."), {"all": [{"step": s, "loss": 1 / s, "lr": rate} for s in (1, 2, 3)]})
"""


def test_experiments_metrics_and_plots_work_on_what_a_stage_writes(tmp_path: Path) -> None:
    folder = small_project(
        tmp_path / "p", PLOTTED.replace("vars: [{rate: 1}]\n", ""), train_py=REPORTS, params_yaml="rate: 1\n"
    )
    dvc(folder, "repro")
    subprocess.run(["git", "-C", str(folder), "add", "-A"], check=True)
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run(["git", "-C", str(folder), *identity, "commit", "-qm", "trained"], check=True)
    names = {"GIT_AUTHOR_NAME": "t", "GIT_AUTHOR_EMAIL": "t@example.org"}
    names |= {name.replace("AUTHOR", "COMMITTER"): value for name, value in names.items()}
    dvc(folder, "exp", "run", "-S", "rate=5", **names)
    difference = json.loads(dvc(folder, "metrics", "diff", "--json").splitlines()[0])
    assert difference["report.json"]["metrics.closed.whole_word"]["diff"] == 4.0
    shown = json.loads(dvc(folder, "plots", "show", "--json").splitlines()[0])
    assert "curve.csv" in str(shown)
    assert "errors" not in shown
