"""``<im_start>`` and ``<im_end>``: in stage 1 their rows of the input embedding learn, and no other row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from twin_case import fill

from medvlm.config import load_recipe
from medvlm.errors import RecipeError
from medvlm.models.checkpoint import build_model, load_checkpoint
from medvlm.models.tokenizer import train_tokenizer
from medvlm.recipe_schema import Recipe
from medvlm.store import Workspace
from medvlm.training.marks import MARKS, attach_marks, detach_marks, take_marks
from medvlm.training.params import freeze, parameter_counts, parameter_groups

NAME = "tiny-llava-med"
SMALL = [
    "model.vision_tower.hidden_size=32",
    "model.vision_tower.mlp_size=32",
    "model.language_model.hidden_size=32",
    "model.language_model.mlp_size=48",
    "model.language_model.layers=1",
    "stages.align.max_steps=6",
    "stages.align.global_batch=4",
    "stages.align.micro_batch=2",
    "checkpoints.every=0.3",
]
TABLE = "model.language_model.embed_tokens.weight"


def recipe_with(*changes: str) -> Recipe:
    return load_recipe(NAME, [*SMALL, *changes])


def rows_of(tokenizer: Any) -> list[int]:
    return tokenizer.convert_tokens_to_ids(list(MARKS))


def run(workspace: Workspace, *changes: str, fresh: bool = True) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of stage 1, and the weights at its end."""
    from medvlm.training.run import run_stage

    report = run_stage(workspace, recipe_with(*changes), 1, fresh=fresh)
    weights = load_checkpoint(workspace.checkpoint(NAME, 1)).model.state_dict()
    return [point["loss"] for point in report.details["curves"]["all"]], dict(weights)


@pytest.fixture
def workspace(tmp_path: Any) -> Workspace:
    return fill(Workspace(tmp_path / "ws"))


def test_the_recipes_with_marks_train_them_in_stage_1_and_no_other_does() -> None:
    for name in ("llava-med", NAME):
        align, *later = load_recipe(name).stages
        assert align.trains == ("projector", "image_marks")
        assert not any("image_marks" in stage.trains for stage in later)
    for name in ("llava-med-v15", "qilin-med-vl", "stllava-med", "cliva-med-phi2"):
        assert "image_marks" not in load_recipe(name).stages[0].trains


def test_stage_1_moves_the_marks_rows_and_leaves_all_others_bit_for_bit(workspace: Workspace) -> None:
    _, end = run(workspace)
    checkpoint = load_checkpoint(workspace.checkpoint(NAME, 1))
    start = build_model(recipe_with(), checkpoint.tokenizer).state_dict()
    assert set(end) == set(start)
    marks = rows_of(checkpoint.tokenizer)
    others = [row for row in range(len(start[TABLE])) if row not in marks]
    assert torch.equal(end[TABLE][others], start[TABLE][others])
    for row in marks:
        assert (end[TABLE][row] - start[TABLE][row]).abs().max() > 1e-4
    for name, value in end.items():
        frozen = name != TABLE and "multi_modal_projector" not in name
        assert not frozen or torch.equal(value, start[name]), name
    assert not torch.equal(end["lm_head.weight"], end[TABLE])
    counts = checkpoint.metadata["counts"]
    assert counts["parameters"] == sum(p.numel() for p in checkpoint.model.parameters())
    assert counts["parameters_trained"] == 32 * 32 + 32 + 2 * 32


def test_marks_learn_alike_at_every_zero_stage(workspace: Workspace) -> None:
    losses, weights = run(workspace, "stages.align.zero_stage=0")
    assert len(set(losses)) == 6
    for zero_stage in (1, 2, 3):
        same, end = run(workspace, f"stages.align.zero_stage={zero_stage}")
        assert same == pytest.approx(losses, abs=1e-5), zero_stage
        torch.testing.assert_close(end[TABLE], weights[TABLE], atol=1e-5, rtol=0)


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_a_killed_stage_resumes_with_the_marks_that_it_had(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, zero_stage: int
) -> None:
    from medvlm.training import objectives
    from medvlm.training.run import run_stage

    change = f"stages.align.zero_stage={zero_stage}"
    unbroken, end = run(workspace, change)
    calls: list[int] = []

    def dies(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 9:  # two micro-batches a step: in the fifth step, after the checkpoint of the fourth
            raise KeyboardInterrupt
        return objectives.answer_loss(*arguments)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setitem(objectives.OBJECTIVES, "answer", dies)
        run_stage(workspace, recipe_with(change), 1, fresh=True)
    scratch = workspace.scratch("train", NAME, "stage1", "all")
    assert max(int(path.parent.name.split("-")[1]) for path in scratch.glob("checkpoint-*/complete.json")) == 4
    (workspace.checkpoint(NAME, 1) / "metadata.json").unlink()
    losses, resumed = run(workspace, change, fresh=False)
    assert losses == unbroken
    assert torch.equal(resumed[TABLE], end[TABLE])


def test_attaching_changes_no_output_and_only_the_marks_have_a_gradient() -> None:
    recipe = recipe_with()
    tokenizer = train_tokenizer(recipe, ["Is there a lesion?"])
    model: Any = build_model(recipe, tokenizer).eval()
    start, end = rows_of(tokenizer)
    image = model.config.image_token_id
    batch = {
        "input_ids": torch.tensor([[1, start, *[image] * 16, end, 9, 10, 11]]),
        "pixel_values": torch.zeros((1, 3, 96, 96)),
    }
    names, before = set(model.state_dict()), model(**batch).logits
    attach_marks(model, tokenizer, recipe, recipe.stages[0])
    freeze(model, recipe.stages[0])
    assert torch.equal(model(**batch).logits, before)
    model(**batch).logits.square().sum().backward()
    rows = model.model.language_model.embed_tokens.mark_rows
    assert rows.grad.abs().sum(1).all() and model.get_input_embeddings().weight.grad is None
    counts = parameter_counts(model)
    (group,) = [g for g in parameter_groups(model, recipe, recipe.stages[0]) if g["params"][0] is rows]
    assert group["lr"] == recipe.stages[0].learning_rate  # a row's rate does not follow the width
    with torch.no_grad():
        rows.add_(1)
    moved = take_marks(model, model.state_dict())
    detach_marks(model)
    assert set(moved) == names == set(model.state_dict())
    torch.testing.assert_close(moved[TABLE][[start, end]], model.state_dict()[TABLE][[start, end]] + 1)
    assert counts["parameters"] == sum(p.numel() for p in model.parameters())


def test_marks_that_cannot_learn_alone_are_refused_when_the_recipe_is_read() -> None:
    for change, words in (
        ("stages.align.trains=[image_marks]", "names image_marks alone"),
        ("model.language_model.tied_embeddings=true", "tied_embeddings makes them rows of the head"),
        ("stages.align.trains=[projector, language_model, image_marks]", "rows of language_model's embedding"),
    ):
        with pytest.raises(RecipeError, match=words):
            recipe_with(change)


def test_a_model_without_marks_has_none_to_learn(workspace: Workspace) -> None:
    _, weights = run(workspace, "model.mm_use_im_start_end=false", "stages.align.max_steps=1")
    checkpoint = load_checkpoint(workspace.checkpoint(NAME, 1))
    assert checkpoint.metadata["counts"]["parameters_trained"] == 32 * 32 + 32
    start = build_model(checkpoint.recipe, checkpoint.tokenizer).state_dict()
    assert torch.equal(weights[TABLE], start[TABLE])


def test_the_plan_counts_the_marks() -> None:
    from medvlm.training.hardware import parse_hardware
    from medvlm.training.plan import make_plan

    hardware = parse_hardware("8xA100-40G")
    align, *_ = make_plan(load_recipe("llava-med"), hardware).stages
    assert align.trained == 1024 * 4096 + 4096 + 2 * 4096
    align, *_ = make_plan(load_recipe("llava-med", ["model.mm_use_im_start_end=false"]), hardware).stages
    assert align.trained == 1024 * 4096 + 4096
