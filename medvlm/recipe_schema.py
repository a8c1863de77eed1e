"""What a recipe may say: the parts of a system and how each of its three stages trains."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from medvlm.errors import RecipeError
from medvlm.model_schema import (
    SIZE,
    SOURCE,
    LanguageModel,
    Model,
    MoE,
    Projector,
    Role,
    Router,
    Section,
    Size,
    Tokenizer,
    VisionTower,
)

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
    "ModulesToSave",
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
]

StageName = Literal["align", "instruct", "finetune", "moe_tune", "prefer"]
TemplateName = Literal[
    "plain", "vicuna_v1", "vicuna_v1_sq", "mistral_instruct", "llama_2", "llama2_chinese", "phi", "chatml"
]
Part = Literal["vision_tower", "projector", "language_model", "feed_forward", "image_marks"]


class Checkpoints(Section):
    """What a killed run can resume from."""

    every: Annotated[float, Field(gt=0, le=1)]
    """Share of the stage's steps between two checkpoints: it needs no change with the length of a run."""
    every_s: Annotated[float, Field(gt=0)]
    """A checkpoint is also written when this much time has passed since the last one."""
    keep: Annotated[int, Field(ge=1)]


class Adapter(Section):
    """Low-rank matrices that learn in place of a part's own (LoRA, Hu et al. 2021)."""

    rank: Size
    alpha: Size
    """Their product is added times ``alpha / rank``."""
    dropout: Annotated[float, Field(ge=0, lt=1)]
    """Of what the first matrix reads."""
    reference_alpha: Annotated[int, Field(gt=0)]
    """Alpha at which the published learning rate was set; see ``medvlm.training.lora.rate_ratio``."""


class ModulesToSave(Section):
    """Modules of the language model that learn with their own weights beside its adapter; peft's word for them.

    The published systems have none: an adapter alone learns, upon a language model that has learned before. A twin's
    begins with random weights, which an adapter leaves as they are: tokens that mean nothing, and a head that
    reads nothing. Measured on the sample corpus, such a twin answers without looking at the image. So this is a source,
    as the weights are: what it makes up for is where they come from.
    """

    modules: Annotated[tuple[Literal["embed_tokens", "lm_head"], ...], Field(min_length=1), SOURCE]
    """``embed_tokens`` is the token table, ``lm_head`` the output layer."""
    learning_rate: Annotated[float, Field(gt=0), SOURCE]
    """At the published size, of full weights. It is scaled as the language model's; see ``Stage.learning_rate``."""


class Lora(Section):
    """Parts that learn through an adapter; their own weights stay, and take it up at the stage's end."""

    vision_tower: Adapter | None = None
    language_model: Adapter | None = None
    modules_to_save: Annotated[ModulesToSave | None, SOURCE] = None
    """What of the language model learns whole all the same."""
    quantisation: Literal["nf4"] | None = None
    """QLoRA: the language model's own weights are held in 4 bits while its adapter learns. Needs bitsandbytes."""

    @model_validator(mode="after")
    def _fits(self) -> Lora:
        if self.quantisation and self.language_model is None:
            raise ValueError(
                f"quantisation {self.quantisation!r} needs lora.language_model: 4-bit weights do not learn"
            )
        if self.modules_to_save is not None and self.language_model is None:
            raise ValueError("modules_to_save needs lora.language_model: without an adapter everything learns whole")
        return self


class Rates(Section):
    """Learning rates of parts that differ from the stage's."""

    vision_tower: Annotated[float, Field(gt=0)] | None = None
    projector: Annotated[float, Field(gt=0)] | None = None
    language_model: Annotated[float, Field(gt=0)] | None = None
    feed_forward: Annotated[float, Field(gt=0)] | None = None


class Speed(Section):
    """What makes a stage faster and leaves its losses as they are; each can be switched off alone.

    They are sizes in that a twin may change them: how much is computed, not what.
    """

    feature_cache: Annotated[bool, SIZE] = True
    """What a frozen tower makes of an image is kept on disk, in the precision of the stage."""
    feature_cache_gb: Annotated[float, Field(gt=0), SIZE] = 50.0
    """Most disk that it may take, of all towers together, in GB: what was used longest ago gives way."""
    loss_at_labels: Annotated[bool, SIZE] = True
    """The vocabulary is projected to at tokens that are learned, a bounded number of them at once."""
    packing: Annotated[bool, SIZE] = True
    """Short sequences of a micro-batch share a row instead of being padded; none sees another."""
    shared_prefix: Annotated[bool, SIZE] = True
    """With ``image_sharing: prefix``, what questions of one image share is computed once."""
    length_groups: Annotated[bool, SIZE] = True
    """Sequences of like length share a batch. It changes the order of the samples."""
    liger: Annotated[bool, SIZE] = True
    """Liger's Triton kernels for norms, positions and feed-forward modules, on a GPU where they are installed."""
    onednn: Annotated[bool, SIZE] = True
    """On a CPU in float32, linear layers run through oneDNN instead of MKL; see ``medvlm.training.onednn``."""
    compile: Annotated[bool, SIZE] = False
    """``torch.compile`` for the language model's layers. Off; ``benchmarks/train.py`` has a row for its worth."""


class Stage(Section):
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
    """``auto``: on where ``medvlm plan`` reckons that a device's memory is short without it."""
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

    @property
    def saved_modules(self) -> tuple[str, ...]:
        """Modules of the language model that learn with their own weights beside its adapter."""
        saved = None if self.lora is None else self.lora.modules_to_save
        return () if saved is None else saved.modules

    def rate(self, part: Part) -> float:
        """The published learning rate of a part."""
        own: float | None = getattr(self.learning_rates, part, None)
        return self.learning_rate if own is None else own

    def adapter(self, part: Part) -> Adapter | None:
        """The adapter through which a part learns; None where it learns itself or not at all."""
        return None if self.lora is None else getattr(self.lora, part, None)


class Decoding(Section):
    """How answers are generated. Greedy: what the published systems but LLaVA-Med used, and reproducible."""

    max_new_tokens: Size


class Recipe(Section):
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
            self._check_saved(stage)
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

    def _check_saved(self, stage: Stage) -> None:
        if stage.saved_modules and self.model.language_model.tied_embeddings:
            raise ValueError(
                f"stages.{stage.name}.lora.modules_to_save is for a table and a head of their own, and "
                "model.language_model.tied_embeddings makes them one"
            )

    def _check_marks(self, stage: Stage) -> None:
        marks = "image_marks" in stage.trains and self.model.mm_use_im_start_end
        if marks and self.model.language_model.tied_embeddings:
            raise ValueError(
                f"stages.{stage.name}.trains names image_marks, rows of the input embedding alone, and "
                "model.language_model.tied_embeddings makes them rows of the head too"
            )
