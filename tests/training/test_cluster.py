"""Launchers of several hosts: what they run, word for word, and what they say when they cannot."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import pytest

from medvlm.errors import TrainingError
from medvlm.training import cluster as clusters
from medvlm.training.cluster import Cluster, SlurmJob, cluster_of_environment, hostfile_command, slurm_script

GOLDEN = """\
#!/bin/bash
#SBATCH --job-name=medvlm-llava-med-stage2
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --output=/shared/scratch/log
#SBATCH --open-mode=append
#SBATCH --export=ALL
#SBATCH --partition=gpu
#SBATCH --gres=gpu:8
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
first=$(scontrol show node "$first" | grep -o 'NodeAddr=[^ ]*' | cut -d = -f 2)
cd {cwd}
srun --kill-on-bad-exit=1 {python} -m torch.distributed.run --nnodes=$SLURM_JOB_NUM_NODES --nproc-per-node=8 \
--rdzv-backend=c10d --rdzv-id=$SLURM_JOB_ID --rdzv-endpoint=$first:29500 -m medvlm.training.run \
--workspace=/shared/w '--set=stages.instruct.epochs=1; rm -rf /' &
# A cancelled job passes the signal on and waits until the trainer has saved.
trap 'scancel --signal=TERM "$SLURM_JOB_ID.0"' TERM INT
wait $!; code=$?
while kill -0 $! 2>/dev/null; do wait $!; code=$?; done
echo $code > /shared/scratch/exit_code
exit $code
"""


def slurm(**changes: object) -> Cluster:
    values = {"launcher": "slurm", "hostfile": "", "nodes": 4, "processes": 8, "options": (), "port": 29500}
    return Cluster(**(values | changes))  # type: ignore[arg-type]


def test_the_slurm_script_word_for_word_and_foreign_words_are_quoted() -> None:
    made = slurm_script(
        slurm(options=("--partition=gpu", "--gres=gpu:8")),
        "medvlm-llava-med-stage2",
        Path("/shared/scratch"),
        ["--workspace=/shared/w", "--set=stages.instruct.epochs=1; rm -rf /"],
    )
    assert made == GOLDEN.format(cwd=Path.cwd(), python=sys.executable)


def test_nothing_set_is_this_machine() -> None:
    assert cluster_of_environment({}).launcher == "local"


def test_the_environment_describes_a_slurm_job() -> None:
    made = cluster_of_environment(
        {
            "MEDVLM_LAUNCHER": "slurm",
            "MEDVLM_NODES": "4",
            "MEDVLM_PROCESSES_PER_NODE": "8",
            "MEDVLM_SLURM_OPTIONS": "--partition=gpu --comment='two words'",
        }
    )
    assert made == slurm(options=("--partition=gpu", "--comment=two words"))


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"MEDVLM_LAUNCHER": "mpi"}, "local, hostfile, slurm"),
        ({"MEDVLM_LAUNCHER": "hostfile"}, "MEDVLM_HOSTFILE"),
        ({"MEDVLM_LAUNCHER": "slurm", "MEDVLM_NODES": "two"}, "MEDVLM_NODES"),
        ({"MEDVLM_LAUNCHER": "slurm", "MEDVLM_NODES": "0"}, "MEDVLM_NODES"),
    ],
)
def test_a_wrong_setting_is_named(values: dict[str, str], named: str) -> None:
    with pytest.raises(TrainingError, match=named):
        cluster_of_environment(values)


def test_the_hostfile_goes_to_deepspeeds_own_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("a slots=8\nb slots=8\n")
    made = cluster_of_environment({"MEDVLM_LAUNCHER": "hostfile", "MEDVLM_HOSTFILE": str(hosts)})
    monkeypatch.setattr(clusters.shutil, "which", lambda _: "/usr/bin/pdsh")
    command = hostfile_command(made, ["--stage=1"])
    assert command[1:5] == ["-m", "deepspeed.launcher.runner", f"--hostfile={hosts}", "--force_multi"]
    assert command[-3:] == ["--module", "medvlm.training.run", "--stage=1"]
    monkeypatch.setattr(clusters.shutil, "which", lambda _: None)
    with pytest.raises(TrainingError, match="pdsh"):
        hostfile_command(made, [])


@pytest.fixture
def fake_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Slurm's commands as scripts that play a queue from files: what is tested is our side of the talk."""
    commands = {
        "sbatch": 'echo "77;cluster"',
        # Each question takes a line of the play; when it is over, so is the job.
        "squeue": f"head -n 1 {tmp_path}/play; sed -i 1d {tmp_path}/play; test -s {tmp_path}/away && exit 1; true",
        "scancel": f'echo "$@" >> {tmp_path}/cancelled',
    }
    (tmp_path / "bin").mkdir()
    for name, text in commands.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(clusters, "POLL_S", 0.0)
    return tmp_path


def test_the_log_is_passed_on_and_the_exit_code_too(fake_slurm: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (fake_slurm / "play").write_text("PENDING\nRUNNING\n")
    job = SlurmJob(fake_slurm / "job", "#!/bin/bash\n")
    assert job.job_id == "77"
    (fake_slurm / "job" / "log").write_text("step 1\nstep 2\n")
    (fake_slurm / "job" / "exit_code").write_text("3\n")
    assert job.wait() == 3
    assert capfd.readouterr().err == "step 1\nstep 2\n", "each line once"


def test_a_job_whose_node_died_is_an_error_that_says_how_to_go_on(fake_slurm: Path) -> None:
    (fake_slurm / "play").write_text("RUNNING\n")
    with pytest.raises(TrainingError, match="goes on from the last checkpoint"):
        SlurmJob(fake_slurm / "job", "#!/bin/bash\n").wait()


def test_cancelling_asks_the_script_first(fake_slurm: Path) -> None:
    (fake_slurm / "play").write_text("RUNNING\nRUNNING\n")
    job = SlurmJob(fake_slurm / "job", "#!/bin/bash\n")
    (fake_slurm / "job" / "exit_code").write_text("1\n")
    job.cancel()
    job.cancel()
    assert job.wait() == 1
    assert (fake_slurm / "cancelled").read_text() == "--batch --signal=TERM 77\n", "asked once, never killed"


def test_without_slurm_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(TrainingError, match="sbatch is not installed"):
        SlurmJob(tmp_path / "job", "#!/bin/bash\n")
