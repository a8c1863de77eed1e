"""Answers per second against the loop of the original scripts, on real SLAKE questions, with one model.

    python benchmarks/predict.py model  FOLDER                     # once: smol-llava-med, before its first stage
    python benchmarks/predict.py run    FOLDER --slake Slake1.0 --order image_first --part 1/4 --out parts
    python benchmarks/predict.py sum    parts

The original scripts (LLaVA-Med's model_vqa_med.py and its descendants) answer one question at a time: open
the image, encode it, read the whole prompt, generate. Here both ways answer the same questions in the same
process, greedily, with the same prompts and the same limit of new tokens; their answers are compared.

``run`` takes a part of the questions, so that no run is long and both ways meet the same machine; ``sum`` adds
the parts up. Any checkpoint of medvlm will do. That of ``model`` has real weights but an untrained projector,
which changes what it says and not how long a token takes: it talks until it is stopped, where a trained model
answers most questions in one to three tokens (``--set decoding.max_new_tokens=3``).
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from medvlm.records import Image, VQAItem

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported

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
    run.add_argument("--seconds", type=float, default=600.0, help="The loop ends after these, where it is then.")
    run.add_argument("--way", choices=["both", "ours"], default="both", help="ours: all at once, without the loop.")
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
    if (folder / "config.json").exists():
        print(f"the model of {folder.name}, as it is")
        return
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
    questions = [item for item in read_benchmark("slake", arguments.slake, images=False) if item.split == "test"]
    part, parts = map(int, arguments.part.split("/"))
    size = -(-min(arguments.questions, len(questions)) // parts)
    chosen = questions[: arguments.questions][(part - 1) * size : part * size]
    items = [pictured(item, arguments.slake) for item in chosen]
    answerer = Answerer(checkpoint, "finetune", style=style, batch_size=BATCH)
    # Neither way pays for what only its first call does. The question is none of these, nor is its image.
    other = [pictured(questions[-1], arguments.slake)]
    answerer.answer(other)
    dict(one_by_one(checkpoint, style, other))
    ours, ours_s = timed(
        lambda: {a.item_id: a.text for batch in answerer.batches(items) for a in answerer.answer(batch)}
    )
    row: dict[str, Any] = {
        "order": arguments.order,
        "questions": len(items),
        "images": sorted({item.image_id for item in items}),
        "ours_s": ours_s[0],
        "ours_cpu_s": ours_s[1],
        "threads": torch.get_num_threads(),
        "answers": ours,
    }
    if arguments.way == "both":
        theirs, theirs_s = timed(lambda: dict(one_by_one(checkpoint, style, items, arguments.seconds)))
        row |= {"theirs_s": theirs_s[0], "theirs_cpu_s": theirs_s[1], "loop": theirs}
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"{arguments.order}-{arguments.way}-{part}-of-{parts}.json"
    path.write_text(json.dumps(row | {"load": round(os.getloadavg()[0], 1)}, indent=1) + "\n")
    print({name: value for name, value in row.items() if name not in ("images", "answers", "loop")})


def pictured(item: VQAItem, slake: Path) -> VQAItem:
    """A question with the bytes of its image."""
    data = (slake / "imgs" / item.image.path).read_bytes()
    return dataclasses.replace(item, image=Image(data, item.image.path), image_sha256=hashlib.sha256(data).hexdigest())


def timed(work: Callable[[], dict[str, str]]) -> tuple[dict[str, str], tuple[float, float]]:
    """What a way answers, and its seconds by the clock and of the processor."""
    clock, processor = time.perf_counter(), time.process_time()
    answers = work()
    return answers, (round(time.perf_counter() - clock, 2), round(time.process_time() - processor, 2))


def one_by_one(checkpoint: Any, style: Any, items: list[Any], seconds: float = 0.0) -> Iterator[tuple[str, str]]:
    """The loop of the original scripts: one question at a time, its image opened and encoded each time."""
    import torch

    from medvlm.training.collate import ConversationEncoder

    _, stage = checkpoint.recipe.stage("finetune")
    encoder = ConversationEncoder(
        checkpoint.recipe, checkpoint.tokenizer, stage.template, checkpoint.recipe.model.language_model.max_positions
    )
    model = checkpoint.model.eval()
    end = time.perf_counter() + seconds
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
        if time.perf_counter() > end:
            return


def sum_up(folder: Path) -> None:
    """Print what each order came to; exit 1 if the best one misses the target, or any answer differs."""
    rows = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    best, same = 0.0, True
    for order in sorted({row["order"] for row in rows}):
        ours = [row for row in rows if row["order"] == order]
        loop = [row for row in ours if "loop" in row]
        asked = {name: text for row in loop for name, text in row["loop"].items()}
        differ = {name for row in ours for name, text in row["answers"].items() if asked.get(name, text) != text}
        same &= not differ
        words = sorted(len(text.split()) for text in asked.values())
        print(
            f"\n{len(asked)} questions about {len({name for row in loop for name in row['images']})} images "
            f"in {len(loop)} parts, {order}, "
            f"answers of {words[len(words) // 2]} words (median; the longest {words[-1]}), "
            f"{loop[0]['threads']} threads, load {min(row['load'] for row in loop):g} to "
            f"{max(row['load'] for row in loop):g}; **identical answers: {len(asked) - len(differ)} of {len(asked)}**\n"
        )
        print("| seconds | ours, answers/s | the loop, answers/s | ours / loop | median of parts | least | greatest |")
        print("|---|---|---|---|---|---|---|")
        gains: list[float] = []
        for unit, by in (("s", "by the clock"), ("cpu_s", "of the processor")):
            ratios = sorted(rate(row, "ours", unit) / rate(row, "theirs", unit) for row in loop)
            median = (ratios[(len(ratios) - 1) // 2] + ratios[len(ratios) // 2]) / 2
            mine, theirs = (
                sum(1 / rate(row, way, unit) * len(row["loop"]) for row in loop) for way in ("ours", "theirs")
            )
            gains.append(theirs / mine)
            print(
                f"| {by} | {len(asked) / mine:.2f} | {len(asked) / theirs:.2f} | {theirs / mine:.1f} "
                f"| {median:.1f} | {ratios[0]:.1f} | {ratios[-1]:.1f} |"
            )
        best = max(best, min(gains))  # on a machine that others use the clock alone may favour either
        for row in (row for row in ours if "loop" not in row):
            print(f"\nAll {len(row['answers'])} at once: {rate(row, 'ours', 'cpu_s'):.2f} answers/s of the processor")
    print(f"\nTarget {TARGET:g} times with identical answers: {'met' if best >= TARGET and same else 'MISSED'}")
    sys.exit(not (best >= TARGET and same))


def rate(row: dict[str, Any], way: str, unit: str) -> float:
    """Answers per second of a way in a part; the loop may have been stopped before its end."""
    return len(row["answers" if way == "ours" else "loop"]) / row[f"{way}_{unit}"]


if __name__ == "__main__":
    main()
