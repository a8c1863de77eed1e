"""Full-size recipes on the meta device have the published numbers of parameters."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from medvlm.config import load_recipe, recipe_names
from medvlm.models.meta import meta_model
from medvlm.training.params import part_of


@dataclass(frozen=True)
class Published:
    """Numbers of parameters as they are published; what is published rounded is compared rounded."""

    language_model: float
    total: float | None
    source: str
    rounding: float = 0.0
    """Half of the last digit that is published."""
    tower: int = 303_179_776  # CLIP ViT-L/14, the vision half, without its projection into the shared space


FULL_SIZE = {
    "llava-med": Published(6_738_415_616, None, "lmsys/vicuna-7b-v1.1, safetensors header; LLaMA paper, table 2: 6.7B"),
    "llava-med-v15": Published(
        7_241_732_096, None, "mistralai/Mistral-7B-Instruct-v0.2, safetensors header (7.24B)", tower=303_507_456
    ),
    "qilin-med-vl": Published(
        13_015_864_320,
        None,
        "Llama 2 13B (paper: 13B), safetensors header of Llama2-Chinese-13b-Chat",
        tower=303_507_456,
    ),
    "cliva-med-phi2": Published(
        2_779_683_840, None, "microsoft/phi-2, safetensors header; its model card: 2.7B", tower=303_507_456
    ),
    "cliva-med-stablelm": Published(
        1_644_515_328, None, "stabilityai/stablelm-2-1_6b, safetensors header; its model card: 1.6B", tower=303_507_456
    ),
    "stllava-med": Published(
        6_738_415_616, None, "lmsys/vicuna-7b-v1.5, safetensors header (Llama 2 7B: 6.74B)", tower=303_507_456
    ),
    # Its tower is published with a classifier of 1,281,000 more: 4.7 M in all (EfficientNet-Lite's README).
    "smol-llava-med": Published(134_515_008, None, "SmolLM2-135M-Instruct's model card: 134,515,008", tower=3_371_008),
}


@pytest.mark.parametrize("name", [name for name in recipe_names() if not name.startswith("tiny-")])
def test_a_full_size_recipe_has_the_published_number_of_parameters(name: str) -> None:
    published = FULL_SIZE[name]  # a new full-size recipe needs an entry with its source
    model = meta_model(load_recipe(name))
    assert all(parameter.is_meta for parameter in model.parameters())
    counts: dict[str, int] = {}
    for key, parameter in model.named_parameters():
        counts[part_of(key)] = counts.get(part_of(key), 0) + parameter.numel()
    assert counts["vision_tower"] == published.tower
    assert abs(counts["language_model"] - published.language_model) <= published.rounding
    if published.total is not None:
        assert abs(sum(counts.values()) - published.total) <= published.rounding


def test_the_two_projectors_of_llava_med() -> None:
    sizes = {
        name: sum(p.numel() for p in meta_model(load_recipe(name)).model.multi_modal_projector.parameters())
        for name in ("llava-med", "llava-med-v15")
    }
    assert sizes == {
        "llava-med": 1024 * 4096 + 4096,
        "llava-med-v15": 1024 * 4096 + 4096 + 4096 * 4096 + 4096,
    }
