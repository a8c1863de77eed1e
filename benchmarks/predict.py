"""Answers per second against the loop of the original scripts, on real SLAKE questions, with one model.

    python benchmarks/predict.py model  FOLDER                     # once: smol-llava-med, before its first stage
    python benchmarks/predict.py run    FOLDER --slake Slake1.0 --order image_first --part 1/4 --out parts
    python benchmarks/predict.py sum    parts

The original scripts (LLaVA-Med's model_vqa_med.py and its descendants) answer one question at a time: open
the image, encode it, read the whole prompt, generate. Here both ways answer the same questions in the same
process, greedily, with the same prompts and the same limit of new tokens; their answers are compared.

``run`` takes a part of the questions, so that no run is long; ``sum`` adds the parts up. Any checkpoint of
medvlm will do. That of ``model`` has real weights but an untrained projector, which changes what it says, and
so how long its answers are, and not how long a token takes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

TARGET = 6.0
QUESTIONS = 208


def main() -> None:
    """Run one of the three commands; ``sum`` exits 1 where the target is missed or an answer differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    model = commands.add_parser("model")
    model.add_argument("folder", type=Path)
    model.add_argument("--recipe", default="smol-llava-med")
    model.add_argument("--set", dest="overrides", action="append", default=[], help="Such as model.image_first=false.")
    run = commands.add_parser("run")
    run.add_argument("folder", type=Path, help="A checkpoint: of `model`, or any of medvlm's.")
    run.add_argument("--slake", type=Path, required=True, help="SLAKE's folder.")
    run.add_argument("--order", default="image_first")
    run.add_argument("--part", default="1/1", help="i/n: the i-th of n parts of the questions.")
    run.add_argument("--questions", type=int, default=QUESTIONS)
    run.add_argument("--out", type=Path, required=True)
    sums = commands.add_parser("sum")
    sums.add_argument("out", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "model":
        make_model(arguments.folder, arguments.recipe, arguments.overrides)
    elif arguments.command == "run":
        run_part(arguments)
    else:
        sum_up(arguments.out)


def make_model(folder: Path, name: str, overrides: list[str]) -> None:
    """Write a recipe's model as it is before its first stage."""
    from medvlm.config import load_recipe
    from medvlm.models.checkpoint import Checkpoint, build_model, save_checkpoint
    from medvlm.models.tokenizer import load_tokenizer, special_marks
    from medvlm.models.vision import ImageProcessor

    recipe = load_recipe(name, overrides)
    tokenizer = load_tokenizer(recipe.model.tokenizer.source, special_marks(recipe))
    model = build_model(recipe, tokenizer)
    processor = ImageProcessor.of(recipe.model.vision_tower)
    save_checkpoint(folder, Checkpoint(model, tokenizer, processor, recipe, {"fingerprint": "benchmark"}))
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f} million weights in {folder}")


def run_part(arguments: argparse.Namespace) -> None:
    """Answer a part of the questions both ways and write times and answers to a file."""
    import torch

    from medvlm.data.benchmarks import read_benchmark
    from medvlm.evaluation.answerer import BATCH, Answerer
    from medvlm.evaluation.prompts import prompt_style
    from medvlm.models.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(arguments.folder)
    style = prompt_style("slake", order=arguments.order)
    questions = [item for item in read_benchmark("slake", arguments.slake) if item.split == "test"]
    part, parts = map(int, arguments.part.split("/"))
    size = -(-min(arguments.questions, len(questions)) // parts)
    items = questions[: arguments.questions][(part - 1) * size : part * size]
    answerer = Answerer(checkpoint, "finetune", style=style, batch_size=BATCH)
    one_by_one(checkpoint, style, items[:1])  # neither way pays for what only the first call does
    started = time.perf_counter()
    ours = {a.item_id: a.text for batch in answerer.batches(items) for a in answerer.answer(batch)}
    ours_s = time.perf_counter() - started
    started = time.perf_counter()
    theirs = dict(one_by_one(checkpoint, style, items))
    theirs_s = time.perf_counter() - started
    row = {
        "order": arguments.order,
        "part": arguments.part,
        "questions": len(items),
        "images": len({item.image_sha256 for item in items}),
        "ours_s": round(ours_s, 2),
        "theirs_s": round(theirs_s, 2),
        "same": sum(ours[item.item_id] == theirs[item.item_id] for item in items),
        "characters": sum(map(len, theirs.values())),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"{arguments.order}-{part}-of-{parts}.json"
    path.write_text(json.dumps(row, indent=1) + "\n")
    print(json.dumps(row))
    for item in items:
        if ours[item.item_id] != theirs[item.item_id]:
            print(f"  {item.item_id}: ours {ours[item.item_id]!r}, the loop's {theirs[item.item_id]!r}")


def one_by_one(checkpoint: Any, style: Any, items: list[Any]) -> Iterator[tuple[str, str]]:
    """The loop of the original scripts: one question at a time, its image opened and encoded each time."""
    import torch

    from medvlm.training.collate import ConversationEncoder

    _, stage = checkpoint.recipe.stage("finetune")
    encoder = ConversationEncoder(
        checkpoint.recipe, checkpoint.tokenizer, stage.template, checkpoint.recipe.model.language_model.max_positions
    )
    model = checkpoint.model.eval()
    for item in items:
        ids = torch.tensor([encoder.prompt(style.prompt(item))])
        with torch.inference_mode():
            answer = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=checkpoint.processor(item.image.bytes)[None],
                max_new_tokens=checkpoint.recipe.decoding.max_new_tokens,
                do_sample=False,
                use_cache=True,
            )
        yield item.item_id, checkpoint.tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True).strip()


@dataclasses.dataclass
class Total:
    """Sums over the parts of one order."""

    questions: int = 0
    images: int = 0
    same: int = 0
    ours_s: float = 0.0
    theirs_s: float = 0.0


def sum_up(folder: Path) -> None:
    """Print a line for each order; exit 1 if the best misses the target, or any answer differs."""
    totals: dict[str, Total] = {}
    for path in sorted(folder.glob("*.json")):
        row = json.loads(path.read_text())
        total = totals.setdefault(row["order"], Total())
        for field in dataclasses.fields(Total):
            setattr(total, field.name, getattr(total, field.name) + row[field.name])
    best = 0.0
    for order, total in totals.items():
        ratio = total.theirs_s / total.ours_s
        best = max(best, ratio)
        print(
            f"{order:15} {total.questions} questions about {total.images} images: "
            f"{total.questions / total.ours_s:.2f} answers/s, the loop {total.questions / total.theirs_s:.2f}: "
            f"{ratio:.1f} times; identical answers {100 * total.same / total.questions:.1f} %"
        )
    same = all(total.same == total.questions for total in totals.values())
    print(f"target {TARGET:g} times with identical answers: {'met' if best >= TARGET and same else 'MISSED'}")
    sys.exit(not (best >= TARGET and same))


if __name__ == "__main__":
    main()
