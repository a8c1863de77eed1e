"""Original LLaVA checkpoints: the logits of the model that they were made from, and every key accounted for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from models.llava_originals import LLAMA_MLP, V1, V15, Original, inside, original, write_original, write_tower
from safetensors.torch import save_file

from medvlm.cli import cli
from medvlm.errors import CheckpointError
from medvlm.models.checkpoint import load_checkpoint
from medvlm.models.importing import Parts, import_checkpoint
from medvlm.store import Workspace


def imported(source: Path, made: Original, **parts: Any) -> Any:
    import_checkpoint(source, made.recipe, source.with_name("imported"), Parts(**parts))
    return load_checkpoint(source.with_name("imported"))


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("layout", [V1, V15, LLAMA_MLP], ids=["v1", "v1.5", "qilin"])
@pytest.mark.parametrize("tower", ["inside", "beside"])
def test_the_logits_are_those_of_the_model_it_was_made_from(
    tmp_path: Path, layout: list[str], pickled: bool, tower: str
) -> None:
    made = original(tmp_path, layout)
    weights = made.weights | (inside(made) if tower == "inside" else {})
    source = write_original(tmp_path / "source", made, weights, pickled=pickled)
    beside = str(write_tower(tmp_path / "clip", made)) if tower == "beside" else None
    checkpoint = imported(source, made, vision_tower=beside)
    assert torch.equal(made.logits(checkpoint.model), made.logits(made.model))
    assert checkpoint.recipe == made.recipe and checkpoint.metadata["stage"] == "instruct"
    assert checkpoint.tokenizer.convert_tokens_to_ids("<image>") == made.rows
    assert checkpoint.model.get_input_embeddings().weight.shape[0] == made.rows + 1


def test_a_projector_and_new_embeddings_in_a_file_of_their_own(tmp_path: Path) -> None:
    """mm_projector.bin of v1's stage 1: the projector, and the rows of the two marks, over the base model."""
    made = original(tmp_path, V1)
    projector = {n: t for n, t in made.weights.items() if "mm_projector" in n}
    base = {n: t.clone() for n, t in made.weights.items() if "mm_projector" not in n}
    base["model.embed_tokens.weight"][-2:] = 9.0
    source = write_original(tmp_path / "source", made, {})
    (source / "model.safetensors").unlink()
    rows = made.weights["model.embed_tokens.weight"][-2:].clone()
    torch.save({**projector, "model.embed_tokens.weight": rows}, source / "mm_projector.bin")
    beside = {
        "base": str(write_original(tmp_path / "base", made, base)),
        "vision_tower": str(write_tower(tmp_path / "clip", made)),
    }
    checkpoint = imported(source, made, **beside)
    assert torch.equal(made.logits(checkpoint.model), made.logits(made.model))
    with pytest.raises(CheckpointError, match="a projector alone") as caught:
        import_checkpoint(source, made.recipe, tmp_path / "o")
    assert "--base" in caught.value.hint


def test_two_projectors_are_one_too_many(tmp_path: Path) -> None:
    made = original(tmp_path, V15)
    source = write_original(tmp_path / "source", made, made.weights | inside(made))
    projector = {n: t.clone() for n, t in made.weights.items() if "mm_projector" in n}
    torch.save(projector, source / "mm_projector.bin")
    import_checkpoint(source, made.recipe, tmp_path / "same")
    projector["model.mm_projector.0.bias"] += 1
    torch.save(projector, source / "mm_projector.bin")
    with pytest.raises(CheckpointError, match=r"mm_projector.0.bias is in the model and, with other values"):
        import_checkpoint(source, made.recipe, tmp_path / "o")
    import_checkpoint(source, made.recipe, tmp_path / "chosen", Parts(projector=source / "mm_projector.bin"))
    bias = load_checkpoint(tmp_path / "chosen").model.model.multi_modal_projector.linear_1.bias
    assert torch.equal(bias, made.weights["model.mm_projector.0.bias"] + 1)


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_lora_is_merged_with_what_was_trained_in_full(tmp_path: Path, suffix: str) -> None:
    made = original(tmp_path, V15)
    generator = torch.Generator().manual_seed(0)
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    adapter: dict[str, torch.Tensor] = {}
    base = {n: t.clone() for n, t in made.weights.items() if "mm_projector" not in n}
    scale = 8 / 2
    for name in names:
        out, width = made.weights[f"{name}.weight"].shape
        low, high = torch.randn(2, width, generator=generator), torch.randn(out, 2, generator=generator)
        adapter[f"base_model.model.{name}.lora_A.weight"] = low
        adapter[f"base_model.model.{name}.lora_B.weight"] = high
        base[f"{name}.weight"] -= scale * (high @ low)
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(made.config))
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "bias": "none", "target_modules": ["q_proj"]}
    (source / "adapter_config.json").write_text(json.dumps(settings))
    if suffix == "bin":
        torch.save(adapter, source / "adapter_model.bin")
    else:
        save_file(adapter, source / "adapter_model.safetensors")
    projector = {f"base_model.model.{n}": t for n, t in made.weights.items() if "mm_projector" in n}
    torch.save(projector, source / "non_lora_trainables.bin")
    parts = {
        "base": str(write_original(tmp_path / "base", made, base)),
        "vision_tower": str(write_tower(tmp_path / "clip", made)),
    }
    result = import_checkpoint(source, made.recipe, tmp_path / "o", Parts(**parts))
    assert result.merged == 2
    checkpoint = load_checkpoint(tmp_path / "o")
    assert torch.allclose(made.logits(checkpoint.model), made.logits(made.model), atol=1e-4)
    without = load_checkpoint_of(base, made, tmp_path)
    assert not torch.allclose(made.logits(without.model), made.logits(made.model), atol=1e-2)

    (source / "non_lora_trainables.bin").rename(tmp_path / "lost")
    with pytest.raises(CheckpointError, match="its projector would be lost"):
        import_checkpoint(source, made.recipe, tmp_path / "p", Parts(**parts))
    (tmp_path / "lost").rename(source / "non_lora_trainables.bin")
    (source / "adapter_config.json").write_text(json.dumps({**settings, "use_dora": True}))
    with pytest.raises(CheckpointError, match="not plain LoRA"):
        import_checkpoint(source, made.recipe, tmp_path / "p", Parts(**parts))


def load_checkpoint_of(base: dict[str, torch.Tensor], made: Original, folder: Path) -> Any:
    projector = {n: t for n, t in made.weights.items() if "mm_projector" in n}
    source = write_original(folder / "unmerged", made, {**base, **projector, **inside(made)})
    import_checkpoint(source, made.recipe, folder / "unmerged-imported")
    return load_checkpoint(folder / "unmerged-imported")


def test_an_adapter_of_the_tower(tmp_path: Path) -> None:
    made = original(tmp_path, V15)
    name = "vision_model.encoder.layers.0.self_attn.q_proj"
    low, high = torch.ones(1, 16) * 0.1, torch.ones(16, 1)
    adapter = {f"base_model.model.{name}.lora_A.weight": low, f"base_model.model.{name}.lora_B.weight": high}
    folder = tmp_path / "vit"
    folder.mkdir()
    save_file(adapter, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 1, "lora_alpha": 2}))
    made.tower[f"{name}.weight"] -= 2 * (high @ low)
    source = write_original(tmp_path / "source", made, made.weights | inside(made))
    checkpoint = imported(source, made, vision_lora=folder)
    assert torch.allclose(made.logits(checkpoint.model), made.logits(made.model), atol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("model.norm.weight"), "1 missing: model.language_model.norm.weight"),
        (lambda w: w.pop("model.mm_projector.0.weight"), "1 missing: model.multi_modal_projector.linear_1.weight"),
        (
            lambda w: w.update({"model.layers.5.mlp.up_proj.weight": torch.zeros(2, 2)}),
            "unexpected: model",
        ),
        (lambda w: w.update({"model.mm_projector.4.weight": torch.zeros(2, 2)}), "unexpected: model.mm_projector.4"),
        (
            lambda w: w.update({"model.vision_tower.vision_tower.head.weight": torch.zeros(2)}),
            "unexpected: model",
        ),
        (lambda w: w.update({"model.norm.weight": torch.zeros(5)}), r"model.language_model.norm.weight is \[5\]"),
        (lambda w: [w.pop(n) for n in list(w) if "layers.1.self_attn" in n and "vision" in n], "8 missing"),
    ],
)
def test_keys_that_are_missing_or_unexpected_are_listed(tmp_path: Path, change: Any, words: str) -> None:
    made = original(tmp_path, V15)
    weights = made.weights | inside(made)
    change(weights)
    with pytest.raises(CheckpointError, match=words) as caught:
        import_checkpoint(write_original(tmp_path / "source", made, weights), made.recipe, tmp_path / "o")
    assert "silently" in caught.value.hint and not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("mm_projector_type", "linear", "model.projector.kind"),
        ("hidden_size", 4096, "model.language_model.hidden_size"),
        ("model_type", "llava_llama", "model.language_model.architecture"),
        ("mm_vision_select_layer", -1, "model.vision_tower.feature_layer"),
        ("mm_use_im_start_end", True, "--set model.mm_use_im_start_end=true"),
        ("image_aspect_ratio", "square", "--set model.vision_tower.image_fit=crop"),
        ("mm_vision_select_feature", "cls_patch", "feature_select"),
    ],
)
def test_other_settings_than_the_recipes_are_refused(tmp_path: Path, setting: str, value: Any, words: str) -> None:
    made = original(tmp_path, V15)
    made.config[setting] = value
    with pytest.raises(CheckpointError) as caught:
        import_checkpoint(
            write_original(tmp_path / "source", made, made.weights | inside(made)), made.recipe, tmp_path / "o"
        )
    assert words in caught.value.what + caught.value.hint


def test_settings_of_the_language_model_are_kept(tmp_path: Path) -> None:
    made = original(tmp_path, V15)
    made.config.update(rope_theta=1_000_000.0, rms_norm_eps=1e-5, max_position_embeddings=32768, sliding_window=None)
    model = imported(write_original(tmp_path / "source", made, made.weights | inside(made)), made).model
    text = model.config.text_config
    assert text.rope_parameters["rope_theta"] == 1_000_000.0 and text.rms_norm_eps == 1e-5
    assert text.max_position_embeddings == 32768 and text.sliding_window is None
    assert not torch.equal(made.logits(model), made.logits(made.model))


def test_marks_that_the_saved_tokenizer_lost_get_the_rows_that_they_had(tmp_path: Path) -> None:
    """The original's loader adds <im_patch>, <im_start>, <im_end> in this order when they are not there."""
    from models.llava_originals import tokenizer_without_image

    made = original(tmp_path, V1)
    source = write_original(tmp_path / "source", made, made.weights | inside(made))
    tokenizer_without_image(source, [])
    checkpoint = imported(source, made)
    expected = [made.tokenizer.convert_tokens_to_ids(mark) for mark in ("<im_patch>", "<im_start>", "<im_end>")]
    assert checkpoint.tokenizer.convert_tokens_to_ids(["<im_patch>", "<im_start>", "<im_end>"]) == expected
    assert torch.equal(made.logits(checkpoint.model), made.logits(made.model))


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    from models.llava_originals import tokenizer_without_image

    made = original(tmp_path, V15)
    source = write_original(tmp_path / "source", made, made.weights | inside(made))
    tokenizer_without_image(tmp_path / "larger", ["<a>", "<b>"])
    with pytest.raises(CheckpointError, match="the tokenizer has 302 tokens, the embedding 300 rows"):
        import_checkpoint(source, made.recipe, tmp_path / "o", Parts(tokenizer=str(tmp_path / "larger")))


def test_no_tower_anywhere_is_an_error_not_a_random_tower(tmp_path: Path) -> None:
    made = original(tmp_path, V15)
    with pytest.raises(CheckpointError, match="holds no vision tower") as caught:
        import_checkpoint(write_original(tmp_path / "source", made, made.weights), made.recipe, tmp_path / "o")
    assert "--vision-tower" in caught.value.hint


def test_the_command_says_where_each_part_came_from(tmp_path: Path) -> None:
    made = original(tmp_path, V15)
    source = write_original(tmp_path / "source", made, made.weights)
    tower = write_tower(tmp_path / "clip", made)
    arguments = ["--workspace", str(tmp_path / "w"), "import-checkpoint", str(source), "--recipe", "tiny-llava-med"]
    arguments += [word for line in V15 for word in ("--set", line)]
    arguments += ["--vision-tower", str(tower)]
    assert CliRunner().invoke(cli, arguments).exit_code == 2
    shown = CliRunner().invoke(cli, [*arguments, "--stage", "instruct", "--json"])
    values = json.loads(shown.stdout)
    assert values["from_where"] == {str(source): len(made.weights), str(tower): len(made.tower)}
    assert values["added_tokens"] == {"<image>": 300} and values["grown_rows"] == 1
    assert values["dropped"] == ["vision_model.embeddings.position_ids"]
    checkpoint = load_checkpoint(Workspace(tmp_path / "w").checkpoint("tiny-llava-med", 2))
    assert torch.equal(made.logits(checkpoint.model), made.logits(made.model))
    shown = CliRunner().invoke(cli, [*arguments, "--out", str(tmp_path / "o")])
    assert shown.exit_code == 0 and f"{len(made.tower)} from {tower}" in shown.stdout
