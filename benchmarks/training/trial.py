"""One training of one row, in a process of its own: its pace, its losses, its peak memory, and where its time goes."""

from __future__ import annotations

import math
import resource
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

__all__ = ["PLAIN", "look", "overrides", "peak", "prepare", "trial"]

PLAIN = "plain"
LEVERS = ("onednn", "feature_cache", "loss_at_labels", "packing", "shared_prefix", "length_groups")


def overrides(case: Any, row: str) -> list[str]:
    """What a row sets in the recipe: every lever by name, so that no default decides."""
    levers = dict.fromkeys(LEVERS, row not in (PLAIN, "levers off") and not row.startswith("only "))
    # They change the order of the samples: only a row that says so has them.
    levers["length_groups"] = row.startswith("ours, length groups")
    if row.startswith("only "):
        levers[row.removeprefix("only ")] = True
    elif row.startswith("without "):
        levers[row.removeprefix("without ")] = False
    stage = f"stages.{('align', 'instruct')[case.stage - 1]}"
    checkpointing = "on" if row.endswith("checkpointing") else "off"
    levers["compile"] = row.endswith("compiled")
    values: dict[str, Any] = {
        "global_batch": case.batch,
        "micro_batch": case.batch,
        "epochs": 1,
        "max_steps": case.steps,
        "samples_per_image": case.per_image,
        "image_sharing": "prefix",
        "template": "chatml" if case.smol else "vicuna_v1",
        "precision": case.precision,
        "gradient_checkpointing": checkpointing,
        **{f"speed.{lever}": str(on).lower() for lever, on in levers.items()},
    }
    lengths = [f"stages.{name}.max_length={case.max_length}" for name in ("align", "instruct", "finetune")]
    return ["model.image_first=true", *lengths, *(f"{stage}.{key}={value}" for key, value in values.items())]


def recipe_of(case: Any, row: str) -> Any:
    """The case's model with the row's levers."""
    from medvlm.config import load_recipe

    name = "smol-llava-med" if case.smol else "tiny-llava-med"
    # The stock model's projector does not standardise what it reads.
    return load_recipe(name, [*case.model, "model.projector.standardised=false", *overrides(case, row)])


def prepare(case: Any, folder: str, data: str | None) -> str:
    """Write samples and the model that every trial begins with; says what they are."""
    from training import samples as drawn

    from medvlm.models.checkpoint import Checkpoint, build_model, save_checkpoint
    from medvlm.models.tokenizer import load_tokenizer, special_marks, train_tokenizer
    from medvlm.models.vision import ImageProcessor
    from medvlm.records import Sample
    from medvlm.store import Workspace, write_records

    workspace = Workspace(Path(folder) / "ws").ensure()
    count, source = case.steps * case.batch, Path(data) if data else None
    if case.samples in ("vqa-rad", "slake") and source:
        samples = drawn.questions(workspace, source, case.samples, count, case.per_image)
    elif case.samples == "captions":
        samples = drawn.captions(source, count)
    else:
        samples = drawn.conversations(source, count, longest=case.longest)
    for name in ("alignment", "instruct"):
        write_records(workspace.samples(name), Sample, samples)
    recipe = recipe_of(case, "ours")
    if case.smol:
        tokenizer = load_tokenizer(recipe.model.tokenizer.source, special_marks(recipe))
    else:
        tokenizer = train_tokenizer(recipe, (turn.text for sample in samples for turn in sample.turns))
    model = build_model(recipe, tokenizer)
    processor = ImageProcessor.of(recipe.model.vision_tower)
    save_checkpoint(Path(folder) / "start", Checkpoint(model, tokenizer, processor, recipe, {"fingerprint": "start"}))
    millions = {part: sum(p.numel() for p in getattr(model.model, part).parameters()) / 1e6 for part in _PARTS}
    sizes = ", ".join(f"{part.replace('_', ' ')} {size:.1f} M" for part, size in millions.items())
    plural = "" if case.per_image == 1 else f", {case.per_image} of each image"
    return f"{sizes}; {len(samples)} samples{plural}; batch {case.batch}, {case.steps} steps an epoch, {case.precision}"


_PARTS = ("vision_tower", "multi_modal_projector", "language_model")


class Clock:
    """Clock and processor time of a part of this process."""

    def __init__(self) -> None:
        self.clock_s = self.cpu_s = 0.0
        self._at = (0.0, 0.0)

    def __enter__(self) -> Clock:
        self._at = (time.perf_counter(), time.process_time())
        return self

    def __exit__(self, *_: object) -> None:
        self.clock_s += time.perf_counter() - self._at[0]
        self.cpu_s += time.process_time() - self._at[1]


def trial(case: Any, row: str, folder: str, *, watch: bool = False) -> dict[str, Any]:
    """An epoch of a row.

    Args:
        case: What is trained.
        row: Which way.
        folder: Of ``prepare``.
        watch: Count operations and profile instead of measuring.

    Returns:
        ``samples``, ``clock_s`` and ``cpu_s`` of the epoch, ``wait_s`` of them for data, ``losses``, ``peak_mb``, and
        the filling of the feature cache apart: ``fill_s``, ``fill_cpu_s``, ``fill_images``.
    """
    from transformers import Trainer, TrainingArguments

    from medvlm.training.collate import collate
    from medvlm.training.params import freeze, parameter_groups

    rows, model, recipe, stage, pad_id, packing, filled = _loaded(case, row, Path(folder))
    freeze(model, stage)
    losses: list[float] = []
    waited, epoch = Clock(), Clock()
    loss_of = _loss_of(row)

    def batched(parts: Any) -> dict[str, Any]:
        with waited:
            return collate(parts, pad_id, packing=packing)

    class Side(Trainer):
        """The stock Trainer with the row's loss."""

        def create_optimizer(self, model: Any = None) -> Any:
            import torch

            # Fused, as the stock Trainer has it.
            groups = parameter_groups(self.model, recipe, stage)
            self.optimizer = torch.optim.AdamW(groups, lr=stage.learning_rate, fused=True)
            return self.optimizer

        def compute_loss(self, model: Any, inputs: dict[str, Any], *_: Any, **options: Any) -> Any:
            loss = loss_of(model, _fed(inputs), options.get("num_items_in_batch"))
            losses.append(loss.item())
            return loss

    trainer = Side(
        model=model,
        args=TrainingArguments(
            output_dir=str(Path(folder) / "out"),
            max_steps=case.steps,
            use_cpu=True,
            report_to=[],
            per_device_train_batch_size=case.batch,
            bf16=case.precision == "bf16",
            activation_checkpointing=stage.gradient_checkpointing == "on",
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=10**6,
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            learning_rate=stage.learning_rate,
            max_grad_norm=stage.max_grad_norm,
        ),
        train_dataset=_Timed(rows, waited),
        data_collator=batched,
    )
    # What libraries set up when they are first called, and the first images of a cold disk, are not the epoch's.
    first = [rows[index] for index in range(2 if row.endswith("compiled") else 1)]  # a size of 1 is compiled apart
    loss_of(model, _fed(batched(first)), None).backward()
    model.zero_grad(set_to_none=True)
    losses.clear()
    waited.clock_s = 0.0
    with ExitStack() as stack:
        seen = stack.enter_context(_watched()) if watch else None
        with epoch:
            trainer.train()
    return {
        "samples": sum(len(rows[place]["sample_ids"]) for place in range(len(rows))),
        "clock_s": epoch.clock_s,
        "cpu_s": epoch.cpu_s,
        "wait_s": waited.clock_s,
        "losses": losses,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        **filled,
        **({} if seen is None else seen.found()),
    }


def _fed(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name not in ("sample_ids", "spans")}


def _loss_of(row: str) -> Any:
    from medvlm.training.objectives import answer_loss

    def stock(model: Any, inputs: dict[str, Any], tokens: Any) -> Any:
        return model(**inputs, num_items_in_batch=tokens).loss

    return stock if row == PLAIN else answer_loss


class _Timed:
    """A dataset whose reading is timed."""

    def __init__(self, rows: Any, clock: Clock) -> None:
        self._rows, self._clock = rows, clock

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, position: int) -> Any:
        with self._clock:
            return self._rows[position]


def _loaded(case: Any, row: str, folder: Path) -> tuple[Any, Any, Any, Any, int, Any, dict[str, Any]]:
    """Rows in their order, the model (stock for the plain row), recipe, stage, padding, packing, and the filling."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    from medvlm.models.checkpoint import load_checkpoint
    from medvlm.store import Workspace
    from medvlm.training.collate import ConversationEncoder
    from medvlm.training.data import TrainingSet, read_stage_samples
    from medvlm.training.engine import choose_engine
    from medvlm.training.images import image_store
    from medvlm.training.kernels import prepare_kernels
    from medvlm.training.order import StagePlan
    from medvlm.training.pixels import PixelStore

    recipe = recipe_of(case, row)
    stage = recipe.stages[case.stage - 1]
    workspace = Workspace(folder / "ws")
    start = load_checkpoint(folder / "start")
    samples = read_stage_samples([workspace.samples(stage.data)], stage, recipe.seed)
    plan = StagePlan(samples, stage, recipe.seed)
    encoder = ConversationEncoder(recipe, start.tokenizer, stage.template, stage.max_length)
    engine = replace(choose_engine(recipe, stage), precision="bf16" if row.endswith("bf16 features") else "fp32")
    # An epoch reads each image once; the cache is meant for the epochs after it.
    many = StagePlan(samples, stage.model_copy(update={"epochs": 3, "max_steps": None}), recipe.seed)
    with Clock() as fill:
        images = image_store(workspace, stage, engine, start, samples, many, PixelStore(start.processor))
    model: Any = start.model
    if row == PLAIN:
        values = {key: value for key, value in model.config.to_dict().items() if key not in ("model_type", "dtype")}
        model = LlavaForConditionalGeneration(LlavaConfig(**values))
        model.load_state_dict(start.model.state_dict())
    else:
        prepare_kernels(model, stage, engine)
    rows = TrainingSet(samples, plan, encoder, images)
    filled = {"fill_s": fill.clock_s, "fill_cpu_s": fill.cpu_s, "fill_images": len(many.images(samples)[0])}
    packing = "off" if row == PLAIN else engine.packing
    return rows, model, recipe, stage, start.tokenizer.pad_token_id, packing, filled


def peak(precision: str) -> dict[str, float]:
    """The most operations of a matrix product that this machine does: by the clock, and a second of processor time.

    Of MKL's and oneDNN's the better one.
    """
    import torch

    kind, n = (torch.bfloat16 if precision == "bf16" else torch.float32), 2048
    a, b = torch.randn(n, n).to(kind), torch.randn(n, n).to(kind)
    onednn: Any = torch.ops.mkldnn
    products = (lambda: a @ b, lambda: onednn._linear_pointwise(a, b, None, "none", [], ""))
    clocks: list[tuple[float, float]] = []
    for product in products * 8:
        with Clock() as one:
            product()
        clocks.append((one.clock_s, one.cpu_s))
    flop = 2.0 * n**3
    return {
        "gflops": flop / min(c for c, _ in clocks) / 1e9,
        "gflops_cpu": flop / min(c for _, c in clocks) / 1e9,
        "threads": torch.get_num_threads(),
    }


def look(case: Any, row: str, folder: str) -> dict[str, Any]:
    """``trial``, watched: ``gflop`` of the epoch and ``share`` of its time by kind of work."""
    return trial(case, row, folder, watch=True)


_KINDS = (
    ("matrix products", ("mm", "linear", "addmm", "bmm", "matmul", "mkldnn", "baddbmm")),
    ("attention", ("attention", "softmax")),
    ("convolutions", ("convolution", "conv2d", "batch_norm")),
    ("logits' softmax and loss", ("log_softmax", "nll_loss", "cross_entropy")),
    ("optimiser", ("_foreach", "adam", "addcdiv", "lerp")),
)


class _Watched:
    """Operations of matrix products and attention, and time by kind of operator."""

    def __init__(self, flops: Any, profiler: Any) -> None:
        self._flops, self._profiler = flops, profiler

    def found(self) -> dict[str, Any]:
        times: dict[str, float] = {}
        for event in self._profiler.key_averages():
            name = event.key.removeprefix("aten::")
            if event.key.startswith("aten::") or "::" in event.key:
                kind = _kind(name)
                times[kind] = times.get(kind, 0.0) + event.self_cpu_time_total
        total = sum(times.values())
        return {
            "gflop": self._flops.get_total_flops() / 1e9,
            "share": {kind: value / total for kind, value in sorted(times.items(), key=lambda item: -item[1])},
        }


def _kind(name: str) -> str:
    if "log_softmax" in name or "nll_loss" in name or "cross_entropy" in name:
        return "logits' softmax and loss"
    for kind, words in _KINDS:
        if any(word in name for word in words):
            return kind
    return "elementwise, copies and the rest"


def _watched() -> Any:
    from contextlib import contextmanager

    from torch.profiler import ProfilerActivity, profile
    from torch.utils.flop_counter import FlopCounterMode

    @contextmanager
    def watching() -> Any:
        counter = FlopCounterMode(display=False, custom_mapping=_attention())
        with profile(activities=[ProfilerActivity.CPU]) as profiler, counter:
            yield _Watched(counter, profiler)

    return watching()


def _attention() -> dict[Any, Any]:
    """What torch's counter does not know: oneDNN's products, and the CPU's attention kernel.

    Two products forward, five backward; half of them where a token sees only what stands before it.
    """
    import torch

    def forward(
        query: Any, key: Any, value: Any, dropout: Any = 0.0, causal: bool = False, *_: Any, **options: Any
    ) -> int:
        b, h, q, d = query
        seen = 2 if causal or options.get("is_causal") else 1
        return 2 * b * h * q * key[-2] * (d + value[-1]) // seen

    def backward(
        grad: Any, query: Any, key: Any, value: Any, out: Any, sums: Any, dropout: Any = 0.0, causal: bool = False,
        *_: Any, **options: Any,
    ) -> int:  # fmt: skip
        b, h, q, d = query
        seen = 2 if causal or options.get("is_causal") else 1
        return 2 * b * h * q * key[-2] * (3 * d + 2 * value[-1]) // seen

    def product(left: Any, right: Any, *_: Any, **__: Any) -> int:
        return 2 * math.prod(left) * right[0]

    ops = torch.ops.aten
    return {
        ops._scaled_dot_product_flash_attention_for_cpu: forward,
        ops._scaled_dot_product_flash_attention_for_cpu_backward: backward,
        torch.ops.mkldnn._linear_pointwise: product,
    }
