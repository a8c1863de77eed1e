"""What a model costs: its numbers of parameters, the memory of a training step, its operations and its traffic.

Letters in the formulas: T tokens of a sequence, D width, F width of the feed-forward layer, n processes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, Literal

from medvlm.recipe_schema import Part, Recipe, Stage
from medvlm.training.hardware import Device

__all__ = [
    "LORA_RANK",
    "Load",
    "Setup",
    "Shape",
    "Tuning",
    "adapter_parameters",
    "load_of_step",
    "memory_by_part",
    "model_shape",
    "own_tuning",
    "recomputes",
    "trained_parameters",
]

Tuning = Literal["full", "lora", "qlora"]
LORA_RANK = 128
"""Of LLaVA's and STLLaVA-Med's scripts; alpha changes no size."""

_NF4_BYTES = 0.516
"""4 bits a weight and its share of the doubly quantised constants (QLoRA, section 3: 0.127 bits)."""
_CONTEXT_BYTES = 1.5 * 2**30
"""CUDA context, NCCL's and cuBLAS's buffers, and what the allocator cannot reuse. An assumption."""
_BUCKET_ELEMENTS = 5e8
"""DeepSpeed's reduce_bucket_size."""
_GATHERED_ELEMENTS = 1e9
"""DeepSpeed's stage3_max_live_parameters."""
_COMFORTABLE = 0.7
"""Share of a device's memory that a reckoned step may take without recomputing: an estimate is not a measurement."""
_EXPERT = re.compile(r"\bexperts?\.(?:[a-z_]+\.)*(\d+)\.")


@dataclass(frozen=True, slots=True)
class Shape:
    """A model in numbers of parameters."""

    parts: dict[str, int]
    """``vision_tower``, ``projector``, ``language_model``."""
    feed_forward: int
    """Of the language model's feed-forward modules, experts among them."""
    idle: int
    """Of experts that a token does not visit."""
    embedding: int
    """The input table: memory, but no multiplication."""
    head: int
    """The output layer."""
    image_marks: int
    """Of its rows, those of ``<im_start>`` and ``<im_end>``."""
    adaptable: int
    """Weights of the language model that LoRA puts an adapter beside, and that 4-bit loading packs."""
    adapter_widths: dict[str, int]
    """By part, what all its adapters have together at rank 1: inputs and outputs of every adapted layer."""

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True)
class Setup:
    """The choices that memory and time depend on."""

    device: Device
    processes: int
    micro_batch: int
    zero_stage: int
    tuning: Tuning
    gradient_checkpointing: bool
    offload_optimizer: bool


def model_shape(recipe: Recipe, stage: Stage | None = None) -> Shape:
    """The numbers of a recipe's model in a stage, counted on the ``meta`` device."""
    from torch import nn

    from medvlm.models.meta import meta_model
    from medvlm.training.marks import mark_parameters
    from medvlm.training.params import is_feed_forward, part_of

    model: Any = meta_model(recipe, stage)
    parts: dict[str, int] = {}
    idle = 0
    for name, parameter in model.named_parameters():
        parts[part_of(name)] = parts.get(part_of(name), 0) + parameter.numel()
        expert = _EXPERT.search(name)
        # Top-1 routing: all experts are of one size, and a token visits one.
        idle += parameter.numel() if expert and int(expert[1]) > 0 else 0
    linear = [m for m in model.model.language_model.modules() if isinstance(m, nn.Linear)]
    return Shape(
        parts=parts,
        feed_forward=sum(p.numel() for name, p in model.named_parameters() if is_feed_forward(name)),
        idle=idle,
        embedding=model.get_input_embeddings().weight.numel(),
        head=sum(parameter.numel() for parameter in model.lm_head.parameters()),
        image_marks=mark_parameters(recipe),
        adaptable=sum(m.weight.numel() for m in linear),
        adapter_widths={
            part: sum(layer.in_features + layer.out_features for layer in _adapted(model, recipe, part))
            for part in ("language_model", "vision_tower")
        },
    )


def _adapted(model: Any, recipe: Recipe, part: Part) -> list[Any]:
    from medvlm.training.lora import adapted_layers

    module = model.model.get_submodule(part)
    return [module.get_submodule(name) for name in adapted_layers(module, recipe, part)]


def own_tuning(stage: Stage) -> Tuning:
    """How the recipe's stage trains the language model."""
    if "language_model" not in stage.trains or stage.adapter("language_model") is None:
        return "full"
    return "qlora" if stage.quantisation else "lora"


def adapter_parameters(shape: Shape, stage: Stage, tuning: Tuning) -> dict[str, int]:
    """By part that learns through adapters, how many parameters these have.

    The language model's follow ``tuning``, at the stage's rank or else ``LORA_RANK``; the tower's are the stage's.
    """
    ranks: dict[str, int] = {}
    for part in ("language_model", "vision_tower"):
        own = stage.adapter(part)
        if part == "language_model" and tuning != "full" and part in stage.trains:
            ranks[part] = own.rank if own else LORA_RANK
        elif part == "vision_tower" and own:
            ranks[part] = own.rank
    return {part: rank * shape.adapter_widths[part] for part, rank in ranks.items()}


def _saved_parameters(shape: Shape, stage: Stage, tuning: Tuning) -> dict[str, int]:
    """By module that learns whole beside the language model's adapter, how many parameters it has."""
    sizes = {"embed_tokens": shape.embedding, "lm_head": shape.head}
    return {} if tuning == "full" else {module: sizes[module] for module in stage.saved_modules}


def trained_parameters(shape: Shape, stage: Stage, tuning: Tuning) -> int:
    """How many parameters learn."""
    own = {"feed_forward": shape.feed_forward, "image_marks": shape.image_marks}
    sizes = {**shape.parts, **own, **adapter_parameters(shape, stage, tuning)}
    return sum(sizes[part] for part in stage.trains) + sum(_saved_parameters(shape, stage, tuning).values())


def memory_by_part(recipe: Recipe, stage: Stage, shape: Shape, setup: Setup) -> dict[str, float]:
    """Bytes that one device holds at the fullest moment of a step, with sequences of ``max_length``.

    - weights: 2 bytes each in mixed precision, 4 in fp32; frozen ones too. ZeRO-3 splits them, and
      ``expert_parallel`` those of experts (whose gradients and states ZeRO splits over as many processes either way).
    - gradients: as many bytes for each that learns. ZeRO-2 splits them.
    - optimiser states: master copy and two moments, 12 bytes for each that learns (fp32: two moments, 8).
      ZeRO-1 splits them; offloaded they are in the host's memory.
    - activations: see ``_activations``; ``logits`` are those of all positions with their gradients, and fp32 copies
      of the positions that carry text.
    - overhead: a constant for the framework, and DeepSpeed's buckets.
    """
    wide = 4 if setup.device.precision == "fp32" else 2
    share = 1 / setup.processes
    learned = trained_parameters(shape, stage, setup.tuning)
    sharing = min(stage.expert_parallel, setup.processes)
    weights = (shape.total - _experts(recipe, shape) * (1 - 1 / sharing)) * wide
    if setup.tuning == "qlora":
        weights -= shape.adaptable * (wide - _NF4_BYTES)
    weights += sum(adapter_parameters(shape, stage, setup.tuning).values()) * wide
    gathered = min(shape.total, _GATHERED_ELEMENTS) * wide
    buckets = min(learned, _BUCKET_ELEMENTS) * wide
    rows = setup.micro_batch * _answers(stage)
    text = stage.max_length - recipe.model.image_tokens
    vocabulary = recipe.model.tokenizer.vocab_size
    states = learned * (8 if wide == 4 else 12) * (share if setup.zero_stage >= 1 else 1)
    overhead = _CONTEXT_BYTES if setup.device.is_gpu else 0.3 * 2**30
    if setup.processes > 1:
        overhead += (gathered if setup.zero_stage == 3 else 0) + (buckets if setup.zero_stage >= 1 else 0)
    return {
        "weights": weights * (share if setup.zero_stage == 3 else 1),
        "gradients": learned * wide * (share if setup.zero_stage >= 2 else 1),
        "optimizer_states": 0.0 if setup.offload_optimizer and setup.device.is_gpu else states,
        "activations": _activations(recipe, stage, setup, wide),
        "logits": rows * vocabulary * (stage.max_length * 2 * wide + text * (wide + 8)),
        "overhead": overhead,
    }


def _experts(recipe: Recipe, shape: Shape) -> float:
    """Parameters of all routed experts; ``shape.idle`` are those of all but one of a layer."""
    return shape.idle * recipe.model.moe.experts / (recipe.model.moe.experts - 1) if recipe.model.moe else 0.0


def recomputes(recipe: Recipe, stage: Stage, shape: Shape, setup: Setup) -> bool:
    """Whether a stage makes its activations again in the backward pass: as it says, or where memory is short.

    Args:
        recipe: The recipe.
        stage: ``gradient_checkpointing`` decides; with ``auto`` the memory that a step takes without it does.
        shape: Of the model in that stage.
        setup: Its own ``gradient_checkpointing`` is not looked at.
    """
    if stage.gradient_checkpointing != "auto":
        return stage.gradient_checkpointing == "on"
    kept = memory_by_part(recipe, stage, shape, replace(setup, gradient_checkpointing=False))
    return sum(kept.values()) > _COMFORTABLE * setup.device.gib * 2**30


def _answers(stage: Stage) -> int:
    """Sequences of one sample: a preference pair has two."""
    return 2 if stage.objective == "dpo" else 1


def _activations(recipe: Recipe, stage: Stage, setup: Setup, wide: int) -> float:
    """Bytes kept between forward and backward.

    A decoder layer keeps, for each token, its two inputs to the norms, their outputs, queries, keys, values,
    attention's output (6 D and the keys' and values' width), the feed-forward layer's four (4 F), and what
    transformers' norms hold in fp32 (16 D bytes). With checkpointing, its input alone, and one layer in full. The
    fused attention kernels keep no T x T matrix.
    """
    model = recipe.model
    decoder, tower = model.language_model, model.vision_tower
    tokens = setup.micro_batch * _answers(stage) * stage.max_length
    keys = 2 * decoder.hidden_size * decoder.kv_heads / decoder.heads
    norms = 16 * decoder.hidden_size if wide == 2 else 0
    layer = tokens * (wide * (6 * decoder.hidden_size + keys + 4 * decoder.mlp_size) + norms)
    kept = layer * decoder.layers
    if setup.gradient_checkpointing:
        kept = layer + tokens * wide * decoder.hidden_size * decoder.layers
    patches = setup.micro_batch * (tower.patches + 1)
    tower_layer = patches * wide * (8 * tower.hidden_size + 3 * tower.mlp_size)
    # A frozen tower runs without gradients: one layer at a time.
    kept += tower_layer * (tower.layers if "vision_tower" in stage.trains and not setup.gradient_checkpointing else 1)
    return kept + patches * wide * (tower.hidden_size + 2 * decoder.hidden_size)


@dataclass(frozen=True, slots=True)
class Load:
    """What one device does."""

    operations: float
    """Floating-point operations of a micro-batch, recomputation included."""
    sent: float
    """Bytes to and from the other devices in a micro-batch."""
    sent_a_step: float
    """Bytes in an optimiser step, beside those of its micro-batches."""
    host: float
    """Bytes to and from the host's memory in an optimiser step."""


def load_of_step(recipe: Recipe, stage: Stage, shape: Shape, setup: Setup, tokens: float) -> Load:
    """Operations and traffic of a micro-batch of sequences of ``tokens`` tokens with one image each.

    Forward, a weight costs 2 operations a token; its input's gradient costs 2 more and its own gradient again 2.
    A frozen language model behind a projector that learns pays the first two: the gradient has to pass through
    every layer to reach the projector. Recomputing activations costs the forward pass again. A frozen tower is
    forward only. Attention adds 2 T^2 D a layer for the lower triangle.
    """
    model = recipe.model
    decoder, tower = model.language_model, model.vision_tower
    matrices = shape.parts["language_model"] - shape.embedding - shape.idle
    forward = 2 * matrices * tokens + 2 * tokens**2 * decoder.hidden_size * decoder.layers
    passes = 2.0 + setup.gradient_checkpointing
    adapters = adapter_parameters(shape, stage, setup.tuning)
    if "language_model" in stage.trains:
        # The table is looked up: its gradient costs no multiplication.
        head = _saved_parameters(shape, stage, setup.tuning).get("lm_head", 0)
        passes += (adapters.get("language_model", matrices) + head) / max(1, matrices)
    if "feed_forward" in stage.trains:
        passes += (shape.feed_forward - shape.idle) / max(1, matrices)
    patches = tower.patches + 1
    seeing = 2 * shape.parts["vision_tower"] * patches + 4 * patches**2 * tower.hidden_size * tower.layers
    if "vision_tower" in stage.trains:
        share = adapters.get("vision_tower", shape.parts["vision_tower"]) / shape.parts["vision_tower"]
        seeing *= 2 + share + setup.gradient_checkpointing
    # Of two answers to choose between, the model before training is asked once: forward only.
    passes = (passes + 1) * 2 if stage.objective == "dpo" else passes
    projecting = 6 * shape.parts["projector"] * tower.patches
    wide = 4 if setup.device.precision == "fp32" else 2
    split = (setup.processes - 1) / setup.processes
    gradients = trained_parameters(shape, stage, setup.tuning) * wide
    learned, weights = gradients * split, shape.total * wide * split
    zero = setup.zero_stage
    return Load(
        operations=setup.micro_batch * (forward * passes + seeing + projecting),
        # ZeRO-3 gathers every weight for the forward and again for the backward pass, and scatters gradients' sums.
        # ZeRO-1 and 2 in DeepSpeed all-reduce gradients (use_multi_rank_bucket_allreduce), which is a scatter and a
        # gather, and gather the new weights as well: benchmarks/scaling.py counted these bytes on a link. Reducing each
        # part to its owner instead sent as many over gloo.
        sent={0: 0.0, 1: 0.0, 2: 2 * learned, 3: 2 * weights + learned}[zero],
        sent_a_step={0: 2 * learned, 1: 3 * learned, 2: learned, 3: 0.0}[zero],
        host=2 * gradients / setup.processes if setup.offload_optimizer else 0.0,
    )
