"""Weight files of others and our own: read one tensor at a time, written shard by shard, each with its SHA-256."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medvlm.errors import CheckpointError, InputError
from medvlm.store import atomic_path, read_json, write_json

if TYPE_CHECKING:
    from torch import Tensor, dtype

__all__ = [
    "SHARD_BYTES",
    "TensorSpec",
    "WeightFiles",
    "digest_of",
    "job_name",
    "local_folder",
    "read_weight_file",
    "tensor_digest",
    "write_sharded",
]

SHARD_BYTES = 2 * 2**30
"""Size of a written shard, and so the memory that writing takes (with the largest tensor once or twice more)."""
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_UNFINISHED = "unfinished.json"


def local_folder(source: str | Path) -> Path:
    """The folder of a source: itself, or the hub's files in the local cache.

    Raises:
        CheckpointError: There is no such folder, and the hub does not give it.
    """
    path = Path(source)
    if path.is_dir():
        return path
    text = str(source)
    if text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise CheckpointError("the folder does not exist", where=text, hint="check the path")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.bin", "*.model", "*.txt"]
    try:
        return Path(snapshot_download(text, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise CheckpointError(
            f"neither a folder nor a repository of the hub that can be read: {type(error).__name__}",
            where=text,
            hint="check the name and the network, or download it and give the folder",
        ) from error


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What is known of a tensor without reading it."""

    shape: tuple[int, ...]
    dtype: dtype

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


class WeightFiles:
    """The tensors of a folder in transformers' layout, read one at a time.

    Args:
        folder: Holds ``model.safetensors`` or ``pytorch_model.bin``, or shards of them with their index.

    Raises:
        CheckpointError: There are no weights, the index and the files disagree, or a file is damaged or unsafe.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, _File] = {}
        files = self._files()
        for path in files:
            opened = _open(path)
            for name in opened.specs:
                if name in self._open:
                    raise CheckpointError(f"{name} is in two files", where=str(path), hint="remove what is left over")
                self._open[name] = opened
        self._check_index()

    def _files(self) -> list[Path]:
        for name in _WEIGHTS:
            index = self.folder / f"{name}.index.json"
            if index.is_file():
                return [self.folder / part for part in sorted(set(_weight_map(index).values()))]
            if (self.folder / name).is_file():
                return [self.folder / name]
        raise CheckpointError(
            "there are no weights", where=str(self.folder), hint=f"looked for {' and '.join(_WEIGHTS)} and their shards"
        )

    def _check_index(self) -> None:
        for name in _WEIGHTS:
            index = self.folder / f"{name}.index.json"
            if index.is_file():
                listed = set(_weight_map(index))
                wrong = sorted(listed ^ set(self._open))
                if wrong:
                    raise CheckpointError(
                        f"index and files disagree on {len(wrong)} tensors: {', '.join(wrong[:8])}",
                        where=str(index),
                        hint="download the folder again; a shard is another version or incomplete",
                    )
                return

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Shape and type of every tensor, by name."""
        return {name: file.specs[name] for name, file in self._open.items()}

    def __contains__(self, name: object) -> bool:
        return name in self._open

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        return self._open[name].read(name)


def read_weight_file(path: Path) -> dict[str, Tensor]:
    """All tensors of one small file, such as ``mm_projector.bin`` or ``adapter_model.safetensors``.

    Raises:
        CheckpointError: It is damaged, unsafe or holds something else than tensors.
    """
    opened = _open(path)
    return {name: opened.read(name) for name in opened.specs}


@dataclass(frozen=True, slots=True)
class _File:
    specs: dict[str, TensorSpec]
    read: Callable[[str], Tensor]


def _weight_map(index: Path) -> dict[str, str]:
    values: Any = read_json(index)
    found = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(found, dict) or not all(isinstance(v, str) and Path(v).name == v for v in found.values()):
        raise CheckpointError(
            "the index maps no tensors to files of its own folder", where=str(index), hint="download the folder again"
        )
    return {str(name): str(file) for name, file in found.items()}


def _open(path: Path) -> _File:
    if not path.is_file():
        raise CheckpointError("the weight file is missing", where=str(path), hint="download the folder again")
    return _open_safetensors(path) if path.suffix == ".safetensors" else _open_pickled(path)


def _open_safetensors(path: Path) -> _File:
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        opened: Any = safe_open(path, framework="pt")
        header = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  # not a mapping
        specs = {
            name: TensorSpec(tuple(part.get_shape()), getattr(torch, _DTYPES[part.get_dtype()]))
            for name, part in header.items()
        }
    except (SafetensorError, OSError, KeyError) as error:
        raise CheckpointError(
            f"the file cannot be read: {error}", where=str(path), hint="download it again and compare its SHA-256"
        ) from error
    return _File(specs, opened.get_tensor)


_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "U8": "uint8",
    "BOOL": "bool",
}


def _open_pickled(path: Path) -> _File:
    """A ``.bin`` file: pickled tensors, mapped and not read, and nothing else; code in it is refused."""
    import pickle  # only for the name of its error
    import zipfile

    import torch

    # Files from before torch 1.6 are no archive and cannot be mapped; they are read whole, one at a time.
    mapped = zipfile.is_zipfile(path)
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, TypeError, OSError) as error:
        lines = str(error).splitlines()
        # torch's first line advises to read it unsafely.
        reason = [line for line in lines if "GLOBAL" in line or "Unsupported" in line] or lines[:1]
        raise CheckpointError(
            f"the file is not a plain set of tensors, or it is damaged: {reason[0] if reason else 'empty'}",
            where=str(path),
            hint="pickled files can run code when they are read, so nothing but tensors is read from them; "
            "get the safetensors, or the file from its publisher again",
        ) from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise CheckpointError("the file holds more than tensors", where=str(path), hint="export its state dict alone")
    tensors: dict[str, Tensor] = state
    return _File({n: TensorSpec(tuple(t.shape), t.dtype) for n, t in tensors.items()}, lambda name: tensors[name])


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    import torch

    flat: Any = tensor.detach().contiguous().view(-1).view(torch.uint8) if tensor.numel() else None
    return hashlib.sha256(b"" if flat is None else memoryview(flat.numpy())).hexdigest()


def digest_of(tensors: Mapping[str, Mapping[str, Any]]) -> str:
    """One SHA-256 of a whole model, whatever its sharding: over name, type, shape and SHA-256 of every tensor."""
    lines = [f"{n} {tensors[n]['dtype']} {list(tensors[n]['shape'])} {tensors[n]['sha256']}" for n in sorted(tensors)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def write_sharded(
    out: Path,
    specs: Mapping[str, TensorSpec],
    produce: Callable[[str], Tensor],
    *,
    job: str,
    finish: Callable[[Path, dict[str, dict[str, Any]]], None],
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, dict[str, Any]]:
    """Write tensors as safetensors shards into a folder that appears whole, or not at all.

    A killed run leaves its finished shards in a hidden folder beside ``out``; the same command goes on from them.

    Args:
        out: Must not exist.
        specs: What each tensor will be; decides the shards before the first is read.
        produce: Makes one tensor.
        job: Names inputs and settings: only a run with the same ``job`` goes on from a killed one.
        finish: Writes the other files into the folder before it takes its place; may refuse the result.
        shard_bytes: Upper bound of a shard with more than one tensor.
        progress: Called with bytes done and in all.

    Returns:
        ``shape``, ``dtype`` and ``sha256`` of every tensor.

    Raises:
        CheckpointError: ``out`` exists, or a tensor is not what ``specs`` says.
        WorkspaceError: The disk is full or read-only.
    """
    if out.exists():
        raise CheckpointError("the folder exists", where=str(out), hint="remove it, or choose another")
    work = out.with_name(f".{out.name}.unfinished")
    state = _resumed(work, job)
    shards = _shards(specs, shard_bytes)
    total = sum(spec.nbytes for spec in specs.values())
    done = 0
    for index, names in enumerate(shards, start=1):
        file = f"model-{index:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        if file not in state["shards"] or not (work / file).is_file():
            state["shards"][file] = _write_shard(work / file, names, specs, produce)
            write_json(work / _UNFINISHED, state)
        done += sum(specs[name].nbytes for name in names)
        progress(done, total)
    tensors = {name: entry for shard in state["shards"].values() for name, entry in shard.items()}
    if len(shards) > 1:
        weight_map = {name: file for file, shard in state["shards"].items() for name in shard}
        index_file = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(work / "model.safetensors.index.json", index_file)
    try:
        finish(work, tensors)
    except CheckpointError:
        # A result that is refused is not what a next run should go on from.
        shutil.rmtree(work, ignore_errors=True)
        raise
    (work / _UNFINISHED).unlink()
    work.replace(out)
    return tensors


def _resumed(work: Path, job: str) -> dict[str, Any]:
    if work.is_dir():
        try:
            state: Any = read_json(work / _UNFINISHED)
        except InputError:
            state = {}
        if isinstance(state, dict) and state.get("job") == job and isinstance(state.get("shards"), dict):
            return state
        shutil.rmtree(work)
    return {"job": job, "shards": {}}


def _shards(specs: Mapping[str, TensorSpec], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = []
    size = 0
    for name, spec in specs.items():
        if not shards or size + spec.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += spec.nbytes
    return shards


def _write_shard(
    path: Path, names: Sequence[str], specs: Mapping[str, TensorSpec], produce: Callable[[str], Tensor]
) -> dict[str, dict[str, Any]]:
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for name in names:
        tensor = produce(name).contiguous()
        spec = specs[name]
        if (tuple(tensor.shape), tensor.dtype) != (spec.shape, spec.dtype):
            found = f"{list(tensor.shape)} {tensor.dtype}"
            raise CheckpointError(
                f"{name} became {found}, expected {list(spec.shape)} {spec.dtype}", where=str(path), hint="report this"
            )
        tensors[name] = tensor
    entries = {
        name: {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch."), "sha256": tensor_digest(t)}
        for name, t in tensors.items()
    }
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    return entries


def job_name(*parts: Any, files: Iterable[WeightFiles] = ()) -> str:
    """A name for a job: its settings, and name, shape and size of its inputs' tensors and files."""
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode())
    for weights in files:
        for path in sorted(weights.folder.iterdir()):
            if path.is_file():
                digest.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}\n".encode())
    return digest.hexdigest()
