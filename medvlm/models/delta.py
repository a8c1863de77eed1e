"""Delta weights: a model published as its difference from LLaMA, added to LLaMA again tensor by tensor.

The arithmetic is that of LLaVA's ``apply_delta.py`` and ``make_delta.py``, which load both models in float16. What is
stored is ``target - base`` rounded to the stored type, so that ``base + (target - base)`` is the target except where
the rounding shows: ``make_delta`` counts those weights, and stores the digest of what ``apply_delta`` gives.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from medvlm.errors import CheckpointError
from medvlm.models.weights import (
    SHARD_BYTES,
    TensorSpec,
    WeightFiles,
    digest_of,
    job_name,
    local_folder,
    tensor_digest,
    write_sharded,
)
from medvlm.store import read_json, write_json

if TYPE_CHECKING:
    from torch import Tensor, dtype

__all__ = ["DeltaResult", "StoredType", "apply_delta", "make_delta"]

StoredType = Literal["float16", "bfloat16", "float32"]
Progress = Callable[[int, int], None]

_GROWS = ("model.embed_tokens.weight", "lm_head.weight")
"""Tables that get a row for each token that the target adds: the first rows are the base's tokens."""
_NEW = ("model.mm_projector.",)
"""Beginnings of what the target has and the base has not: stored as it is."""
_COMPUTED = "rotary_emb.inv_freq"
"""A buffer that old versions of transformers stored; every version computes it."""
_MANIFEST = "manifest.json"
_SIDE_FILES = (".json", ".model", ".txt")
_SIDE_FILE_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class DeltaResult:
    """What was written."""

    folder: Path
    tensors: int
    parameters: int
    grown: dict[str, int]
    """Rows that a table has beyond the base's."""
    inexact: int
    """Weights that applying the delta does not give back to the last bit (``make_delta``)."""
    sha256: str
    """Of all tensors; see ``digest_of``. ``make_delta``: of what applying the delta will give."""
    duration_s: float


def apply_delta(
    base: str | Path,
    delta: str | Path,
    out: Path,
    *,
    expect_sha256: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = lambda done, total: None,
) -> DeltaResult:
    """Write base + delta as safetensors with a manifest of SHA-256, and the delta's configuration and tokenizer.

    Args:
        base: Folder or hub id of the base model (LLaMA in transformers' layout).
        delta: Folder or hub id of the delta.
        out: Must not exist; appears when everything is written and checked. A killed run goes on when repeated.
        expect_sha256: Digest that the result must have. A delta that ``make_delta`` wrote brings its own.
        shard_bytes: Of the written shards; what is held in memory is one of them and one tensor.
        progress: Called with bytes done and in all.

    Raises:
        CheckpointError: A tensor is missing, unexpected, or of another shape or type; a file is damaged or unsafe;
            the result is not the expected one; ``out`` exists.
    """
    import torch

    started = time.monotonic()
    base_files, delta_files = WeightFiles(local_folder(base)), WeightFiles(local_folder(delta))
    known = _known(delta_files.folder)
    kept: dtype = getattr(torch, known.get("target_dtype", "float16"))
    specs = _specs(base_files, delta_files, kept, str(delta))
    expected = expect_sha256 or known.get("sha256")

    def finish(folder: Path, tensors: dict[str, dict[str, Any]]) -> None:
        found = digest_of(tensors)
        if expected is not None and found != expected.lower():
            raise CheckpointError(
                f"the result has SHA-256 {found}, expected {expected}",
                where=str(base),
                hint="this is another base model, or another delta, than the hash was made for",
            )
        _copy_side_files(delta_files.folder, folder)
        write_json(folder / _MANIFEST, {"sha256": found, "tensors": tensors})

    tensors = write_sharded(
        out,
        specs,
        lambda name: _sum(name, base_files, delta_files).to(kept),
        job=job_name("apply", str(kept), shard_bytes, files=(base_files, delta_files)),
        finish=finish,
        shard_bytes=shard_bytes,
        progress=progress,
    )
    return _result(out, specs, base_files, digest_of(tensors), 0, started)


def make_delta(
    base: str | Path,
    target: str | Path,
    out: Path,
    *,
    stored: StoredType = "float16",
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = lambda done, total: None,
) -> DeltaResult:
    """Write target - base, with the digest of what applying it gives.

    Args:
        base: Folder or hub id of the base model.
        target: Folder or hub id of the model to publish.
        out: Must not exist.
        stored: ``float16`` as the published deltas; ``float32`` gives nearly every weight back exactly, for twice
            the size.
        shard_bytes: See ``apply_delta``.
        progress: See ``apply_delta``.

    Raises:
        CheckpointError: See ``apply_delta``.
    """
    import torch

    started = time.monotonic()
    base_files, target_files = WeightFiles(local_folder(base)), WeightFiles(local_folder(target))
    held: dtype = getattr(torch, stored)
    specs = _specs(base_files, target_files, held, str(target))
    kept = _floating(target_files, str(target))
    results: dict[str, dict[str, Any]] = {}

    def difference(name: str) -> Tensor:
        original = target_files.read(name)
        result = original.to(held, copy=True)
        if name in base_files:
            part = base_files.read(name).to(held)
            rows = result[: part.shape[0]] if name in _GROWS else result
            rows -= part
        again = result.clone()
        if name in base_files:
            rows = again[: base_files.specs[name].shape[0]] if name in _GROWS else again
            rows += base_files.read(name).to(held)
        again = again.to(kept)
        results[name] = {
            "dtype": str(kept).removeprefix("torch."),
            "shape": list(again.shape),
            "sha256": tensor_digest(again),
            "inexact": int((again != original.to(kept)).sum()),
        }
        write_json(notes, results)
        return result

    notes = out.with_name(f".{out.name}.results.json")
    job = job_name("make", stored, shard_bytes, files=(base_files, target_files))
    results.update(_noted(notes, job))
    results["job"] = {"name": job}

    def finish(folder: Path, tensors: dict[str, dict[str, Any]]) -> None:
        results.pop("job")
        values = {
            "sha256": digest_of(results),
            "target_dtype": str(kept).removeprefix("torch."),
            "stored_dtype": stored,
            "inexact": sum(entry["inexact"] for entry in results.values()),
            "delta": {"sha256": digest_of(tensors), "tensors": tensors},
        }
        _copy_side_files(target_files.folder, folder)
        write_json(folder / "delta.json", values)

    write_sharded(out, specs, difference, job=job, finish=finish, shard_bytes=shard_bytes, progress=progress)
    notes.unlink(missing_ok=True)
    inexact = sum(entry["inexact"] for entry in results.values())
    return _result(out, specs, base_files, digest_of(results), inexact, started)


def _noted(notes: Path, job: str) -> dict[str, dict[str, Any]]:
    """What a killed run of the same job already knows of the result."""
    if not notes.is_file():
        return {}
    values: Any = read_json(notes)
    return values if isinstance(values, dict) and values.get("job", {}).get("name") == job else {}


def _sum(name: str, base: WeightFiles, delta: WeightFiles) -> Tensor:
    """Base + delta in the delta's own type, as the original adds; new rows and new tensors are the delta's."""
    result = delta.read(name).clone()
    if name in base:
        part = base.read(name).to(result.dtype)
        rows = result[: part.shape[0]] if name in _GROWS else result
        rows += part
    return result


def _specs(base: WeightFiles, other: WeightFiles, written: dtype, source: str) -> dict[str, TensorSpec]:
    """Every tensor of the result; refuses what does not belong together."""
    _floating(base, str(base.folder))
    _floating(other, source)
    ours, theirs = base.specs, other.specs
    wrong: list[str] = []
    for name in ours:
        if name not in theirs and not name.endswith(_COMPUTED):
            wrong.append(f"{name} is missing")
    for name, spec in theirs.items():
        if name.endswith(_COMPUTED):
            continue
        before = ours.get(name)
        if before is None:
            if not name.startswith(_NEW):
                wrong.append(f"{name} is not in the base model")
        elif name in _GROWS:
            if before.shape[1:] != spec.shape[1:] or before.shape[0] > spec.shape[0]:
                wrong.append(f"{name} is {list(spec.shape)}, the base has {list(before.shape)}")
        elif before.shape != spec.shape:
            wrong.append(f"{name} is {list(spec.shape)}, the base has {list(before.shape)}")
    if wrong:
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise CheckpointError(
            f"base and {Path(source).name} do not belong together: {'; '.join(wrong[:8])}{more}",
            where=source,
            hint=f"use the base model that it was made from; {base.folder} is another",
        )
    return {n: TensorSpec(s.shape, written) for n, s in theirs.items() if not n.endswith(_COMPUTED)}


def _floating(files: WeightFiles, source: str) -> dtype:
    """The type of a model's weights; refuses tensors that are not numbers to add."""
    import torch

    specs = {n: s for n, s in files.specs.items() if not n.endswith(_COMPUTED)}
    wrong = [
        f"{n} is {s.dtype}" for n, s in specs.items() if s.dtype not in (torch.float16, torch.bfloat16, torch.float32)
    ]
    if wrong:
        raise CheckpointError(
            f"these are no weights to add: {'; '.join(wrong[:8])}",
            where=source,
            hint="use weights that are not quantised",
        )
    types = [spec.dtype for spec in specs.values()]
    return max(set(types), key=types.count)


def _known(folder: Path) -> Mapping[str, Any]:
    path = folder / "delta.json"
    if not path.is_file():
        return {}
    values: Any = read_json(path)
    if not isinstance(values, dict) or values.get("target_dtype") not in ("float16", "bfloat16", "float32"):
        raise CheckpointError("delta.json is damaged", where=str(path), hint="download the delta again")
    return values


def _copy_side_files(source: Path, folder: Path) -> None:
    """Configuration and tokenizer: small text, never code, never the source's weights or their index."""
    for path in sorted(source.iterdir()):
        skipped = path.name.endswith(".index.json") or path.name in ("delta.json", _MANIFEST)
        if path.suffix in _SIDE_FILES and path.is_file() and not skipped and path.stat().st_size <= _SIDE_FILE_BYTES:
            shutil.copyfile(path, folder / path.name)


def _result(
    out: Path, specs: Mapping[str, TensorSpec], base: WeightFiles, digest: str, inexact: int, started: float
) -> DeltaResult:
    import math

    before = base.specs
    grown = {n: specs[n].shape[0] - before[n].shape[0] for n in _GROWS if n in specs and n in before}
    return DeltaResult(
        folder=out,
        tensors=len(specs),
        parameters=sum(math.prod(spec.shape) for spec in specs.values()),
        grown={name: rows for name, rows in grown.items() if rows},
        inexact=inexact,
        sha256=digest,
        duration_s=round(time.monotonic() - started, 3),
    )
