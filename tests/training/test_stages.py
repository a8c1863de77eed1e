"""Three stages of the twin: what they write, and that they learn."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from twin_case import STEPS, TrainedTwin

from medvlm.models.checkpoint import load_checkpoint
from medvlm.store import read_report
from medvlm.training.run import run_stage

TABLE = "model.language_model.embed_tokens.weight"


def test_the_loss_falls(trained: TrainedTwin) -> None:
    for report in trained.reports[:2]:
        curve = report.details["curves"]["all"]
        assert curve[-1]["loss"] < 0.9 * curve[0]["loss"]


def test_reports_count_what_was_learned(trained: TrainedTwin) -> None:
    align, instruct, finetune = trained.reports
    assert align.counts["samples"] == 40 and align.counts["steps"] == STEPS and align.counts["truncated"] == 0
    assert align.counts["parameters_trained"] == 192 * 128 + 128 + 2 * 128  # and the two marks
    assert instruct.counts["parameters_trained"] > 100_000
    assert finetune.counts["samples"] == 80 and set(finetune.details["curves"]) == {"vqa-rad", "slake"}
    for number, report in enumerate(trained.reports, start=1):
        written = read_report(trained.workspace.stage("tiny-llava-med", number))
        assert written is not None and written.fingerprint == report.fingerprint
        assert report.versions["deepspeed"] and report.seed == 42
        assert report.metrics["samples_per_second"] > 0 and report.metrics["peak_memory_mb"] > 0
        assert 0 < report.metrics["data_wait_share"] < 1
        paces = report.details["pace"].values()
        assert sum(len(pace) for pace in paces) == report.counts["steps"]


def test_each_checkpoint_is_whole_and_its_scratch_gone(trained: TrainedTwin) -> None:
    folders = [trained.workspace.checkpoint("tiny-llava-med", n) for n in (1, 2)]
    folders += [trained.workspace.checkpoint("tiny-llava-med", 3, target) for target in ("vqa-rad", "slake")]
    names = {"model.safetensors", "config.json", "tokenizer.json", "preprocessor_config.json", "recipe.yaml"}
    for folder in folders:
        assert names <= {path.name for path in folder.iterdir()}
        metadata = json.loads((folder / "metadata.json").read_text())
        assert metadata["fingerprint"] and metadata["git_commit"] and math.isfinite(metadata["metrics"]["loss"])
    assert not list(trained.workspace.scratch("train").rglob("checkpoint-*"))


def test_alignment_moves_the_projector_and_the_marks_only(trained: TrainedTwin) -> None:
    from medvlm.models.checkpoint import build_model

    folder = trained.workspace.checkpoint("tiny-llava-med", 1)
    tokenizer = load_checkpoint(folder).tokenizer
    start = build_model(trained.recipe, tokenizer).state_dict()
    after = load_file(folder / "model.safetensors")
    moved = {name for name, value in after.items() if not torch.equal(value, start[name])}
    projector = {"model.multi_modal_projector.linear.weight", "model.multi_modal_projector.linear.bias"}
    assert moved == {*projector, TABLE}
    rows = (after[TABLE] != start[TABLE]).any(1).nonzero().flatten().tolist()
    assert rows == sorted(tokenizer.convert_tokens_to_ids(["<im_start>", "<im_end>"]))


def test_instruction_tuning_leaves_the_tower_alone(trained: TrainedTwin) -> None:
    before, after = (load_file(trained.workspace.checkpoint("tiny-llava-med", n) / "model.safetensors") for n in (1, 2))
    for name, value in after.items():
        assert torch.equal(value, before[name]) == name.startswith("model.vision_tower."), name


def test_a_finished_stage_is_kept(trained: TrainedTwin) -> None:
    again = run_stage(trained.workspace, trained.recipe, 1)
    assert again.details["reused"] == ["all"]
    assert again.details["curves"] == trained.reports[0].details["curves"]
    assert again.fingerprint == trained.reports[0].fingerprint


def test_deepspeed_agrees_with_plain_torch(trained: TrainedTwin) -> None:
    """The first steps of alignment, written out: AdamW, warm-up and cosine, gradients clipped at 1.

    The marks' rows learn as in the original, in the table itself: no other row has a gradient.
    """
    from medvlm.models.checkpoint import build_model
    from medvlm.models.vision import ImageProcessor
    from medvlm.training.collate import ConversationEncoder, collate
    from medvlm.training.data import PixelStore, StagePlan, TrainingSet, read_stage_samples
    from medvlm.training.objectives import answer_loss
    from medvlm.training.params import freeze, rate_ratio

    recipe, stage = trained.recipe, trained.recipe.stages[0]
    tokenizer = load_checkpoint(trained.workspace.checkpoint("tiny-llava-med", 1)).tokenizer
    model = build_model(recipe, tokenizer).train()
    freeze(model, stage)
    samples = read_stage_samples([trained.workspace.samples("alignment")], stage, recipe.seed)
    plan = StagePlan(samples, stage, recipe.seed)
    encoder = ConversationEncoder(recipe, tokenizer, stage.template, stage.max_length)
    rows = TrainingSet(samples, plan, encoder, PixelStore(ImageProcessor.of(recipe.model.vision_tower)))
    projector = [p for p in model.parameters() if p.requires_grad]
    table = model.get_input_embeddings().weight.requires_grad_()
    learned = torch.zeros((len(table), 1))
    learned[tokenizer.convert_tokens_to_ids(["<im_start>", "<im_end>"])] = 1
    table.register_hook(lambda gradient: gradient * learned)
    parameters = [*projector, table]
    optimizer = torch.optim.AdamW([{"params": projector}, {"params": [table]}], weight_decay=0.0)
    peaks = [stage.learning_rate * rate_ratio(recipe, "projector"), stage.learning_rate]
    losses: list[float] = []
    for step in range(6):
        start = step * stage.global_batch
        batch = collate([rows[start + i] for i in range(stage.global_batch)], tokenizer.pad_token_id)
        del batch["sample_ids"], batch["spans"]
        warmup = math.ceil(stage.warmup_ratio * STEPS)
        progress = max(0, step - warmup) / (STEPS - warmup)
        share = step / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * progress))
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * share
        loss = answer_loss(model, batch, None)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, stage.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    curve = trained.reports[0].details["curves"]["all"]
    assert [point["loss"] for point in curve[:6]] == pytest.approx(losses, abs=1e-4)
