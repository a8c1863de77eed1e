"""Laid-out linear layers: the same results, and nothing changed where they do not apply."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medvlm.models.packed import PackedLinears

there = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def layer(width: int = 24, out: int = 40, *, bias: bool = False) -> nn.Linear:
    made = nn.Linear(width, out, bias=bias)
    made.weight.data, made.weight.requires_grad = drawn(out, width), False
    if bias:
        made.bias.data = drawn(out)
    return made


@pytest.fixture
def laid_out(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the weights that are laid out, in the order in which it happens."""
    shapes: list[tuple[int, ...]] = []
    original: Any = torch.ops.mkldnn._reorder_linear_weight

    class Watched:
        _linear_pointwise = torch.ops.mkldnn._linear_pointwise

        @staticmethod
        def _reorder_linear_weight(weight: Tensor, rows: int) -> Tensor:
            shapes.append(tuple(weight.shape))
            return original(weight, rows)

    monkeypatch.setattr(torch.ops, "mkldnn", Watched, raising=False)
    return shapes


@there
@pytest.mark.parametrize("rows", [(1,), (3, 1), (2, 7), (600,)])
@pytest.mark.parametrize("bias", [False, True])
def test_results_are_those_of_the_layer(rows: tuple[int, ...], bias: bool, laid_out: list[tuple[int, ...]]) -> None:
    model, given = nn.Sequential(layer(bias=bias), nn.GELU(), layer(40, 24)), drawn(*rows, 24)
    packed = PackedLinears(smallest=1)
    with torch.inference_mode():
        expected = model(given)
        with packed:
            first = model(given)
        with packed:
            second = model(given)
    torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(first, second)
    assert laid_out == [(40, 24), (24, 40)]


@there
def test_a_part_of_a_sequence_and_an_empty_batch_are_taken(laid_out: list[tuple[int, ...]]) -> None:
    subject, given = layer(), drawn(2, 5, 24)
    with torch.inference_mode(), PackedLinears(smallest=1):
        last = subject(given[:, -1:])
        nothing = subject(given[:0])
    torch.testing.assert_close(last, (given[:, -1:] @ subject.weight.T), rtol=1e-4, atol=1e-4)
    assert nothing.shape == (0, 5, 40) and laid_out == [(40, 24)]


@there
def test_a_weight_that_has_changed_is_laid_out_anew(laid_out: list[tuple[int, ...]]) -> None:
    subject, given, packed = layer(), drawn(3, 24), PackedLinears(smallest=1)
    for change in (
        lambda: None,
        lambda: subject.weight.mul_(2),
        lambda: setattr(subject.weight, "data", drawn(40, 24)),
    ):
        with torch.no_grad(), packed:
            change()
            got = subject(given)
        torch.testing.assert_close(got, given @ subject.weight.T, rtol=1e-4, atol=1e-4)
    assert len(laid_out) == 3


@there
def test_what_learns_is_small_or_too_much_or_of_another_type_runs_as_it_did(laid_out: list[tuple[int, ...]]) -> None:
    given = drawn(3, 24)
    learns = layer().requires_grad_(True)
    with PackedLinears(smallest=1):
        learns(given).sum().backward()
    assert learns.weight.grad is not None
    with torch.no_grad():
        with PackedLinears(smallest=24 * 40 + 1):
            layer()(given)
        with PackedLinears(smallest=1):
            layer().to(torch.bfloat16)(given.to(torch.bfloat16))
        assert laid_out == []
        with PackedLinears(smallest=1, at_most_bytes=24 * 40 * 4 + 1):
            layer()(given)
            layer(24, 8)(given)
    assert laid_out == [(40, 24)]


def test_without_onednn_nothing_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    subject, given = layer(), drawn(3, 24)
    with torch.inference_mode(), PackedLinears(smallest=1):
        assert torch.equal(subject(given), nn.functional.linear(given, subject.weight))
