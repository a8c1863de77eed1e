"""Exports that another harness can run, with our rules in one file, and its answers read back."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner
from PIL import Image as PillowImage

from medvlm.cli import cli
from medvlm.errors import InputError
from medvlm.evaluation.answers import join_answers, read_predictions
from medvlm.evaluation.interop import export_benchmark
from medvlm.evaluation.metrics import apply_rules
from medvlm.records import Image, VQAItem
from medvlm.store import Workspace, write_records


@pytest.fixture
def pictured(items: list[VQAItem]) -> list[VQAItem]:
    """The items with real PNG bytes, one picture for each image id."""
    buffers: dict[str, bytes] = {}
    for shade, item in enumerate(items):
        if item.image_id not in buffers:
            buffer = io.BytesIO()
            PillowImage.new("L", (4, 4), 40 * shade).save(buffer, "PNG")
            buffers[item.image_id] = buffer.getvalue()
    return [dataclasses.replace(item, image=Image(buffers[item.image_id], "imgs/source.png")) for item in items]


class Loader(yaml.SafeLoader):
    """Reads ``!function module.name`` as the text ``module.name``."""


Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))  # type: ignore[arg-type]


def test_the_task_folder_names_its_data_and_functions(pictured: list[VQAItem], tmp_path: Path) -> None:
    folder = tmp_path / "tasks" / "vqa rad: 'test'"
    folder.parent.mkdir()
    assert export_benchmark(pictured, folder, name="vqa-rad", form="lmms-eval") == 6
    task: dict[str, Any] = yaml.load((folder / "medvlm_vqa_rad.yaml").read_text("utf-8"), Loader)
    data = pq.read_table(task["dataset_kwargs"]["data_files"]["test"])
    assert data.column("item_id").to_pylist() == [item.item_id for item in pictured]
    features = json.loads(data.schema.metadata[b"huggingface"])["info"]["features"]
    assert features["image"] == {"_type": "Image"}
    assert set(features) == set(data.column_names)
    # What datasets' own Image feature looks like in Arrow; with another type it would not decode.
    assert str(data.schema.field("image").type) == "struct<bytes: binary, path: string>"
    assert all(field.nullable for field in data.schema)
    code = (folder / "utils.py").read_text("utf-8")
    functions = {task[name] for name in ("doc_to_visual", "doc_to_text", "process_results")}
    functions |= {metric["aggregation"] for metric in task["metric_list"]}
    assert all(f"def {name.removeprefix('utils.')}(" in code for name in functions)


RUN_TASK = """
import importlib.util, json, sys
sys.modules["medvlm"] = None  # any import of it fails now
spec = importlib.util.spec_from_file_location("utils", sys.argv[1])
task = importlib.util.module_from_spec(spec)
spec.loader.exec_module(task)
docs = json.load(sys.stdin)
found = []
for doc, prediction in docs:
    results = task.process_results(doc, [prediction])
    found.append({"doc_id": len(found), "filtered_resps": prediction, "input": task.doc_to_text(doc), **results})
print(json.dumps(found))
"""


def test_the_exported_rules_are_ours_and_their_log_is_read_back(pictured: list[VQAItem], tmp_path: Path) -> None:
    folder = tmp_path / "task"
    export_benchmark(pictured, folder, name="vqa-rad", form="lmms-eval")
    texts = ["Yes, it is", "abnormal", "an MRI", "the left lobe", "brain brain", "3"]
    fields = ("item_id", "question", "answer", "answer_type", "language")
    docs = [[{name: getattr(item, name) for name in fields}, text] for item, text in zip(pictured, texts, strict=True)]
    done = subprocess.run(
        [sys.executable, "-c", RUN_TASK, str(folder / "utils.py")],
        input=json.dumps(docs),
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    samples = json.loads(done.stdout)
    for item, text, sample in zip(pictured, texts, samples, strict=True):
        ours = apply_rules(item.answer, text, item.answer_type)
        assert sample["closed_whole_word"]["score"] == ours.get("whole_word")
        assert sample["open_token_recall"]["score"] == ours.get("token.recall")
        assert sample["open_llava_med_recall"]["score"] == ours.get("llava_med.recall")
    log = tmp_path / "samples.jsonl"
    log.write_text("".join(json.dumps(sample) + "\n" for sample in reversed(samples)), "utf-8")
    joined = join_answers(pictured, read_predictions(log, benchmark="vqa-rad"), where="log")
    assert [prediction and prediction.text for prediction in joined.predictions] == texts


def test_a_log_of_another_task_has_no_ids(tmp_path: Path) -> None:
    log = tmp_path / "samples.jsonl"
    log.write_text(json.dumps({"doc_id": 0, "filtered_resps": ["yes"], "acc": 1.0}), "utf-8")
    with pytest.raises(InputError, match="id has to be"):
        read_predictions(log, benchmark="vqa-rad")


def test_the_plain_files_are_llava_meds(pictured: list[VQAItem], tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    export_benchmark(pictured, folder, name="vqa-rad", form="jsonl")
    questions = [json.loads(line) for line in (folder / "questions.jsonl").read_text("utf-8").splitlines()]
    gold = json.loads((folder / "test.json").read_text("utf-8"))
    assert [row["question_id"] for row in questions] == [row["id"] for row in gold] == [i.item_id for i in pictured]
    assert {row["answer_type"] for row in gold} == {"OPEN", "CLOSED"}
    assert gold[0]["conversations"][1]["value"] == "Yes"
    # Every published name is the same; the pictures are not mixed up by that.
    assert len(list((folder / "images").iterdir())) == 4
    for row, item in zip(questions, pictured, strict=True):
        assert (folder / "images" / row["image"]).read_bytes() == item.image.bytes


def test_an_existing_folder_and_an_item_without_image_are_refused(items: list[VQAItem], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="exists already"):
        export_benchmark(items, tmp_path, name="vqa-rad", form="jsonl")
    blank = dataclasses.replace(items[0], image=Image(b"", ""))
    with pytest.raises(InputError, match="no image"):
        export_benchmark([blank], tmp_path / "new", name="vqa-rad", form="jsonl")
    assert not (tmp_path / "new").exists()


def test_the_verb_exports_the_workspaces_test_split(pictured: list[VQAItem], tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "workspace")
    train = dataclasses.replace(pictured[0], item_id="t", split="train")
    write_records(workspace.items("vqa-rad"), VQAItem, [train, *pictured])
    arguments = ["--workspace", str(workspace.root), "export-benchmark", "vqa-rad", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(cli, [*arguments, "--json"])
    assert json.loads(result.stdout)["items"] == 6
    assert (tmp_path / "out" / "utils.py").exists()
