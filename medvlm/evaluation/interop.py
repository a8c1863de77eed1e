"""Benchmarks for other harnesses: an lmms-eval task folder, or plain files as LLaVA-Med's scripts read them.

The answers come back through ``read_predictions``, which reads LLaVA-Med's answer files and the
samples that lmms-eval logs.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from medvlm import __version__
from medvlm.errors import InputError
from medvlm.records import Image, VQAItem, to_row
from medvlm.store import atomic_folder

__all__ = ["FORMS", "Form", "export_benchmark"]

Form = Literal["lmms-eval", "jsonl"]
FORMS: tuple[Form, ...] = ("lmms-eval", "jsonl")
_ROW_GROUP = 64
_COLUMNS = (
    "item_id", "image", "image_id", "question", "answer", "answer_type", "question_type", "modality", "organ",
    "language",
)  # fmt: skip


def export_benchmark(items: Iterable[VQAItem], folder: Path, *, name: str, form: Form) -> int:
    """Write a benchmark's items for another harness.

    Args:
        items: Of one split, with their images. Consumed once.
        folder: Must not exist yet.
        name: Of the task, such as ``vqa-rad``.
        form: ``lmms-eval`` writes ``medvlm_<name>.yaml``, ``utils.py`` (our rules, in one file that
            needs nothing of medvlm) and ``test.parquet``; use it with ``--include_path``. ``jsonl``
            writes ``questions.jsonl`` and ``test.json`` in LLaVA-Med's formats, and ``images/``.

    Returns:
        The number of items.

    Raises:
        InputError: The folder exists, or an item has no image.
        WorkspaceError: The disk is full or read-only.
    """
    if folder.exists():
        raise InputError("the folder exists already", where=str(folder), hint="choose a new one, or delete it")
    with atomic_folder(folder) as temporary:
        checked = _with_image(items)
        if form == "lmms-eval":
            return _write_lmms_eval(checked, temporary, folder.resolve(), name)
        return _write_jsonl(checked, temporary)


def _with_image(items: Iterable[VQAItem]) -> Iterator[VQAItem]:
    for item in items:
        if not item.image.bytes:
            raise InputError(
                "the item has no image", where=f"{item.benchmark}, item {item.item_id}", hint="give the whole release"
            )
        yield item


# ── Plain files ─────────────────────────────────────────────────────────────────────────────────


def _write_jsonl(items: Iterable[VQAItem], folder: Path) -> int:
    (folder / "images").mkdir()
    gold: list[dict[str, Any]] = []
    with (folder / "questions.jsonl").open("w", encoding="utf-8") as stream:
        for item in items:
            image = _image_name(item.image)
            (folder / "images" / image).write_bytes(item.image.bytes)
            question = {"question_id": item.item_id, "image": image, "text": f"{item.question}\n<image>"}
            stream.write(json.dumps(question, ensure_ascii=False) + "\n")
            turns = [{"from": "human", "value": question["text"]}, {"from": "gpt", "value": item.answer}]
            gold.append(
                {
                    "id": item.item_id,
                    "image": image,
                    "answer_type": item.answer_type.upper(),
                    "question_type": item.question_type,
                    "conversations": turns,
                }
            )
    (folder / "test.json").write_text(json.dumps(gold, indent=1, ensure_ascii=False) + "\n", "utf-8")
    return len(gold)


def _image_name(image: Image) -> str:
    """A name from the content: published names repeat (SLAKE's are all ``source.jpg``) and may hold paths."""
    suffix = Path(image.path).suffix.lower()
    return hashlib.sha256(image.bytes).hexdigest()[:20] + (suffix if re.fullmatch(r"\.[a-z0-9]{1,5}", suffix) else "")


# ── lmms-eval ───────────────────────────────────────────────────────────────────────────────────

_TASK = """\
# {name}, test split, exported by medvlm {version}. Run it with:
#   lmms-eval --include_path {folder} --tasks {task} --log_samples --output_path results …
# and score the logged samples under every rule with:
#   medvlm score --benchmark {name} --items … --predictions results/…/…_samples_{task}.jsonl
task: {task}
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.doc_to_text
doc_to_target: answer
process_results: !function utils.process_results
generation_kwargs:
  max_new_tokens: 64
  temperature: 0
  do_sample: false
metric_list:
{metrics}
lmms_eval_specific_kwargs:
  default:
    pre_prompt: ""
    post_prompt: ""
metadata:
  version: 1.0
"""
_METRICS = (
    "closed_whole_word",
    "closed_llava_med_batch",
    "open_token_recall",
    "open_token_f1",
    "open_llava_med_recall",
)


def _write_lmms_eval(items: Iterable[VQAItem], folder: Path, final: Path, name: str) -> int:
    task = "medvlm_" + re.sub(r"[^a-z0-9]+", "_", name.lower())
    metrics = "\n".join(
        f"  - metric: {metric}\n    aggregation: !function utils.mean\n    higher_is_better: true"
        for metric in _METRICS
    )
    text = _TASK.format(
        name=name,
        version=__version__,
        folder=final,
        task=task,
        data=json.dumps(str(final / "test.parquet"), ensure_ascii=False),  # JSON's quotes are YAML's too
        metrics=metrics,
    )
    (folder / f"{task}.yaml").write_text(text, "utf-8")
    (folder / "utils.py").write_text(_task_code(), "utf-8")
    count = 0
    schema = _parquet_schema()
    with pq.ParquetWriter(folder / "test.parquet", schema, compression="zstd") as writer:
        rows: list[dict[str, Any]] = []
        for item in items:
            row = to_row(item)
            rows.append({column: row[column] for column in _COLUMNS})
            count += 1
            if len(rows) == _ROW_GROUP:
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
                rows = []
        if rows or not count:
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    return count


def _parquet_schema() -> pa.Schema:
    """The items' columns, marked so that ``datasets`` decodes the image, and lmms-eval leaves it out of logs.

    ``datasets`` follows the mark only where a column's type is exactly its own: everything nullable.
    """
    image = pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])
    schema = pa.schema([pa.field(column, image if column == "image" else pa.string()) for column in _COLUMNS])
    text = {"dtype": "string", "_type": "Value"}
    features = {column: {"_type": "Image"} if column == "image" else text for column in _COLUMNS}
    return schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def _task_code() -> str:
    """One Python file with our rules and the task's functions, which imports nothing of medvlm."""
    source = importlib.resources.files("medvlm.evaluation")
    parts = [(source / name).read_text("utf-8") for name in ("normalise.py", "metrics.py")]
    rules = "\n\n".join(_without_own_imports(part) for part in parts)
    task = (source / "lmms_eval_task.py.txt").read_text("utf-8")
    return (
        f'"""Score rules of medvlm {__version__} (Apache-2.0) and the functions of an lmms-eval task."""\n\n'
        "from __future__ import annotations\n\n"
        'from typing import Literal\n\nAnswerType = Literal["open", "closed"]\n\n'
        f"{rules}\n\n{task}"
    )


def _without_own_imports(source: str) -> str:
    source = re.sub(r'\A""".*?"""\n', "", source, count=1, flags=re.DOTALL)
    source = source.replace("from __future__ import annotations\n", "", 1)
    return re.sub(r"^from medvlm\.\S+ import (\([^)]*\)|.*)\n", "", source, flags=re.MULTILINE).strip() + "\n"
