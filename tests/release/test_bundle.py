"""What leaves the house: card, credit, bill of materials and checksums of a scored recipe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from released import RECIPE, finished_workspace

from medvlm.errors import WorkspaceError
from medvlm.release.bundle import build_release, verify_release
from medvlm.release.card import model_card
from medvlm.store import Workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return finished_workspace(tmp_path)


def test_the_card_says_what_was_learned_from_how_well_it_does_blind_and_that_it_is_not_for_clinics(
    workspace: Workspace,
) -> None:
    card = model_card(workspace, RECIPE)
    _, header, text = card.split("---\n", 2)
    metadata = yaml.safe_load(header)
    assert {"research-use-only", "not-for-clinical-use", "non-commercial-data"} <= set(metadata["tags"])
    values = [metric["value"] for result in metadata["model-index"][0]["results"] for metric in result["metrics"]]
    assert values == [81.0, 81.0, 81.0], "the blind and the clean values are no results of the model"
    assert "Research use only" in text
    assert "| vqa-rad | finetune | closed | `whole_word` | 81.0 (76.0 to 86.0) | 53.3 (47.0 to 59.0) | 61.0" in text
    assert "| vqa-rad:train | vqa-rad:test | 202 of 203 | 203 |" in text
    assert "CC BY (5), CC BY-NC (2)" in text
    assert "8 processes on cuda, bf16" in text
    assert "10 of 1,000" in text


def test_a_stage_that_was_not_trained_is_named(tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError, match="medvlm"):
        model_card(Workspace(tmp_path), RECIPE)


def test_the_bundle_is_complete_and_a_changed_bit_is_found(workspace: Workspace) -> None:
    report = build_release(workspace, RECIPE)
    bundle = workspace.release(RECIPE) / "bundle"
    names = {path.name for path in bundle.iterdir()}
    assert names == {"README.md", "SHA256SUMS", "checkpoints", "recipe.yaml", "sbom.cdx.json"}
    assert report.details["licences"] == {"CC BY": 10, "CC BY-NC": 4}
    assert verify_release(bundle) == []
    weights = bundle / "checkpoints" / "vqa-rad" / "model.safetensors"
    weights.unlink()
    weights.write_bytes(b"another")
    (bundle / "added.txt").touch()
    (bundle / "recipe.yaml").unlink()
    assert verify_release(bundle) == ["added.txt", "checkpoints/vqa-rad/model.safetensors", "recipe.yaml"]


def test_the_bill_of_materials_is_valid_cyclonedx_and_names_every_dataset(workspace: Workspace) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    build_release(workspace, RECIPE)
    text = (workspace.release(RECIPE) / "bundle" / "sbom.cdx.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    components = {part["name"]: part for part in json.loads(text)["components"]}
    assert set(components) == {"alignment", "instruct", "vqa-rad", "slake", "pathvqa"}
    assert [entry["license"]["name"] for entry in components["alignment"]["licenses"]] == ["CC BY", "CC BY-NC"]


def test_the_same_things_give_the_same_bytes(workspace: Workspace) -> None:
    assert build_release(workspace, RECIPE).fingerprint == build_release(workspace, RECIPE).fingerprint
