"""Router files of others: read as tensors or not at all."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from medvlm.errors import CheckpointError
from medvlm.models.router_file import read_router, write_router


def published(width: int = 2560) -> OrderedDict[str, torch.Tensor]:
    """As phi_router.pth is laid out: 2,560 wide, float32."""
    generator = torch.Generator().manual_seed(1)
    weight, bias = torch.randn((4, width), generator=generator), torch.randn(4, generator=generator)
    return OrderedDict([("fc1.weight", weight), ("fc1.bias", bias)])


@pytest.mark.parametrize("width", [2560, 2048])
def test_the_published_layout(tmp_path: Path, width: int) -> None:
    tensors = published(width)
    torch.save(tensors, tmp_path / "router.pth")
    weight, bias = read_router(tmp_path / "router.pth", experts=4, width=width)
    assert torch.equal(weight, tensors["fc1.weight"]) and torch.equal(bias, tensors["fc1.bias"])
    write_router(tmp_path, weight, bias)
    again = read_router(tmp_path / "router.safetensors", experts=4, width=width)
    assert torch.equal(again[0], weight) and torch.equal(again[1], bias)


class _Hostile:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("executed"),))


def refusal(path: Path, width: int = 2560) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        read_router(path, experts=4, width=width)
    assert caught.value.where == str(path) and caught.value.hint
    return caught.value


def test_a_file_that_would_run_code_is_refused_and_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"fc1.weight": _Hostile()}, tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes(pickle.dumps(_Hostile(), protocol=2))
    for name in ("a.pth", "b.pth"):
        assert "cannot be read safely" in refusal(tmp_path / name).what
    assert not (tmp_path / "executed").exists()


def test_a_router_of_another_model_is_refused_with_both_sizes(tmp_path: Path) -> None:
    torch.save(published(2048), tmp_path / "stablelm_router.pth")
    error = refusal(tmp_path / "stablelm_router.pth")
    assert "a width of 2048" in error.what and "a width of 2560" in error.what
    assert "phi_router.pth" in error.hint


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"fc1.weight": torch.zeros(4, 2560)}, "the file holds fc1.weight"),
        ({**published(), "fc2.weight": torch.zeros(1)}, "fc2.weight"),
        ({"fc1.weight": torch.full((4, 2560), float("nan")), "fc1.bias": torch.zeros(4)}, "not finite"),
        ({"fc1.weight": torch.zeros(4), "fc1.bias": torch.zeros(4)}, "tensors of shape (4,)"),
        ({"fc1.weight": 3, "fc1.bias": torch.zeros(4)}, "something else than tensors"),
        ([1, 2], "a list"),
    ],
)
def test_a_file_that_holds_no_router_is_refused(tmp_path: Path, content: Any, words: str) -> None:
    torch.save(content, tmp_path / "router.pth")
    assert words in refusal(tmp_path / "router.pth").what


def test_a_missing_or_damaged_file(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "none.pth").what
    torch.save(published(), tmp_path / "cut.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:5000])
    assert "cannot be read safely" in refusal(tmp_path / "cut.pth").what
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0")
    assert "cannot be read safely" in refusal(tmp_path / "cut.safetensors").what
