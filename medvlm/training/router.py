"""The domain router: one linear layer that tells which modality's expert a token goes to.

It is learned after stage 2, whose model does not change any more, from the states that it will read in stage 3: the
inputs of the feed-forward modules that become mixtures, token by token. One layer of weights serves them all, as in
the published files. Tokens before the image cannot know its modality and are left out.

Shape letters: T tokens, D model width, E experts (one a domain).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from medvlm.config import recipe_differences, router_yaml
from medvlm.errors import CheckpointError
from medvlm.models.router_file import read_router, write_router
from medvlm.progress import report_progress
from medvlm.recipe_schema import MoE, Recipe
from medvlm.store import Report, Workspace, atomic_folder, fingerprint, read_json, write_json, write_report
from medvlm.training.data import check_contract, data_fingerprint, quarantined_rows, read_stage_samples
from medvlm.training.router_states import RouterStates, by_modality, collect_states, labelled

if TYPE_CHECKING:
    from torch import Tensor

    from medvlm.models.checkpoint import Checkpoint

__all__ = [
    "TrainedRouter",
    "fit_router",
    "read_trained_router",
    "router_loss",
    "start_of_mixture",
    "train_router",
]

BATCH_STATES = 2048
_CURVE_POINTS = 5


@dataclass(frozen=True, slots=True)
class TrainedRouter:
    """What stage 3 puts into every mixture."""

    weight: Tensor
    """(E, D), float32."""
    bias: Tensor
    """(E,), float32."""
    domains: tuple[tuple[str, ...], ...]
    """Modalities of each expert, in the router's order."""
    fingerprint: str
    accuracy: float


def router_loss(states_TD: Tensor, domain_T: Tensor, weight_ED: Tensor, bias_E: Tensor) -> Tensor:
    """Mean cross-entropy of the tokens' domains under the router's softmax, in float32."""
    from torch.nn import functional

    return functional.cross_entropy(functional.linear(states_TD.float(), weight_ED, bias_E), domain_T)


def fit_router(
    states_TD: Tensor, domain_T: Tensor, *, experts: int, steps: int, learning_rate: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Weight (E, D) and bias (E,), from zeros, by Adam on drawn batches of states.

    Same states and seed, same router.
    """
    import torch

    weight = torch.zeros((experts, states_TD.shape[1]), requires_grad=True)
    bias = torch.zeros(experts, requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=learning_rate)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        drawn = torch.randint(len(states_TD), (min(BATCH_STATES, len(states_TD)),), generator=generator)
        optimizer.zero_grad()
        router_loss(states_TD[drawn], domain_T[drawn], weight, bias).backward()
        optimizer.step()
    return weight.detach(), bias.detach()


def train_router(workspace: Workspace, recipe: Recipe, *, fresh: bool = False) -> Report:
    """Train a recipe's domain router, or take over a published one, and measure it on held-out images.

    Args:
        workspace: Gives stage 2's checkpoint and the instruction samples; gets ``routers/<recipe>``.
        recipe: With ``model.moe``.
        fresh: Train again what is finished.

    Returns:
        Metrics ``accuracy`` (images) and ``token_accuracy`` on held-out images; the confusion of domains and
        experts, labels by modality, and accuracy by number of labels in the details.

    Raises:
        CheckpointError: The recipe has no experts, stage 2 has no checkpoint, or the router's file does not fit.
        InputError: A domain has fewer than two labelled images, or there are no samples.
        TrainingError: The dataset broke its contract.
    """
    from medvlm.models.checkpoint import load_checkpoint

    started = time.monotonic()
    moe = _moe(recipe)
    instruct = recipe.stages[-2]
    check_contract(workspace, instruct)
    folder = workspace.checkpoint(recipe.name, len(recipe.stages) - 1)
    start = load_checkpoint(folder)
    _same_model(recipe, start, folder)
    shards = workspace.samples("instruct")
    quarantined = quarantined_rows(workspace, instruct)
    mark = router_fingerprint(recipe, start.metadata["fingerprint"], data_fingerprint([shards], quarantined))
    target = workspace.router_weights(recipe.name)
    if not fresh and (target / "metadata.json").is_file():
        metadata = read_json(target / "metadata.json")
        if metadata["fingerprint"] == mark:
            click.echo(f"{target}: finished before, from the same recipe, data and start; kept", err=True)
            return _report(workspace, recipe, metadata, started, reused=True)
    samples = read_stage_samples(
        [shards],
        instruct.model_copy(update={"max_samples": None}),
        recipe.seed,
        language=recipe.language,
        quarantined=quarantined,
    )
    train, held_out = labelled(samples, moe, recipe.seed)
    states = collect_states(start, recipe, moe, train, "train")
    measured_on = collect_states(start, recipe, moe, held_out, "held out")
    weight, bias, details = _train_and_measure(recipe, moe, states, measured_on)
    metadata = {
        "fingerprint": mark,
        "start": start.metadata["fingerprint"],
        "recipe": recipe.name,
        "seed": recipe.seed,
        **details,
        "labels": {"train": by_modality(train), "held_out": by_modality(held_out)},
    }
    with atomic_folder(target) as temporary:
        write_router(temporary, weight, bias)
        write_json(temporary / "metadata.json", metadata)
    return _report(workspace, recipe, metadata, started, reused=False)


def router_fingerprint(recipe: Recipe, start: str, data: str) -> str:
    """Changes with the recipe's part in the router, the start checkpoint, the samples and a given router's file."""
    source = _moe(recipe).router.source
    given = [] if source == "train" or not Path(source).is_file() else [Path(source)]
    return fingerprint(router_yaml(recipe), start, data, *given)


def read_trained_router(workspace: Workspace, recipe: Recipe, start: str) -> TrainedRouter:
    """The router that stage 3 begins with.

    Args:
        workspace: Holds ``routers/<recipe>``.
        recipe: With ``model.moe``.
        start: Fingerprint of stage 2's checkpoint.

    Raises:
        CheckpointError: It was not trained yet, or for another checkpoint of stage 2.
    """
    moe = _moe(recipe)
    folder = workspace.router_weights(recipe.name)
    hint = f"run 'medvlm train-router --recipe {recipe.name}'"
    if not (folder / "metadata.json").is_file():
        raise CheckpointError("the domain router is not trained yet", where=str(folder), hint=hint)
    metadata = read_json(folder / "metadata.json")
    if metadata["start"] != start:
        raise CheckpointError(
            "the domain router was trained for another checkpoint of the stage before", where=str(folder), hint=hint
        )
    width = recipe.model.language_model.hidden_size
    weight, bias = read_router(folder / "router.safetensors", experts=moe.experts, width=width)
    domains = tuple(tuple(domain) for domain in metadata["domains"])
    return TrainedRouter(weight, bias, domains, metadata["fingerprint"], metadata["accuracy"])


def start_of_mixture(workspace: Workspace, recipe: Recipe, start: Checkpoint) -> None:
    """Upcycle stage 2's model, in place, with the recipe's trained router in every mixture.

    Raises:
        CheckpointError: There is no router for this checkpoint.
    """
    from medvlm.models.moe import upcycle

    router = read_trained_router(workspace, recipe, start.metadata["fingerprint"])
    moe = _moe(recipe).model_copy(update={"domains": router.domains})
    upcycle(start.model, moe, router.weight, router.bias)


def _moe(recipe: Recipe) -> MoE:
    if recipe.model.moe is None:
        raise CheckpointError(
            "this recipe has no experts, so it needs no router",
            where=f"recipe {recipe.name}, field model.moe",
            hint="choose a recipe with a stage moe_tune, such as tiny-cliva-med-phi2",
        )
    return recipe.model.moe


def _same_model(recipe: Recipe, start: Checkpoint, folder: Path) -> None:
    changed = recipe_differences(recipe, start.recipe)
    changed = [path for path in changed if path[0] == "model" and path[:2] != ("model", "moe")]
    if changed:
        raise CheckpointError(
            f"the stage before was trained with another {', '.join('.'.join(path) for path in changed)}",
            where=str(folder),
            hint="train that stage again, or undo the change",
        )


def _train_and_measure(
    recipe: Recipe, moe: MoE, train: RouterStates, held_out: RouterStates
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    from scipy.optimize import linear_sum_assignment

    router = moe.router
    curve: list[dict[str, float]] = []
    if router.source == "train":
        fractions = [train.images // 2**power for power in range(_CURVE_POINTS)]
        weight: Any = None
        bias: Any = None
        for images in sorted({count for count in fractions if count >= moe.experts}):
            part = train.first(images)
            weight, bias = fit_router(
                part.states,
                part.domain,
                experts=moe.experts,
                steps=router.steps,
                learning_rate=router.learning_rate,
                seed=recipe.seed,
            )
            measured = _measured(held_out, weight, bias)
            curve.append({"labels": images, "accuracy": measured["accuracy"]})
            report_progress({"recipe": recipe.name, "router": "fit", "labels": images, **curve[-1]})
        domains = [list(domain) for domain in moe.domains]
    else:
        width = recipe.model.language_model.hidden_size
        weight, bias = read_router(Path(router.source), experts=moe.experts, width=width)
        # Nobody says which row is for which domain: the assignment that gets most held-out images right.
        confusion = np.array(_measured(held_out, weight, bias)["confusion"])
        _, expert_of_domain = linear_sum_assignment(-confusion)
        order = np.argsort(expert_of_domain)
        domains = [list(moe.domains[domain]) for domain in order]
        held_out = _relabelled(held_out, expert_of_domain)
    return weight, bias, {**_measured(held_out, weight, bias), "curve": curve, "domains": domains}


def _relabelled(states: RouterStates, expert_of_domain: Any) -> RouterStates:
    import torch

    expert_of = torch.as_tensor(expert_of_domain)
    return RouterStates(states.states, expert_of[states.domain], states.image, states.layer, states.images)


def _measured(states: RouterStates, weight: Tensor, bias: Tensor) -> dict[str, Any]:
    """Accuracy of images (the mean of their tokens' log-probabilities), of tokens, by layer, and the confusion."""
    import torch
    from torch.nn import functional

    logs_TE = functional.linear(states.states, weight, bias).log_softmax(-1)
    experts = weight.shape[0]
    votes = torch.zeros((states.images, experts)).index_add(0, states.image, logs_TE)
    domain = torch.zeros(states.images, dtype=torch.int64).index_copy(0, states.image, states.domain)
    chosen = votes.argmax(-1)
    right_T = (logs_TE.argmax(-1) == states.domain).float()
    confusion = torch.bincount(domain * experts + chosen, minlength=experts**2).view(experts, experts)
    layers = sorted(set(states.layer.tolist()))
    return {
        "accuracy": round((chosen == domain).float().mean().item(), 6),
        "token_accuracy": round(right_T.mean().item(), 6),
        "token_accuracy_by_layer": [round(right_T[states.layer == layer].mean().item(), 6) for layer in layers],
        "confusion": confusion.tolist(),
    }


def _report(workspace: Workspace, recipe: Recipe, metadata: dict[str, Any], started: float, *, reused: bool) -> Report:
    labels = metadata["labels"]
    report = Report(
        step=f"train-router {recipe.name}",
        counts={"labels": sum(labels["train"].values()), "held_out": sum(labels["held_out"].values())},
        metrics={name: metadata[name] for name in ("accuracy", "token_accuracy")},
        details={
            "recipe": recipe.name,
            "source": _moe(recipe).router.source,
            "domains": metadata["domains"],
            "confusion": metadata["confusion"],
            "token_accuracy_by_layer": metadata["token_accuracy_by_layer"],
            "labels": labels,
            "accuracy_by_labels": metadata["curve"],
            "reused": reused,
        },
        seed=recipe.seed,
        fingerprint=metadata["fingerprint"],
    )
    packages = ("torch", "transformers", "safetensors")
    return write_report(workspace.router(recipe.name), report, started=started, packages=packages)
