"""Stage moe_tune: what it trains, what it counts, and that ZeRO and a resume change nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from moe_case import RECIPE, SMALL, TunedMixture
from progress_trap import train_by_verb
from safetensors.torch import load_file

from medvlm.config import load_recipe
from medvlm.errors import CheckpointError
from medvlm.models.checkpoint import load_checkpoint
from medvlm.models.moe import moe_layers
from medvlm.store import Report, Workspace, read_json
from medvlm.training.run import run_stage

MLP = ".mlp."


def curve(report: Report) -> list[float]:
    return [point["loss"] for point in report.details["curves"]["all"]]


def test_only_feed_forward_modules_move_and_the_router_is_the_trained_one(tuned: TunedMixture) -> None:
    before = load_file(tuned.workspace.checkpoint(RECIPE, 2) / "model.safetensors")
    after = load_file(tuned.workspace.checkpoint(RECIPE, 3) / "model.safetensors")
    router = load_file(tuned.workspace.router_weights(RECIPE) / "router.safetensors")
    kept = set(before) & set(after)
    for name in kept:
        # Vision tower's own feed-forward modules bear the same name: they stay.
        trained = MLP in name and name.startswith("model.language_model.")
        assert torch.equal(after[name], before[name]) != trained, name
    new = set(after) - kept
    assert {name.split(".mlp.")[1].split(".")[0] for name in new} == {"experts", "meta_expert", "router"}
    for layer in (0, 2):
        prefix = f"model.language_model.layers.{layer}.mlp"
        assert torch.equal(after[f"{prefix}.router.weight"], router["fc1.weight"])
        assert torch.equal(after[f"{prefix}.router.bias"], router["fc1.bias"])
        experts = torch.stack([after[f"{prefix}.experts.{expert}.fc1.weight"] for expert in range(4)])
        assert (experts.std(0) > 0).any(), "experts became different"


def test_active_parameters_leave_three_of_four_experts_out(tuned: TunedMixture) -> None:
    counts = tuned.moe_tune.counts
    model = load_checkpoint(tuned.workspace.checkpoint(RECIPE, 3)).model
    mixtures = [layer for _, layer in moe_layers(model)]
    one = sum(p.numel() for p in mixtures[0].experts[0].parameters())
    assert counts["parameters"] == sum(p.numel() for p in model.parameters())
    assert counts["parameters_active"] == counts["parameters"] - 3 * one * len(mixtures)
    trained = sum(p.numel() for n, p in model.named_parameters() if MLP in n and "language_model" in n)
    assert counts["parameters_trained"] == trained


def test_the_load_of_each_expert_is_in_the_report(tuned: TunedMixture) -> None:
    details = tuned.moe_tune.details
    assert set(details["expert_load"]) == {"0", "2"}
    assert set(details["expert_load_by_modality"]) == {"ct", "mri"}
    for shares in (*details["expert_load"].values(), *details["expert_load_by_modality"]["ct"].values()):
        assert set(shares) == {"0", "1", "2", "3"} and sum(shares.values()) == pytest.approx(1, abs=1e-5)
    assert 0 < tuned.moe_tune.metrics["expert_balance"] <= 1
    assert details["tokens_dropped"] == 0
    assert all(0 <= point["expert_balance"] <= 1 for point in details["curves"]["all"])
    # The last layer knows the modality: CT's expert gets more of CT than of MRI.
    by_modality = details["expert_load_by_modality"]
    assert by_modality["ct"]["2"]["1"] > by_modality["mri"]["2"]["1"]


def test_the_counts_are_of_tokens_and_not_of_padding() -> None:
    from torch import nn

    from medvlm.models.moe import MoELayer
    from medvlm.training.expert_load import ExpertLoad, balance

    model = nn.Module()
    layer = MoELayer(nn.Linear(2, 2), 2, experts=2, meta_expert=True, capacity=None)
    layer.router.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    model.layers = nn.ModuleList([nn.ModuleDict({"mlp": layer})])
    wrapped = nn.ModuleDict({"decoder": model})
    load = ExpertLoad(wrapped, {"a": "ct", "b": "mri"})
    first, second = [1.0, 0.0], [0.0, 1.0]
    layer(torch.tensor([[first, first, second], [second, second, first]]))
    load.add([[(0, 3)], [(1, 2)]], [["a"], ["b", "a"]])
    summary = load.summary()
    assert summary["expert_load"] == {"0": {"0": 0.4, "1": 0.6}}
    assert summary["expert_load_by_modality"]["ct"]["0"] == {"0": 0.666667, "1": 0.333333}
    assert summary["expert_load_by_modality"]["mri"]["0"] == {"0": 0.0, "1": 1.0}
    assert summary["tokens_routed"] == 5
    # Two sequences in one row, and a row without a mask that holds all.
    packed = ExpertLoad(wrapped, {"a": "ct", "b": "mri"})
    layer(torch.tensor([[first, second, second, first]]))
    packed.add([[(1, 1), (0, 2)]], [["a"], ["b"]])
    packed.add([[(1, 1)], [(0, 2)]], [["a"], ["b"]])
    assert packed.summary()["expert_load_by_modality"] == {
        "ct": {"0": {"0": 0.0, "1": 1.0}},
        "mri": {"0": {"0": 1.0, "1": 0.0}},
    }
    assert balance([0.5, 0.5]) == 1 and balance([1.0, 0.0]) == 0


def test_a_finished_mixture_is_kept_with_its_load(tuned: TunedMixture) -> None:
    again = run_stage(tuned.workspace, tuned.recipe, 3)
    assert again.details["reused"] == ["all"]
    assert again.details["expert_load"] == tuned.moe_tune.details["expert_load"]
    # What was kept ran at no pace; everything that describes the model is as it was.
    assert again.metrics == {name: tuned.moe_tune.metrics[name] for name in ("loss", "expert_balance")}


def test_another_router_makes_the_stage_train_again(tuned: TunedMixture, tmp_path: Path) -> None:
    from shutil import copytree

    workspace = Workspace(tmp_path / "ws")
    copytree(tuned.workspace.root, workspace.root)
    metadata = workspace.router_weights(RECIPE) / "metadata.json"
    metadata.unlink()
    with pytest.raises(CheckpointError, match="router is not trained yet"):
        run_stage(workspace, tuned.recipe, 3)


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_all_zero_stages_give_the_same_losses(tuned: TunedMixture, zero_stage: int, tmp_path: Path) -> None:
    aside = _fresh_target(tuned)
    try:
        recipe = load_recipe(RECIPE, [*SMALL, f"stages.moe_tune.zero_stage={zero_stage}"])
        report = run_stage(tuned.workspace, recipe, 3)
        assert curve(report) == pytest.approx(curve(tuned.moe_tune), abs=1e-5)
        assert report.details["expert_load"] == tuned.moe_tune.details["expert_load"]
        ours, theirs = (
            load_file(folder / "model.safetensors") for folder in (tuned.workspace.checkpoint(RECIPE, 3), aside)
        )
        assert set(ours) == set(theirs)
    finally:
        _put_back(tuned, aside)


def test_a_killed_run_goes_on_exactly(tuned: TunedMixture) -> None:
    aside = _fresh_target(tuned)
    try:
        overrides = ["checkpoints.every=0.1", *SMALL]
        stopped = train_by_verb(tuned.workspace, RECIPE, "moe_tune", overrides, trap="1:SIGTERM")
        assert stopped.returncode == 1 and "it is saved" in stopped.stderr, stopped.stderr
        scratch = tuned.workspace.scratch("train", RECIPE, "stage3", "all")
        assert list(scratch.glob("checkpoint-*/expert_load.json"))
        report = run_stage(tuned.workspace, tuned.recipe, 3)
        assert report.details["curves"] == tuned.moe_tune.details["curves"]
        assert report.details["expert_load_by_modality"] == tuned.moe_tune.details["expert_load_by_modality"]
        resumed, whole = (
            (folder / "model.safetensors").read_bytes() for folder in (tuned.workspace.checkpoint(RECIPE, 3), aside)
        )
        assert resumed == whole
    finally:
        _put_back(tuned, aside)


def test_a_capacity_drops_and_counts(tuned: TunedMixture) -> None:
    aside = _fresh_target(tuned)
    try:
        recipe = load_recipe(RECIPE, [*SMALL, "model.moe.capacity=0.5", "stages.moe_tune.max_steps=1"])
        from medvlm.training.router import train_router

        kept = read_json(tuned.workspace.router_weights(RECIPE) / "metadata.json")
        train_router(tuned.workspace, recipe)
        report = run_stage(tuned.workspace, recipe, 3)
        assert report.details["tokens_dropped"] > 0
        assert load_checkpoint(tuned.workspace.checkpoint(RECIPE, 3)).model.config.moe["capacity"] == 0.5
        train_router(tuned.workspace, tuned.recipe)
        assert read_json(tuned.workspace.router_weights(RECIPE) / "metadata.json") == kept
    finally:
        _put_back(tuned, aside)


def _fresh_target(tuned: TunedMixture) -> Path:
    checkpoint = tuned.workspace.checkpoint(RECIPE, 3)
    return checkpoint.rename(checkpoint.with_name("aside"))


def _put_back(tuned: TunedMixture, aside: Path) -> None:
    from shutil import rmtree

    checkpoint = tuned.workspace.checkpoint(RECIPE, 3)
    rmtree(checkpoint, ignore_errors=True)
    aside.rename(checkpoint)
