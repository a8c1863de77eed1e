"""A workspace in a bucket: one machine builds, another goes on; nobody ever sees a half of anything."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from buckets import KEYS, NAME, local_bucket
from click.testing import CliRunner, Result
from failures.reliability import held
from PIL import Image

from medvlm import s3
from medvlm.cli import VERBS, cli
from medvlm.errors import StoreError, WorkspaceError
from medvlm.s3 import Bucket
from medvlm.step_files import STEP_FILES, files_of_step
from medvlm.store import Workspace, read_json
from medvlm.units import unit_of
from medvlm.working_copy import CACHE_VARIABLE, WorkingCopy, copy_folder

UNIT = "datasets/alignment"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with local_bucket() as address:
        yield address


@pytest.fixture
def address(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A workspace of its own in the bucket."""
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": server}.items():
        monkeypatch.setenv(name, value)
    return f"s3://{NAME}/{tmp_path.name}"


def machine(address: str, folder: Path, *command: str, monkeypatch: pytest.MonkeyPatch) -> Result:
    """Run a verb on a machine with a local copy of its own."""
    monkeypatch.setenv(CACHE_VARIABLE, str(folder))
    return CliRunner().invoke(cli, ["--workspace", address, *command], catch_exceptions=False)


def write(root: Path, files: dict[str, str], unit: str = UNIT) -> None:
    for name, text in files.items():
        path = root / unit / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def files_in(root: Path, unit: str = UNIT) -> dict[str, str]:
    folder = root / unit
    return {p.relative_to(folder).as_posix(): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


OLD = {"samples/part-00000.parquet": "old 0", "samples/part-00001.parquet": "old 1", "report.json": "old"}
NEW = {"samples/part-00000.parquet": "new 0", "report.json": "new"}


@pytest.mark.parametrize(
    ("path", "unit"),
    [
        ("figures/shards/part-00000.parquet", "figures"),
        ("datasets/alignment/samples/part-00000.parquet", "datasets/alignment"),
        ("datasets/preference/tiny/samples/part-00000.parquet", "datasets/preference/tiny"),
        ("checkpoints/r/stage1/checkpoint/all/model.safetensors", "checkpoints/r/stage1"),
        ("scratch/train/r/stage1/all/checkpoint-3/complete.json", "scratch/train/r/stage1/all"),
        ("scratch/fetch/abc/journal/00001.journal", "scratch/fetch/abc"),
        ("scratch/fetch/lock", None),
        ("scratch/pipes/x.json", None),
        ("figures/.tmp-0-shards/part-00000.parquet", None),
        ("datasets/.gitignore", None),
    ],
)
def test_a_unit_is_what_takes_its_place_whole(path: str, unit: str | None) -> None:
    assert unit_of(path) == unit


def test_every_verb_says_what_it_reads_and_writes() -> None:
    assert {name.split(" ")[0] for name in STEP_FILES} == {*VERBS, "contract"}
    first = files_of_step(["train", "--recipe", "tiny-llava-med", "--stage", "align"])
    assert "datasets/alignment" in first.reads and "datasets/instruct" not in first.reads
    assert "checkpoints/tiny-llava-med/stage1" in first.writes
    assert files_of_step(["dataset", "build", "--seed=1", "instruct"]).writes[0] == "datasets/instruct"
    assert files_of_step(["serve", "--checkpoint", "/c/checkpoints/tiny/stage3/x"]).reads[0] == "checkpoints/tiny"
    assert files_of_step(["score", "--benchmark=slake"]).writes[0] == "scores/*/slake"


def release(folder: Path) -> Path:
    """VQA-RAD's layout with two questions."""
    rows = [
        {
            "qid": index, "phrase_type": kind, "image_name": f"{index}.png", "image_organ": "CHEST",
            "question": "Is the heart enlarged?", "question_type": "SIZE", "answer": "Yes", "answer_type": "CLOSED",
        }
        for index, kind in enumerate(("freeform", "test_freeform"))
    ]  # fmt: skip
    (folder / "VQA_RAD Image Folder").mkdir(parents=True)
    for index in range(2):
        Image.new("L", (64, 48), 90 * index).save(folder / "VQA_RAD Image Folder" / f"{index}.png")
    (folder / "VQA_RAD Dataset Public.json").write_text(json.dumps(rows))
    return folder


def test_one_machine_builds_and_another_describes(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    build = ["dataset", "build-benchmark", "vqa-rad", "--source", str(release(tmp_path / "release"))]
    built = machine(address, one, *build, monkeypatch=monkeypatch)
    assert "put up" in built.stderr and "benchmarks/vqa-rad" in built.stderr

    described = machine(address, other, "dataset", "describe", "vqa-rad", "--json", monkeypatch=monkeypatch)
    report = read_json(Workspace(one).benchmark("vqa-rad") / "report.json")
    assert json.loads(described.stdout)["rows"] == report["counts"]["items"]
    assert "brought in" in described.stderr
    again = machine(address, other, "dataset", "describe", "vqa-rad", "--json", monkeypatch=monkeypatch)
    assert "brought in" not in again.stderr, "only what changed moves"
    assert again.stdout == described.stdout

    checked = subprocess.run(
        [sys.executable, "-m", "data_contracts", "benchmark-items", "--benchmark", "vqa-rad", "--workspace", address],
        env={**os.environ, CACHE_VARIABLE: str(other), "MEDVLM_CONTRACT_DOCS": "false"},
        capture_output=True,
        text=True,
    )
    assert checked.returncode == 0, checked.stderr
    back = machine(address, one, "workspace", "pull", "contracts/*", "--json", monkeypatch=monkeypatch)
    assert json.loads(back.stdout)["units"] == ["contracts/benchmark-items"]


KILLED = """
import os, sys
from pathlib import Path
from medvlm import s3, working_copy
working_copy.FILES_AT_ONCE = 1
upload, left = s3.Bucket.upload, [int(sys.argv[3])]
def trap(self, *arguments):
    if not left[0]:
        os.kill(os.getpid(), 9)
    left[0] -= 1
    upload(self, *arguments)
s3.Bucket.upload = trap
working_copy.WorkingCopy(Path(sys.argv[1]), sys.argv[2]).push()
"""


@pytest.mark.parametrize("uploads", [1, 2])
def test_a_kill_in_the_middle_of_an_upload_leaves_the_old_version(
    address: str, tmp_path: Path, uploads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    write(one, OLD)
    WorkingCopy(one, address).push()
    (one / UNIT / "samples" / "part-00001.parquet").unlink()
    write(one, {**NEW, "samples/part-00002.parquet": "new 2"})
    killed = subprocess.run([sys.executable, "-c", KILLED, str(one), address, str(uploads)])
    assert killed.returncode == -9
    WorkingCopy(other, address).pull()
    assert files_in(other) == OLD, "what was put up half is seen by nobody"

    moved = WorkingCopy(one, address).push()
    assert moved.files == 3 - uploads, "what had arrived is not sent again"
    WorkingCopy(other, address).pull()
    assert files_in(other) == {**NEW, "samples/part-00002.parquet": "new 2"}
    assert len(Bucket(address).list("files/")) == 3, "nothing of the old version, nor of the killed upload, is left"
    held(
        "kill -9 in the middle of an upload into the bucket",
        lost="nothing: the dataset or checkpoint before stays what everybody reads",
        saw="nothing of the half that had arrived",
        rerun="sends what had not arrived, then both the new version is seen and the old one's files are gone",
    )


def test_a_kill_in_the_middle_of_a_pull_is_nobodys_work(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    write(one, OLD)
    WorkingCopy(one, address).push()
    WorkingCopy(other, address).pull()
    (one / UNIT / "samples" / "part-00001.parquet").unlink()
    write(one, NEW)
    WorkingCopy(one, address).push()
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", lambda self, target: (_ for _ in ()).throw(KeyboardInterrupt))
        patched.setattr(WorkingCopy, "_remember", _remember_without_replace)
        with pytest.raises(KeyboardInterrupt):
            WorkingCopy(other, address).pull()
    assert files_in(other) not in (OLD, NEW), "a half lies here"
    assert WorkingCopy(other, address).push().units == []
    WorkingCopy(other, address).pull()
    assert files_in(other) == NEW


def _remember_without_replace(self: WorkingCopy, unit: str, known: object) -> None:
    import dataclasses

    self._state(unit).write_text(json.dumps(dataclasses.asdict(known)))  # type: ignore[call-overload]


def test_two_machines_that_change_one_unit_are_told(address: str, tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    write(one, OLD)
    WorkingCopy(one, address).push()
    WorkingCopy(other, address).pull()
    write(one, {"report.json": "mine"})
    write(other, {"report.json": "theirs"})
    WorkingCopy(other, address).push()
    for move in (WorkingCopy(one, address).push, WorkingCopy(one, address).pull):
        with pytest.raises(WorkspaceError, match=f"--mine {UNIT}"):
            move()
    assert files_in(one)["report.json"] == "mine"
    WorkingCopy(one, address).push([UNIT], mine=True)
    WorkingCopy(other, address).pull()
    assert files_in(other)["report.json"] == "mine"


def test_two_machines_may_add_to_reviews_and_parts_of_a_fetch(address: str, tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for unit in ("review", "scratch/fetch/abc"):
        write(one, {"first": "1"}, unit)
        write(other, {"second": "2"}, unit)
    for root in (one, other, one):
        WorkingCopy(root, address).push()
        WorkingCopy(root, address).pull()
    for unit in ("review", "scratch/fetch/abc"):
        assert files_in(one, unit) == files_in(other, unit) == {"first": "1", "second": "2"}

    write(one, {"first": "longer"}, "review")
    write(other, {"third": "3"}, "review")
    WorkingCopy(other, address).push()
    WorkingCopy(one, address).pull()
    assert files_in(one, "review") == {"first": "longer", "second": "2", "third": "3"}, "what was done here stays"
    WorkingCopy(one, address).push()
    WorkingCopy(other, address).pull()
    assert files_in(other, "review") == files_in(one, "review")


def test_a_unit_that_was_deleted_here_to_save_room_comes_back(address: str, tmp_path: Path) -> None:
    write(tmp_path / "one", OLD)
    copy = WorkingCopy(tmp_path / "one", address)
    copy.push()
    for name in OLD:
        (copy.root / UNIT / name).unlink()
    copy.push()
    copy.pull()
    assert files_in(copy.root) == OLD


def test_a_damaged_object_is_named_and_nothing_takes_its_place(address: str, tmp_path: Path) -> None:
    write(tmp_path / "one", OLD)
    WorkingCopy(tmp_path / "one", address).push()
    (key,) = (key for key in Bucket(address).list("files/") if "part-00001" in key)
    Bucket(address)._put(f"files/{key}", b"0ld 1", {})
    with pytest.raises(StoreError, match="SHA-256") as told:
        WorkingCopy(tmp_path / "other", address).pull()
    assert key in told.value.where
    assert files_in(tmp_path / "other") == {}


@pytest.mark.parametrize("name", ["../../../outside", "/outside", "../alignment2/x"])
def test_a_manifest_cannot_write_outside_its_unit(address: str, tmp_path: Path, name: str) -> None:
    bucket = Bucket(address)
    body = {"unit": UNIT, "files": {name: {"sha256": "0" * 64, "size": 1}}}
    bucket._put(f"manifests/{UNIT}.json", json.dumps(body).encode(), {})
    with pytest.raises(StoreError, match="outside its unit"):
        WorkingCopy(tmp_path / "one", address).pull()


def test_a_large_file_goes_up_in_parts(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", 5 * 2**20)
    told: list[tuple[int, int]] = []
    root = tmp_path / "one"
    (root / UNIT).mkdir(parents=True)
    (root / UNIT / "part-00000.parquet").write_bytes(os.urandom(11 * 2**20))
    WorkingCopy(root, address, lambda what, done, total: told.append((done, total))).push()
    (entry,) = Bucket(address).list("files/").values()
    assert entry.etag.strip('"').endswith("-3"), "three parts"
    assert max(told) == (11 * 2**20, 11 * 2**20)
    WorkingCopy(tmp_path / "other", address).pull()
    there, here = ((folder / UNIT / "part-00000.parquet").read_bytes() for folder in (root, tmp_path / "other"))
    assert there == here


def test_a_server_that_is_busy_is_asked_again(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Busy(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            body = b"here" if len(asked) == 2 else b"<Error><Code>SlowDown</Code></Error>"
            self.send_response(200 if len(asked) == 2 else 503)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", '"x"')
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Busy) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        try:
            assert Bucket(address).read("manifests/x.json") == (b"here", '"x"')
        finally:
            server.shutdown()
            thread.join()
    assert len(asked) == 2


def test_what_is_wrong_is_said_with_the_next_step(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StoreError, match="make the bucket"):
        WorkingCopy(tmp_path / "one", "s3://no-such-bucket/x").pull()
    with pytest.raises(StoreError, match="names no bucket"):
        Bucket("s3:///x")
    with pytest.raises(WorkspaceError, match="local copy of s3://no-such-bucket/x"):
        WorkingCopy(tmp_path / "one", address)
    refused = CliRunner().invoke(cli, ["--workspace", str(tmp_path / "folder"), "workspace", "pull"])
    assert refused.exit_code == 2 and "name a bucket" in refused.output


def test_the_copy_of_each_bucket_has_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CACHE_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folders = {copy_folder(name) for name in ("s3://a/b-c", "s3://a/b/c", "s3://a/b/c/")}
    assert len(folders) == 2 and all(tmp_path in folder.parents for folder in folders)
