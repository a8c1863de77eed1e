"""Exported checkpoints: stock transformers opens them, with the same pixels, prompts and logits."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from models.llava_originals import SMALL
from PIL import Image

from medvlm.cli import cli
from medvlm.config import load_recipe
from medvlm.errors import CheckpointError
from medvlm.models.checkpoint import Checkpoint, build_model, save_checkpoint
from medvlm.models.export import chat_template, export_checkpoint
from medvlm.models.template import TEMPLATES, render
from medvlm.models.tokenizer import train_tokenizer
from medvlm.models.vision import ImageProcessor
from medvlm.records import Turn
from medvlm.training.collate import ConversationEncoder

MISTRAL = [
    "model.projector.kind=mlp2x_gelu",
    "model.language_model.architecture=mistral",
    "model.language_model.kv_heads=2",
    "model.mm_use_im_start_end=false",
    "model.vision_tower.image_fit=pad",
    "stages.instruct.template=mistral_instruct",
]
STANDARDISED = ["model.projector.standardised=true"]


def made(folder: Path, *overrides: str, stage: str = "instruct") -> Checkpoint:
    recipe = load_recipe("tiny-llava-med", [*SMALL, *overrides])
    tokenizer = train_tokenizer(recipe, ["Is there a lesion?", "Yes"] * 3)
    model = build_model(recipe, tokenizer).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
        if recipe.model.projector.standardised:
            projector: Any = model.model.multi_modal_projector
            projector.mean.normal_(generator=generator)
            projector.spread.uniform_(0.2, 3.0, generator=generator)
    metadata = {"fingerprint": "f", "stage": stage}
    checkpoint = Checkpoint(model, tokenizer, ImageProcessor.of(recipe.model.vision_tower), recipe, metadata)
    save_checkpoint(folder, checkpoint)
    return checkpoint


def picture() -> Image.Image:
    drawn = Image.effect_noise((130, 90), 60).convert("RGB")
    drawn.paste((250, 10, 60), (10, 20, 50, 60))
    return drawn


def png(drawn: Image.Image) -> bytes:
    stream = io.BytesIO()
    drawn.save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("overrides", "template"),
    [([], "vicuna_v1"), (MISTRAL, "mistral_instruct"), ([*MISTRAL, *STANDARDISED], "mistral_instruct")],
    ids=["linear", "mlp2x_gelu", "standardised"],
)
def test_stock_transformers_gives_the_same_pixels_prompts_logits_and_answers(
    tmp_path: Path, overrides: list[str], template: Any
) -> None:
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    checkpoint = made(tmp_path / "c", *overrides)
    result = export_checkpoint(tmp_path / "c", tmp_path / "o", shard_bytes=20_000)
    assert result.template == template
    stock: Any
    stock, info = LlavaForConditionalGeneration.from_pretrained(tmp_path / "o", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert type(stock) is LlavaForConditionalGeneration
    processor: Any = AutoProcessor.from_pretrained(tmp_path / "o")
    drawn = picture()
    content = [{"type": "image", "image": drawn}, {"type": "text", "text": "Is there a lesion?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    encoder = ConversationEncoder(checkpoint.recipe, checkpoint.tokenizer, template, 512)
    assert inputs["input_ids"][0].tolist() == encoder.prompt("<image>\nIs there a lesion?")
    pixels = checkpoint.processor(png(drawn))[None]
    assert torch.equal(inputs["pixel_values"], pixels)
    ours: Any = checkpoint.model
    with torch.no_grad():
        expected = ours(input_ids=inputs["input_ids"], pixel_values=pixels).logits
        assert (stock.eval()(**inputs).logits - expected).abs().max() < 1e-4
        answer = {"max_new_tokens": 5, "do_sample": False}
        mine = ours.generate(input_ids=inputs["input_ids"], pixel_values=pixels, **answer)
        assert torch.equal(stock.generate(**inputs, **answer), mine)


def test_a_linear_projector_keeps_every_bit(tmp_path: Path) -> None:
    from transformers import LlavaForConditionalGeneration

    checkpoint = made(tmp_path / "c")
    export_checkpoint(tmp_path / "c", tmp_path / "o")
    stock: Any = LlavaForConditionalGeneration.from_pretrained(tmp_path / "o")
    features = torch.randn((1, 4, 16), generator=torch.Generator().manual_seed(0))
    ours: Any = checkpoint.model
    assert torch.equal(stock.model.multi_modal_projector(features), ours.model.multi_modal_projector(features))


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "plain"])
@pytest.mark.parametrize("image", ["<image>", "<im_start><image><im_end>"])
def test_the_chat_template_writes_what_training_wrote(name: Any, image: str) -> None:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    hostile = "It's </s> a \\n 'lesion' <image>?"
    turns = [
        Turn("user", f"<image>\n{hostile.replace('<image>', '')}"),
        Turn("assistant", "Yes </s> {{ 7 * 7 }}"),
        Turn("user", "Where?"),
    ]
    reserved = ["<image>", "<im_start>", "<im_end>", "<s>", "</s>"]
    segments = render(TEMPLATES[name], turns, image=image, bos="<s>", eos="</s>", reserved=reserved)
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    text = chat_template(TEMPLATES[name], image=image, reserved=reserved)
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": hostile.replace("<image>", "")}]},
        {"role": "assistant", "content": turns[1].text},
        {"role": "user", "content": "Where?"},
    ]
    found = environment.from_string(text).render(messages=messages, bos_token="<s>", eos_token="</s>")
    assert found == "<s>" + "".join(segment.text for segment in segments)
    messages[2]["content"] = hostile
    again = environment.from_string(text).render(messages=messages, bos_token="<s>", eos_token="</s>")
    assert again.count("<image>") == 1


def test_a_system_message_and_an_image_after_the_text() -> None:
    from jinja2 import Environment

    def refuse(message: str) -> None:
        raise ValueError(message)

    environment = Environment(trim_blocks=True, lstrip_blocks=True)  # no HTML here
    content = [{"type": "text", "text": "Where?"}, {"type": "image"}]
    for first, expected in ((False, "Where?\n<image>"), (True, "<image>\nWhere?")):
        text = chat_template(TEMPLATES["mistral_instruct"], image="<image>", reserved=[], image_first=first)
        template = environment.from_string(text)
        template.globals["raise_exception"] = refuse
        found = template.render(messages=[{"role": "user", "content": content}], bos_token="", eos_token="")
        assert found == f"[INST] {expected} [/INST]"
        with pytest.raises(ValueError, match="take turns"):
            template.render(messages=[{"role": "system", "content": "Be brief"}], bos_token="", eos_token="")


@pytest.mark.parametrize(
    ("overrides", "words"), [(["model.projector.kind=cluster", "model.projector.prototypes=4"], "projector is cluster")]
)
def test_what_has_no_stock_form_names_its_own(tmp_path: Path, overrides: list[str], words: str) -> None:
    made(tmp_path / "c", *overrides)
    with pytest.raises(CheckpointError, match=words) as caught:
        export_checkpoint(tmp_path / "c", tmp_path / "o")
    assert "AutoModelForImageTextToText" in caught.value.hint and not (tmp_path / "o").exists()


def test_other_tensors_than_stock_llava_has_are_refused(tmp_path: Path) -> None:
    """As a mixture of experts has them."""
    from safetensors.torch import load_file, save_file

    made(tmp_path / "c")
    path = tmp_path / "c/model.safetensors"
    weights = load_file(path) | {"model.language_model.layers.0.mlp.experts.0.up_proj.weight": torch.zeros(2, 2)}
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"experts\.0\.up_proj"):
        export_checkpoint(tmp_path / "c", tmp_path / "o")


def test_the_command_and_its_type(tmp_path: Path) -> None:
    made(tmp_path / "c", stage="align")
    shown = CliRunner().invoke(
        cli, ["export", str(tmp_path / "c"), str(tmp_path / "o"), "--dtype", "bfloat16", "--json"]
    )
    values = json.loads(shown.stdout)
    assert values["dtype"] == "bfloat16" and values["template"] == "vicuna_v1"
    assert json.loads((tmp_path / "o/config.json").read_text())["dtype"] == "bfloat16"
    assert CliRunner().invoke(cli, ["export", str(tmp_path / "none"), str(tmp_path / "p")]).exit_code == 1
