"""Projectors: shapes, and what the prototype extractor promises."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from medvlm.config import load_recipe
from medvlm.errors import RecipeError
from medvlm.models.checkpoint import Checkpoint, build_model, load_checkpoint, save_checkpoint
from medvlm.models.projector import PROJECTORS, ClusterProjector
from medvlm.models.tokenizer import train_tokenizer
from medvlm.models.vision import ImageProcessor

V, D, K, P = 24, 16, 5, 9


def config() -> Any:
    return SimpleNamespace(
        vision_config=SimpleNamespace(hidden_size=V),
        text_config=SimpleNamespace(hidden_size=D),
        projector_prototypes=K,
        projector_standardised=False,
    )


def cluster() -> ClusterProjector:
    torch.manual_seed(3)
    return ClusterProjector(config()).eval()


def features(images: int = 2) -> torch.Tensor:
    return torch.randn((images, P, V), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("kind", sorted(PROJECTORS))
def test_every_kind_gives_one_embedding_a_patch(kind: str) -> None:
    assert PROJECTORS[kind](config())(features()).shape == (2, P, D)


def test_centres_are_one_a_prototype() -> None:
    assert cluster().centres(features()).shape == (2, K, V)


def test_the_same_seed_gives_the_same_prototypes() -> None:
    assert torch.equal(cluster().prototypes, cluster().prototypes)


def test_a_permutation_of_patches_permutes_embeddings_and_changes_nothing_else() -> None:
    projector, order = cluster(), torch.randperm(P, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(projector(features()[:, order]), projector(features())[:, order])


def test_images_do_not_see_each_other() -> None:
    projector = cluster()
    torch.testing.assert_close(projector(features())[:1], projector(features()[:1]))


def test_a_patch_knows_of_the_others_of_its_image() -> None:
    projector, changed = cluster(), features()
    changed[0, 0] *= -1
    moved = (projector(changed) - projector(features())).abs().sum(-1)
    assert (moved[0, 1:] > 1e-6).all() and (moved[1] == 0).all()


def test_patches_gather_at_the_prototype_they_resemble() -> None:
    """Written out by hand: identity maps, patches that point exactly at prototypes, a hard choice."""
    projector = cluster()
    with torch.no_grad():
        for layer in (projector.query, projector.key, projector.value):
            layer.weight.copy_(torch.eye(V))
        projector.prototypes.copy_(torch.eye(K, V))
        projector.log_sharpness.fill_(6.0)
        setattr(projector, "norm", torch.nn.Identity())  # noqa: B010  # its type is another
        patches = torch.eye(V)[[0, 0, 3]][None] * torch.tensor([1.0, 3.0, 5.0])[None, :, None]
        centres = projector.centres(patches)[0]
        given = projector.dispatch(patches, centres[None])[0]
    # Mean of 1 and 3 upon the prototype itself; 5 upon another; the others keep nothing of note.
    assert centres[0, 0].item() == pytest.approx(3.0, abs=1e-3)
    assert centres[3, 3].item() == pytest.approx(6.0, abs=1e-3)
    torch.testing.assert_close(given, centres[[0, 0, 3]], atol=1e-3, rtol=0)


def test_gradients_reach_every_weight() -> None:
    projector = cluster()
    projector(features()).square().sum().backward()
    for name, parameter in projector.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if "multi_modal_projector" in name}


def test_a_checkpoint_holds_every_weight_of_it(tmp_path: Path) -> None:
    recipe = load_recipe(
        "tiny-llava-med", ["model.projector.kind=cluster", f"model.projector.prototypes={K}", "seed=8"]
    )
    tokenizer = train_tokenizer(recipe, ["Is there a lesion?"])
    model = build_model(recipe, tokenizer)
    drawn, again = weights(model), weights(build_model(recipe, tokenizer))
    assert all(torch.equal(again[name], value) for name, value in drawn.items())
    processor = ImageProcessor.of(recipe.model.vision_tower)
    save_checkpoint(tmp_path / "c", Checkpoint(model, tokenizer, processor, recipe, {}))
    assert set(drawn) == {f"model.multi_modal_projector.{name}" for name in cluster().state_dict()}
    held = {name for name in load_file(tmp_path / "c/model.safetensors") if "multi_modal_projector" in name}
    assert held == set(drawn)
    loaded = weights(load_checkpoint(tmp_path / "c").model)
    assert all(torch.equal(loaded[name], value) for name, value in drawn.items())


@pytest.mark.parametrize("change", ["model.projector.kind=cluster", "model.projector.prototypes=4"])
def test_prototypes_belong_to_the_cluster_kind(change: str) -> None:
    with pytest.raises(RecipeError, match="prototypes belongs to kind 'cluster' or"):
        load_recipe("tiny-llava-med", [change])
