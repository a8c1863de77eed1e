"""STLLaVA-Med's published projector: its names load, all of them, and give the numbers of the published formula."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models.llava_originals import LLAMA_MLP, Original, inside, original, write_original
from torch.nn.functional import adaptive_avg_pool1d, linear, normalize

from medvlm.errors import CheckpointError
from medvlm.models.checkpoint import load_checkpoint
from medvlm.models.importing import Parts, import_checkpoint
from medvlm.models.projector import PooledClusterProjector

K = 5
POOLED = [line for line in LLAMA_MLP if "projector.kind" not in line]
POOLED += ["model.projector.kind=cluster_pooled", f"model.projector.prototypes={K}"]
PREFIX = "model.mm_projector."
LAYERS = {"c": "centre", "v": "key", "f": "value", "mlp.0": "linear_1", "mlp.2": "linear_2"}


def published(width_in: int, width_out: int) -> dict[str, torch.Tensor]:
    """Tensors under the published names, in the published shapes: the state dict of their ``Clustering``."""
    generator = torch.Generator().manual_seed(4)
    made = {"sim_alpha": torch.full((1, 1, 1), 1.7), "sim_beta": torch.full((1, 1, 1), -0.3)}
    for name in ("c", "v", "f", "mlp.0", "mlp.2"):
        rows, columns = (width_out if "mlp" in name else width_in), (width_out if name == "mlp.2" else width_in)
        made[f"{name}.weight"] = torch.randn((rows, columns), generator=generator) * 0.3
        made[f"{name}.bias"] = torch.randn(rows, generator=generator) * 0.3
    made["ln_1.weight"], made["ln_1.bias"] = torch.full((width_in,), 9.0), torch.full((width_in,), 9.0)
    return {f"{PREFIX}{name}": value for name, value in made.items()}


def published_formula(weights: dict[str, torch.Tensor], x_NPV: torch.Tensor) -> torch.Tensor:
    """The formula of heliossun/STLLaVA-Med at 9113c41, one image and one patch at a time."""
    w = {name.removeprefix(PREFIX): value for name, value in weights.items()}
    images: list[torch.Tensor] = []
    for x in x_NPV:
        patches = len(x)
        feature = linear(x, w["f.weight"], w["f.bias"])
        value = linear(x, w["v.weight"], w["v.bias"]).T
        bins = [(k * patches // K, -(-(k + 1) * patches // K)) for k in range(K)]
        centers = torch.stack([x[a:b].mean(0) for a, b in bins])
        begun = torch.stack([feature[a:b].mean(0) for a, b in bins])
        torch.testing.assert_close(centers, adaptive_avg_pool1d(x.T[None], K)[0].T)
        for _ in range(2):
            centers = linear(centers, w["c.weight"], w["c.bias"])
            sim = torch.softmax(normalize(centers, dim=-1) @ normalize(value, dim=-1), dim=0)
            centers = sim @ feature
        total, count, chosen = begun.clone(), torch.ones(K), []
        for p in range(patches):
            cosine = torch.stack([normalize(c, dim=0) @ normalize(x[p], dim=0) for c in centers])
            similarity = torch.sigmoid(w["sim_beta"].flatten() + w["sim_alpha"].flatten() * cosine)
            k = int(similarity.argmax())
            total[k] += similarity[k] * feature[p]
            count[k] += 1
            chosen.append((k, similarity[k]))
        out = torch.stack([x[p] + s * total[k] / count[k] for p, (k, s) in enumerate(chosen)])
        hidden = linear(out, w["mlp.0.weight"], w["mlp.0.bias"])
        images.append(linear(hidden * torch.sigmoid(1.702 * hidden), w["mlp.2.weight"], w["mlp.2.bias"]))
    return torch.stack(images)


def made_by_them(folder: Path) -> tuple[Original, dict[str, torch.Tensor]]:
    """A checkpoint under the originals' names, and its projector's tensors."""
    made = original(folder, POOLED)
    made.config["mm_projector_type"] = "cluster"
    model = made.recipe.model
    projector = published(model.vision_tower.hidden_size, model.language_model.hidden_size)
    rest = {name: value for name, value in made.weights.items() if not name.startswith(PREFIX)}
    made.weights.clear()
    made.weights.update(rest | projector)
    return made, projector


@pytest.mark.parametrize("patches", [5, 12, 16])
def test_it_computes_the_published_formula(patches: int) -> None:
    config: Any = SimpleNamespace(
        vision_config=SimpleNamespace(hidden_size=6), text_config=SimpleNamespace(hidden_size=4), projector_prototypes=K
    )
    weights = published(6, 4)
    ours = {
        f"{name}.{kind}": weights[f"{PREFIX}{theirs}.{kind}"]
        for theirs, name in LAYERS.items()
        for kind in ("weight", "bias")
    }
    ours |= {"likeness_scale": weights[f"{PREFIX}sim_alpha"], "likeness_shift": weights[f"{PREFIX}sim_beta"]}
    projector = PooledClusterProjector(config)
    projector.load_state_dict(ours)
    x = torch.randn((2, patches, 6), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(projector(x), published_formula(weights, x), atol=1e-5, rtol=1e-4)
    projector(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in projector.parameters())


def test_a_published_checkpoint_loads_with_every_tensor_accounted_for(tmp_path: Path) -> None:
    made, projector = made_by_them(tmp_path)
    source = write_original(tmp_path / "source", made, made.weights | inside(made))
    result = import_checkpoint(source, made.recipe, tmp_path / "o")
    # What their forward pass never reads is said, not lost in silence.
    assert sorted(result.dropped) == [f"{PREFIX}ln_1.bias", f"{PREFIX}ln_1.weight"]
    assert result.tensors + len(result.dropped) == len(made.weights) + len(made.tower)
    model = load_checkpoint(tmp_path / "o").model
    x = torch.randn((2, 16, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = model.model.multi_modal_projector(x)
    torch.testing.assert_close(found, published_formula(projector, x), atol=1e-5, rtol=1e-4)
    assert made.logits(model).isfinite().all()


def test_the_projector_alone_over_a_language_model(tmp_path: Path) -> None:
    """As it is published: a repository of the projector beside those of the language model and the tower."""
    made, projector = made_by_them(tmp_path)
    base = {name: value for name, value in made.weights.items() if name not in projector}
    source = write_original(tmp_path / "source", made, base | inside(made))
    torch.save(projector, tmp_path / "mm_projector.bin")
    result = import_checkpoint(source, made.recipe, tmp_path / "o", Parts(projector=tmp_path / "mm_projector.bin"))
    assert sorted(result.dropped) == [f"{PREFIX}ln_1.bias", f"{PREFIX}ln_1.weight"]
    weight = load_checkpoint(tmp_path / "o").model.model.multi_modal_projector.centre.weight
    assert torch.equal(weight, projector[f"{PREFIX}c.weight"])


def test_the_described_extractor_is_refused_for_it_with_the_setting_that_helps(tmp_path: Path) -> None:
    made, _ = made_by_them(tmp_path)
    source = write_original(tmp_path / "source", made, made.weights | inside(made))
    described = original(tmp_path / "ours", [line.replace("cluster_pooled", "cluster") for line in POOLED]).recipe
    with pytest.raises(CheckpointError) as caught:
        import_checkpoint(source, described, tmp_path / "o")
    assert "--set model.projector.kind=cluster_pooled" in caught.value.hint


@pytest.mark.parametrize("name", ["sim_alpha", "c.bias", "mlp.2.weight"])
def test_a_missing_tensor_is_an_error(tmp_path: Path, name: str) -> None:
    made, _ = made_by_them(tmp_path)
    del made.weights[f"{PREFIX}{name}"]
    source = write_original(tmp_path / "source", made, made.weights | inside(made))
    with pytest.raises(CheckpointError, match=r"1 missing: model\.multi_modal_projector"):
        import_checkpoint(source, made.recipe, tmp_path / "o")
