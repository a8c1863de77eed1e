"""Two machines without a shared disk, one bucket: each runs its stage on what the other has made."""

import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest
import yaml
from buckets import KEYS, NAME, local_bucket
from projects import copy_project

from medvlm.pipeline import with_items
from medvlm.settings import Settings, read_settings, write_settings
from medvlm.working_copy import CACHE_VARIABLE
from orchestration.bucket_stage import files_of_stage
from orchestration.launchers import TrainingLauncher
from orchestration.resources import DvcProject, StageRun

DVC_YAML = """
stages:
  figures:
    cmd: python make.py figures/shards
    deps: [make.py]
    outs: [workspace/figures/shards]
  alignment:
    cmd: python make.py datasets/alignment/samples workspace/figures/shards/part
    deps: [make.py, workspace/figures/shards, workspace/review/decisions.jsonl]
    outs: [workspace/datasets/alignment/samples]
"""
MAKE = """
import pathlib, sys
folder = pathlib.Path("workspace", sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
(folder / "part").write_text("".join(pathlib.Path(name).read_text() for name in sys.argv[2:]) + "x")
"""


def machine(folder: Path, bucket: str) -> DvcProject:
    """A fresh clone of the project, with nothing in its workspace."""
    folder.mkdir()
    (folder / "dvc.yaml").write_text(DVC_YAML)
    (folder / "make.py").write_text(MAKE)
    settings = Settings.sample().model_copy(update={"bucket": bucket})
    write_settings(folder / "params.yaml", with_items(settings))
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "-q"], cwd=folder, check=True)
    return DvcProject(root=str(folder), launcher=TrainingLauncher())


def reproduce(project: DvcProject, stage: str) -> StageRun:
    runs: list[StageRun] = []

    @dg.asset
    def step(context: dg.AssetExecutionContext, project: DvcProject) -> None:
        runs.append(project.reproduce(context, stage))

    assert dg.materialize([step], resources={"project": project}).success
    return runs[0]


def test_what_one_machine_has_made_is_up_to_date_on_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEDVLM_WORKSPACE", raising=False)
    with local_bucket() as server:
        for name, value in {**KEYS, "AWS_ENDPOINT_URL": server}.items():
            monkeypatch.setenv(name, value)
        bucket = f"s3://{NAME}/project"
        one, other = machine(tmp_path / "one", bucket), machine(tmp_path / "other", bucket)
        assert reproduce(one, "figures").ran
        made = reproduce(other, "alignment")
        assert made.ran
        samples = Path("workspace/datasets/alignment/samples/part")
        assert (tmp_path / "other" / samples).read_text() == "xx"

        seen = reproduce(one, "alignment")
        assert (seen.ran, seen.data_version) == (False, made.data_version)
        assert (tmp_path / "one" / samples).read_text() == "xx"
        assert yaml.safe_load(other.lock_file.read_text())["stages"].keys() == {"figures", "alignment"}
        assert one.medvlm("fetch")[:3] == ["medvlm", "--workspace", bucket]


def test_configure_with_a_bucket_keeps_the_copy_inside_the_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from click.testing import CliRunner

    from medvlm.cli import cli

    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    path = tmp_path / "params.yaml"
    arguments = ["--workspace", "s3://bucket/vlm", "configure", "--sample", "--file", str(path)]
    done = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    settings = read_settings(path)
    assert (settings.workspace, settings.bucket) == ("workspace", "s3://bucket/vlm")
    write_settings(path, settings.model_copy(update={"bucket": ""}))
    assert "bucket: s3" not in path.read_text()


def test_every_stage_of_the_project_knows_what_it_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dvc.repo import Repo

    folder = copy_project(tmp_path / "project")
    monkeypatch.chdir(folder)
    with Repo(str(folder)) as repo:

        def reads(stage: str) -> set[str]:
            return set(files_of_stage(repo, stage, folder / "workspace").reads)

        assert reads("figures") >= {"corpus", "figures", "scratch/fetch"}
        assert reads("stage1@tiny-llava-med") >= {
            "datasets/alignment", "contracts/alignment", "recipes/tiny-llava-med",
            "scratch/train/tiny-llava-med/stage1",
        }  # fmt: skip
        assert "datasets/instruct" not in reads("stage1@tiny-llava-med")
        # dvc.yaml names the contract's result only, which holds the fingerprint of these.
        assert reads("stage3@tiny-llava-med") >= {"benchmarks/*", "checkpoints/tiny-llava-med/stage2"}
        assert reads("leaderboard") >= {"scores", "leaderboard"}
        assert reads("release@tiny-llava-med") >= {"checkpoints/tiny-llava-med", "figures", "datasets/*"}
