"""Rows of several sequences and trees of questions: no token sees what it would not see alone."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medvlm.config import load_recipe
from medvlm.models.checkpoint import build_model
from medvlm.models.tokenizer import train_tokenizer
from medvlm.records import Turn
from medvlm.training.collate import ConversationEncoder, collate
from medvlm.training.engine import choose_engine
from medvlm.training.kernels import prepare_kernels
from medvlm.training.objectives import answer_loss
from medvlm.training.packing import IGNORED, Encoded, Packing, pack_rows, share_prefix

RECIPE = load_recipe("tiny-llava-med", ["model.image_first=true"])
PAIRS = [
    ("Is there a lesion?", "Yes"),
    ("Is there a fracture of the rib?", "No, nothing at all can be seen"),
    ("Where?", "On the left side"),
    ("What is shown here, and why?", "A lesion."),
]


@functools.cache
def parts() -> tuple[Any, Any, ConversationEncoder]:
    tokenizer = train_tokenizer(RECIPE, [text for pair in PAIRS for text in pair] * 3)
    model = build_model(RECIPE, tokenizer).train()
    return model, tokenizer, ConversationEncoder(RECIPE, tokenizer, "vicuna_v1", 192)


def encoded(question: str, answer: str) -> Encoded:
    return parts()[2].encode((Turn("user", f"<image>\n{question}"), Turn("assistant", answer)), "s")


def pixels(seed: int) -> torch.Tensor:
    return torch.randn((3, 96, 96), generator=torch.Generator().manual_seed(seed))


def row(image: int, *sequences: Encoded) -> dict[str, Any]:
    return {"sequences": list(sequences), "pixels": pixels(image), "sample_ids": [f"s{image}"]}


def loss_and_gradients(
    rows: list[dict[str, Any]], packing: Packing = "off"
) -> tuple[float, list[torch.Tensor], dict[str, Any]]:
    model, tokenizer, _ = parts()
    model.set_attn_implementation("sdpa")
    stage = RECIPE.stages[1]
    prepare_kernels(model, stage, replace(choose_engine(RECIPE, stage), packing=packing, onednn=False))
    batch = collate(rows, tokenizer.pad_token_id, packing=packing)
    shapes = dict(batch)
    del batch["sample_ids"], batch["spans"]
    model.zero_grad(set_to_none=True)
    loss = answer_loss(model, batch, None)
    loss.backward()
    return loss.item(), [p.grad.clone() for p in model.parameters() if p.grad is not None], shapes


def same(one: tuple[Any, ...], two: tuple[Any, ...]) -> None:
    assert one[0] == pytest.approx(two[0], abs=1e-5)
    assert len(one[1]) == len(two[1])
    for ours, theirs in zip(one[1], two[1], strict=True):
        assert torch.allclose(ours, theirs, atol=2e-5), (ours - theirs).abs().max()


@pytest.mark.parametrize(("packing", "count"), [("mask", 2), ("blocks", 1)])
def test_packed_rows_have_the_loss_and_gradients_of_padded_ones(packing: Packing, count: int) -> None:
    long = encoded("What is shown here? " * 12, "A lesion on the left side. " * 4)
    rows = [row(0, encoded(*PAIRS[0])), row(1, long), row(2, encoded(*PAIRS[1])), row(3, encoded(*PAIRS[2]))]
    padded, packed = loss_and_gradients(rows), loss_and_gradients(rows, packing)
    assert len(packed[2]["input_ids"]) == count and len(padded[2]["input_ids"]) == 4
    assert packed[2]["pixel_values"].shape[0] == 4
    same(padded, packed)


@pytest.mark.parametrize("packing", ["off", "mask", "blocks"])
def test_questions_behind_one_image_have_the_loss_and_gradients_of_separate_rows(packing: Packing) -> None:
    sequences = [encoded(*pair) for pair in PAIRS]
    tree = share_prefix(sequences, parts()[2].image_id)
    assert tree is not None and tree.ids.count(parts()[2].image_id) == RECIPE.model.image_tokens
    assert len(tree.ids) < 0.6 * sum(len(sequence.ids) for sequence in sequences)
    other = encoded(*PAIRS[2])
    apart = loss_and_gradients([row(0, *sequences), row(1, other)])
    together = loss_and_gradients([row(0, tree), row(1, other)], packing)
    assert len(together[2]["pixel_values"]) == 2 and len(apart[2]["pixel_values"]) == 5
    same(apart, together)


def test_a_question_does_not_see_the_other_questions() -> None:
    model, tokenizer, encoder = parts()
    logits = []
    for first in (PAIRS[0], PAIRS[1]):
        tree = share_prefix([encoded(*first), encoded(*PAIRS[2])], encoder.image_id)
        assert tree is not None
        batch = collate([row(0, tree)], tokenizer.pad_token_id)
        inputs = {k: v for k, v in batch.items() if k not in ("labels", "sample_ids")}
        with torch.no_grad():
            logits.append(model(**inputs).logits[0, -len(tree.branches) + tree.branches.index(2) :])
    assert torch.allclose(*logits, atol=1e-5)


def test_a_question_before_its_image_shares_nothing() -> None:
    recipe = load_recipe("tiny-llava-med")
    encoder = ConversationEncoder(recipe, parts()[1], "vicuna_v1", 192)
    sequences = [encoder.encode((Turn("user", f"{q}\n<image>"), Turn("assistant", a)), "s") for q, a in PAIRS]
    assert share_prefix(sequences, encoder.image_id) is None
    assert share_prefix(sequences[:1], encoder.image_id) is sequences[0]


def test_equal_questions_keep_their_answers_apart() -> None:
    sequences = [encoded("Where?", "left"), encoded("Where?", "left")]
    tree = share_prefix(sequences, parts()[2].image_id)
    assert tree is not None
    learned = [label for label in tree.labels if label != IGNORED]
    assert learned == [label for s in sequences for label in s.labels if label != IGNORED]
    same(loss_and_gradients([row(0, *sequences)]), loss_and_gradients([row(0, tree)]))


def test_positions_go_on_from_the_shared_beginning() -> None:
    tree = Encoded([1] * 7, [IGNORED] * 7, 0, [0, 0, 0, 1, 1, 2, 2])
    assert tree.positions == [0, 1, 2, 3, 4, 3, 4]
    assert Encoded([1] * 3, [IGNORED] * 3, 0).positions == [0, 1, 2]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=24))
def test_every_sequence_has_one_place_and_no_row_is_longer_than_the_longest(lengths: list[int]) -> None:
    rows = pack_rows(lengths, "mask")
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= max(lengths) for row in rows)
    assert len(rows) <= len(pack_rows(lengths, "off")) == len(lengths)


@pytest.mark.parametrize("packing", ["blocks", "varlen"])
def test_all_sequences_stand_in_one_row_whose_positions_begin_anew(packing: Packing) -> None:
    sequences = [encoded(*pair) for pair in PAIRS]
    batch = collate([row(i, s) for i, s in enumerate(sequences)], parts()[1].pad_token_id, packing=packing)
    assert batch["input_ids"].shape == (1, sum(len(s.ids) for s in sequences))
    assert (batch["position_ids"] == 0).sum() == len(PAIRS)
    # Flash-attention tells them apart by that alone.
    assert ("attention_mask" in batch) == (packing == "blocks")


@pytest.mark.parametrize("held", [None, 3])
def test_a_bounded_number_of_logits_gives_the_same_loss(held: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row(0, encoded(*PAIRS[0])), row(1, encoded(*PAIRS[1]))]
    whole = loss_and_gradients(rows)
    sizes: list[int] = []
    model = parts()[0]
    hook = model.lm_head.register_forward_hook(lambda *call: sizes.append(call[2].numel() // call[2].shape[-1]))
    monkeypatch.setattr(model, "head_tokens", held)
    part = loss_and_gradients(rows)
    hook.remove()
    same(whole, part)
    assert max(sizes) == (3 if held else rows_tokens(part[2]) - 2)


def rows_tokens(batch: dict[str, Any]) -> int:
    return batch["input_ids"].numel()
