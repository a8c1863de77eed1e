"""Direct preference optimisation: the loss against TRL's, the reference against the start, a run end to end."""

from __future__ import annotations

import collections
import hashlib
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from twin_case import fill, picture

from medvlm.config import load_recipe
from medvlm.errors import InputError, RecipeError, TrainingError
from medvlm.recipe_schema import Recipe
from medvlm.records import PreferencePair
from medvlm.store import Workspace, write_json, write_records
from medvlm.training.collate import collate
from medvlm.training.objectives import answer_log_probabilities, answer_loss, dpo_loss, dpo_objective
from medvlm.training.packing import IGNORED, Encoded

SMALL = [
    "model.vision_tower.hidden_size=32",
    "model.vision_tower.mlp_size=32",
    "model.language_model.hidden_size=32",
    "model.language_model.mlp_size=48",
    "model.language_model.layers=2",
    "stages.align.max_steps=1",
    "stages.instruct.max_steps=1",
    "stages.prefer.max_steps=10",
    "stages.prefer.global_batch=8",
    "stages.prefer.micro_batch=4",
]
numbers = st.lists(st.tuples(*[st.floats(-40, 0)] * 4), min_size=1, max_size=6)


@settings(max_examples=40, deadline=None)
@given(numbers, st.sampled_from([0.05, 0.1, 0.5]))
def test_loss_and_rewards_are_trl_s(rows: list[tuple[float, ...]], beta: float) -> None:
    values = torch.tensor(rows, dtype=torch.float64)
    policy, reference = values[:, :2], values[:, 2:]
    losses, measures = dpo_loss(policy, reference, beta)
    loss, logged = of_trl(policy, reference, beta)
    assert losses.mean().item() == pytest.approx(loss, abs=1e-9)
    assert {name: value.mean().item() for name, value in measures.items()} == pytest.approx(logged, abs=1e-6)


def of_trl(policy: torch.Tensor, reference: torch.Tensor, beta: float) -> tuple[float, dict[str, float]]:
    """What TRL's trainer computes from the same log-probabilities, given by a stand-in model, one token each."""
    from trl.trainer.dpo_trainer import DPOTrainer

    # TRL has the chosen answers first, then the rejected ones.
    logps, pairs = policy.T.reshape(-1, 1), 2 * len(policy)
    tokens = pairs, 1
    outputs = SimpleNamespace(
        log_probs=logps,
        entropy=torch.zeros(tokens),
        mean_logits=torch.zeros(tokens),
        is_top1=torch.zeros(tokens, dtype=torch.bool),
    )
    model = SimpleNamespace(training=True)
    trainer = SimpleNamespace(
        model=model,
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=["sigmoid"],
        loss_weights=[1.0],
        label_smoothing=0.0,
        use_weighting=False,
        beta=beta,
        _metrics={"train": collections.defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    chosen, rejected = reference.unbind(1)
    inputs = {
        "input_ids": torch.ones((pairs, 2), dtype=torch.long),
        "attention_mask": torch.ones((pairs, 2), dtype=torch.long),
        "completion_mask": torch.tensor([[0, 1]]).expand(pairs, 2),
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }
    stand_in: Any = lambda **_: outputs  # noqa: E731
    compute: Any = DPOTrainer._compute_loss  # pyright: ignore[reportPrivateUsage]
    loss = compute(trainer, stand_in, inputs, return_outputs=False)
    names = {"accuracies": "preference_accuracy", "margins": "reward_margin"}
    names |= {"chosen": "reward_chosen", "rejected": "reward_rejected"}
    logged = trainer._metrics["train"]
    return loss.item(), {ours: logged[f"rewards/{theirs}"][0] for theirs, ours in names.items()}


def test_a_pair_that_has_not_moved_costs_log_two_and_prefers_nothing() -> None:
    values = torch.tensor([[-3.0, -5.0], [-4.0, -1.0]])
    losses, measures = dpo_loss(values, values, 0.1)
    assert losses.tolist() == pytest.approx([math.log(2)] * 2)
    assert measures["preference_accuracy"].tolist() == [0, 0]


def test_gradients_raise_the_chosen_answer_and_lower_the_rejected_one() -> None:
    policy = torch.tensor([[-3.0, -5.0]], requires_grad=True)
    dpo_loss(policy, torch.tensor([[-3.0, -5.0]]), 0.1)[0].sum().backward()
    assert policy.grad is not None and policy.grad[0].tolist() == pytest.approx([-0.05, 0.05])


class Table:
    """A model whose logits are a fixed function of the token before."""

    def __init__(self) -> None:
        self.logits = torch.randn((11, 11), generator=torch.Generator().manual_seed(1))

    def __call__(self, input_ids: torch.Tensor, token_labels: torch.Tensor, **_: Any) -> Any:
        labels = token_labels[:, 1:]
        logits = self.logits[input_ids][:, :-1][labels != IGNORED]
        return SimpleNamespace(loss=cross_entropy(logits, labels[labels != IGNORED], reduction="none"))


def row(ids: list[int], rejected: list[int], reference: tuple[float, float] | None = None) -> dict[str, Any]:
    def encoded(answer: list[int]) -> Encoded:
        return Encoded([1, 2, *answer], [IGNORED, IGNORED, *answer], 0)

    sequences = [encoded(ids), encoded(rejected)]
    made = {"sequences": sequences, "pixels": torch.zeros(3, 2, 2), "sample_ids": ["p"]}
    return made if reference is None else {**made, "reference": reference}


def by_hand(model: Table, answer: list[int]) -> float:
    steps = zip([2, *answer], answer, strict=False)
    return sum(model.logits[before].log_softmax(-1)[after].item() for before, after in steps)


def test_log_probabilities_are_sums_over_each_answer_whatever_the_padding() -> None:
    model = Table()
    batch = collate([row([4, 5, 6], [7]), row([8], [9, 10])], pad_id=0)
    answers = [[4, 5, 6], [7], [8], [9, 10]]
    expected = [by_hand(model, answer) for answer in answers]
    assert answer_log_probabilities(model, batch).tolist() == pytest.approx(expected, abs=1e-5)
    tokens = sum(map(len, answers))
    assert answer_loss(model, dict(batch), None).item() == pytest.approx(-sum(expected) / tokens, abs=1e-5)


def test_answers_of_a_pair_stand_side_by_side_with_the_same_image_and_their_references() -> None:
    rows = [row([4, 5], [6], (-1.0, -2.0)), row([7], [8, 9], (-3.0, -4.0))]
    rows[1]["pixels"] = torch.ones(3, 2, 2)
    batch = collate(rows, pad_id=0)
    assert batch["input_ids"].tolist() == [[1, 2, 4, 5], [1, 2, 6, 0], [1, 2, 7, 0], [1, 2, 8, 9]]
    assert batch["reference"].tolist() == [[-1, -2], [-3, -4]]
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [0, 0, 1, 1]


def test_a_step_split_into_batches_has_the_loss_of_the_whole() -> None:
    model = Table()
    rows = [row([4, i], [i, 5, 6], (-1.0 * i, -2.0)) for i in range(6)]
    whole, _ = dpo_objective(model, collate(rows, 0), None, beta=0.1, step_pairs=6)
    parts = [dpo_objective(model, collate(rows[i : i + 2], 0), 99, beta=0.1, step_pairs=6)[0] for i in (0, 2, 4)]
    assert sum(part.item() for part in parts) == pytest.approx(whole.item(), abs=1e-6)


@pytest.mark.parametrize(
    "change",
    ["stages.prefer.data=instruct", "stages.instruct.objective=dpo", "stages.prefer.samples_per_image=2"],
)
def test_pairs_and_the_objective_belong_together(change: str) -> None:
    with pytest.raises(RecipeError, match="objective 'dpo'"):
        load_recipe("tiny-stllava-med", [change])


def recipe_with(*changes: str) -> Recipe:
    return load_recipe("tiny-stllava-med", [*SMALL, *changes])


def pair(index: int) -> PreferencePair:
    image = picture(index)
    sides = ("left", "right") if index % 2 else ("right", "left")
    chosen, rejected = (f"A disc on the {side} side." for side in sides)
    digest = hashlib.sha256(image.bytes).hexdigest()
    return PreferencePair(
        f"p{index}", image, digest, "0" * 16, f"g{index}", "What is shown?", chosen, rejected, "judge:rule"
    )


@pytest.fixture
def instructed(tmp_path: Any) -> Workspace:
    from medvlm.training.run import run_stage

    workspace = fill(Workspace(tmp_path / "ws"))
    for stage in (1, 2):
        run_stage(workspace, recipe_with(), stage)
    write_records(workspace.preference_pairs("tiny-stllava-med"), PreferencePair, (pair(i) for i in range(20)))
    return workspace


def test_a_stage_of_pairs_begins_at_its_reference_learns_them_and_resumes_exactly(
    instructed: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    from medvlm.training import objectives
    from medvlm.training.run import run_stage

    # Whatever learns, the reference was asked before the first step.
    saved = "stages.prefer.lora.modules_to_save={modules: [embed_tokens, lm_head], learning_rate: 2e-5}"
    changes = ["checkpoints.every=0.3", saved]
    report = run_stage(instructed, recipe_with(*changes), 3)
    curve = report.details["curves"]["all"]
    names = {"step", "loss", "lr", "preference_accuracy", "reward_margin", "reward_chosen", "reward_rejected"}
    assert all(set(point) == names for point in curve)
    assert curve[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert curve[0]["reward_margin"] == pytest.approx(0, abs=1e-4)
    late = curve[-3:]
    assert sum(point["loss"] for point in late) / 3 < math.log(2) and late[-1]["reward_margin"] > 0
    assert sum(point["preference_accuracy"] for point in late) / 3 > 0.6
    assert report.metrics["reward_margin"] == pytest.approx(curve[-1]["reward_margin"], abs=1e-6)
    assert (instructed.checkpoint("tiny-stllava-med", 3) / "adapter/adapter_model.safetensors").is_file()

    shutil.rmtree(instructed.stage("tiny-stllava-med", 3))
    calls: list[int] = []
    loss = objectives.dpo_loss

    def dies(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 11:  # in the sixth step, after the checkpoint of the third
            raise KeyboardInterrupt
        return loss(*arguments)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(objectives, "dpo_loss", dies)
        run_stage(instructed, recipe_with(*changes), 3)
    again = run_stage(instructed, recipe_with(*changes), 3)
    assert again.details["reused"] == []
    for before, after in zip(curve, again.details["curves"]["all"], strict=True):
        assert after == pytest.approx(before, abs=1e-5)


def test_pairs_that_were_not_built_or_broke_their_contract(instructed: Workspace) -> None:
    from medvlm.training.run import run_stage

    write_json(instructed.contract("preference/tiny-stllava-med") / "result.json", {"success": False})
    with pytest.raises(TrainingError, match="preference/tiny-stllava-med") as broken:
        run_stage(instructed, recipe_with(), 3)
    assert "data_contracts preference --recipe tiny-stllava-med" in broken.value.hint
    (instructed.contract("preference/tiny-stllava-med") / "result.json").unlink()
    write_records(instructed.preference_pairs("tiny-stllava-med"), PreferencePair, [])
    with pytest.raises(InputError) as empty:
        run_stage(instructed, recipe_with(), 3)
    assert "build-preference" in empty.value.hint
