"""Checkpoints as stock ``LlavaForConditionalGeneration``, which vLLM and others serve without any of our code.

What can be exported exactly: a CLIP tower, a projector of one or two linear layers, a dense language model. The stock
projector is linear, activation, linear. ``mlp2x_gelu`` is that; a ``linear`` one becomes itself, then the activation
``linear`` (none), then the unit matrix, which changes no bit. Where a projector standardises its features, that becomes
part of its first layer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from medvlm.config import load_recipe
from medvlm.errors import CheckpointError
from medvlm.models.llava_layout import listed
from medvlm.models.template import IMAGE_MARK, TEMPLATES, Template
from medvlm.models.tokenizer import IM_END, IM_START, load_tokenizer, special_marks
from medvlm.models.weights import SHARD_BYTES, TensorSpec, WeightFiles, digest_of, job_name, write_sharded
from medvlm.recipe_schema import Recipe, TemplateName, VisionTower
from medvlm.store import read_json

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ExportType", "Exported", "chat_template", "export_checkpoint"]

ExportType = Literal["stored", "float32", "bfloat16", "float16"]

_NAMES = {
    # The layout of the published llava-hf checkpoints, which every reader of stock LLaVA knows.
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.multi_modal_projector.linear.": "multi_modal_projector.linear_1.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}
_STANDARDISATION = ("model.multi_modal_projector.mean", "model.multi_modal_projector.spread")
_OWN_FORMAT = (
    "such a model is opened where medvlm is installed: 'import medvlm.models.vlm' registers it, then "
    "AutoModelForImageTextToText.from_pretrained(CHECKPOINT) loads it"
)


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written."""

    folder: Path
    tensors: int
    parameters: int
    dtype: str
    template: str
    """Whose words the chat template writes."""
    sha256: str
    duration_s: float


def export_checkpoint(
    folder: Path,
    out: Path,
    *,
    dtype: ExportType = "stored",
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Exported:
    """Write a finished checkpoint in the stock layout, with tokenizer, processor and chat template.

    Args:
        folder: The checkpoint.
        out: Must not exist.
        dtype: Of the weights; ``stored`` keeps theirs.
        shard_bytes: Of the written shards; one is in memory at a time.
        progress: Called with bytes done and in all.

    Raises:
        CheckpointError: The checkpoint is absent or incomplete, its architecture has no stock form (the error says
            which format it has instead), or ``out`` exists.
    """
    import torch

    started = time.monotonic()
    if not (folder / "metadata.json").is_file():
        raise CheckpointError("there is no finished checkpoint", where=str(folder), hint="train or import it first")
    recipe = load_recipe(folder / "recipe.yaml")
    files = WeightFiles(folder)
    config = _stock_config(folder, recipe)
    folded = _folded(files) if recipe.model.projector.standardised else {}
    names = {_stock_name(name): name for name in files.specs if name not in _STANDARDISATION}
    width = config.text_config.hidden_size
    units = {} if recipe.model.projector.kind != "linear" else _unit_layer(width)
    kept = {n: files.specs[o].dtype if dtype == "stored" else getattr(torch, dtype) for n, o in names.items()}
    kept |= {name: kept["multi_modal_projector.linear_1.weight"] for name in units}
    specs = {
        name: TensorSpec(tuple(units[name]().shape) if name in units else files.specs[names[name]].shape, kept[name])
        for name in [*names, *units]
    }
    _check(config, specs, str(folder))
    template = _template_name(folder, recipe)

    def produce(name: str) -> Tensor:
        if name in folded:
            return folded[name].to(kept[name])
        return (units[name]() if name in units else files.read(names[name])).to(kept[name])

    def finish(work: Path, tensors: dict[str, dict[str, Any]]) -> None:
        del tensors
        config.dtype = kept["multi_modal_projector.linear_1.weight"]
        config.save_pretrained(work)
        _write_processor(folder, work, recipe, template)

    tensors = write_sharded(
        out,
        specs,
        produce,
        job=job_name("export", dtype, shard_bytes, files=[files]),
        finish=finish,
        shard_bytes=shard_bytes,
        progress=progress,
    )
    return Exported(
        folder=out,
        tensors=len(tensors),
        parameters=sum(spec.nbytes // spec.dtype.itemsize for spec in specs.values()),
        dtype=str(config.dtype).removeprefix("torch."),
        template=template,
        sha256=digest_of(tensors),
        duration_s=round(time.monotonic() - started, 3),
    )


def _stock_config(folder: Path, recipe: Recipe) -> Any:
    from transformers import LlavaConfig

    model = recipe.model
    if model.vision_tower.architecture != "clip":
        raise _no_stock_form(folder, recipe, f"its tower is {model.vision_tower.architecture}, not CLIP")
    if model.projector.kind not in ("linear", "mlp2x_gelu"):
        raise _no_stock_form(folder, recipe, f"its projector is {model.projector.kind}, not one or two linear layers")
    values: Any = read_json(folder / "config.json")
    known = (
        "vision_config",
        "text_config",
        "image_token_index",
        "image_seq_length",
        "vision_feature_layer",
        "vision_feature_select_strategy",
        "tie_word_embeddings",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
    )
    config: Any = LlavaConfig(
        **{name: values[name] for name in known if name in values},
        projector_hidden_act="linear" if model.projector.kind == "linear" else "gelu",
        architectures=["LlavaForConditionalGeneration"],
    )
    return config


def _no_stock_form(folder: Path, recipe: Recipe, reason: str) -> CheckpointError:
    return CheckpointError(f"{recipe.name} has no form in stock LLaVA: {reason}", where=str(folder), hint=_OWN_FORMAT)


def _folded(files: WeightFiles) -> dict[str, Tensor]:
    """The first layer of a projector that standardises its features, for features as they are."""
    mean_V, spread_V = (files.read(name).double() for name in _STANDARDISATION)
    weight_DV, bias_D = (files.read(f"model.multi_modal_projector.linear_1.{part}") for part in ("weight", "bias"))
    scaled_DV = weight_DV.double() / spread_V
    return {
        "multi_modal_projector.linear_1.weight": scaled_DV.to(weight_DV.dtype),
        "multi_modal_projector.linear_1.bias": (bias_D.double() - scaled_DV @ mean_V).to(bias_D.dtype),
    }


def _stock_name(name: str) -> str:
    for ours, stock in _NAMES.items():
        if name.startswith(ours):
            return stock + name.removeprefix(ours)
    return name


def _unit_layer(width: int) -> dict[str, Callable[[], Tensor]]:
    import torch

    return {
        "multi_modal_projector.linear_2.weight": lambda: torch.eye(width),
        "multi_modal_projector.linear_2.bias": lambda: torch.zeros(width),
    }


def _check(config: Any, specs: dict[str, TensorSpec], source: str) -> None:
    """Refuse tensors that the stock model does not have, or lacks."""
    import torch
    from transformers import LlavaForConditionalGeneration

    with torch.device("meta"):
        stock = LlavaForConditionalGeneration(config)
    expected = {_stock_name(name): tuple(tensor.shape) for name, tensor in stock.state_dict().items()}
    if config.tie_word_embeddings:
        expected.pop("language_model.lm_head.weight", None)
    found = {name: spec.shape for name, spec in specs.items()}
    wrong = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
    if wrong:
        raise CheckpointError(
            f"the checkpoint has no form in stock LLaVA: {len(wrong)} tensors differ: {listed(wrong)}",
            where=source,
            hint=_OWN_FORMAT,
        )


def _template_name(folder: Path, recipe: Recipe) -> TemplateName:
    """The template of the stage that made the checkpoint; a caption's has no questions, so the next stage's then."""
    number, stage = recipe.stage(read_json(folder / "metadata.json")["stage"])
    for each in (stage, *recipe.stages[number:]):
        if "{text}" in TEMPLATES[each.template].first:
            return each.template
    return stage.template


def _write_processor(folder: Path, work: Path, recipe: Recipe, template: TemplateName) -> None:
    from transformers import GenerationConfig, LlavaProcessor

    tokenizer: Any = load_tokenizer(folder, special_marks(recipe))
    tower = recipe.model.vision_tower
    reserved = [*special_marks(recipe), tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token]
    text = chat_template(
        TEMPLATES[template],
        image=f"{IM_START}{IMAGE_MARK}{IM_END}" if recipe.model.mm_use_im_start_end else IMAGE_MARK,
        reserved=[mark for mark in dict.fromkeys(reserved) if mark],
        image_first=recipe.model.image_first,
    )
    processor = LlavaProcessor(
        image_processor=_image_processor(tower),
        tokenizer=tokenizer,
        patch_size=tower.patch_px,
        vision_feature_select_strategy="default" if tower.feature_select == "patch" else "full",
        num_additional_image_tokens=1,  # CLIP's class token
        chat_template=text,
    )
    processor.save_pretrained(work)
    GenerationConfig(
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        max_new_tokens=recipe.decoding.max_new_tokens,
    ).save_pretrained(work)


def _image_processor(tower: VisionTower) -> Any:
    from transformers import CLIPImageProcessorPil
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    size = tower.image_px
    options: dict[str, Any] = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    if tower.image_fit == "pad":
        return LlavaImageProcessorPil(**options, do_pad=True)
    return CLIPImageProcessorPil(**options)


def chat_template(template: Template, *, image: str, reserved: list[str], image_first: bool = False) -> str:
    """A Jinja chat template that writes what ``render`` writes.

    A message's content is text, or a list of ``{"type": "image"}`` and ``{"type": "text", "text": …}``, which a line
    break joins. Marks within a text are taken apart, as in training: a foreign text can neither end a turn nor bring
    in an image. The system prompt is the template's own; a system message is refused.

    Args:
        template: The words around turns.
        image: What an image becomes, with its frame.
        reserved: Marks that a text cannot use.
        image_first: Images go before the text of their message.
    """
    clean = "text" + "".join(f" | replace({_quoted(m)}, {_quoted(f'{m[0]} {m[1:]}')})" for m in reserved)

    def around(words: str) -> str:
        before, _, after = words.partition("{text}")
        return f"{_literal(before)}{{{{ said(message['content']) }}}}{_literal(after)}"

    parts = "content | sort(attribute='type') | list" if image_first else "content"
    return (
        f"{{%- macro plain(text) -%}}{{{{ {clean} }}}}{{%- endmacro -%}}\n"
        "{%- macro said(content) -%}\n"
        "{%- if content is string -%}{{ plain(content) }}\n"
        f"{{%- else -%}}{{%- for part in {parts} -%}}\n"
        "{%- if not loop.first -%}{{ '\\n' }}{%- endif -%}\n"
        "{%- if part['type'] == 'text' -%}{{ plain(part['text']) }}\n"
        f"{{%- else -%}}{_literal(image)}{{%- endif -%}}\n"
        "{%- endfor -%}{%- endif -%}\n"
        "{%- endmacro -%}\n"
        "{{- bos_token -}}\n"
        "{%- for message in messages -%}\n"
        "{%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}\n"
        "{{- raise_exception('user and assistant take turns; the system prompt is part of the model') -}}\n"
        "{%- endif -%}\n"
        f"{{%- if loop.first -%}}{around(template.first)}\n"
        f"{{%- elif message['role'] == 'user' -%}}{around(template.user)}\n"
        f"{{%- else -%}}{around(template.assistant)}\n"
        "{%- endif -%}\n"
        "{%- endfor -%}"
    )


def _literal(text: str) -> str:
    """A Jinja expression that prints a text of the template, with the tokenizer's marks."""
    pieces = text.replace("{bos}", "\0bos_token\0").replace("{eos}", "\0eos_token\0").split("\0")
    shown = [f"{{{{ {p if p in ('bos_token', 'eos_token') else _quoted(p)} }}}}" for p in pieces if p]
    return "".join(shown)


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"
