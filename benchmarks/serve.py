"""Requests per second and waiting times of `medvlm serve`, beside one-at-a-time generation.

    python benchmarks/serve.py [--requests 48] [--tokens 48] [--hidden 512] [--layers 8]

The model is a LLaVA-like one with random weights, drawn on the spot. The server runs as a process of
its own, as `medvlm serve` starts it, and is asked over HTTP by OpenAI's client, a different image and
question each time. The peer is transformers' `generate`, one question after the other in one process,
without HTTP; and the server itself at concurrency 1. All make exactly the same number of tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import numpy as np
import openai
import yaml
from PIL import Image

TARGET_X, TARGET_AT = 3.0, 8
CONCURRENCIES = (1, 8, 32)
WORDS = ("is", "there", "a", "nodule", "in", "the", "left", "lung", "where", "what", "does", "this", "image", "show")


def main() -> None:
    """Print a line a concurrency; exit 1 if the server at 8 is not 3 times as fast as one at a time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=48, help="for each line")
    parser.add_argument("--tokens", type=int, default=48, help="of each answer")
    parser.add_argument("--hidden", type=int, default=512, help="width of the language model")
    parser.add_argument("--layers", type=int, default=8, help="of the language model")
    arguments = parser.parse_args()
    questions = [question(n) for n in range(arguments.requests)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "checkpoint"
        parameters = draw(folder, arguments.hidden, arguments.layers)
        print(f"{parameters / 1e6:.0f} M parameters, {arguments.requests} requests, {arguments.tokens} tokens each")
        alone = [one_at_a_time(folder, questions[: max(8, len(questions) // 3)], arguments.tokens)]
        base = report("generate, one at a time", *alone[0], arguments.tokens)
        rates = asyncio.run(served(folder, questions, arguments.tokens, base))
    gain = rates[TARGET_AT] / base
    print(f"target {TARGET_X:g} x at {TARGET_AT}: {'met' if gain >= TARGET_X else 'MISSED'} ({gain:.1f} x)")
    sys.exit(gain < TARGET_X)


def question(n: int) -> tuple[bytes, str]:
    """An image and a question that no other request has."""
    rng = np.random.default_rng(n)
    out = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (120, 160, 3), dtype=np.uint8)).save(out, "JPEG")
    return out.getvalue(), f"{n}: {' '.join(rng.choice(WORDS, 6 + n % 12))}?"


def draw(folder: Path, hidden: int, layers: int) -> int:
    """A checkpoint with random weights; returns its number of parameters."""
    from medvlm.config import load_recipe
    from medvlm.models.checkpoint import Checkpoint, build_model, save_checkpoint
    from medvlm.models.tokenizer import train_tokenizer
    from medvlm.models.vision import ImageProcessor

    path = folder.parent / "recipe.yaml"
    language_model = {"hidden_size": hidden, "layers": layers, "heads": hidden // 64, "kv_heads": hidden // 64}
    sizes = {"language_model": language_model | {"mlp_size": 3 * hidden}}
    path.write_text(yaml.safe_dump({"extends": "tiny-llava-med", "name": "served", "title": "Served", "model": sizes}))
    recipe = load_recipe(path)
    tokenizer = train_tokenizer(recipe, [" ".join(WORDS)] * 50)
    model = build_model(recipe, tokenizer)
    # An answer ends after --tokens and never before, so that every line makes the same number.
    model.generation_config.eos_token_id = None
    metadata = {"stage": "finetune", "fingerprint": "drawn"}
    processor = ImageProcessor.of(recipe.model.vision_tower)
    save_checkpoint(folder, Checkpoint(model, tokenizer, processor, recipe, metadata))
    return sum(parameter.numel() for parameter in model.parameters())


def one_at_a_time(folder: Path, questions: Sequence[tuple[bytes, str]], tokens: int) -> tuple[float, list[float]]:
    """Seconds in all and of each question with transformers' ``generate``."""
    import torch

    from medvlm.records import Turn
    from medvlm.serving.chat import ChatModel

    chat = ChatModel.load(folder)
    each: list[float] = []
    for n in range(-1, len(questions)):
        image, text = questions[max(n, 0)]
        begun = time.perf_counter()
        asked = chat.prepare(image, [Turn("user", text)], tokens)
        ids = torch.tensor([asked.ids])
        with torch.inference_mode():
            out = chat.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=asked.pixels[None],
                max_new_tokens=tokens,
                do_sample=False,
            )
        assert out.shape[1] == ids.shape[1] + tokens
        if n >= 0:  # the first one only warms up
            each.append(time.perf_counter() - begun)
    return sum(each), each


async def served(folder: Path, questions: Sequence[tuple[bytes, str]], tokens: int, base: float) -> dict[int, float]:
    """Requests per second at each concurrency."""
    command = [sys.executable, "-m", "medvlm.cli", "serve", "--checkpoint", str(folder), "--port", "0"]
    command += ["--max-batch", str(max(CONCURRENCIES))]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ)
    try:
        assert process.stderr
        lines = iter(process.stderr.readline, "")
        url = next(found.group() for line in lines if (found := re.search(r"http://127\.0\.0\.1:\d+", line)))
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600) as client:

            async def ask(asked: tuple[bytes, str]) -> None:
                address = f"data:image/jpeg;base64,{base64.b64encode(asked[0]).decode()}"
                parts = [{"type": "text", "text": asked[1]}, {"type": "image_url", "image_url": {"url": address}}]
                messages = [{"role": "user", "content": parts}]
                answer = await client.chat.completions.create(model="served", messages=messages, max_tokens=tokens)  # type: ignore[arg-type]
                assert answer.usage
                assert answer.usage.completion_tokens == tokens

            await ask(questions[0])
            rates: dict[int, float] = {}
            for limit in CONCURRENCIES:
                part = questions if limit > 1 else questions[: max(8, len(questions) // 3)]
                seconds, each = await timed(ask, part, limit)
                rates[limit] = report(f"medvlm serve, {limit} at once", seconds, each, tokens, base)
            return rates
    finally:
        process.terminate()
        process.communicate()


async def timed(
    ask: Callable[[tuple[bytes, str]], Awaitable[None]], questions: Sequence[tuple[bytes, str]], limit: int
) -> tuple[float, list[float]]:
    """Seconds in all and of each request, ``limit`` at once."""
    gate, each = asyncio.Semaphore(limit), []

    async def one(asked: tuple[bytes, str]) -> None:
        async with gate:
            begun = time.perf_counter()
            await ask(asked)
            each.append(time.perf_counter() - begun)

    begun = time.perf_counter()
    await asyncio.gather(*map(one, questions))
    return time.perf_counter() - begun, each


def report(name: str, seconds: float, each: Sequence[float], tokens: int, base: float = 0.0) -> float:
    """Print a line; returns requests per second."""
    rate = len(each) / seconds
    p50, p95 = np.quantile(each, [0.5, 0.95])
    ratio = f"   {rate / base:.1f} x" if base else ""
    numbers = f"{rate:6.2f} requests/s  {rate * tokens:7.0f} tokens/s   p50 {p50:6.2f} s   p95 {p95:6.2f} s"
    print(f"  {name:26} {numbers}{ratio}", flush=True)
    return rate


if __name__ == "__main__":
    main()
