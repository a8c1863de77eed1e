"""Small checkpoints in exactly the original's layout, and the model that each was made from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from medvlm.config import load_recipe
from medvlm.models.checkpoint import build_model
from medvlm.models.tokenizer import load_tokenizer
from medvlm.recipe_schema import Recipe

SMALL = [
    "model.vision_tower.hidden_size=16",
    "model.vision_tower.heads=2",
    "model.vision_tower.mlp_size=24",
    "model.language_model.hidden_size=24",
    "model.language_model.heads=4",
    "model.language_model.layers=2",
    "model.language_model.mlp_size=40",
    "model.tokenizer.vocab_size=300",
]
V1 = [*SMALL, "model.language_model.kv_heads=4"]
V15 = [
    *SMALL,
    "model.language_model.kv_heads=2",
    "model.language_model.architecture=mistral",
    "model.projector.kind=mlp2x_gelu",
    "model.mm_use_im_start_end=false",
    "model.vision_tower.image_fit=pad",
]
LLAMA_MLP = [line for line in V15 if "mistral" not in line]
"""As Qilin-Med-VL: v1.5's projector on Llama."""


@dataclass(frozen=True)
class Original:
    """A model, and its weights and settings under the original's names."""

    recipe: Recipe
    model: Any
    rows: int
    """Of the original's embedding: without our ``<image>``."""
    weights: dict[str, torch.Tensor]
    tower: dict[str, torch.Tensor]
    config: dict[str, Any]
    tokenizer: Any

    def logits(self, model: Any) -> torch.Tensor:
        """Of the tokens that the original knows."""
        generator = torch.Generator().manual_seed(3)
        vision = self.recipe.model.vision_tower
        pixels = torch.randn((1, 3, vision.image_px, vision.image_px), generator=generator)
        image_id = model.config.image_token_id
        ids = torch.tensor([[5, *[image_id] * self.recipe.model.image_tokens, 7, 40, 99, 120, self.rows - 1]])
        with torch.no_grad():
            return model.eval()(input_ids=ids, pixel_values=pixels).logits[..., : self.rows]


def tokenizer_without_image(folder: Path, marks: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    vocabulary |= {f"word{number}": number for number in range(len(vocabulary), 300)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    fast.add_tokens(marks, special_tokens=True)
    fast.save_pretrained(folder)
    return fast


def original(folder: Path, overrides: list[str]) -> Original:
    """A model of a recipe, drawn, with noise on what is drawn as ones and zeros."""
    recipe = load_recipe("tiny-llava-med", overrides)
    framed = recipe.model.mm_use_im_start_end
    marks = ["<im_patch>", "<im_start>", "<im_end>"] if framed else []
    plain = tokenizer_without_image(folder / "tokenizer", marks)
    full = load_tokenizer(folder / "tokenizer", ["<image>"])
    model = build_model(recipe, full)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    weights: dict[str, torch.Tensor] = {}
    tower: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("model.vision_tower."):
            tower[f"vision_model.{name.removeprefix('model.vision_tower.')}"] = tensor.clone()
            continue
        theirs = name.replace("model.language_model.", "model.").replace("multi_modal_projector", "mm_projector")
        theirs = theirs.replace("linear_1.", "0.").replace("linear_2.", "2.").replace("linear.", "")
        rows = len(plain) if name.endswith("embed_tokens.weight") or name.startswith("lm_head") else None
        weights[theirs] = tensor[:rows].clone()
    decoder = recipe.model.language_model
    config = {
        "model_type": "llava_mistral" if decoder.architecture == "mistral" else "llava",
        "vocab_size": len(plain),
        "hidden_size": decoder.hidden_size,
        "intermediate_size": decoder.mlp_size,
        "num_hidden_layers": decoder.layers,
        "num_attention_heads": decoder.heads,
        "num_key_value_heads": decoder.kv_heads,
        "rms_norm_eps": 1e-6,
        "mm_hidden_size": recipe.model.vision_tower.hidden_size,
        "mm_vision_select_layer": -2,
        "mm_use_im_start_end": framed,
        "mm_projector_type": recipe.model.projector.kind,
        "torch_dtype": "float16",
    }
    return Original(recipe, model, len(plain), weights, tower, config, plain)


def write_original(folder: Path, made: Original, weights: dict[str, torch.Tensor], *, pickled: bool = False) -> Path:
    folder.mkdir(parents=True)
    made.tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(made.config))
    if pickled:
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_tower(folder: Path, made: Original) -> Path:
    """A CLIP folder: both halves, as the hub's."""
    folder.mkdir(parents=True)
    text = {"text_model.final_layer_norm.weight": torch.zeros(4), "logit_scale": torch.zeros(1)}
    positions = {"vision_model.embeddings.position_ids": torch.arange(17)}
    torch.save(
        {**made.tower, **text, **positions, "visual_projection.weight": torch.zeros(2, 2)}, folder / "pytorch_model.bin"
    )
    return folder


def inside(made: Original) -> dict[str, torch.Tensor]:
    """The tower's weights as v1.5 holds them within the model."""
    return {f"model.vision_tower.vision_tower.{name}": tensor for name, tensor in made.tower.items()}
