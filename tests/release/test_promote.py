"""Promotion needs every check and a person; what was approved is exactly what is promoted."""

from __future__ import annotations

from pathlib import Path

import pytest
from released import RECIPE, finished_workspace

from medvlm.approval import approve
from medvlm.errors import ReleaseRefused
from medvlm.release.bundle import build_release
from medvlm.release.promote import obstacles, promote, promoted
from medvlm.store import Workspace, write_json


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """A release whose contracts hold; nobody has approved it yet."""
    made = finished_workspace(tmp_path)
    for name in ("figures", "benchmark-items", "alignment", "instruct"):
        made.contract(name).mkdir(parents=True)
        write_json(made.contract(name) / "result.json", {"success": True})
    build_release(made, RECIPE)
    return made


def approve_release(workspace: Workspace) -> None:
    approve(workspace, RECIPE, build_release(workspace, RECIPE).fingerprint, who="ada")


def test_without_a_persons_approval_nothing_is_promoted(workspace: Workspace) -> None:
    assert len(obstacles(workspace, RECIPE)) == 1
    with pytest.raises(ReleaseRefused, match="nobody has approved"):
        promote(workspace, RECIPE, registry="")
    assert promoted(workspace, RECIPE) is None


def test_an_approved_release_is_promoted_in_the_name_of_who_approved(workspace: Workspace) -> None:
    approve_release(workspace)
    promotion = promote(workspace, RECIPE, registry="")
    assert (promotion.who, promotion.registered) == ("ada", "")
    assert promoted(workspace, RECIPE) == promotion


def test_an_approval_holds_for_what_was_approved_only(workspace: Workspace) -> None:
    approve_release(workspace)
    weights = workspace.checkpoint(RECIPE, 3, "vqa-rad") / "model.safetensors"
    weights.unlink()
    weights.write_bytes(b"trained again")
    build_release(workspace, RECIPE)
    assert [o for o in obstacles(workspace, RECIPE) if "approved" in o]


def test_a_broken_contract_or_an_unknown_one_stands_in_the_way(workspace: Workspace) -> None:
    approve_release(workspace)
    write_json(workspace.contract("instruct") / "result.json", {"success": False})
    (workspace.contract("figures") / "result.json").unlink()
    assert obstacles(workspace, RECIPE) == [
        "the contract figures was never checked",
        "the contract instruct is broken",
    ]


def test_a_bundle_that_was_changed_is_not_promoted(workspace: Workspace) -> None:
    approve_release(workspace)
    (workspace.release(RECIPE) / "bundle" / "README.md").write_text("best model ever")
    with pytest.raises(ReleaseRefused, match=r"README\.md is not as it was made"):
        promote(workspace, RECIPE, registry="")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the registry's own schema migrations
def test_a_registry_gets_a_version_with_its_alias(workspace: Workspace, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    approve_release(workspace)
    registry = f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert promote(workspace, RECIPE, registry=registry).registered == f"{RECIPE}/1"
    assert promote(workspace, RECIPE, registry=registry).registered == f"{RECIPE}/2"
    version = MlflowClient(tracking_uri=registry, registry_uri=registry).get_model_version_by_alias(RECIPE, "promoted")
    assert str(version.version) == "2"
    assert version.tags["research_use_only"] == "true"
    assert Path(version.source).name == "bundle"
