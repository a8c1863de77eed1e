"""Recipes: what is read, what is inherited, what is refused and with which words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
from click.testing import CliRunner

from medvlm.cli import cli
from medvlm.config import (
    load_recipe,
    recipe_differences,
    recipe_names,
    recipe_yaml,
    router_yaml,
    stage_yaml,
    twin_violations,
)
from medvlm.errors import RecipeError
from medvlm.recipe_fields import field_role
from medvlm.recipe_schema import SIZE, SOURCE, TemplateName


def test_every_recipe_reads_and_is_named_after_its_file() -> None:
    assert {"llava-med", "tiny-llava-med"} <= set(recipe_names())
    for name in recipe_names():
        assert load_recipe(name).name == name


def test_published_hyper_parameters_of_llava_med() -> None:
    recipe = load_recipe("llava-med")
    align, instruct, finetune = recipe.stages
    assert [s.name for s in recipe.stages] == ["align", "instruct", "finetune"]
    assert (align.learning_rate, align.global_batch, align.epochs) == (2e-3, 128, 1)
    assert (instruct.learning_rate, instruct.global_batch, instruct.epochs) == (2e-5, 128, 3)
    assert (finetune.learning_rate, finetune.global_batch, finetune.epochs) == (2e-5, 64, 9)
    assert align.trains == ("projector", "image_marks")
    assert instruct.trains == finetune.trains == ("projector", "language_model")
    assert all(s.max_length == 2048 and s.warmup_ratio == 0.03 and s.weight_decay == 0 for s in recipe.stages)
    assert recipe.model.image_tokens == 256
    assert recipe.targets(1) == recipe.targets(2) == ("all",)
    assert recipe.targets(3) == recipe.benchmarks


@pytest.mark.parametrize("name", [name for name in recipe_names() if name.startswith("tiny-")])
def test_a_twin_changes_sizes_and_sources_only(name: str) -> None:
    assert twin_violations(load_recipe(name), load_recipe(name.removeprefix("tiny-"))) == []


@pytest.mark.parametrize(
    "change", ["stages.align.learning_rate=1e-2", "model.projector.kind=mlp2x_gelu", "stages.finetune.targets=all"]
)
def test_a_twin_that_changes_anything_else_is_found_out(change: str) -> None:
    twin = load_recipe("tiny-llava-med", [change])
    assert twin_violations(twin, load_recipe("llava-med")) == [change.split("=")[0]]


def test_roles_of_fields() -> None:
    assert field_role(("model", "vision_tower", "hidden_size")) == SIZE
    assert field_role(("stages", "align", "max_steps")) == SIZE
    assert field_role(("model", "language_model", "weights")) == SOURCE
    assert field_role(("stages", "align", "learning_rate")) is None
    # What a random language model makes necessary is a source as it is.
    assert field_role(("stages", "instruct", "lora", "modules_to_save", "learning_rate")) == SOURCE
    with pytest.raises(KeyError):
        field_role(("stages", "align", "nothing"))


def recipe_file(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(text, "utf-8")
    return path


def refusal(source: Any, *overrides: str) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        load_recipe(source, overrides)
    return caught.value


def test_an_unknown_key_is_refused_with_file_field_and_a_guess(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, "extends: tiny-llava-med\nstages:\n  align:\n    epoch: 2\n")
    error = refusal(path)
    assert "'epoch'; did you mean 'epochs'?" in error.what
    assert error.where == f"{path}, field stages.align.epoch"
    assert "epochs" in error.hint and "learning_rate" in error.hint


def test_the_file_that_holds_the_wrong_value_is_named(tmp_path: Path) -> None:
    base = recipe_file(tmp_path, "extends: tiny-llava-med\nmodel:\n  vision_tower:\n    layers: two\n", "base.yaml")
    child = recipe_file(tmp_path, "extends: ./base.yaml\nseed: 3\n")
    assert str(base) in refusal(child).where


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stages.align.epochs=three", "valid number"),
        ("model.vision_tower.layers=2.5", "valid integer"),
        ("model.vision_tower.layers='2'", "valid integer"),
        ("model.vision_tower.patch_px=25", "image_px 96 is not a multiple of patch_px 25"),
        ("model.vision_tower.feature_layer=-9", "does not exist"),
        ("stages.align.micro_batch=4096", "larger than global_batch"),
        ("stages.align.max_length=100000", "more than model.language_model.max_positions"),
        ("stages.align.max_length=20", "leaves no room"),
        ("stages.align.targets=each", "needs data 'benchmarks'"),
        ("stages.align.objective=magic", "'answer'"),
        ("stages.align=null", "three stages, this one has 2"),
        ("stages.warmup.epochs=1", "'align', 'instruct'"),
        ("nothing", "is not an override"),
        ("seed=[", "not YAML"),
    ],
)
def test_wrong_values_and_impossible_combinations_are_refused(override: str, words: str) -> None:
    assert words in refusal("tiny-llava-med", override).what


def test_on_and_off_are_words_as_the_settings_mean_them() -> None:
    for word in ("on", "off"):
        recipe = load_recipe("tiny-llava-med", [f"stages.align.gradient_checkpointing={word}"])
        assert recipe.stages[0].gradient_checkpointing == word
    assert load_recipe("tiny-llava-med", ["model.mm_use_im_start_end=false"]).model.mm_use_im_start_end is False


def test_an_unknown_recipe_names_the_nearest() -> None:
    assert "did you mean 'tiny-llava-med'" in refusal("tiny-lava-med").what
    assert "does not exist" in refusal("no/such/file.yaml").what


def test_recipes_in_a_circle(tmp_path: Path) -> None:
    recipe_file(tmp_path, "extends: ./b.yaml\n", "a.yaml")
    recipe_file(tmp_path, "extends: ./a.yaml\n", "b.yaml")
    assert "circle" in refusal(tmp_path / "a.yaml").what


def test_a_key_cannot_stand_twice(tmp_path: Path) -> None:
    assert "twice" in refusal(recipe_file(tmp_path, "extends: llava-med\nseed: 1\nseed: 2\n")).what


def test_numbers_with_an_exponent_are_numbers(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, "extends: llava-med\nstages:\n  align:\n    learning_rate: 1e-4\n")
    assert load_recipe(path).stages[0].learning_rate == 1e-4


def test_a_resolved_recipe_reads_back(tmp_path: Path) -> None:
    recipe = load_recipe("tiny-llava-med", ["stages.align.max_steps=7"])
    assert load_recipe(recipe_file(tmp_path, recipe_yaml(recipe))) == recipe
    assert set(recipe_differences(recipe, load_recipe("tiny-llava-med"))) == {("stages", "align", "max_steps")}


def test_a_stage_depends_on_itself_and_the_model_only() -> None:
    before = load_recipe("tiny-llava-med")
    after = load_recipe("tiny-llava-med", ["stages.instruct.max_steps=7"])
    changed = [number for number in (1, 2, 3) if stage_yaml(before, number) != stage_yaml(after, number)]
    assert changed == [2]
    wider = load_recipe("tiny-llava-med", ["model.language_model.hidden_size=256"])
    assert all(stage_yaml(before, number) != stage_yaml(wider, number) for number in (1, 2, 3))


def test_templates_named_in_the_schema_exist() -> None:
    from medvlm.models.template import TEMPLATES

    assert set(get_args(TemplateName)) == set(TEMPLATES)


def test_the_verb_lists_shows_checks_and_resolves(tmp_path: Path) -> None:
    run = CliRunner().invoke
    listed = run(cli, ["recipe", "list", "--json"])
    assert json.loads(listed.stdout) == recipe_names()
    shown = json.loads(run(cli, ["recipe", "show", "tiny-llava-med", "--set", "seed=9", "--json"]).stdout)
    assert (shown["name"], shown["seed"]) == ("tiny-llava-med", 9)
    assert set(json.loads(run(cli, ["recipe", "check", "--json"]).stdout)["valid"]) == set(recipe_names())
    assert isinstance(run(cli, ["recipe", "check", "nonsense"]).exception, RecipeError)
    assert run(cli, ["--workspace", str(tmp_path), "recipe", "resolve", "tiny-llava-med"]).exit_code == 0
    assert sorted(p.name for p in (tmp_path / "recipes/tiny-llava-med").iterdir()) == [
        "stage1.yaml",
        "stage2.yaml",
        "stage3.yaml",
    ]


@pytest.mark.parametrize(
    ("name", "architecture", "width", "layers", "mlp", "vocab"),
    [
        ("cliva-med-phi2", "phi", 2560, 32, 10240, 51200),
        ("cliva-med-stablelm", "stablelm", 2048, 24, 5632, 100352),
    ],
)
def test_published_hyper_parameters_of_cliva_med(
    name: str, architecture: str, width: int, layers: int, mlp: int, vocab: int
) -> None:
    recipe = load_recipe(name)
    model, moe = recipe.model, recipe.model.moe
    decoder = model.language_model
    assert (decoder.architecture, decoder.hidden_size, decoder.layers) == (architecture, width, layers)
    assert (decoder.mlp_size, decoder.heads, model.tokenizer.vocab_size) == (mlp, 32, vocab)
    assert (model.image_tokens, model.projector.kind) == (576, "mlp2x_gelu")
    align, instruct, moe_tune = recipe.stages
    assert [(s.learning_rate, s.epochs, s.global_batch) for s in recipe.stages] == [
        (1e-3, 1, 64),
        (2e-5, 3, 128),
        (2e-5, 9, 64),
    ]
    assert (align.trains, instruct.trains) == (("projector",), ("projector", "language_model"))
    assert (moe_tune.name, moe_tune.trains, recipe.targets(3)) == ("moe_tune", ("feed_forward",), ("all",))
    assert moe is not None
    assert (moe.experts, moe.top_k, moe.every, moe.meta_expert, moe.capacity) == (4, 1, 2, True, None)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.moe=null", "go together"),
        ("model.moe.top_k=2", "1"),
        ("model.moe.experts=3", "3 experts have 4 domains"),
        ("model.moe.domains=[[ct], [ct], [mri], [gross]]", "stands in two domains"),
        ("stages.moe_tune.trains=[feed_forward, language_model]", "holds already"),
        ("model.moe.router.step=3", "there is no field 'step'; did you mean 'steps'?"),
    ],
)
def test_impossible_experts_are_refused(override: str, words: str) -> None:
    assert words in refusal("tiny-cliva-med-phi2", override).what


def test_experts_and_router_belong_to_the_last_stage_only() -> None:
    before = load_recipe("tiny-cliva-med-phi2")
    after = load_recipe("tiny-cliva-med-phi2", ["model.moe.router.labels=7"])
    changed = [number for number in (1, 2, 3) if stage_yaml(before, number) != stage_yaml(after, number)]
    assert changed == [3]
    assert router_yaml(before) != router_yaml(after)
    assert field_role(("model", "moe", "router", "labels")) == SIZE
    assert field_role(("model", "moe", "expert_start")) is None
