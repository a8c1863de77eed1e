"""The records that flow through the pipeline: frozen, typed, one Parquet schema each.

The way of one record (see README):
``FigureRef`` → ``FetchOutcome`` + ``Figure`` → ``Sample`` → batch → ``Prediction`` for each
``VQAItem`` → ``Score``. ``QuarantinedRow`` is where a row goes that breaks a contract.
"""

from __future__ import annotations

import builtins
import dataclasses
import functools
import types
import typing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "AnswerType",
    "FetchOutcome",
    "FetchStatus",
    "Figure",
    "FigureRef",
    "Image",
    "Prediction",
    "PreferencePair",
    "QuarantinedRow",
    "Sample",
    "Score",
    "Split",
    "Turn",
    "VQAItem",
    "WrongAnswer",
    "from_row",
    "schema_of",
    "to_row",
]

AnswerType = Literal["open", "closed"]
Split = Literal["train", "validation", "test"]
FetchStatus = Literal[
    "ok",
    "bad_row",
    "unresolvable",
    "article_absent",
    "media_absent",
    "metadata_invalid",
    "pmid_mismatch",
    "licence_refused",
    "retracted",
    "md5_mismatch",
    "undecodable",
    "too_large",
    "timeout",
    "store_error",
]


@dataclass(frozen=True, slots=True)
class Image:
    """An encoded image, in the layout that ``datasets``, DuckDB and Polars read as an image."""

    bytes: builtins.bytes
    path: str
    """File name as published, for people; nothing is ever opened by it."""


@dataclass(frozen=True, slots=True)
class FigureRef:
    """One row of an input list: which figure is wanted."""

    row: int
    """0-based line number in the list; the key of the outcome."""
    pair_id: str
    pmcid: str
    """Such as ``PMC7236913``, without a version."""
    file_name: str
    """Media file name as published; empty where only a figure id, or every figure, is asked for."""
    figure_id: str
    """JATS figure id or label, where the row names one; else empty."""
    pmid: int | None
    panel: str = ""
    """Panel number of a ChiMed-VL name; the whole figure is fetched."""


@dataclass(frozen=True, slots=True)
class FetchOutcome:
    """What became of one input row. One row in, one outcome out, always."""

    row: int
    pair_id: str
    pmcid: str
    status: FetchStatus
    detail: str
    attempts: int
    bytes_read: int
    seconds: float
    key: str
    """Object key in the store; empty if none was resolved."""
    version: int | None
    licence: str | None
    figures: int = 0
    """Figures that this row added to the shards: 0 or 1, more where a row asks for a whole article."""
    metadata_etags: tuple[str, ...] = ()
    """``<version>:<ETag>`` of the article's metadata objects when this was decided; a rerun and
    ``medvlm recheck`` trust the outcome as long as these hold."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A fetched figure with its caption, its mentions in the text and its provenance."""

    figure_id: str
    """``pair_id`` of the list: ``<PMID>_<figure>``."""
    pmcid: str
    version: int
    pmid: int | None
    key: str
    source_url: str
    licence: str
    citation: str
    article_title: str
    retracted: bool
    image: Image
    width_px: int
    height_px: int
    sha256: str
    """Of the image bytes stored here."""
    phash: str
    """64-bit perceptual hash, 16 hex digits."""
    label: str
    caption: str
    mentions: tuple[str, ...]
    """Paragraphs of the article that refer to this figure, in reading order."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a conversation. The first user turn holds ``<image>`` exactly once."""

    role: Literal["user", "assistant"]
    text: str


@dataclass(frozen=True, slots=True)
class Sample:
    """A training sample: one image and a conversation about it."""

    sample_id: str
    dataset: str
    """``alignment``, ``instruct``, or the benchmark whose train split it is."""
    image: Image
    image_sha256: str
    image_phash: str
    group_id: str
    """Article or image id; splits never cut through a group."""
    turns: tuple[Turn, ...]
    modality: str
    """``chest_xray``, ``ct``, ``mri``, ``histology``, ``gross`` or ``unknown``."""
    language: Literal["en", "zh"]
    licence: str
    source: str
    """Who wrote the text: ``caption``, ``official``, ``generated-offline``, ``generated:<model>``, ``review``."""


@dataclass(frozen=True, slots=True)
class VQAItem:
    """One benchmark question."""

    item_id: str
    """Unique within the benchmark; the ``qid`` of the release where it has one."""
    benchmark: str
    split: Split
    image: Image
    image_id: str
    image_sha256: str
    image_phash: str
    question: str
    answer: str
    answer_type: AnswerType
    answer_type_derived: bool
    """True where the release has no answer type and ours follows from the answer."""
    question_type: str
    modality: str
    organ: str
    language: Literal["en", "zh"]
    case_id: str = ""
    """Patient or article that the image is of, as the release names it; empty where it does not say."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """A model's answer to one item."""

    item_id: str
    benchmark: str
    model: str
    """Recipe name, or the name of a foreign model."""
    stage: str
    blind: bool
    """True where the image was replaced by the mean image."""
    prompt: str
    text: str
    options: tuple[str, ...] = ()
    """The closed set that the answer is from, such as yes and no; empty where there is none, or was not asked for."""
    option_logprobs: tuple[float, ...] = ()
    """How likely each option is as the whole answer: a natural logarithm, to two decimals."""


@dataclass(frozen=True, slots=True)
class Score:
    """One number under one named rule, on one slice of one benchmark."""

    benchmark: str
    model: str
    stage: str
    blind: bool
    slice: str
    """``all``, or ``<field>=<value>`` such as ``modality=CT`` or ``leaked=false``."""
    answer_type: AnswerType
    rule: str
    value: float
    """Per cent, 0 to 100."""
    low: float | None
    """Lower end of the 95 % interval; None where none was computed."""
    high: float | None
    n: int
    """Items in the denominator."""


@dataclass(frozen=True, slots=True)
class WrongAnswer:
    """An answer that is wrong, or not fully right, under the headline rule, with what to look at."""

    item_id: str
    benchmark: str
    model: str
    stage: str
    answer_type: AnswerType
    question: str
    answer: str
    prediction: str
    blind_prediction: str | None
    """What the same model says without the image; None where it was not asked."""
    rule: str
    """The headline rule of the answer type."""
    score: float
    """Under that rule, 0 to 1; below 1."""
    question_type: str
    modality: str
    organ: str
    language: Literal["en", "zh"]
    image_id: str
    image: Image


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """Two answers to one question, the better one chosen."""

    pair_id: str
    image: Image
    image_sha256: str
    image_phash: str
    group_id: str
    question: str
    chosen: str
    rejected: str
    source: str
    """``judge:<name>``, ``chat`` or ``official``."""


@dataclass(frozen=True, slots=True)
class QuarantinedRow:
    """A row that broke a row-level rule of a contract."""

    contract: str
    rule: str
    row_id: str
    value: str
    """The offending value, shortened to 500 characters."""


T = TypeVar("T")


@functools.cache
def schema_of(kind: type) -> pa.Schema:
    """Parquet schema of a record type; a field is nullable only if its type admits None.

    Raises:
        TypeError: A field has a type that records do not use.
    """
    import pyarrow as pa  # a quarter of a second that whoever only names records shall not pay

    hints = typing.get_type_hints(kind)
    return pa.schema([_field(f.name, hints[f.name]) for f in dataclasses.fields(kind)])


def _field(name: str, hint: Any) -> pa.Field:
    import pyarrow as pa

    nullable = False
    if isinstance(hint, types.UnionType):
        (hint,) = (arg for arg in typing.get_args(hint) if arg is not type(None))
        nullable = True
    return pa.field(name, _arrow_type(hint), nullable=nullable)


def _arrow_type(hint: Any) -> pa.DataType:
    import pyarrow as pa

    plain = {str: pa.string, int: pa.int64, float: pa.float64, bool: pa.bool_, bytes: pa.binary}
    origin = typing.get_origin(hint)
    if origin is Literal:
        return pa.string()
    if origin is tuple:
        return pa.list_(_field("item", typing.get_args(hint)[0]))
    if dataclasses.is_dataclass(hint):
        return pa.struct(list(schema_of(typing.cast(type, hint))))
    if hint in plain:
        return plain[hint]()
    raise TypeError(f"records do not use the type {hint!r}")


def to_row(record: Any) -> dict[str, Any]:
    """A record as plain Python values for Arrow; the inverse of ``from_row``."""
    return {f.name: _plain(getattr(record, f.name)) for f in dataclasses.fields(record)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_row(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in typing.cast("tuple[Any, ...]", value)]
    return value


def from_row(kind: type[T], row: dict[str, Any]) -> T:
    """A record from a row of a Parquet file written with its schema.

    Raises:
        TypeError: The row lacks a field or has one too many.
    """
    return kind(**{name: _typed(_hints(kind).get(name), value) for name, value in row.items()})


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _typed(hint: Any, value: Any) -> Any:
    if value is None or hint is None:
        return value
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        return tuple(_typed(item, v) for v in value)
    if dataclasses.is_dataclass(hint):
        return from_row(typing.cast(type, hint), value)
    return value
