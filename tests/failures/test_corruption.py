"""One flipped bit in a shard and in a checkpoint: found by hash, named, and repaired from the store."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from failures.reliability import held

from medvlm.records import Image, PreferencePair
from medvlm.store import write_records

DVC_YAML = """
stages:
  samples:
    cmd: python make.py
    deps: [make.py]
    outs: [samples, checkpoint]
"""
MAKE = """
from pathlib import Path
import torch
from safetensors.torch import save_file
from medvlm.records import Image, PreferencePair
from medvlm.store import write_records
rows = (PreferencePair(str(n), Image(bytes(500), "a"), "", "", "", "q", "a", "b", "chat") for n in range(50))
write_records(Path("samples"), PreferencePair, rows)
Path("checkpoint").mkdir(exist_ok=True)
save_file({"w": torch.arange(1000.0)}, "checkpoint/model.safetensors")
"""


def dvc(folder: Path, *words: str) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *words],
        cwd=folder,
        env={**os.environ, "PATH": path, "DVC_NO_ANALYTICS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def flip_a_bit(path: Path) -> bytes:
    """Flip one bit in the middle; the bytes as they were. Size and time stay, as when a disk decays."""
    before, times = path.read_bytes(), path.stat()
    changed = bytearray(before)
    changed[len(changed) // 2] ^= 1
    path.write_bytes(changed)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    return before


@pytest.mark.parametrize("what", ["samples/part-00000.parquet", "checkpoint/model.safetensors"])
def test_a_flipped_bit_is_named_and_repaired(tmp_path: Path, what: str) -> None:
    (tmp_path / "dvc.yaml").write_text(DVC_YAML)
    (tmp_path / "make.py").write_text(MAKE)
    dvc(tmp_path, "init", "--no-scm", "-q")
    dvc(tmp_path, "repro")
    dvc(tmp_path, "remote", "add", "-d", "store", str(tmp_path / "remote"))
    dvc(tmp_path, "push")
    good = flip_a_bit(tmp_path / what)
    status = dvc(tmp_path, "status")
    assert what.split("/")[0] in status
    assert "modified" in status
    dvc(tmp_path, "checkout", "--force")
    assert (tmp_path / what).read_bytes() == good
    assert "up to date" in dvc(tmp_path, "repro")
    kind = "shard" if what.startswith("samples") else "checkpoint"
    held(
        f"one bit of a {kind} flipped",
        lost="nothing",
        saw="`dvc status` names the output as modified; a release's checksums name the file",
        rerun="`dvc checkout --force` (or `dvc pull`) restores it; without a store `dvc repro` makes it anew",
    )


def test_a_truncated_shard_is_an_error_that_names_it(tmp_path: Path) -> None:
    from medvlm.errors import MedVLMError
    from medvlm.store import read_records

    write_records(
        tmp_path / "s", PreferencePair, (PreferencePair(str(n), Image(b"x", "a"), *[""] * 7) for n in range(5))
    )
    path = tmp_path / "s" / "part-00000.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(MedVLMError, match=r"part-00000\.parquet"):
        read_records(tmp_path / "s", PreferencePair)
