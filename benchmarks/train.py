"""Training throughput: ours beside the plain stack, each lever alone, in alternating trials.

    python benchmarks/train.py [--vqa-rad FOLDER] [--size tiny|smol] [--stage 1|2] [--steps 6] [--batch 8] [--trials 3]

The plain stack is what a careful user writes today: transformers' ``LlavaForConditionalGeneration`` and ``Trainer``,
with batches padded to their longest sequence. Both begin from the same weights and read the same samples in the same
order, in float32 on the CPU, each trial in a process of its own, so that its peak memory is its own.

``ours`` has every lever on but length groups, which change the order of the samples; each further row switches one
lever off. Ratios are of samples a second against the plain stack's trial of the same round. Losses are compared step
by step; exit code 1 where they differ by more than 1e-3.

Without ``--vqa-rad``, samples are drawn: conversations of two to ten questions of mixed length.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LEVERS = ("feature_cache", "loss_at_labels", "packing", "shared_prefix")
ROWS = ("plain", "ours", *(f"without {lever}" for lever in LEVERS))
TOLERANCE = 1e-3

# About 30 million parameters: a tower of CLIP ViT's shape, and a Llama with a vocabulary of 4,096.
SMALL = (
    "model.vision_tower.hidden_size=384", "model.vision_tower.layers=6", "model.vision_tower.heads=6",
    "model.vision_tower.mlp_size=1536", "model.vision_tower.image_px=224", "model.vision_tower.patch_px=16",
    "model.projector.kind=mlp2x_gelu", "model.language_model.hidden_size=384", "model.language_model.layers=8",
    "model.language_model.heads=6", "model.language_model.kv_heads=6", "model.language_model.mlp_size=1024",
    "model.language_model.max_positions=2048", "model.tokenizer.vocab_size=4096",
)  # fmt: skip


def main() -> None:
    """Run the trials and print a row for each way of training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vqa-rad", type=Path, help="Folder of the official release.")
    parser.add_argument("--size", choices=["tiny", "small", "smol"], default="small")
    parser.add_argument(
        "--stage", type=int, choices=[1, 2], default=2, help="1: projector only; 2: language model too."
    )
    for name, value in (("steps", 4), ("batch", 8), ("trials", 3), ("per-image", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        print(json.dumps(trial(arguments)))
        return
    with tempfile.TemporaryDirectory() as name:
        prepare(arguments, Path(name))
        results = run_trials(arguments, Path(name))
    sys.exit(report(results))


def run_trials(arguments: argparse.Namespace, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Every row once a round; the first round also fills the feature cache, and is kept apart as ``fill_s``."""
    results: dict[str, list[dict[str, Any]]] = {row: [] for row in ROWS}
    for _ in range(arguments.trials):
        for row in ROWS:
            command = [sys.executable, __file__, *sys.argv[1:], "--row", row, "--folder", str(folder)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{row} failed:\n{done.stderr[-3000:]}")
            results[row].append(json.loads(done.stdout.strip().splitlines()[-1]))
    return results


def report(results: dict[str, list[dict[str, Any]]]) -> int:
    """Print the table; 1 where losses disagree."""
    print(f"{'':24}{'samples/s':>10}{'ratio':>8}{'(min to max)':>16}{'peak MB':>9}{'of plain':>9}{'loss off by':>13}")
    plain, worst = results["plain"], 0.0
    for row, trials in results.items():
        ratios = sorted(t["rate"] / p["rate"] for t, p in zip(trials, plain, strict=True))
        peak = statistics.median(t["peak_mb"] for t in trials)
        share = peak / statistics.median(p["peak_mb"] for p in plain)
        off = max(abs(a - b) for t in trials for a, b in zip(t["losses"], plain[0]["losses"], strict=True))
        worst = max(worst, off)
        print(
            f"{row:24}{statistics.median(t['rate'] for t in trials):10.2f}{statistics.median(ratios):8.2f}"
            f"{f'({ratios[0]:.2f} to {ratios[-1]:.2f})':>16}{peak:9.0f}{share:9.0%}{off:13.1e}"
        )
    fill = results["ours"][0]
    print(f"feature cache: {fill['images']} images, {fill['fill_s']:.1f} s to fill once")
    print(f"losses, plain: {', '.join(f'{loss:.4f}' for loss in plain[0]['losses'])}")
    return int(worst > TOLERANCE)


def recipe_of(arguments: argparse.Namespace, row: str) -> Any:
    """The recipe with the row's levers; ``smol`` is smol-llava-med in float32."""
    from medvlm.config import load_recipe

    name = f"stages.{('align', 'instruct')[arguments.stage - 1]}"
    texts = [f"stages.{s}.precision=fp32" for s in ("align", "instruct")] if arguments.size == "smol" else []
    texts += SMALL if arguments.size == "small" else ["model.projector.kind=mlp2x_gelu"]  # the stock one
    sharing = [f"{name}.samples_per_image={arguments.per_image}", f"{name}.image_sharing=prefix"]
    texts += [
        *(sharing if arguments.per_image > 1 else []),
        "model.image_first=true",
        f"{name}.speed.length_groups=false",
    ]
    texts += [f"{name}.{key}={value}" for key, value in settings(arguments).items()]
    texts += [f"{name}.speed.{lever}=false" for lever in LEVERS if row in ("plain", f"without {lever}")]
    return load_recipe("smol-llava-med" if arguments.size == "smol" else "tiny-llava-med", texts)


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Of the stage, the same for every row."""
    template = "chatml" if arguments.size == "smol" else "vicuna_v1"
    sizes = {"global_batch": arguments.batch, "micro_batch": arguments.batch, "max_steps": arguments.steps}
    return {**sizes, "epochs": 1000, "max_length": 512 if arguments.size == "tiny" else 2048, "template": template}


def prepare(arguments: argparse.Namespace, folder: Path) -> None:
    """Samples and the model that every trial begins with."""
    from medvlm.models.checkpoint import Checkpoint, build_model, save_checkpoint
    from medvlm.models.tokenizer import load_tokenizer, special_marks, train_tokenizer
    from medvlm.models.vision import ImageProcessor
    from medvlm.records import Sample
    from medvlm.store import Workspace, write_records

    workspace = Workspace(folder / "ws").ensure()
    samples = real_samples(workspace, arguments.vqa_rad) if arguments.vqa_rad else drawn_samples()
    for name in ("alignment", "instruct"):
        write_records(workspace.samples(name), Sample, samples)
    recipe = recipe_of(arguments, "ours")
    if arguments.size == "smol":
        tokenizer = load_tokenizer(recipe.model.tokenizer.source, special_marks(recipe))
    else:
        tokenizer = train_tokenizer(recipe, (turn.text for sample in samples for turn in sample.turns))
    processor = ImageProcessor.of(recipe.model.vision_tower)
    model = build_model(recipe, tokenizer)
    save_checkpoint(folder / "start", Checkpoint(model, tokenizer, processor, recipe, {"fingerprint": "start"}))
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print(
        f"{millions:.1f} M parameters, stage {arguments.stage}, batch "
        f"{arguments.batch}, {arguments.steps} steps, {len(samples)} samples, {arguments.per_image} of an image at once"
    )


def real_samples(workspace: Any, source: Path) -> list[Any]:
    """VQA-RAD's train questions, each a sample."""
    from medvlm.data.benchmarks import build_benchmark, finetune_samples
    from medvlm.records import VQAItem
    from medvlm.store import iterate_records

    build_benchmark(workspace, "vqa-rad", source)
    return list(finetune_samples(iterate_records(workspace.items("vqa-rad"), VQAItem)))


def drawn_samples() -> list[Any]:
    """Conversations about drawn pictures, of two to ten questions with answers of two to sixty words."""
    import hashlib
    import io

    from PIL import Image as Picture

    from medvlm.records import Image, Sample, Turn

    rng = random.Random(0)
    words = [f"{a}{b}" for a in ("lesion", "lung", "liver", "bone", "left", "large") for b in ("", "s", "ish", "al")]
    samples: list[Any] = []
    for index in range(48):
        stream = io.BytesIO()
        Picture.frombytes("RGB", (32, 32), rng.randbytes(3072)).save(stream, "PNG")
        image = Image(stream.getvalue(), f"{index}.png")
        turns: list[Any] = []
        for turn in range(rng.randint(2, 10)):
            mark = "" if turn else "<image>\n"
            turns.append(Turn("user", f"{mark}What is {' '.join(rng.choices(words, k=rng.randint(2, 12)))}?"))
            turns.append(Turn("assistant", f"{' '.join(rng.choices(words, k=rng.randint(2, 60)))}."))
        digest = hashlib.sha256(image.bytes).hexdigest()
        where = (image, digest, "0" * 16, f"g{index}", tuple(turns), "ct", "en", "CC BY", "generated-offline")
        samples.append(Sample(f"s{index}", "instruct", *where))
    return samples


def trial(arguments: argparse.Namespace) -> dict[str, Any]:
    """One run of a row: its rate without start-up, its losses and its peak memory."""
    from medvlm.training.engine import prepared_environment

    with prepared_environment():
        import torch
        from transformers import Trainer, TrainingArguments

        from medvlm.training.collate import collate
        from medvlm.training.objectives import answer_loss
        from medvlm.training.params import freeze, parameter_groups

        rows, model, recipe, stage, pad_id, fill_s, images = loaded(arguments)
        freeze(model, stage)
        losses: list[float] = []
        marks: list[float] = []

        class Plain(Trainer):
            """The stock loss, with the batch's sample names put aside."""

            def create_optimizer(self, model: Any = None) -> Any:
                self.optimizer = torch.optim.AdamW(parameter_groups(self.model, recipe, stage), lr=stage.learning_rate)
                return self.optimizer

            def compute_loss(self, model: Any, inputs: dict[str, Any], *_: Any, **options: Any) -> Any:
                marks.append(time.perf_counter())
                inputs.pop("sample_ids")
                tokens = options.get("num_items_in_batch")
                if arguments.row == "plain":
                    loss = model(**inputs, num_items_in_batch=tokens).loss
                else:
                    loss = answer_loss(model, inputs, tokens)
                losses.append(loss.item())
                return loss

        packing = arguments.row != "plain" and stage.speed.packing
        trainer = Plain(
            model=model,
            args=TrainingArguments(
                output_dir=str(arguments.folder / "out"),
                max_steps=arguments.steps,
                use_cpu=True,
                report_to=[],
                per_device_train_batch_size=arguments.batch,
                save_strategy="no",
                disable_tqdm=True,
                logging_steps=10**6,
                train_sampling_strategy="sequential",
                remove_unused_columns=False,
                dataloader_pin_memory=False,
                learning_rate=stage.learning_rate,
                max_grad_norm=stage.max_grad_norm,
            ),
            train_dataset=rows,
            data_collator=lambda batch: collate(batch, pad_id, packing=packing),
        )
        trainer.train()
        ended = time.perf_counter()
    # The first step warms up: allocations, and what the libraries set up when they are first called.
    rate = arguments.batch * (len(marks) - 1) / (ended - marks[1])
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"rate": rate, "losses": losses, "peak_mb": peak_mb, "fill_s": fill_s, "images": images}


def loaded(arguments: argparse.Namespace) -> tuple[Any, Any, Any, Any, int, float, int]:
    """Rows in their order, the model (stock for ``plain``), recipe, stage, padding, and what the cache took."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    from medvlm.models.checkpoint import load_checkpoint
    from medvlm.store import Workspace
    from medvlm.training.collate import ConversationEncoder
    from medvlm.training.data import PixelStore, StagePlan, TrainingSet, read_stage_samples
    from medvlm.training.engine import choose_engine
    from medvlm.training.images import image_store

    recipe = recipe_of(arguments, arguments.row)
    stage = recipe.stages[arguments.stage - 1]
    workspace = Workspace(arguments.folder / "ws")
    start = load_checkpoint(arguments.folder / "start")
    samples = read_stage_samples([workspace.samples(stage.data)], stage, recipe.seed)
    plan = StagePlan(samples, stage, recipe.seed)
    encoder = ConversationEncoder(recipe, start.tokenizer, stage.template, stage.max_length)
    began = time.perf_counter()
    engine = choose_engine(recipe, stage)
    images = image_store(workspace, stage, engine, start, samples, plan, PixelStore(start.processor))
    fill_s = time.perf_counter() - began
    model: Any = start.model
    if not stage.speed.loss_at_labels:
        model.head_tokens = None
    if arguments.row == "plain":
        values = {key: value for key, value in model.config.to_dict().items() if key not in ("model_type", "dtype")}
        model = LlavaForConditionalGeneration(LlavaConfig(**values))
        model.load_state_dict(start.model.state_dict())
    rows = TrainingSet(samples, plan, encoder, images)
    pad_id: Any = start.tokenizer.pad_token_id
    return rows, model, recipe, stage, pad_id, fill_s, len(plan.images(samples)[0])


if __name__ == "__main__":
    main()
