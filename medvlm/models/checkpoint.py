"""Models built from a recipe, and checkpoints: folders that transformers opens, written whole or not at all."""

from __future__ import annotations

import math
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from medvlm.config import load_recipe, recipe_yaml
from medvlm.errors import CheckpointError
from medvlm.models.loading import check_hashes, check_keys, check_sizes, disk_errors, refuse_loading, weight_hashes
from medvlm.models.sources import pretrained
from medvlm.models.template import IMAGE_MARK
from medvlm.models.tokenizer import load_tokenizer, special_marks
from medvlm.models.vision import ImageProcessor, draw_tower, load_tower, tower_config
from medvlm.recipe_schema import Recipe
from medvlm.store import atomic_folder, read_json, write_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

    from medvlm.models.vlm import MedVLMConfig, MedVLMForConditionalGeneration

__all__ = [
    "Checkpoint",
    "attention_implementation",
    "build_model",
    "decoder_config",
    "git_commit",
    "load_checkpoint",
    "model_config",
    "save_checkpoint",
]

RANDOM = "random"

# What an architecture's published configuration sets and a recipe has no size for: microsoft/phi-2 (its rotary
# part of a head) and stabilityai/stablelm-2-1_6b (its rotary part, and biases of queries, keys and values).
_ARCHITECTURE: dict[str, dict[str, Any]] = {
    "phi": {"partial_rotary_factor": 0.4},
    "stablelm": {"partial_rotary_factor": 0.25, "use_qkv_bias": True},
}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model with all that is needed to use it."""

    model: MedVLMForConditionalGeneration
    tokenizer: PreTrainedTokenizerFast
    processor: ImageProcessor
    recipe: Recipe
    metadata: dict[str, Any]


def attention_implementation() -> str:
    """``flash_attention_2`` where it is installed and the GPU can run it, else ``sdpa``."""
    import importlib.util

    import torch

    capable = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8
    return "flash_attention_2" if capable and importlib.util.find_spec("flash_attn") else "sdpa"


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> MedVLMForConditionalGeneration:
    """The model at the start of a recipe's first stage, in float32.

    Args:
        recipe: Its weights are ``random`` (drawn from its seed), a hub id or a folder.
        tokenizer: Gives the ids of the image, padding and end marks.

    Raises:
        CheckpointError: Published weights cannot be loaded or do not fit the recipe.
    """
    import torch

    from medvlm.models.vlm import MedVLMForConditionalGeneration

    attention = attention_implementation()
    tower, decoder = _published_tower(recipe, attention), _published_decoder(recipe, attention)
    tokens: Any = tokenizer
    marks = {name: getattr(tokens, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    vocab_size = max(recipe.model.tokenizer.vocab_size, len(tokenizer))
    config: Any = model_config(
        recipe,
        vision_config=tower.config if tower is not None else tower_config(recipe.model.vision_tower),
        text_config=decoder.config if decoder is not None else decoder_config(recipe, vocab_size, marks),
        image_id=tokens.convert_tokens_to_ids(IMAGE_MARK),
        marks=marks,
    )
    # The public argument exists on from_pretrained only; this is where transformers keeps the choice.
    config._attn_implementation = attention
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        model = MedVLMForConditionalGeneration(config)
        if tower is not None:
            model.model.vision_tower = tower
        else:
            draw_tower(model.model.vision_tower, recipe.seed)
        if decoder is not None:
            model.model.language_model, model.lm_head = decoder.model, decoder.lm_head
            if len(tokenizer) > config.text_config.vocab_size:
                # New marks start as the average of all embeddings, the choice that disturbs the model least.
                model.resize_token_embeddings(len(tokenizer), mean_resizing=True)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


def model_config(
    recipe: Recipe, *, vision_config: Any, text_config: Any, image_id: int, marks: Mapping[str, int | None]
) -> MedVLMConfig:
    """The configuration of a recipe's model, around those of its tower and its language model.

    Args:
        recipe: Gives the projector and what is read from the tower.
        vision_config: Of transformers' tower.
        text_config: Of transformers' language model; its vocabulary is the model's.
        image_id: Id of ``<image>``.
        marks: ``pad_token_id``, ``bos_token_id`` and ``eos_token_id``, where they are known.
    """
    from medvlm.models.vlm import MedVLMConfig

    make_config: Any = MedVLMConfig  # its generated signature is unknown to type checkers
    return make_config(
        vision_config=vision_config,
        text_config=text_config,
        projector_kind=recipe.model.projector.kind,
        projector_prototypes=recipe.model.projector.prototypes,
        projector_standardised=recipe.model.projector.standardised,
        image_token_index=image_id,
        image_seq_length=recipe.model.image_tokens,
        vision_feature_layer=recipe.model.vision_tower.feature_layer,
        vision_feature_select_strategy="default" if recipe.model.vision_tower.feature_select == "patch" else "full",
        tie_word_embeddings=recipe.model.language_model.tied_embeddings,
        dtype="float32",
        **marks,
    )


def decoder_config(recipe: Recipe, vocab_size: int, settings: Mapping[str, Any]) -> PretrainedConfig:
    """The transformers configuration of a recipe's language model.

    Args:
        recipe: Gives the sizes.
        vocab_size: Rows of the embedding.
        settings: What else is known: ``pad_token_id`` and the like, or a published model's rope and norms.
    """
    from transformers import CONFIG_MAPPING

    spec = recipe.model.language_model
    make_config: Any = CONFIG_MAPPING[spec.architecture]
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.mlp_size,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "max_position_embeddings": spec.max_positions,
        # Keeps what a layer puts out as large as what it reads, at any width.
        "initializer_range": 1 / math.sqrt(spec.hidden_size),
        "tie_word_embeddings": spec.tied_embeddings,
        **_ARCHITECTURE.get(spec.architecture, {}),
    }
    return make_config(**{**sizes, **settings})


def _published_tower(recipe: Recipe, attention: str) -> Any:
    return None if recipe.model.vision_tower.weights == RANDOM else load_tower(recipe, attention)


def _published_decoder(recipe: Recipe, attention: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    spec = recipe.model.language_model
    if spec.weights == RANDOM:
        return None
    source, options = pretrained(spec.weights)
    with refuse_loading(spec.weights):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            **options,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported, and refused below
            output_loading_info=True,
            attn_implementation=attention,
            dtype=torch.float32,
        )
    decoder, info = loaded
    check_keys(info, spec.weights)
    check_sizes(
        decoder.config,
        _SizesOf(spec),
        (
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "intermediate_size",
            "tie_word_embeddings",
        ),
        spec.weights,
    )
    if options:
        # The weights are in float32 now; what says that they were quantised would keep them from being saved.
        del decoder.config.quantization_config
    return decoder


class _SizesOf:
    """A recipe's language model under transformers' names."""

    def __init__(self, spec: Any) -> None:
        self.hidden_size = spec.hidden_size
        self.num_hidden_layers = spec.layers
        self.num_attention_heads = spec.heads
        self.num_key_value_heads = spec.kv_heads
        self.intermediate_size = spec.mlp_size
        self.tie_word_embeddings = spec.tied_embeddings


class Saves(Protocol):
    """What writes files of its own into a folder."""

    def save(self, folder: Path) -> None:
        """Write them."""
        ...


def save_checkpoint(
    folder: Path, checkpoint: Checkpoint, *, state: dict[str, Any] | None = None, adapter: Saves | None = None
) -> None:
    """Write a checkpoint in place of ``folder``, whole.

    Args:
        folder: Gets safetensors, ``config.json``, tokenizer, processor, ``recipe.yaml``, ``metadata.json``.
        checkpoint: What is written.
        state: The weights, where the model itself holds only a part of them (ZeRO-3).
        adapter: Kept in ``adapter/``; the weights hold it already.

    Raises:
        WorkspaceError: The disk is full or read-only; what was there before stays.
    """
    with atomic_folder(folder) as temporary:
        with disk_errors():
            checkpoint.model.save_pretrained(temporary, state_dict=state)
        checkpoint.tokenizer.save_pretrained(temporary)
        checkpoint.processor.save(temporary)
        (temporary / "recipe.yaml").write_text(recipe_yaml(checkpoint.recipe), "utf-8")
        if adapter is not None:
            adapter.save(temporary / "adapter")
        hashes = weight_hashes(temporary)
        write_json(temporary / "metadata.json", {**checkpoint.metadata, "weights_sha256": hashes})


def load_checkpoint(folder: Path) -> Checkpoint:
    """A finished checkpoint, in float32 on the CPU.

    Raises:
        CheckpointError: It is absent, incomplete or damaged, or its weights do not cover the model exactly.
    """
    # Before torch is imported: threads that wait shall sleep, see medvlm.training.engine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    from medvlm.models.vlm import MedVLMForConditionalGeneration

    if not (folder / "metadata.json").is_file():
        raise CheckpointError(
            "there is no finished checkpoint", where=str(folder), hint="train the stage that makes it first"
        )
    metadata = read_json(folder / "metadata.json")
    check_hashes(folder, metadata.pop("weights_sha256", {}))
    recipe = load_recipe(folder / "recipe.yaml")
    with refuse_loading(str(folder)):
        loaded: Any = MedVLMForConditionalGeneration.from_pretrained(
            folder,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported, and refused below
            output_loading_info=True,
            attn_implementation=attention_implementation(),
            dtype=torch.float32,
        )
    model, info = loaded
    check_keys(info, str(folder))
    return Checkpoint(
        model=model,
        tokenizer=load_tokenizer(folder, special_marks(recipe)),
        processor=ImageProcessor.load(folder, recipe.model.vision_tower),
        recipe=recipe,
        metadata=metadata,
    )


def git_commit() -> str:
    """The commit of the code that runs, ``unknown`` outside a repository."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except OSError:
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"
