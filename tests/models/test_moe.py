"""Mixtures of experts: what a layer computes, what upcycling keeps, and what a saved model brings back."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from medvlm.config import load_recipe
from medvlm.models.checkpoint import Checkpoint, build_model, decoder_config, load_checkpoint, save_checkpoint
from medvlm.models.moe import FrozenRouter, MoELayer, dispatch, install_experts, moe_layers, route, upcycle
from medvlm.models.tokenizer import train_tokenizer
from medvlm.models.vision import ImageProcessor, tower_config
from medvlm.training.collate import ConversationEncoder

TWINS = ("tiny-cliva-med-phi2", "tiny-cliva-med-stablelm")
WIDTH, EXPERTS = 6, 4


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 9), nn.Linear(9, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(torch.tanh(self.fc1(x)))


def layer(*, meta_expert: bool = True, capacity: float | None = None) -> MoELayer:
    """A mixture whose experts differ."""
    torch.manual_seed(3)
    made = MoELayer(FeedForward(), WIDTH, experts=EXPERTS, meta_expert=meta_expert, capacity=capacity)
    for parameter in made.experts.parameters():
        nn.init.normal_(parameter)
    made.router.weight.normal_()
    made.router.bias.normal_()
    return made


def token_by_token(mixture: MoELayer, x_BLD: torch.Tensor, taken: set[int] | None = None) -> torch.Tensor:
    """The definition, without any sorting."""
    out: list[torch.Tensor] = []
    for place, x in enumerate(x_BLD.reshape(-1, WIDTH)):
        gates = torch.softmax(mixture.router.weight @ x + mixture.router.bias, 0)
        expert = int(gates.argmax())
        y = torch.zeros(WIDTH) if mixture.meta_expert is None else mixture.meta_expert(x)
        if taken is None or place in taken:
            y = y + gates[expert] * mixture.experts[expert](x)
        out.append(y)
    return torch.stack(out).view(x_BLD.shape)


@pytest.mark.parametrize("meta_expert", [True, False])
def test_a_layer_is_gate_times_expert_plus_meta_expert(meta_expert: bool) -> None:
    mixture = layer(meta_expert=meta_expert)
    reference = copy.deepcopy(mixture)
    x = torch.randn(3, 7, WIDTH, requires_grad=True)
    x_again = x.detach().clone().requires_grad_()
    out, expected = mixture(x), token_by_token(reference, x_again)
    assert torch.allclose(out, expected, atol=1e-6)
    assert mixture.dropped == 0
    out.square().sum().backward()
    expected.square().sum().backward()
    assert x.grad is not None and x_again.grad is not None
    assert torch.allclose(x.grad, x_again.grad, atol=1e-5)
    for (name, ours), theirs in zip(mixture.named_parameters(), reference.parameters(), strict=True):
        theirs_grad = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
        assert ours.grad is not None and torch.allclose(ours.grad, theirs_grad, atol=1e-5), name


def test_an_expert_without_tokens_is_still_part_of_the_graph() -> None:
    mixture = layer()
    mixture.router.weight.zero_()
    mixture.router.bias.copy_(torch.tensor([0.0, 9.0, 0.0, 0.0]))
    mixture(torch.randn(2, 5, WIDTH)).sum().backward()
    for index, expert in enumerate(mixture.experts):
        gradients = [p.grad for p in expert.parameters()]
        assert all(g is not None for g in gradients)
        assert any(bool(g.any()) for g in gradients if g is not None) == (index == 1)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=40), st.none() | st.floats(0.1, 5))
def test_dispatch_takes_the_first_tokens_of_each_expert_in_order(choices: list[int], capacity: float | None) -> None:
    order, counts = dispatch(torch.tensor(choices), EXPERTS, capacity)
    limit = len(choices) if capacity is None else math.ceil(capacity * len(choices) / EXPERTS)
    expected = [[t for t, choice in enumerate(choices) if choice == e][:limit] for e in range(EXPERTS)]
    assert order.tolist() == [t for tokens in expected for t in tokens]
    assert counts == [len(tokens) for tokens in expected]


def test_tokens_beyond_the_capacity_have_the_meta_expert_alone_and_are_counted() -> None:
    mixture = layer(capacity=0.5)
    x = torch.randn(2, 16, WIDTH)
    choices, _ = route(mixture.router(x.reshape(-1, WIDTH)))
    order, _ = dispatch(choices, EXPERTS, 0.5)
    out = mixture(x)
    assert torch.allclose(out, token_by_token(mixture, x, set(order.tolist())), atol=1e-6)
    assert mixture.dropped == 32 - len(order) > 0
    assert torch.equal(mixture(x), out), "the same tokens are dropped each time"


def test_the_router_is_exact_in_any_precision_and_never_learns() -> None:
    router = FrozenRouter(WIDTH, EXPERTS)
    router.weight.normal_()
    exact = router.weight.clone()
    assert not list(router.parameters())
    for cast in (torch.bfloat16, torch.float16, torch.float64):
        router.to(cast)
        assert router.weight.dtype == torch.float32 and torch.equal(router.weight, exact)
        assert router(torch.randn(2, WIDTH).to(cast)).dtype == torch.float32
    x = torch.randn(3, WIDTH)
    expected = router(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(router(x), expected)


def dense(name: str) -> tuple[Checkpoint, dict[str, torch.Tensor]]:
    recipe = load_recipe(name)
    tokenizer = train_tokenizer(recipe, ["Is there a lesion?", "Yes"] * 3)
    model = build_model(recipe, tokenizer).eval()
    prompt = ConversationEncoder(recipe, tokenizer, "phi", 192).prompt("<image>\nIs there a lesion?")
    pixels = torch.randn((1, 3, 96, 96), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": torch.tensor([prompt]), "pixel_values": pixels}
    return Checkpoint(model, tokenizer, ImageProcessor.of(recipe.model.vision_tower), recipe, {}), inputs


def upcycled(checkpoint: Checkpoint, **changes: Any) -> Checkpoint:
    assert checkpoint.recipe.model.moe is not None
    generator = torch.Generator().manual_seed(2)
    moe = checkpoint.recipe.model.moe.model_copy(update=changes)
    upcycle(checkpoint.model, moe, torch.randn((4, 128), generator=generator), torch.randn(4, generator=generator))
    return checkpoint


@pytest.mark.parametrize("name", TWINS)
def test_a_layer_of_copies_begins_as_one_plus_gate_times_the_dense_module(name: str) -> None:
    checkpoint, _ = dense(name)
    before = copy.deepcopy(checkpoint.model.model.language_model.layers[2].mlp)
    mixtures = dict(moe_layers(upcycled(checkpoint).model))
    assert list(mixtures) == [0, 2]
    x = torch.randn(2, 5, 128)
    _, gate = route(mixtures[2].router(x.reshape(-1, 128)))
    expected = (1 + gate.view(2, 5, 1)) * before(x)
    assert torch.allclose(mixtures[2](x), expected, atol=1e-5)


@pytest.mark.parametrize("name", TWINS)
def test_the_meta_path_alone_is_the_dense_model(name: str) -> None:
    checkpoint, inputs = dense(name)
    expected = checkpoint.model(**inputs).logits
    upcycled(checkpoint)
    assert not torch.allclose(checkpoint.model(**inputs).logits, expected, atol=0.01), "copies amplify: see the module"
    for _, mixture in moe_layers(checkpoint.model):
        mixture.routed = False
    assert torch.equal(checkpoint.model(**inputs).logits, expected)


@pytest.mark.parametrize("name", TWINS)
def test_silent_experts_begin_as_the_dense_model_and_can_learn(name: str) -> None:
    checkpoint, inputs = dense(name)
    expected = checkpoint.model(**inputs).logits
    upcycled(checkpoint, expert_start="silent")
    logits = checkpoint.model(**inputs).logits
    assert torch.allclose(logits, expected, atol=1e-6)
    logits.square().mean().backward()
    outputs = [p for n, p in checkpoint.model.named_parameters() if ".experts." in n and ("fc2" in n or "down" in n)]
    assert any(p.grad is not None and bool(p.grad.any()) for p in outputs)


@pytest.mark.parametrize("name", TWINS)
def test_a_mixture_opens_with_transformers_key_by_key(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    checkpoint, inputs = dense(name)
    upcycled(checkpoint)
    expected = checkpoint.model(**inputs).logits
    save_checkpoint(tmp_path / "c", checkpoint)
    loaded = load_checkpoint(tmp_path / "c").model.eval()
    assert loaded.config.moe == checkpoint.model.config.moe
    assert torch.equal(loaded(**inputs).logits, expected)
    auto: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "c", dtype=torch.bfloat16)
    weights = dict(checkpoint.model.named_buffers())
    for key, value in auto.named_buffers():
        if "router" in key:
            assert value.dtype == torch.float32 and torch.equal(value, weights[key])
    assert auto.lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("name", TWINS)
def test_generation_with_a_cache_gives_the_same_answer(name: str) -> None:
    checkpoint, inputs = dense(name)
    model: Any = upcycled(checkpoint).model
    cached = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert torch.equal(cached, model.generate(**inputs, max_new_tokens=6, do_sample=False, use_cache=False))


def test_a_router_of_another_shape_or_a_second_upcycling_is_refused() -> None:
    checkpoint, _ = dense(TWINS[0])
    moe = checkpoint.recipe.model.moe
    assert moe is not None
    with pytest.raises(ValueError, match=r"\(4, 64\)"):
        upcycle(checkpoint.model, moe, torch.zeros(4, 64), torch.zeros(4))
    upcycled(checkpoint)
    with pytest.raises(ValueError, match="experts already"):
        upcycled(checkpoint)


@pytest.mark.parametrize(
    ("name", "decoder", "active", "total_without_meta"),
    [
        # microsoft/phi-2 has 2,779,683,840 parameters; Med-MoE's Table 1: 3.6B active, 5.3B in total.
        ("cliva-med-phi2", 2_779_683_840, 3.6e9, 5.3e9),
        # stabilityai/stablelm-2-1_6b: 1,644,515,328; 2.0B active, 2.9B in total.
        ("cliva-med-stablelm", 1_644_515_328, 2.0e9, 2.9e9),
    ],
)
def test_full_size_models_have_the_published_number_of_parameters(
    name: str, decoder: int, active: float, total_without_meta: float
) -> None:
    from medvlm.models.vlm import MedVLMConfig, MedVLMForConditionalGeneration

    recipe = load_recipe(name)
    moe = recipe.model.moe
    assert moe is not None
    config: Any = MedVLMConfig
    with torch.device("meta"):
        model: Any = MedVLMForConditionalGeneration(
            config(
                vision_config=tower_config(recipe.model.vision_tower),
                text_config=decoder_config(recipe, recipe.model.tokenizer.vocab_size, {}),
                projector_kind=recipe.model.projector.kind,
            )
        )

        def count(*parts: nn.Module) -> int:
            return sum(p.numel() for part in parts for p in part.parameters())

        assert count(model.model.language_model, model.lm_head) == decoder
        one_expert = count(model.model.language_model.layers[0].mlp)
        install_experts(model.model.language_model, {**moe.model_dump(), "capacity": None})
    layers = len(range(0, recipe.model.language_model.layers, moe.every))
    total = count(model.model.language_model, model.lm_head)
    assert total == decoder + 4 * layers * one_expert
    assert total - 3 * layers * one_expert == pytest.approx(active, rel=0.03)
    # The paper's total leaves the meta expert out: it counts the original module as one of the four.
    assert total - layers * one_expert == pytest.approx(total_without_meta, rel=0.01)
