"""Linear layers through oneDNN: the results and gradients of the layer, and nothing changed where they do not apply."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from medvlm.training import onednn
from medvlm.training.onednn import SMALLEST, onednn_serves, use_onednn

pytestmark = pytest.mark.skipif(not onednn_serves(), reason="this PyTorch has no oneDNN")


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of what oneDNN gave, in the order in which it was asked."""
    shapes: list[tuple[int, ...]] = []
    original: Any = onednn._product

    def product(*operands: Any) -> Tensor:
        shapes.append(tuple((result := original(*operands)).shape))
        return result

    monkeypatch.setattr(onednn, "_product", product)
    return shapes


def gradients(model: nn.Module, given: Tensor, weights: Tensor) -> list[Tensor]:
    output = model(given)
    learned = [given, *model.parameters()] if given.requires_grad else list(model.parameters())
    return [output, *torch.autograd.grad((output * weights).sum(), learned)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1024, 32), (2, 512, 32), (32, 1024)])
def test_results_and_gradients_are_those_of_the_layer(
    shape: tuple[int, ...], bias: bool, products: list[tuple[int, ...]]
) -> None:
    given = drawn(*shape)
    given = (given if shape[-1] == 32 else given.t()).requires_grad_()  # the last is a transposed view
    stock, weights = nn.Linear(32, 64, bias=bias), drawn(*given.shape[:-1], 64)
    ours = copy.deepcopy(stock)
    assert use_onednn(ours) == 1
    for mine, its in zip(gradients(ours, given, weights), gradients(stock, given, weights), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-3)
    assert products == [(*given.shape[:-1], 64), tuple(given.shape), (64, 32)]


def test_a_gradient_is_made_only_where_something_learns(products: list[tuple[int, ...]]) -> None:
    layer = nn.Linear(32, 64)
    use_onednn(layer)
    layer.weight.requires_grad = False
    (grad,) = torch.autograd.grad(layer(drawn(1024, 32)).sum(), [layer.bias])
    torch.testing.assert_close(grad, torch.full((64,), 1024.0))
    given = drawn(1024, 32).requires_grad_()
    layer.requires_grad_(False)
    layer(given).sum().backward()
    assert given.grad is not None and products == [(1024, 64), (1024, 64), (1024, 32)]


@pytest.mark.parametrize(("rows", "kind"), [(SMALLEST // 2048 - 1, torch.float32), (2048, torch.bfloat16)])
def test_small_products_and_other_types_run_as_they_did(
    rows: int, kind: torch.dtype, products: list[tuple[int, ...]]
) -> None:
    stock = nn.Linear(32, 64).to(kind)
    ours, given = copy.deepcopy(stock), drawn(rows, 32).to(kind)
    use_onednn(ours)
    assert torch.equal(ours(given), stock(given)) and not products
    assert ours(given[:0]).shape == (0, 64)


def test_other_kinds_of_layers_are_left_alone() -> None:
    class Packed(nn.Linear):
        """As 4-bit layers are."""

    model = nn.Sequential(Packed(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))
    assert use_onednn(model) == 1
    assert "forward" not in vars(model[0]) and "forward" in vars(model[2])


def test_a_copy_of_a_model_computes_with_its_own_weights(products: list[tuple[int, ...]]) -> None:
    layer = nn.Linear(32, 64, bias=False)
    use_onednn(layer)
    other, given = copy.deepcopy(layer), drawn(1024, 32)
    other.weight.data.mul_(2)
    torch.testing.assert_close(other(given), 2 * layer(given))
    assert len(products) == 2


def test_activations_can_be_made_again(products: list[tuple[int, ...]]) -> None:
    layer, given = nn.Linear(32, 64), drawn(1024, 32).requires_grad_()
    use_onednn(layer)
    expected = gradients(layer, given, drawn(1024, 64))
    again: Any = checkpoint(layer, given, use_reentrant=False)
    found = torch.autograd.grad((again * drawn(1024, 64)).sum(), [given, *layer.parameters()])
    for mine, its in zip(found, expected[1:], strict=True):
        assert torch.equal(mine, its)
    assert len(products) == 7
