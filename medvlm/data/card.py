"""The card beside a dataset: ``README.md`` for people and ``croissant.json`` (MLCommons Croissant 1.0) for tools."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from medvlm import RESEARCH_USE_ONLY
from medvlm.errors import WorkspaceError
from medvlm.store import Report, Workspace, atomic_path, read_report, shard_paths, write_json

__all__ = ["croissant", "renew_cards", "write_card"]

TITLES = {
    "alignment": "Alignment samples: figures and their captions",
    "instruct": "Instruction samples: conversations about figures",
    "preference": "Preference pairs: two answers to a question about a figure",
}

PMC = "https://registry.opendata.aws/ncbi-pmc"

_TYPES = {pa.string(): "sc:Text", pa.int64(): "sc:Integer", pa.float64(): "sc:Float", pa.bool_(): "sc:Boolean"}
_CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "sc": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "dct": "http://purl.org/dc/terms/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileProperty": "cr:fileProperty",
    "fileObject": "cr:fileObject",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}


def write_card(workspace: Workspace, name: str) -> Path:
    """Write ``README.md`` and ``croissant.json`` beside a dataset or benchmark, from its report and its shards.

    The card shows the leakage that is known; a leakage report renews it (``renew_cards``).

    Args:
        workspace: Holds the dataset.
        name: ``alignment``, ``instruct``, ``preference/<recipe>`` or a benchmark.

    Returns:
        The path of ``README.md``.

    Raises:
        WorkspaceError: The dataset has not been built.
    """
    folder, shards = _folders(workspace, name)
    report = read_report(folder)
    if report is None or not shards.is_dir():
        raise WorkspaceError(
            f"the dataset {name!r} has not been built", where=str(folder), hint="run 'medvlm dataset build' first"
        )
    write_json(folder / "croissant.json", croissant(name, shards, report))
    return _write_readme(workspace, name, report)


def renew_cards(workspace: Workspace, names: Iterable[str]) -> None:
    """Write the ``README.md`` of those datasets again that have one, with the leakage that is known by now.

    What does not depend on it stays: no shard is read.
    """
    for name in names:
        folder, _ = _folders(workspace, name)
        report = read_report(folder)
        if report is not None and (folder / "README.md").is_file():
            _write_readme(workspace, name, report)


def _folders(workspace: Workspace, name: str) -> tuple[Path, Path]:
    """Step folder and shards of a dataset or benchmark."""
    if workspace.items(name).is_dir():
        return workspace.benchmark(name), workspace.items(name)
    return workspace.dataset(name), workspace.samples(name)


def _write_readme(workspace: Workspace, name: str, report: Report) -> Path:
    folder, shards = _folders(workspace, name)
    path = folder / "README.md"
    with atomic_path(path) as temporary:
        temporary.write_text(_readme(workspace, name, shards, report), "utf-8")
    return path


def _readme(workspace: Workspace, name: str, shards: Path, report: Report) -> str:
    details = report.details
    parts = [f"# {_title(name)}", RESEARCH_USE_ONLY]
    if details.get("synthetic"):
        parts.append("**Synthetic.** Drawn by code from the sample corpus; it shows no patient and proves nothing.")
    parts += ["## Counts", _table(("what", "rows"), report.counts.items())]
    for field, counts in sorted(details.get("by", {}).items()):
        if field not in ("licence", "split_answer_type"):
            parts.append(_table((field.replace("_", " "), "rows"), counts.items()))
    parts.append("## Licences")
    if "licence" in details:
        parts.append(f"The release is {details['licence']} ({details['source']}).")
    if details.get("by", {}).get("licence"):
        parts.append("Each row carries the licence of its figure; whoever passes rows on must keep to it.")
        parts.append(_table(("licence", "rows"), details["by"]["licence"].items()))
    parts += [
        "## Left out",
        _dropped(details.get("dropped", {})),
        "## Leakage",
        _kept(report),
        _leakage(workspace, name),
    ]
    parts += ["## Provenance", _provenance(report), "## Opening it", _opening(shards)]
    return "\n\n".join(parts) + "\n"


def _title(name: str) -> str:
    """A title for people; ``preference/<recipe>`` names its recipe."""
    kind, _, recipe = name.partition("/")
    return f"{TITLES[kind]}{f' ({recipe})' if recipe else ''}" if kind in TITLES else f"Benchmark {name}"


def _table(head: tuple[str, ...], rows: Any) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(_cell(value) for value in row) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    """A value as table text: foreign texts cannot open a new column, a tag or a link."""
    text = f"{value:,}" if isinstance(value, int) else " ".join(str(value).split())
    for character, entity in (("&", "&amp;"), ("<", "&lt;"), ("|", "&#124;"), ("[", "&#91;"), ("`", "&#96;")):
        text = text.replace(character, entity)
    return text


def _dropped(dropped: Mapping[str, Any]) -> str:
    if not dropped:
        return "Nothing."
    rows = [(reason, lost["count"], "; ".join(lost["first"][:3])[:300]) for reason, lost in sorted(dropped.items())]
    return _table(("reason", "rows", "such as"), rows)


def _kept(report: Report) -> str:
    """What became of images that a benchmark tests with."""
    if report.step.startswith("build-benchmark"):
        return (
            "The official splits are kept as published. A training stage leaves out images that a benchmark tests "
            "with where its recipe says `keep_leaked: false`; every score has the clean questions beside all of them."
        )
    if report.details.get("keep_leaked"):
        return "Images that a benchmark of this workspace tests with were kept on request: scores say so."
    dropped = report.details.get("dropped", {})
    same, near = (dropped.get(reason, {}).get("count", 0) for reason in ("leaked", "leaked_near"))
    return (
        f"Rows left out because a benchmark of this workspace tests with their image: {same:,} with the very image, "
        f"{near:,} with one that looks like it."
    )


def _leakage(workspace: Workspace, name: str) -> str:
    report = read_report(workspace.leakage)
    touching = [
        row
        for row in (report.details.get("comparisons", []) if report else [])
        if name in (row["train"].split(":")[0], row["test"].split(":")[0])
    ]
    if not touching:
        return "Not looked for yet: run `medvlm leakage`."
    columns = ("train", "test", "test_images", "leaked_images", "near_images", "clean_items")
    head = ("trained on", "tested on", "test images", "the very image", "near images", "clean questions")
    return _table(head, ([row[column] for column in columns] for row in touching))


def _provenance(report: Report) -> str:
    files = report.details.get("files", [])
    lines = [f"- step: `{report.step}`", f"- fingerprint of content and code: `{report.fingerprint}`"]
    lines += [f"- seed: {report.seed}"] if report.seed is not None else []
    lines += [f"- {key}: `{report.details[key]}`" for key in ("model", "prompt_sha256") if key in report.details]
    lines += [f"- {package} {version}" for package, version in sorted(report.versions.items())]
    text = "\n".join(lines)
    if files:
        text += "\n\nPublished files it was read from, and whether they are the published content where that is known:"
        rows = [(file["file"], f"{file['sha256'][:16]}…", file["official"]) for file in files]
        text += "\n\n" + _table(("file", "SHA-256", "content"), rows)
    if report.step.startswith("build "):
        text += (
            f"\n\nFigures and captions: NIH NLM NCBI PubMed Central Article Datasets, {PMC};"
            " source address and citation of each figure are in the figures' shards. NLM does not endorse this."
        )
    return text


def _opening(shards: Path) -> str:
    files = f"{shards.name}/*.parquet"
    return (
        f'```python\ndatasets.load_dataset("parquet", data_files="{files}")\n'
        f'duckdb.read_parquet("{files}").limit(5)\n```'
    )


def croissant(name: str, shards: Path, report: Report) -> dict[str, Any]:
    """Croissant 1.0 metadata of a folder of shards, as JSON-LD.

    Args:
        name: Of the dataset.
        shards: The Parquet files; their addresses are relative to the folder above.
        report: Of the step that wrote them.
    """
    files = shard_paths(shards)
    licences = report.details.get("licence") or sorted(report.details.get("by", {}).get("licence", {}))
    kind = "records"
    return {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "name": name.replace("/", "-"),
        "description": f"{_title(name)}. {RESEARCH_USE_ONLY}",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "license": licences or "unknown",
        "url": PMC,
        "citeAs": report.details.get("source", f"NIH NLM NCBI PubMed Central Article Datasets, {PMC}"),
        "datePublished": report.created_at,
        "version": f"1.0.0+{report.fingerprint}",
        "distribution": [_file_object(path, shards) for path in files]
        + [
            {
                "@type": "cr:FileSet",
                "@id": "shards",
                "name": "shards",
                "encodingFormat": "application/x-parquet",
                "includes": f"{shards.name}/*.parquet",
            }
        ],
        "recordSet": [
            {
                "@type": "cr:RecordSet",
                "@id": kind,
                "name": kind,
                "field": [_field(kind, column) for column in pq.read_schema(files[0])],
            }
        ],
    }


def _file_object(path: Path, shards: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    return {
        "@type": "cr:FileObject",
        "@id": path.name,
        "name": path.name,
        "contentUrl": f"{shards.name}/{path.name}",
        "contentSize": f"{path.stat().st_size} B",
        "encodingFormat": "application/x-parquet",
        "sha256": sha256,
    }


def _field(record_set: str, column: pa.Field) -> dict[str, Any]:
    source: dict[str, Any] = {"fileSet": {"@id": "shards"}, "extract": {"column": column.name}}
    field: dict[str, Any] = {"@type": "cr:Field", "@id": f"{record_set}/{column.name}", "name": column.name}
    if column.name == "image":
        source["transform"] = {"jsonPath": "bytes"}
        return field | {"dataType": "sc:ImageObject", "source": source}
    if not pa.types.is_list(column.type):
        return field | {"dataType": _TYPES[column.type], "source": source}
    inner = column.type.value_type
    if not pa.types.is_struct(inner):
        return field | {"dataType": _TYPES[inner], "repeated": True, "source": source}
    parts = [
        {
            "@type": "cr:Field",
            "@id": f"{record_set}/{column.name}/{part.name}",
            "name": part.name,
            "dataType": _TYPES[part.type],
            "repeated": True,
            "source": source | {"transform": {"jsonPath": part.name}},
        }
        for part in inner
    ]
    return field | {"repeated": True, "subField": parts}
