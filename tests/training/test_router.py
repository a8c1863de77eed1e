"""The domain router: its objective, its split, its files, and what stage 3 accepts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_case import RECIPE, SMALL, TunedMixture

from medvlm.cli import cli
from medvlm.config import load_recipe
from medvlm.errors import CheckpointError, InputError
from medvlm.models.router_file import read_router
from medvlm.recipe_schema import MoE
from medvlm.records import Turn
from medvlm.store import Workspace, read_json, read_report
from medvlm.training.data import StageSample
from medvlm.training.router import fit_router, read_trained_router, router_loss, train_router
from medvlm.training.router_states import labelled


def test_the_objective_is_the_cross_entropy_of_the_domains() -> None:
    torch.manual_seed(0)
    states, weight, bias = torch.randn(7, 5), torch.randn(4, 5), torch.randn(4)
    domain = torch.tensor([0, 1, 2, 3, 0, 1, 2])
    expected = 0.0
    for state, right in zip(states, domain, strict=True):
        logits = [float(weight[e] @ state + bias[e]) for e in range(4)]
        expected += torch.tensor(logits).exp().sum().log().item() - logits[int(right)]
    assert router_loss(states, domain, weight, bias).item() == pytest.approx(expected / 7, abs=1e-6)
    in_half = router_loss(states.bfloat16(), domain, weight, bias)
    assert in_half.dtype == torch.float32


def test_a_router_learns_what_a_line_can_part_and_the_same_seed_gives_the_same() -> None:
    torch.manual_seed(0)
    domain = torch.arange(400) % 4
    states = torch.nn.functional.one_hot(domain, 8).float() + 0.1 * torch.randn(400, 8)
    fits = [fit_router(states, domain, experts=4, steps=200, learning_rate=1e-2, seed=5) for _ in range(2)]
    weight, bias = fits[0]
    assert ((states @ weight.T + bias).argmax(-1) == domain).float().mean() > 0.99
    assert all(torch.equal(a, b) for a, b in zip(*fits, strict=True))


def moe(labels: int = 1000) -> MoE:
    found = load_recipe(RECIPE, [f"model.moe.router.labels={labels}"]).model.moe
    assert found is not None
    return found


def one(index: int, image: int, modality: str) -> StageSample:
    return StageSample(f"s{index}", f"sha{image}", (Turn("user", "?"),), Path("x"), index, modality)


modalities = st.sampled_from(["chest_xray", "ct", "mri", "histology", "gross", "unknown"])


@settings(max_examples=50, deadline=None)
@given(st.lists(modalities, min_size=1, max_size=60), st.integers(1, 40))
def test_no_image_is_learned_and_held_out(kinds: list[str], labels: int) -> None:
    full = [*kinds, *("chest_xray", "ct", "mri", "gross") * 2]
    samples = [one(2 * i + twice, i, kind) for i, kind in enumerate(full) for twice in (0, 1)]
    train, held_out = labelled(samples, moe(labels), seed=1)
    images = [sample.image_sha256 for sample in (*train, *held_out)]
    assert len(set(images)) == len(images)
    assert all(sample.modality != "unknown" for sample in (*train, *held_out))
    assert len(train) <= labels
    assert {"chest_xray", "ct", "mri"} <= {sample.modality for sample in held_out}
    # Any beginning is balanced as far as there are images.
    assert len({s.modality for s in train[:4]} & {"chest_xray", "ct", "mri"}) == min(3, len(train[:4]), 3)


def test_a_domain_without_images_is_named() -> None:
    samples = [one(i, i, kind) for i, kind in enumerate(["chest_xray", "ct", "histology"] * 3)]
    with pytest.raises(InputError, match="0 images are labelled mri"):
        labelled(samples, moe(), seed=1)


def test_it_tells_modalities_of_held_out_images_apart(tuned: TunedMixture) -> None:
    report = tuned.router
    assert report.metrics["accuracy"] >= 0.75
    assert report.counts == {"labels": 49, "held_out": 11}
    confusion = torch.tensor(report.details["confusion"])
    assert int(confusion.sum()) == 11
    assert confusion.diagonal().sum() / 11 == pytest.approx(report.metrics["accuracy"], abs=1e-5)
    assert [point["labels"] for point in report.details["accuracy_by_labels"]] == [6, 12, 24, 49]
    assert "unknown" not in report.details["labels"]["train"]
    written = read_report(tuned.workspace.router(RECIPE))
    assert written is not None and written.fingerprint == report.fingerprint


def test_the_file_has_the_layout_of_the_published_ones(tuned: TunedMixture) -> None:
    from safetensors.torch import load_file

    tensors = load_file(tuned.workspace.router_weights(RECIPE) / "router.safetensors")
    assert {name: tuple(value.shape) for name, value in tensors.items()} == {"fc1.weight": (4, 48), "fc1.bias": (4,)}
    assert all(value.dtype == torch.float32 for value in tensors.values())


def test_what_is_finished_is_kept_and_fresh_gives_the_same_bytes(tuned: TunedMixture) -> None:
    folder = tuned.workspace.router_weights(RECIPE)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert train_router(tuned.workspace, tuned.recipe).details["reused"] is True
    assert train_router(tuned.workspace, tuned.recipe, fresh=True).details["reused"] is False
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_verb_takes_over_a_published_router_and_finds_out_which_row_is_whose(
    tuned: TunedMixture, tmp_path: Path
) -> None:
    own = tuned.workspace.router_weights(RECIPE) / "router.safetensors"
    weight, bias = read_router(own, experts=4, width=48)
    order = [2, 0, 3, 1]
    torch.save({"fc1.weight": weight[order], "fc1.bias": bias[order]}, tmp_path / "phi_router.pth")
    kept = {path.name: path.read_bytes() for path in own.parent.iterdir()}
    command = ["--workspace", str(tuned.workspace.root), "train-router", "--recipe", RECIPE, "--json"]
    for text in (*SMALL, f"model.moe.router.source={tmp_path / 'phi_router.pth'}"):
        command += ["--set", text]
    done = CliRunner().invoke(cli, command)
    try:
        assert done.exit_code == 0, done.output
        report = json.loads(done.stdout)
        assert report["details"]["domains"] == [["mri"], ["chest_xray"], ["histology", "gross"], ["ct"]]
        assert report["metrics"]["accuracy"] == tuned.router.metrics["accuracy"]
        assert report["details"]["accuracy_by_labels"] == []
    finally:
        for name, content in kept.items():
            (own.parent / name).write_bytes(content)


def test_stage_3_refuses_a_router_that_is_absent_or_of_another_start(tuned: TunedMixture, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not trained yet") as caught:
        read_trained_router(Workspace(tmp_path), tuned.recipe, "x")
    assert f"train-router --recipe {RECIPE}" in caught.value.hint
    with pytest.raises(CheckpointError, match="another checkpoint"):
        read_trained_router(tuned.workspace, tuned.recipe, "x")
    start = read_json(tuned.workspace.checkpoint(RECIPE, 2) / "metadata.json")["fingerprint"]
    assert read_trained_router(tuned.workspace, tuned.recipe, start).accuracy == tuned.router.metrics["accuracy"]


def test_a_recipe_without_experts_has_no_router(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no experts"):
        train_router(Workspace(tmp_path), load_recipe("tiny-llava-med"))
