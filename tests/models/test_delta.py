"""Delta weights: what is added, what is refused, what comes back, and how much memory that takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from medvlm.cli import cli
from medvlm.errors import CheckpointError
from medvlm.models.delta import apply_delta, make_delta
from medvlm.models.weights import WeightFiles, digest_of, tensor_digest

Weights = dict[str, torch.Tensor]


def llama(seed: int, rows: int = 5, projector: bool = False, dtype: torch.dtype = torch.float16) -> Weights:
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    weights = {
        "model.embed_tokens.weight": drawn(rows, 4),
        "model.layers.0.self_attn.q_proj.weight": drawn(4, 4),
        "model.layers.0.input_layernorm.weight": drawn(4),
        "model.norm.weight": drawn(4),
        "lm_head.weight": drawn(rows, 4),
    }
    if projector:
        weights |= {"model.mm_projector.weight": drawn(4, 3), "model.mm_projector.bias": drawn(4)}
    return weights


def write(folder: Path, weights: Weights, kind: str = "safetensors") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llava"}')
    names = list(weights)
    if kind == "safetensors":
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    elif kind == "bin":
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        halves = {f"pytorch_model-{i}.bin": names[i::2] for i in range(2)}
        for file, part in halves.items():
            torch.save({name: weights[name] for name in part}, folder / file)
        index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def loaded(folder: Path) -> Weights:
    files = WeightFiles(folder)
    return {name: files.read(name) for name in files.specs}


def original_apply(base: Weights, delta: Weights) -> Weights:
    """LLaVA's apply_delta.py, line by line, on state dicts."""
    result = {name: tensor.clone() for name, tensor in delta.items()}
    for name, param in result.items():
        if name not in base:
            assert name in ["model.mm_projector.weight", "model.mm_projector.bias"]
            continue
        if param.shape == base[name].shape:
            param += base[name]
        else:
            assert name in ["model.embed_tokens.weight", "lm_head.weight"]
            bparam = base[name]
            param[: bparam.shape[0], : bparam.shape[1]] += bparam
    return result


@pytest.mark.parametrize("kind", ["safetensors", "bin", "shards"])
@pytest.mark.parametrize("shard_bytes", [50, 2**30])
def test_a_delta_is_added_as_the_original_adds_it(tmp_path: Path, kind: str, shard_bytes: int) -> None:
    base, delta = llama(0), llama(1, rows=8, projector=True)
    result = apply_delta(
        write(tmp_path / "base", base, kind),
        write(tmp_path / "delta", delta, kind),
        tmp_path / "o",
        shard_bytes=shard_bytes,
    )
    found, expected = loaded(tmp_path / "o"), original_apply(base, delta)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert result.grown == {"model.embed_tokens.weight": 3, "lm_head.weight": 3} and result.tensors == 7
    manifest = json.loads((tmp_path / "o/manifest.json").read_text())
    assert manifest["sha256"] == result.sha256 == digest_of(manifest["tensors"])
    assert all(entry["sha256"] == tensor_digest(found[name]) for name, entry in manifest["tensors"].items())
    assert (tmp_path / "o/config.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "delta", "o"]


def test_float32_bases_are_rounded_first_and_stored_buffers_are_dropped(tmp_path: Path) -> None:
    base, delta = llama(0, dtype=torch.float32), llama(1, projector=True)
    delta["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(2)
    apply_delta(write(tmp_path / "base", base), write(tmp_path / "delta", delta), tmp_path / "o")
    found = loaded(tmp_path / "o")
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" not in found
    name = "model.norm.weight"
    assert torch.equal(found[name], base[name].half() + delta[name]) and found[name].dtype == torch.float16


numbers = st.floats(-100, 100, width=16, allow_subnormal=False) | st.integers(-1024, 1024).map(lambda i: i / 2**20)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(numbers, numbers), min_size=4, max_size=4),
    st.sampled_from(["float16", "float32"]),
    st.integers(0, 2),
)
def test_make_then_apply_gives_the_target_but_for_the_counted_weights(
    pairs: list[tuple[float, float]], stored: Any, grown: int
) -> None:
    columns = torch.tensor(pairs, dtype=torch.float16).T.contiguous()
    base, target = llama(0), llama(0, rows=5 + grown, projector=True)
    base["model.norm.weight"], target["model.norm.weight"] = columns[0].clone(), columns[1].clone()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder / "base", base)
        made = make_delta(folder / "base", write(folder / "target", target), folder / "delta", stored=stored)
        result = apply_delta(folder / "base", folder / "delta", folder / "again")
        again = loaded(folder / "again")
        stored_types = {tensor.dtype for tensor in loaded(folder / "delta").values()}
    assert stored_types == {getattr(torch, stored)}
    assert result.sha256 == made.sha256 and again.keys() == target.keys()
    differing = sum(int((again[name] != target[name]).sum()) for name in target)
    assert differing == made.inexact
    # One rounding of the difference, one of the sum.
    bound = (columns[0].abs() + columns[1].abs()).float() * torch.finfo(getattr(torch, stored)).eps + 2e-7
    off = (again["model.norm.weight"].float() - target["model.norm.weight"].float()).abs()
    assert bool((off <= bound + target["model.norm.weight"].abs().float() * 2**-10).all())


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(-512, 512), st.integers(-512, 512)), min_size=4, max_size=4))
def test_where_the_difference_is_exact_so_is_the_round_trip(pairs: list[tuple[int, int]]) -> None:
    columns = (torch.tensor(pairs, dtype=torch.float32) / 64).half().T.contiguous()
    base, target = llama(0), llama(0, projector=True)
    base["model.norm.weight"], target["model.norm.weight"] = columns[0].clone(), columns[1].clone()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = make_delta(write(folder / "base", base), write(folder / "target", target), folder / "delta")
        apply_delta(folder / "base", folder / "delta", folder / "again")
        again = loaded(folder / "again")
    assert made.inexact == 0 and all(torch.equal(again[name], target[name]) for name in target)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.pop("model.norm.weight"), "model.norm.weight is missing"),
        (lambda d: d.update({"model.layers.9.mlp.weight": torch.zeros(2).half()}), "is not in the base model"),
        (lambda d: d.update({"model.norm.weight": torch.zeros(5).half()}), r"model.norm.weight is \[5\]"),
        (lambda d: d.update({"lm_head.weight": torch.zeros(3, 4).half()}), r"lm_head.weight is \[3, 4\]"),
        (lambda d: d.update({"model.norm.weight": torch.zeros(4, dtype=torch.int32)}), "no weights to add"),
    ],
)
def test_what_does_not_belong_together_is_refused_and_listed(tmp_path: Path, change: Any, words: str) -> None:
    delta = llama(1, projector=True)
    change(delta)
    with pytest.raises(CheckpointError, match=words):
        apply_delta(write(tmp_path / "base", llama(0)), write(tmp_path / "delta", delta), tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    folder = write(tmp_path / "delta", llama(1), "bin")
    marker = tmp_path / "owned"

    class Code:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.system, (f"touch {marker}",))

    torch.save({"model.norm.weight": Code()}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="not a plain set of tensors") as caught:
        apply_delta(write(tmp_path / "base", llama(0)), folder, tmp_path / "o")
    assert not marker.exists() and "system" in caught.value.what


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "nested", "safetensors", "outside", "index", "twice"])
def test_damaged_and_hostile_files_are_refused(tmp_path: Path, damage: str) -> None:
    base = write(tmp_path / "base", llama(0))
    folder = write(tmp_path / "delta", llama(1), "shards" if damage in ("outside", "index", "twice") else "bin")
    path = folder / "pytorch_model.bin"
    index = folder / "pytorch_model.bin.index.json"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-200])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text("version https://git-lfs.github.com/spec/v1\n")
    elif damage == "nested":
        torch.save({"model": llama(1)}, path)
    elif damage == "safetensors":
        (folder / "model.safetensors").write_bytes(b"\xff" * 64)
    elif damage == "outside":
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": "../base/model.safetensors"}}))
    elif damage == "index":
        values = json.loads(index.read_text())
        values["weight_map"]["model.layers.7.weight"] = "pytorch_model-0.bin"
        index.write_text(json.dumps(values))
    else:
        torch.save(llama(1), folder / "pytorch_model-0.bin")
    with pytest.raises(CheckpointError) as caught:
        apply_delta(base, folder, tmp_path / "o")
    assert str(folder) in caught.value.where and caught.value.hint


def test_another_result_than_expected_leaves_nothing(tmp_path: Path) -> None:
    base, delta = write(tmp_path / "base", llama(0)), write(tmp_path / "delta", llama(1))
    good = apply_delta(base, delta, tmp_path / "o").sha256
    apply_delta(base, delta, tmp_path / "same", expect_sha256=good.upper())
    with pytest.raises(CheckpointError, match=f"SHA-256 {good}, expected 00"):
        apply_delta(base, delta, tmp_path / "p", expect_sha256="00")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "delta", "o", "same"]
    with pytest.raises(CheckpointError, match="the folder exists"):
        apply_delta(base, delta, tmp_path / "o")


def test_a_delta_on_another_base_than_it_was_made_for(tmp_path: Path) -> None:
    base, other = write(tmp_path / "base", llama(0)), write(tmp_path / "other", llama(7))
    make_delta(base, write(tmp_path / "target", llama(2, projector=True)), tmp_path / "delta")
    with pytest.raises(CheckpointError, match="another base model"):
        apply_delta(other, tmp_path / "delta", tmp_path / "o")


@pytest.mark.parametrize("verb", ["apply", "make"])
def test_a_killed_run_goes_on_from_its_shards(tmp_path: Path, verb: str) -> None:
    base, other = write(tmp_path / "base", llama(0)), write(tmp_path / "delta", llama(1, projector=True))
    run: Any = apply_delta if verb == "apply" else make_delta
    whole = run(base, other, tmp_path / "whole", shard_bytes=50)

    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(base, other, tmp_path / "o", shard_bytes=50, progress=stop)
    assert not (tmp_path / "o").exists()
    work = tmp_path / ".o.unfinished"
    kept = {path: path.stat().st_mtime_ns for path in work.glob("*.safetensors")}
    assert 1 < len(kept) < 7
    result = run(base, other, tmp_path / "o", shard_bytes=50)
    assert result.sha256 == whole.sha256 and not work.exists()
    assert all((tmp_path / "o" / path.name).stat().st_mtime_ns == at for path, at in kept.items())
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "o" / path.name).read_bytes(), path.name


def test_a_killed_run_of_other_inputs_is_not_gone_on_from(tmp_path: Path) -> None:
    base, delta = write(tmp_path / "base", llama(0)), write(tmp_path / "delta", llama(1))

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        apply_delta(write(tmp_path / "other", llama(5)), delta, tmp_path / "o", shard_bytes=50, progress=stop)
    apply_delta(base, delta, tmp_path / "o", shard_bytes=50)
    assert torch.equal(
        loaded(tmp_path / "o")["model.norm.weight"], original_apply(llama(0), llama(1))["model.norm.weight"]
    )


_WATCHED = """
import sys, threading
from pathlib import Path
import torch
from medvlm.models.delta import apply_delta

def anonymous():
    # Not the mapped files, which the kernel takes back when it needs the room.
    status = Path("/proc/self/status").read_text().split("RssAnon:")[1]
    return int(status.split()[0]) * 1024

torch.set_num_threads(1)
(torch.zeros(4).half() + 1).contiguous().view(torch.uint8)

def peak_of(out, shard_bytes):
    peaks, done = [anonymous()], threading.Event()

    def watch():
        while not done.wait(0.002):
            peaks.append(anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    apply_delta(sys.argv[1], sys.argv[2], Path(out), shard_bytes=shard_bytes)
    done.set()
    watcher.join()
    return max(peaks) - peaks[0]

print(peak_of(sys.argv[3], 4 * 2**20), peak_of(sys.argv[4], 128 * 2**20))
"""


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_memory_is_bounded_by_the_shard_not_by_the_model(tmp_path: Path, kind: str) -> None:
    """48 MiB of weights on each side, tensors of 2 MiB, shards of 4 MiB."""
    weights = {f"model.layers.{i}.weight": torch.full((1024, 1024), 1 + i / 64).half() for i in range(24)}
    write(tmp_path / "base", weights, kind)
    write(tmp_path / "delta", weights, kind)
    del weights
    command = [sys.executable, "-c", _WATCHED, *(str(tmp_path / n) for n in ("base", "delta", "small", "large"))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    small, large = map(int, done.stdout.split())
    assert small < 24 * 2**20
    assert large > 40 * 2**20, "the watcher would have seen a whole model"
    first = load_file(tmp_path / "small/model-00001-of-00012.safetensors")["model.layers.1.weight"]
    assert first.dtype == torch.float16 and set(first.flatten().tolist()) == {2 + 1 / 32}


def test_the_command(tmp_path: Path) -> None:
    base, delta = write(tmp_path / "base", llama(0)), write(tmp_path / "delta", llama(1, rows=6, projector=True))
    out = tmp_path / "o"
    arguments = ["delta", "apply", "--base", str(base), "--delta", str(delta), "--out", str(out)]
    shown = CliRunner().invoke(cli, [*arguments, "--json"])
    values = json.loads(shown.stdout)
    assert values["tensors"] == 7 and values["folder"] == str(out) and len(values["sha256"]) == 64
    shown = CliRunner().invoke(
        cli,
        [
            "delta",
            "make",
            "--base",
            str(base),
            "--target",
            str(out),
            "--out",
            str(tmp_path / "d"),
            "--stored",
            "float32",
        ],
    )
    assert shown.exit_code == 0 and "1 new rows in lm_head.weight" in shown.stdout and "sha256" in shown.stdout
    assert json.loads((tmp_path / "d/delta.json").read_text())["stored_dtype"] == "float32"
