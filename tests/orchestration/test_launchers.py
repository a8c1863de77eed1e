"""Where training runs: what each launcher is told, and the pod word for word."""

from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from medvlm.pipeline import with_items
from medvlm.settings import Settings, write_settings
from orchestration.launchers import TrainingLauncher, run_in_pod
from orchestration.resources import DvcProject

POD = TrainingLauncher(kind="kubernetes", image="registry/medvlm:1", volume_claim="project", namespace="vlm", gpus=8)


def test_the_environment_names_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDVLM_LAUNCHER", "slurm")
    monkeypatch.setenv("MEDVLM_NODES", "4")
    monkeypatch.setenv("MEDVLM_PROCESSES_PER_NODE", "8")
    monkeypatch.setenv("MEDVLM_SLURM_OPTIONS", "--partition=gpu")
    launcher = TrainingLauncher.of_environment()
    assert launcher.environment == {
        "MEDVLM_LAUNCHER": "slurm",
        "MEDVLM_HOSTFILE": "",
        "MEDVLM_NODES": "4",
        "MEDVLM_PROCESSES_PER_NODE": "8",
        "MEDVLM_SLURM_OPTIONS": "--partition=gpu",
    }
    assert POD.environment["MEDVLM_LAUNCHER"] == "local", "in the pod the job is a local one"


def test_the_pod_word_for_word() -> None:
    from dagster_k8s.pipes import build_pod_body

    body = build_pod_body(
        "pod", POD.image, ["python", "-m", "dvc"], {"A": "1"}, {"labels": {"app": "medvlm"}}, POD.pod(Path("/project"))
    ).to_dict()
    (container,) = body["spec"]["containers"]
    assert container["image"] == "registry/medvlm:1"
    assert container["command"] == ["python", "-m", "dvc"]
    assert container["working_dir"] == "/project"
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "8"}
    assert [(m["name"], m["mount_path"]) for m in container["volume_mounts"]] == [
        ("project", "/project"),
        ("shm", "/dev/shm"),
    ]
    assert body["spec"]["restart_policy"] == "Never"
    assert body["spec"]["termination_grace_period_seconds"] == 120
    claims = [v["persistent_volume_claim"] for v in body["spec"]["volumes"] if v["name"] == "project"]
    assert claims[0]["claim_name"] == "project"


class Client:
    """Dagster's client as a record of what it was asked."""

    def __init__(self) -> None:
        self.asked: dict[str, Any] = {}

    def run(self, **asked: Any) -> "Client":
        self.asked = asked
        return self

    def get_results(self) -> None: ...


def test_the_pod_runs_the_stages_own_command() -> None:
    client = Client()
    run_in_pod(client, POD, None, Path("/project"), ["python", "-m", "dvc", "repro"])
    assert client.asked["command"] == ["python", "-m", "dvc", "repro"]
    assert (client.asked["image"], client.asked["namespace"]) == ("registry/medvlm:1", "vlm")
    with pytest.raises(dg.Failure, match="MEDVLM_POD_IMAGE"):
        run_in_pod(client, TrainingLauncher(kind="kubernetes"), None, Path("/project"), [])


JOB = """
import os
from medvlm.progress import report_progress
report_progress({"step": 1, "loss": 0.5})
open("out.txt", "w").write(os.environ["MEDVLM_LAUNCHER"] + " " + os.environ["MEDVLM_NODES"])
"""


def test_a_job_elsewhere_reports_through_files_that_all_hosts_share(tmp_path: Path) -> None:
    import subprocess
    import sys

    stage = "  far:\n    cmd: python job.py\n    deps: [job.py]\n    outs: [out.txt]\n"
    (tmp_path / "dvc.yaml").write_text(f"stages:\n{stage}")
    (tmp_path / "job.py").write_text(JOB)
    write_settings(tmp_path / "params.yaml", with_items(Settings.sample()))
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "-q"], cwd=tmp_path, check=True)
    project = DvcProject(root=str(tmp_path), launcher=TrainingLauncher(kind="slurm", nodes=2))

    @dg.asset
    def step(context: dg.AssetExecutionContext, project: DvcProject) -> dg.MaterializeResult:
        project.reproduce(context, "far", watch=True, train=True)
        return dg.MaterializeResult()

    result = dg.materialize([step], resources={"project": project})
    assert (tmp_path / "out.txt").read_text() == "slurm 2"
    (observation,) = result.get_asset_observation_events()
    assert observation.asset_observation_data.asset_observation.metadata["loss"].value == 0.5
