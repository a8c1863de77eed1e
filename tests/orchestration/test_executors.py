"""The executor by configuration alone."""

import dagster as dg
import pytest

from medvlm.errors import InputError
from orchestration.executors import executor_of_environment


@pytest.mark.parametrize(("name", "executor"), [("", dg.multiprocess_executor), ("in_process", dg.in_process_executor)])
def test_processes_of_this_host(monkeypatch: pytest.MonkeyPatch, name: str, executor: object) -> None:
    monkeypatch.setenv("MEDVLM_EXECUTOR", name)
    assert executor_of_environment() is executor


def test_a_cluster_by_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDVLM_EXECUTOR", "k8s")
    assert executor_of_environment().name == "k8s"


def test_celery_knows_its_broker_by_name_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDVLM_EXECUTOR", "celery")
    monkeypatch.delenv("MEDVLM_CELERY_BROKER", raising=False)
    with pytest.raises(InputError, match="MEDVLM_CELERY_BROKER"):
        executor_of_environment()
    monkeypatch.setenv("MEDVLM_CELERY_BROKER", "redis://:planted-secret@queue/0")
    executor = executor_of_environment()
    assert executor.name == "celery"
    assert "planted-secret" not in str(vars(executor))


@pytest.mark.parametrize(("name", "hint"), [("cloud", "choose from"), ("ray", "pip install dagster-ray")])
def test_what_is_not_there_is_said_with_what_to_do(monkeypatch: pytest.MonkeyPatch, name: str, hint: str) -> None:
    monkeypatch.setenv("MEDVLM_EXECUTOR", name)
    with pytest.raises(InputError, match=hint):
        executor_of_environment()
