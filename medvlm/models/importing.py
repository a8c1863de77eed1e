"""Checkpoints of the original LLaVA layout as ours, with every tensor accounted for."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medvlm.config import recipe_yaml
from medvlm.errors import CheckpointError
from medvlm.models.adapters import StoredAdapter
from medvlm.models.checkpoint import RANDOM, decoder_config, git_commit, model_config
from medvlm.models.llava_layout import (
    COMPUTED,
    listed,
    our_name,
    plain_name,
    settings_that_differ,
    text_settings,
    tower_name,
)
from medvlm.models.meta import meta_model
from medvlm.models.original_tokenizer import original_tokenizer
from medvlm.models.template import IMAGE_MARK
from medvlm.models.vision import ImageProcessor, tower_config
from medvlm.models.weights import (
    SHARD_BYTES,
    TensorSpec,
    WeightFiles,
    digest_of,
    job_name,
    local_folder,
    read_weight_file,
    write_sharded,
)
from medvlm.recipe_schema import Recipe
from medvlm.store import read_json, write_json

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Imported", "Parts", "import_checkpoint"]

EMBEDDING = "model.language_model.embed_tokens.weight"
HEAD = "lm_head.weight"
_TABLES = (EMBEDDING, HEAD)
_NO_WEIGHTS = ("text_model.", "text_projection", "visual_projection", "logit_scale")


@dataclass(frozen=True, slots=True)
class Parts:
    """Where the parts are that the checkpoint itself does not hold. None: the checkpoint, or the recipe's source."""

    base: str | None = None
    """Language model, or LLaVA model, that an adapter or a lone projector belongs to."""
    vision_tower: str | None = None
    """Folder or hub id of the CLIP tower; taken in place of one inside the checkpoint."""
    projector: Path | None = None
    """An ``mm_projector.bin``; taken in place of one inside the checkpoint."""
    vision_lora: Path | None = None
    """Folder of a LoRA adapter of the tower."""
    tokenizer: str | None = None


@dataclass(frozen=True, slots=True)
class Imported:
    """What was written."""

    folder: Path
    tensors: int
    parameters: int
    from_where: dict[str, int]
    """Tensors by the file or folder that they came from."""
    merged: int
    """Weights that took up an adapter."""
    dropped: list[str]
    """Stored tensors that nothing reads; see ``medvlm.models.llava_layout.COMPUTED``."""
    added_tokens: dict[str, int]
    """Marks that the tokenizer did not have, with their ids."""
    grown_rows: int
    """Rows that embedding and head got for them; each is the average of the others, as LLaVA adds a mark."""
    sha256: str
    duration_s: float


@dataclass(slots=True)
class _Gathered:
    """Readers of all tensors, by our name."""

    read: dict[str, Callable[[], Tensor]] = field(default_factory=dict[str, "Callable[[], Tensor]"])
    specs: dict[str, TensorSpec] = field(default_factory=dict[str, TensorSpec])
    origin: dict[str, str] = field(default_factory=dict[str, str])
    dropped: list[str] = field(default_factory=list[str])
    strange: list[str] = field(default_factory=list[str])

    def put(self, name: str, spec: TensorSpec, read: Callable[[], Tensor], origin: str) -> None:
        self.specs[name], self.read[name], self.origin[name] = spec, read, origin


def import_checkpoint(
    source: str | Path,
    recipe: Recipe,
    out: Path,
    parts: Parts | None = None,
    *,
    stage: int = 2,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Imported:
    """Write a checkpoint of LLaVA's original layout as one of ours.

    Reads v1 and v1.5, full models, LoRA (``adapter_model`` with ``non_lora_trainables.bin``, merged here), a lone
    ``mm_projector.bin`` over a base, and the tower inside the checkpoint or beside it. One tensor is in memory at a
    time, and a shard; a killed run goes on when repeated.

    Args:
        source: Folder or hub id.
        recipe: Says which model it is; sizes and settings are compared with the checkpoint's ``config.json``.
        out: Must not exist.
        parts: What the checkpoint does not hold itself.
        stage: Of the recipe that the checkpoint counts as: its template is used, and training goes on after it.
        shard_bytes: Of the written shards.
        progress: Called with bytes done and in all.

    Raises:
        CheckpointError: A tensor is missing, unexpected or of another shape (all are listed), the settings are not the
            recipe's, a file is damaged or unsafe, a part is not given, or ``out`` exists.
    """
    started = time.monotonic()
    parts = parts or Parts()
    folder = local_folder(source)
    config: Any = read_json(folder / "config.json")
    settings_that_differ(config, recipe, str(folder / "config.json"))
    main, adapter = _main_weights(folder, recipe, parts)
    gathered = _Gathered()
    _gather(gathered, main, lambda name: our_name(plain_name(name), recipe))
    _gather_extras(gathered, folder, recipe, parts)
    _gather_tower(gathered, recipe, parts)
    tower_adapter = _tower_adapter(parts)
    adapters = [a for a in (adapter, tower_adapter) if a is not None]
    _account(gathered, recipe, adapters, str(source))
    before = gathered.specs[EMBEDDING].shape[0]
    sources = [parts.tokenizer, folder, parts.base, recipe.model.tokenizer.source]
    tokenizer, added = original_tokenizer(sources, config, recipe, before)
    rows = max(before, len(tokenizer))
    specs = {
        name: TensorSpec((rows, *spec.shape[1:]), spec.dtype) if name in _TABLES else spec
        for name, spec in gathered.specs.items()
    }

    def produce(name: str) -> Tensor:
        tensor = gathered.read[name]()
        for each in adapters:
            tensor = each.merged(name, tensor)
        return _grown(tensor, rows) if name in _TABLES else tensor

    def metadata(sha256: str) -> dict[str, Any]:
        return {
            "fingerprint": sha256[:16],
            "recipe": recipe.name,
            "stage": recipe.stages[stage - 1].name,
            "target": "all",
            "seed": recipe.seed,
            "git_commit": git_commit(),
            "metrics": {},
            "counts": {},
            "curve": [],
            "imported": {"source": str(source), "sha256": sha256},
        }

    def finish(work: Path, tensors: dict[str, dict[str, Any]]) -> None:
        model_settings = _config(config, recipe, tokenizer, rows)
        _write_side_files(work, recipe, tokenizer, model_settings, metadata(digest_of(tensors)))

    settings = (recipe_yaml(recipe), shard_bytes, *map(str, (parts.base, parts.vision_tower, parts.projector)))
    tensors = write_sharded(
        out,
        specs,
        produce,
        job=job_name("import", *settings, str(parts.vision_lora), rows, files=[main]),
        finish=finish,
        shard_bytes=shard_bytes,
        progress=progress,
    )
    origins = list(gathered.origin.values())
    return Imported(
        folder=out,
        tensors=len(tensors),
        parameters=sum(spec.nbytes // spec.dtype.itemsize for spec in specs.values()),
        from_where={origin: origins.count(origin) for origin in dict.fromkeys(origins)},
        merged=sum(len(each.targets()) for each in adapters),
        dropped=gathered.dropped,
        added_tokens=added,
        grown_rows=rows - before,
        sha256=digest_of(tensors),
        duration_s=round(time.monotonic() - started, 3),
    )


def _main_weights(folder: Path, recipe: Recipe, parts: Parts) -> tuple[WeightFiles, StoredAdapter | None]:
    """The language model's weights, and the adapter where the checkpoint is one."""
    has_adapter = (folder / "adapter_config.json").is_file()
    adapter = StoredAdapter(folder, lambda n: our_name(plain_name(n), recipe)) if has_adapter else None
    lone_projector = not has_adapter and (folder / "mm_projector.bin").is_file() and not _has_weights(folder)
    if not has_adapter and not lone_projector:
        if parts.base is not None:
            raise CheckpointError(
                "the checkpoint is a whole model and needs no base",
                where=str(folder),
                hint="leave --base out; a base belongs to an adapter or to a lone mm_projector.bin",
            )
        return WeightFiles(folder), None
    if parts.base is None:
        kind = "a LoRA adapter" if has_adapter else "a projector alone"
        raise CheckpointError(
            f"the checkpoint is {kind} and does not hold the language model",
            where=str(folder),
            hint=f"name it with --base, for this recipe {recipe.model.language_model.weights}",
        )
    if has_adapter and not (folder / "non_lora_trainables.bin").is_file():
        raise CheckpointError(
            "the adapter has no non_lora_trainables.bin: its projector would be lost",
            where=str(folder),
            hint="download the file; the original saves it beside the adapter",
        )
    return WeightFiles(local_folder(parts.base)), adapter


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("model*.safetensors")) or any(folder.glob("pytorch_model*.bin"))


def _gather(gathered: _Gathered, files: WeightFiles, rename: Callable[[str], str | None]) -> None:
    for name, spec in files.specs.items():
        if COMPUTED.search(name):
            gathered.dropped.append(name)
            continue
        ours = rename(name)
        if ours is None:
            gathered.strange.append(name)
        elif ours in gathered.specs:
            gathered.strange.append(f"{name} (a second {ours})")
        else:
            gathered.put(ours, spec, lambda name=name: files.read(name), str(files.folder))


def _gather_extras(gathered: _Gathered, folder: Path, recipe: Recipe, parts: Parts) -> None:
    """``non_lora_trainables.bin`` and ``mm_projector.bin``: what was trained in full beside what was not."""
    adapted = (folder / "adapter_config.json").is_file()
    trained = [folder / "non_lora_trainables.bin"] if adapted else []
    projector = parts.projector or (folder / "mm_projector.bin")
    if projector.is_file() or parts.projector is not None:
        trained.append(projector)
    for path in trained:
        for key, tensor in read_weight_file(path).items():
            if COMPUTED.search(key):
                gathered.dropped.append(key)
                continue
            name = our_name(plain_name(key), recipe)
            if name is None:
                gathered.strange.append(f"{key} in {path.name}")
                continue
            tensor = _over_whole_table(gathered, name, tensor)
            known = gathered.read.get(name)
            inside = gathered.origin.get(name) == str(folder) and parts.projector is None
            if known is not None and inside and not _equal(known(), tensor):
                raise CheckpointError(
                    f"{key} is in the model and, with other values, in {path.name}",
                    where=str(path),
                    hint="name the one to take with --projector, or move the file away",
                )
            gathered.put(name, TensorSpec(tuple(tensor.shape), tensor.dtype), lambda t=tensor: t, str(path))


def _over_whole_table(gathered: _Gathered, name: str, tensor: Tensor) -> Tensor:
    """A table of which only the last rows were saved (the new marks), laid over the whole one."""
    whole = gathered.specs.get(name)
    if name not in _TABLES or whole is None or tensor.shape[0] >= whole.shape[0]:
        return tensor
    result = gathered.read[name]().clone()
    result[-tensor.shape[0] :] = tensor.to(result.dtype)
    return result


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool((one.float() == other.float()).all())


def _gather_tower(gathered: _Gathered, recipe: Recipe, parts: Parts) -> None:
    inside = [name for name in gathered.specs if name.startswith("model.vision_tower.")]
    source = parts.vision_tower
    if source is None and not inside:
        source = recipe.model.vision_tower.weights
        if source == RANDOM:
            raise CheckpointError(
                "the checkpoint holds no vision tower, and the recipe's is random",
                where=f"recipe {recipe.name}, field model.vision_tower.weights",
                hint="name the tower's folder or hub id with --vision-tower",
            )
    if source is None:
        return
    for name in inside:
        del gathered.specs[name], gathered.read[name], gathered.origin[name]
    files = WeightFiles(local_folder(source))
    tower = _Gathered()
    _gather(tower, files, tower_name)
    gathered.strange += [name for name in tower.strange if not name.startswith(_NO_WEIGHTS)]
    gathered.dropped += tower.dropped
    for name, spec in tower.specs.items():
        gathered.put(name, spec, tower.read[name], str(files.folder))


def _tower_adapter(parts: Parts) -> StoredAdapter | None:
    if parts.vision_lora is None:
        return None
    return StoredAdapter(parts.vision_lora, lambda name: tower_name(name.removeprefix("base_model.model.")))


def _account(gathered: _Gathered, recipe: Recipe, adapters: list[StoredAdapter], source: str) -> None:
    """Refuse what does not cover the recipe's model exactly, and list all of it."""
    expected = {name: tuple(tensor.shape) for name, tensor in meta_model(recipe).state_dict().items()}
    shapes: list[str] = []
    for name in expected.keys() & gathered.specs.keys():
        shape = gathered.specs[name].shape
        # The tables may have rows for marks; how many is compared with the tokenizer.
        fits = shape[1:] == expected[name][1:] if name in _TABLES else shape == expected[name]
        if not fits:
            shapes.append(f"{name} is {list(shape)}, the recipe's is {list(expected[name])}")
    strange = gathered.strange + [name for name in gathered.specs if name not in expected]
    targets = {name for each in adapters for name in each.targets()}
    strange += [f"an adapter of {name}" for name in targets - gathered.specs.keys()]
    missing = expected.keys() - gathered.specs.keys()
    if not missing and gathered.specs[EMBEDDING].shape[0] != gathered.specs[HEAD].shape[0]:
        shapes.append("embedding and head differ in rows")
    told = [
        f"{len(names)} {kind}: {listed(names)}"
        for kind, names in (("missing", missing), ("unexpected", strange), ("of another shape", shapes))
        if names
    ]
    if told:
        raise CheckpointError(
            f"the checkpoint does not cover the model of recipe {recipe.name}; {'; '.join(told)}",
            where=source,
            hint="choose the recipe that it was trained as, or change it with --set; nothing is left out silently",
        )


def _grown(table: Tensor, rows: int) -> Tensor:
    import torch

    missing = rows - table.shape[0]
    if not missing:
        return table
    average = table.float().mean(0, keepdim=True).to(table.dtype)
    return torch.cat([table, average.expand(missing, -1)])


def _config(config: dict[str, Any], recipe: Recipe, tokenizer: Any, rows: int) -> Any:
    marks = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    settings = {**text_settings(config), **marks}
    return model_config(
        recipe,
        vision_config=tower_config(recipe.model.vision_tower),
        text_config=decoder_config(recipe, rows, settings),
        image_id=tokenizer.convert_tokens_to_ids(IMAGE_MARK),
        marks=marks,
    )


def _write_side_files(work: Path, recipe: Recipe, tokenizer: Any, config: Any, metadata: dict[str, Any]) -> None:
    from transformers import GenerationConfig

    config.architectures = ["MedVLMForConditionalGeneration"]
    config.save_pretrained(work)
    GenerationConfig(
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id
    ).save_pretrained(work)
    tokenizer.save_pretrained(work)
    ImageProcessor.of(recipe.model.vision_tower).save(work)
    (work / "recipe.yaml").write_text(recipe_yaml(recipe), "utf-8")
    write_json(work / "metadata.json", metadata)
