"""Read predictions, ours or a published file, and join them to benchmark items by id."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from medvlm.errors import InputError, PredictionMismatch
from medvlm.records import Prediction, VQAItem
from medvlm.store import read_records

__all__ = ["Joined", "Missing", "join_answers", "json_lines", "read_predictions"]

Missing = Literal["error", "wrong"]

_IDS = ("item_id", "question_id")
_LISTED = 10


def read_predictions(path: Path, *, benchmark: str) -> list[Prediction]:
    """Predictions of a folder of Parquet shards, one Parquet file, or a JSONL file.

    JSONL lines hold ``question_id`` (or ``item_id``) and ``text``, as LLaVA-Med, Med-MoE and
    STLLaVA-Med write them; ``prompt``, ``model_id`` and ``blind`` are taken along. The samples that
    lmms-eval logs of our exported tasks are read too. UTF-8 with or without a byte-order mark, LF or
    CRLF.

    Args:
        path: The folder or file.
        benchmark: Named in each record that does not name its own.

    Raises:
        InputError: The file is missing, empty, not UTF-8, has a line that is not JSON (a truncated
            last line included), or an id or an answer that is not text.
        WorkspaceError: A folder holds no readable shards.
    """
    if path.is_dir():
        return read_records(path, Prediction)
    if path.suffix == ".parquet":
        return _from_parquet(path)
    predictions = [
        _prediction(row, benchmark=benchmark, where=f"{path}, line {number}") for number, row in json_lines(path)
    ]
    if not predictions:
        raise InputError("the file holds no predictions", where=str(path), hint="check that the model's run ended well")
    return predictions


def _from_parquet(path: Path) -> list[Prediction]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from medvlm.records import from_row

    try:
        rows = pq.read_table(path).to_pylist()
        return [from_row(Prediction, row) for row in rows]
    except FileNotFoundError as error:
        raise InputError("the file does not exist", where=str(path), hint="check the path") from error
    except (pa.ArrowInvalid, TypeError, OSError) as error:
        raise InputError(
            f"this is no Parquet file of predictions: {error}",
            where=str(path),
            hint="it needs the columns item_id, benchmark, model, stage, blind, prompt and text",
        ) from error


def json_lines(path: Path) -> Iterable[tuple[int, Any]]:
    """Line number and value of each line of a JSONL file that is not blank.

    Raises:
        InputError: The file is missing, not UTF-8, or a line is not JSON, with its number.
    """
    try:
        text = path.read_text("utf-8-sig")
    except FileNotFoundError as error:
        raise InputError("the file does not exist", where=str(path), hint="check the path") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"the file is not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}",
            where=str(path),
            hint="convert it, for example with iconv -f utf-16 -t utf-8",
        ) from error
    # Only line feeds end a line: an answer may hold U+2028, which splitlines() would cut at.
    lines = text.split("\n")
    last = max((number for number, line in enumerate(lines, 1) if line.strip()), default=0)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as error:
            truncated = number == last and number > 1
            raise InputError(
                f"the last line is cut off: {error.msg}" if truncated else f"the line is not JSON: {error.msg}",
                where=f"{path}, line {number}, column {error.colno}",
                hint="the run that wrote it was probably killed: run it again, or delete that line and use "
                "--missing wrong"
                if truncated
                else 'each line has to be one object such as {"question_id": 10, "text": "Yes"}',
            ) from error


def _prediction(row: Any, *, benchmark: str, where: str) -> Prediction:
    if not isinstance(row, dict):
        raise InputError(
            f"the line is not an object but {type(row).__name__}",
            where=where,
            hint='each line has to be one object such as {"question_id": 10, "text": "Yes"}',
        )
    fields = _from_lmms_eval(cast("dict[str, Any]", row))
    text = fields.get("text")
    if not isinstance(text, str):
        found = "there is none" if "text" not in fields else f"it is {json.dumps(text)[:80]}"
        raise InputError(
            f"the answer has to be a string in the field 'text', but {found}",
            where=where,
            hint='write answers as text ("2", not 2), and an empty answer as ""',
        )
    return Prediction(
        item_id=_item_id(fields, where=where),
        benchmark=str(fields.get("benchmark") or benchmark),
        model=str(fields.get("model") or fields.get("model_id") or ""),
        stage=str(fields.get("stage") or ""),
        blind=fields.get("blind") is True,
        prompt=str(fields.get("prompt") or ""),
        text=text,
    )


def _from_lmms_eval(fields: dict[str, Any]) -> dict[str, Any]:
    """A sample that lmms-eval logged, as an answer; any other line as it is.

    lmms-eval drops the document from its log, so the id is read from the records that our exported
    task leaves under its metrics.
    """
    if "text" in fields or "filtered_resps" not in fields:
        return fields
    records = (cast("dict[str, Any]", value) for value in fields.values() if isinstance(value, dict))
    item_id = next((record["item_id"] for record in records if "item_id" in record), None)
    response = fields["filtered_resps"]
    if isinstance(response, list) and len(cast("list[Any]", response)) == 1:
        response = cast("list[Any]", response)[0]
    return {"item_id": item_id, "text": response, "prompt": fields.get("input", "")}


def _item_id(fields: Mapping[str, Any], *, where: str) -> str:
    value = next((fields[name] for name in _IDS if name in fields), None)
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # pandas writes an int column as floats once a row is missing
    if isinstance(value, bool) or not isinstance(value, (int, str)) or value == "":
        raise InputError(
            f"the question's id has to be a string or an integer, but it is {json.dumps(value)[:80]}",
            where=where,
            hint="name it question_id (or item_id)",
        )
    return str(value)


@dataclass(frozen=True)
class Joined:
    """Items with their predictions, in the order of the items, and what did not fit."""

    items: tuple[VQAItem, ...]
    predictions: tuple[Prediction | None, ...]
    """None where an item counts as wrong because it has no prediction, or more than one."""
    missing: tuple[str, ...] = ()
    repeated: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()


def join_answers(
    items: Sequence[VQAItem], predictions: Sequence[Prediction], *, missing: Missing = "error", where: str
) -> Joined:
    """Join predictions to items by id, whatever their order.

    Args:
        items: Of one benchmark and split; their ids are unique.
        predictions: Of one model, stage and kind (blind or not).
        missing: ``error`` refuses unless the join is one to one. ``wrong`` counts an item without
            a prediction, or with several, as wrong under every rule, and leaves unknown ids out.
        where: Names the predictions in an error.

    Raises:
        PredictionMismatch: The join is not one to one, with the ids; or the file is plainly
            another benchmark's, which ``missing="wrong"`` does not excuse.
    """
    known = {item.item_id for item in items}
    counts = Counter(prediction.item_id for prediction in predictions)
    absent = tuple(item.item_id for item in items if item.item_id not in counts)
    repeated = tuple(item_id for item_id, count in counts.items() if count > 1)
    unknown = tuple(item_id for item_id in counts if item_id not in known)
    by_id = {prediction.item_id: prediction for prediction in predictions}
    _refuse_another_benchmark(items, by_id, unknown=unknown, where=where)
    if missing == "error" and (absent or repeated or unknown):
        raise PredictionMismatch(
            "; ".join(
                f"{len(ids)} {text}: {_listed(ids)}"
                for ids, text in (
                    (absent, "items have no prediction"),
                    (repeated, "ids have several predictions"),
                    (unknown, "ids are not of this benchmark's test split"),
                )
                if ids
            ),
            where=where,
            hint="run the prediction again so that each item has one answer, or count these as wrong "
            "with --missing wrong",
        )
    ambiguous = {*absent, *repeated}
    answers = tuple(None if item.item_id in ambiguous else by_id[item.item_id] for item in items)
    return Joined(tuple(items), answers, absent, repeated, unknown)


def _listed(ids: Sequence[str]) -> str:
    more = f" and {len(ids) - _LISTED} more" if len(ids) > _LISTED else ""
    return ", ".join(ids[:_LISTED]) + more


def _refuse_another_benchmark(
    items: Sequence[VQAItem], by_id: Mapping[str, Prediction], *, unknown: Sequence[str], where: str
) -> None:
    """Small integers are ids in every benchmark, so the prompts have to hold the questions too."""
    hint = "check --benchmark, --items and --predictions; data_RAD, for one, numbers VQA-RAD's questions anew"
    if by_id and len(unknown) * 2 > len(by_id):
        raise PredictionMismatch(
            f"{len(unknown)} of the {len(by_id)} ids are not of this benchmark ({_listed(unknown)}): "
            "this looks like another benchmark's file",
            where=where,
            hint=hint,
        )
    prompted = [(item, by_id[item.item_id].prompt) for item in items if item.item_id in by_id]
    prompted = [(item, prompt) for item, prompt in prompted if prompt]
    foreign = [item.item_id for item, prompt in prompted if _letters(item.question) not in _letters(prompt)]
    if prompted and len(foreign) * 2 > len(prompted):
        raise PredictionMismatch(
            f"{len(foreign)} of {len(prompted)} prompts do not hold the question of their id ({_listed(foreign)}): "
            "this looks like another benchmark's file, or another numbering",
            where=where,
            hint=hint,
        )


def _letters(text: str) -> str:
    return "".join(char for char in text.lower() if char.isalnum())
