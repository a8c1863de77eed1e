"""Where training stages run: on this host, on ssh hosts, in a Slurm job, or in a Kubernetes pod.

All run the same command, ``dvc repro --single-item stageN@RECIPE``, which runs ``medvlm train``. The first three
are the library's own launchers, told by the environment; a pod is started here, and the job in it is a local one.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import dagster as dg

from medvlm.progress import LISTENER_VARIABLE
from orchestration.progress import LISTENER


class TrainingLauncher(dg.ConfigurableResource):
    """One setting for all training stages; every host or pod must see the project folder at the same path."""

    kind: Literal["local", "hostfile", "slurm", "kubernetes"] = "local"
    hostfile: str = ""
    """DeepSpeed's hostfile."""
    nodes: int = 1
    processes_per_node: int = 1
    """One for each GPU."""
    slurm_options: str = ""
    """Further options of ``sbatch``, such as ``--partition=gpu --gres=gpu:8 --time=24:00:00``."""
    image: str = ""
    """Of the pod: see Dockerfile."""
    namespace: str = "default"
    volume_claim: str = ""
    """The claim that holds the project folder, mounted at the same path."""
    gpus: int = 1
    """Of the pod."""

    @classmethod
    def of_environment(cls) -> "TrainingLauncher":
        """The launcher of ``MEDVLM_LAUNCHER`` and its companions, as in docs/operations.md."""
        named = os.environ.get
        return cls(
            kind=named("MEDVLM_LAUNCHER") or "local",  # type: ignore[arg-type]  # pydantic checks it
            hostfile=named("MEDVLM_HOSTFILE", ""),
            nodes=int(named("MEDVLM_NODES") or 1),
            processes_per_node=int(named("MEDVLM_PROCESSES_PER_NODE") or 1),
            slurm_options=named("MEDVLM_SLURM_OPTIONS", ""),
            image=named("MEDVLM_POD_IMAGE", ""),
            namespace=named("MEDVLM_POD_NAMESPACE") or "default",
            volume_claim=named("MEDVLM_POD_VOLUME_CLAIM", ""),
            gpus=int(named("MEDVLM_POD_GPUS") or 1),
        )

    @property
    def environment(self) -> dict[str, str]:
        """What the library's launchers read."""
        return {
            "MEDVLM_LAUNCHER": "local" if self.kind == "kubernetes" else self.kind,
            "MEDVLM_HOSTFILE": self.hostfile,
            "MEDVLM_NODES": str(self.nodes),
            "MEDVLM_PROCESSES_PER_NODE": str(self.processes_per_node),
            "MEDVLM_SLURM_OPTIONS": self.slurm_options,
        }

    def pod(self, root: Path) -> dict[str, Any]:
        """The pod's specification: one container on the GPUs, with the project folder and room for shared memory."""
        mounts = [{"name": "project", "mountPath": str(root)}, {"name": "shm", "mountPath": "/dev/shm"}]  # noqa: S108
        limits = {"limits": {"nvidia.com/gpu": self.gpus}} if self.gpus else {}
        return {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 120,  # time to write a checkpoint
            "containers": [{"name": "training", "workingDir": str(root), "volumeMounts": mounts, "resources": limits}],
            "volumes": [
                {"name": "project", "persistentVolumeClaim": {"claimName": self.volume_claim}},
                # The default 64 MB are too few for data workers.
                {"name": "shm", "emptyDir": {"medium": "Memory"}},
            ],
        }


@contextmanager
def pipes_session(context: Any, shared: Path | None) -> Iterator[dg.PipesSession]:
    """A Pipes session over files: temporary ones of this host, or ones on the disk that all hosts share.

    Args:
        context: Of the asset.
        shared: Folder for the files; None for this host's own.
    """
    if shared is None:
        injector: Any = dg.PipesTempFileContextInjector()
        reader: Any = dg.PipesTempFileMessageReader()
    else:
        shared.mkdir(parents=True, exist_ok=True)
        name = f"{context.run.run_id}-{'-'.join(key.to_user_string() for key in context.selected_asset_keys)}"
        injector = dg.PipesFileContextInjector(str(shared / f"{name}.context.json"))
        reader = dg.PipesFileMessageReader(str(shared / f"{name}.messages.jsonl"))
    with dg.open_pipes_session(context=context, context_injector=injector, message_reader=reader) as session:
        yield session


def session_environment(session: dg.PipesSession) -> dict[str, str]:
    """What a process needs to report progress into a session."""
    return {**session.get_bootstrap_env_vars(), LISTENER_VARIABLE: LISTENER}


def run_in_pod(client: Any, launcher: TrainingLauncher, context: Any, root: Path, command: Sequence[str]) -> None:
    """Run a command in a pod and wait; its logs are the step's, cancelling the step deletes the pod.

    Args:
        client: A ``dagster_k8s.PipesK8sClient``.
        launcher: Image, namespace, volume and GPUs.
        context: Of the asset.
        root: The project folder, the same path in the pod.
        command: Program and arguments.

    Raises:
        dagster.Failure: Image or volume are not configured.
        dagster_k8s.client.DagsterK8sError: The pod failed.
    """
    if not launcher.image or not launcher.volume_claim:
        raise dg.Failure(
            "the kubernetes launcher needs MEDVLM_POD_IMAGE and MEDVLM_POD_VOLUME_CLAIM; see docs/operations.md",
            allow_retries=False,
        )
    client.run(
        context=context,
        image=launcher.image,
        command=list(command),
        namespace=launcher.namespace,
        env={"DVC_NO_ANALYTICS": "1"},
        base_pod_meta={"labels": {"app": "medvlm"}},
        base_pod_spec=launcher.pod(root),
    ).get_results()


def default_client() -> Any:
    """Dagster's own client, for the cluster of this pod or of the kubeconfig.

    Raises:
        dagster.Failure: dagster-k8s is not installed.
    """
    try:
        from dagster_k8s import PipesK8sClient
    except ImportError as error:
        raise dg.Failure("dagster-k8s is missing: pip install 'medvlm[kubernetes]'", allow_retries=False) from error
    return PipesK8sClient()
