"""The plan against published runs and published footprints, and what it says where something does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from medvlm.cli import cli
from medvlm.config import load_recipe
from medvlm.errors import InputError, TrainingError
from medvlm.training.footprint import Setup, load_of_step, model_shape
from medvlm.training.hardware import DEVICES, parse_hardware
from medvlm.training.plan import Plan, StagePlanned, make_plan


def planned(recipe: str = "llava-med", hardware: str = "8xA100-40G", **options: Any) -> Plan:
    overrides = options.pop("overrides", ())
    return make_plan(load_recipe(recipe, overrides), parse_hardware(hardware), **options)


def stage(name: str, recipe: str = "llava-med", hardware: str = "8xA100-40G", **options: Any) -> StagePlanned:
    return next(s for s in planned(recipe, hardware, **options).stages if s.stage == name)


@pytest.mark.parametrize(
    ("name", "samples", "overrides", "hours"),
    [
        ("align", None, [], 6.8),
        ("align", 600_000, [], 6.8),  # what the paper says it trained on
        ("align", 600_000, ["stages.align.epochs=3"], 19.4),
        ("instruct", None, [], 8.0),
        ("instruct", None, ["stages.instruct.epochs=1"], 2.6),
        ("instruct", 10_712, [], 1.8),
        ("instruct", 10_712, ["stages.instruct.epochs=1"], 0.6),
    ],
)
def test_the_published_runs_within_30_percent_at_one_utilisation(
    name: str, samples: int | None, overrides: list[str], hours: float
) -> None:
    """LLaVA-Med's paper, table 3b: hours on eight A100-40G."""
    found = stage(name, samples={name: samples} if samples else None, overrides=overrides).hours
    assert found == pytest.approx(hours, rel=0.3)


def test_numbers_of_llava_med() -> None:
    plan = planned(price=2.0)
    assert plan.parameters["total"] == plan.parameters["active"] == 7_045_793_792
    assert plan.parameters["trained"] == {
        "align": 4_198_400 + 2 * 4096,
        "instruct": 6_742_614_016,
        "finetune": 6_742_614_016,
    }
    align, instruct, _ = plan.stages
    # Reference: 3,907 steps of 128 for 500,000 pairs; 1,407 for 60,017 conversations three times.
    assert abs(align.steps - 3_907) <= 1 and instruct.steps == 1_407
    assert plan.fits and plan.cost == pytest.approx(plan.hours * 16, abs=0.1)
    assert align.tokens == pytest.approx(align.steps * 128 * align.tokens_per_sequence, rel=0.01)


def test_a_frozen_language_model_costs_two_thirds_of_one_that_learns() -> None:
    """Forward 2, gradients of inputs 2, of weights 2 operations a weight and token; recomputing 2 more."""
    frozen = stage("align", overrides=["stages.align.gradient_checkpointing=off"])
    learning = stage(
        "align",
        overrides=["stages.align.gradient_checkpointing=off", "stages.align.trains=[projector, language_model]"],
    )
    assert frozen.operations / learning.operations == pytest.approx(2 / 3, abs=0.01)
    recomputed = stage("align")
    assert recomputed.operations / frozen.operations == pytest.approx(1.5, abs=0.02)
    weights, tokens = 6.607e9, frozen.tokens
    assert frozen.operations == pytest.approx(4 * weights * tokens, rel=0.03)


def test_memory_follows_the_zero_paper() -> None:
    """ZeRO (Rajbhandari et al. 2020), figure 1: 16 bytes a parameter, of which 12, 14 and 16 are split."""
    sizes = {}
    for zero in range(4):
        parts = stage("instruct", overrides=[f"stages.instruct.zero_stage={zero}"]).memory_gib
        sizes[zero] = sum(parts[name] for name in ("weights", "gradients", "optimizer_states"))
    learned, total, n = 6_742_614_016, 7_045_793_792, 8
    gib = 2**30
    assert sizes[0] == pytest.approx((2 * total + 14 * learned) / gib, rel=1e-3)
    assert sizes[1] == pytest.approx((2 * total + 2 * learned + 12 * learned / n) / gib, rel=1e-3)
    assert sizes[2] == pytest.approx((2 * total + 14 * learned / n) / gib, rel=1e-3)
    assert sizes[3] == pytest.approx((2 * total + 14 * learned) / n / gib, rel=1e-3)


def test_traffic_of_zero_2_is_what_a_link_counted() -> None:
    # benchmarks/scaling.py: two processes, a step of one micro-batch, on the only link between their hosts.
    counted_bytes = 22.4e6
    sizes = {"hidden_size": 256, "layers": 4, "heads": 4, "kv_heads": 4, "mlp_size": 768}
    overrides = [f"model.language_model.{field}={size}" for field, size in sizes.items()]
    recipe = load_recipe("tiny-llava-med", [*overrides, "stages.align.trains=[projector,language_model]"])
    _, align = recipe.stage("align")
    setup = Setup(parse_hardware("CPU").device, 2, 8, 2, "full", gradient_checkpointing=False, offload_optimizer=False)
    load = load_of_step(recipe, align, model_shape(recipe, align), setup, 50)
    assert load.sent + load.sent_a_step == pytest.approx(counted_bytes, rel=0.01)


def test_choices_cover_zero_lora_and_checkpointing_and_agree_with_the_own_setting() -> None:
    made = stage("instruct")
    keys = {(c.zero_stage, c.tuning, c.gradient_checkpointing) for c in made.choices}
    assert len(keys) == 22  # 4-bit weights have no ZeRO-3
    own = next(c for c in made.choices if (c.zero_stage, c.tuning, c.gradient_checkpointing) == (3, "full", True))
    assert own.gib_per_gpu == made.gib_per_gpu and own.fits
    assert {c.tuning for c in stage("align").choices} == {"full"}
    by_key = {(c.zero_stage, c.tuning, c.gradient_checkpointing): c.gib_per_gpu for c in made.choices}
    assert by_key[2, "full", True] > by_key[2, "lora", True] > by_key[2, "qlora", True]


@pytest.mark.parametrize(
    ("hardware", "overrides", "words"),
    [
        ("1x4090", [], "LoRA"),
        ("8xA100-40G", ["stages.instruct.zero_stage=0"], "zero_stage=2"),
        ("8xA100-40G", ["stages.instruct.gradient_checkpointing=off", "stages.instruct.micro_batch=2"], "checkpoint"),
        ("1xT4", [], "QLoRA"),
        ("1xH200", ["stages.instruct.micro_batch=64"], "micro_batch=1"),
    ],
)
def test_what_does_not_fit_says_which_setting_to_change(hardware: str, overrides: list[str], words: str) -> None:
    made = stage("instruct", hardware=hardware, overrides=overrides)
    assert not made.fits and made.gib_per_gpu > DEVICES[str(parse_hardware(hardware).device.name)].gib * 0.97
    assert made.advice.startswith("fits in") and words in made.advice


def test_advice_is_true() -> None:
    made = stage("instruct", overrides=["stages.instruct.zero_stage=0"])
    promised = float(made.advice.split()[2])
    assert stage("instruct", overrides=["stages.instruct.zero_stage=2"]).gib_per_gpu == pytest.approx(
        promised, abs=0.06
    )


def test_a_model_that_fits_nowhere_names_a_larger_device() -> None:
    made = stage("align", hardware="1xT4", overrides=["model.language_model.layers=64"])
    assert "needs" in made.advice and "such as" in made.advice


def test_a_batch_that_does_not_split_is_refused() -> None:
    with pytest.raises(TrainingError, match="does not split over 3"):
        planned(hardware="3xA100-40G")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8xA100-40G", "8xA100-40G"),
        ("8 x a100-40g", "8xA100-40G"),
        ("H100", "1xH100-80G"),
        ("2xRTX3090", "2x3090-24G"),
        ("RTX 4090", "1x4090-24G"),
        ("NVIDIA L40S", "1xL40S-48G"),
        ("cpu", "1xCPU"),
    ],
)
def test_hardware_is_read(text: str, expected: str) -> None:
    assert str(parse_hardware(text)) == expected


@pytest.mark.parametrize("text", ["", "0xA100-40G", "8xA100", "B9000", "x", "999999999xT4", "8xA100-40G; ls"])
def test_hardware_that_is_not_there_is_refused(text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_hardware(text)
    assert caught.value.hint


def test_the_command_prints_one_json_object_and_a_readable_table(tmp_path: Path) -> None:
    arguments = ["--workspace", str(tmp_path / "w"), "plan", "--recipe", "llava-med-v15", "--hardware", "8xA100-80G"]
    shown = CliRunner().invoke(cli, [*arguments, "--json"])
    values = json.loads(shown.stdout)
    assert values["recipe"] == "llava-med-v15" and values["parameters"]["total"] == 7_566_219_264
    assert [s["stage"] for s in values["stages"]] == ["align", "instruct", "finetune"]
    for made in values["stages"]:
        assert made["fits"] is True and 0 < made["gib_per_gpu"] < 80 and made["hours"] > 0
        assert sum(made["memory_gib"].values()) == pytest.approx(made["gib_per_gpu"], abs=0.02)
    assert not (tmp_path / "w").exists()
    shown = CliRunner().invoke(cli, [*arguments, "--picture", str(tmp_path / "plan.png")])
    assert shown.exit_code == 0 and "ZeRO-3" in shown.stdout and "500,000 pairs" in shown.stdout
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_samples_are_asked_for_by_a_stage_that_exists() -> None:
    for text in ("warmup=5", "align", "align=0", "align=x"):
        assert CliRunner().invoke(cli, ["plan", "--recipe", "llava-med", "--samples", text]).exit_code != 0


def test_a_dataset_in_the_workspace_is_counted(tmp_path: Path) -> None:
    from training.twin_case import sample

    from medvlm.records import Sample
    from medvlm.store import Workspace, write_records

    workspace = Workspace(tmp_path / "w").ensure()
    write_records(workspace.samples("alignment"), Sample, [sample(i, "alignment") for i in range(40)])
    made = stage("align", workspace=workspace)
    assert made.samples == 40 and made.steps == 1 and str(tmp_path) in made.data["all"]
    assert 258 + 30 < made.tokens_per_sequence < 258 + 80
    # The synthetic corpus says nothing about a full-size run; a twin learns from it.
    workspace.corpus.mkdir(parents=True)
    assert stage("align", workspace=workspace).samples == 500_000
    twin = stage("align", "tiny-llava-med", "CPU", workspace=workspace)
    assert (twin.samples, twin.steps) == (40, 120)


@pytest.mark.parametrize("name", ["align", "instruct", "prefer"])
def test_adapters_are_counted_as_training_attaches_them(name: str) -> None:
    from medvlm.models.meta import meta_model
    from medvlm.training.lora import attach
    from medvlm.training.params import freeze

    recipe = load_recipe("tiny-stllava-med")
    _, of_recipe = recipe.stage(name)
    model = meta_model(recipe)
    attach(model, recipe, of_recipe)
    freeze(model, of_recipe)
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert stage(name, "tiny-stllava-med", "CPU").trained == learning


def test_a_recipe_with_adapters_is_planned_with_them_and_can_be_planned_without() -> None:
    own, full = stage("instruct", "stllava-med"), stage("instruct", "stllava-med", tuning="full")
    assert own.tuning == "lora" and own.trained < 0.06 * full.trained < full.trained
    assert own.gib_per_gpu < full.gib_per_gpu and own.operations < full.operations
    assert stage("align", "stllava-med").tuning == "full"


def test_a_preference_pair_costs_two_answers_and_two_more_forward_passes() -> None:
    pair = stage("prefer", "stllava-med", samples={"prefer": 10_240})
    single = stage("instruct", "stllava-med", samples={"instruct": 10_240}, overrides=["stages.instruct.epochs=1"])
    ratio = (pair.operations / pair.tokens) / (single.operations / single.tokens)
    assert ratio == pytest.approx(2 * 4 / 3, rel=0.05)
