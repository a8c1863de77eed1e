"""Input lists: which figures are wanted, one row a line, in every shape that people have.

{"pmc_tar_url": …, "image_file_path": "PMC1/a.jpg", "pair_id": "123_F1"}   LLaVA-Med's published list
{"pmcid": "PMC1", "figure_id": "F2", "pmid": 123}                          figure id optional
{"image": "PMC1_Fig6_46.jpg", …}                                           ChiMed-VL's panel names
PMC1                                                                       every figure of the article
PMC1 F2                                                                    one figure, by its id or label
PMC1_Fig6_46.jpg                                                           a panel: the whole figure is fetched
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from medvlm.errors import InputError
from medvlm.records import FetchOutcome, FetchStatus, FigureRef

__all__ = ["ArticleRows", "ListIndex", "index_list", "parse_row", "read_refs", "refuse_bad_rows", "refused"]

PMCID = re.compile(r"PMC([1-9]\d{0,11})\Z")
PANEL = re.compile(r"(PMC[1-9]\d{0,11})_(Fig\w*?)(?:_(\d+))?(?:\.\w{2,5})?\Z", re.IGNORECASE)
TAR_NAME = re.compile(r"(PMC\d+)\.tar\.gz\Z")
LINE_LIMIT_BYTES = 2**20
PMID_LIMIT = 10**12

BAD_ARTICLE = -1


def refused(ref: FigureRef, status: FetchStatus, detail: str, **facts: Any) -> FetchOutcome:
    """The outcome of a row that yields no figure; ``facts`` are further fields of the outcome."""
    values: dict[str, Any] = {"attempts": 0, "bytes_read": 0, "seconds": 0.0, "key": "", "version": None}
    values |= {"licence": None} | facts
    return FetchOutcome(row=ref.row, pair_id=ref.pair_id, pmcid=ref.pmcid, status=status, detail=detail[:500], **values)


def parse_row(row: int, line: bytes) -> FigureRef | FetchOutcome:
    """One line of a list as a figure reference, or as the outcome that says why it is none.

    Args:
        row: 0-based line number.
        line: The line as read, not blank.
    """
    nothing = FigureRef(row=row, pair_id="", pmcid="", file_name="", figure_id="", pmid=None)
    if len(line) > LINE_LIMIT_BYTES:
        return refused(nothing, "bad_row", f"the line has {len(line):,} bytes")
    try:
        text = line.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        return refused(nothing, "bad_row", f"the line is not UTF-8: byte {error.start}")
    if not text.startswith("{"):
        return _from_words(nothing, text)
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        return refused(nothing, "bad_row", f"the line is not JSON: {error}")
    return _from_object(nothing, cast("dict[str, Any]", value))


def _from_words(nothing: FigureRef, text: str) -> FigureRef | FetchOutcome:
    words = [word for word in re.split(r"[\s,;]+", text) if word]
    if words and PMCID.match(words[0]):
        figure_id = " ".join(words[1:])
        return _ref(nothing, "_".join([words[0], *words[1:]]) if figure_id else words[0], words[0], figure_id=figure_id)
    panel = PANEL.match(text)
    if panel:
        return _ref(nothing, _stem(text), panel[1].upper(), figure_id=panel[2], panel=panel[3])
    return refused(nothing, "bad_row", f"{text[:80]!r} is neither JSON nor a PMCID such as PMC7236913")


def _from_object(nothing: FigureRef, value: dict[str, Any]) -> FigureRef | FetchOutcome:
    if "image_file_path" in value or "pmc_tar_url" in value:
        return _from_llava_med(nothing, value)
    if "pmcid" in value:
        pmcid, figure_id, pmid = value["pmcid"], value.get("figure_id") or "", value.get("pmid")
        if not isinstance(pmcid, str) or not PMCID.match(pmcid):
            return refused(nothing, "bad_row", f"pmcid is {pmcid!r}, not such as PMC7236913")
        if not isinstance(figure_id, str) or not (pmid is None or (isinstance(pmid, int) and 0 < pmid < PMID_LIMIT)):
            return refused(nothing, "bad_row", f"figure_id is {str(figure_id)[:80]!r} and pmid is {str(pmid)[:80]!r}")
        pair_id = str(value.get("pair_id") or (f"{pmcid}_{figure_id}" if figure_id else pmcid))
        return _ref(nothing, pair_id, pmcid, figure_id=figure_id, pmid=pmid)
    image = value.get("image")
    panel = PANEL.match(image.rsplit("/", 1)[-1]) if isinstance(image, str) else None
    if panel:
        return _ref(nothing, _stem(panel[0]), panel[1].upper(), figure_id=panel[2], panel=panel[3])
    return refused(nothing, "bad_row", f"the row has none of image_file_path, pmcid, image; it has {sorted(value)[:8]}")


def _from_llava_med(nothing: FigureRef, value: dict[str, Any]) -> FigureRef | FetchOutcome:
    path, tar_url, pair_id = value.get("image_file_path"), value.get("pmc_tar_url", ""), value.get("pair_id", "")
    if not isinstance(path, str) or not isinstance(tar_url, str) or not isinstance(pair_id, str):
        return refused(nothing, "bad_row", "image_file_path, pmc_tar_url and pair_id must be strings")
    folder, _, name = path.rpartition("/")
    if not _is_plain_name(name):
        return refused(nothing, "bad_row", f"image_file_path {path!r} ends in no file name")
    from_path = next((part for part in folder.split("/") if PMCID.match(part)), "")
    tar = TAR_NAME.search(tar_url)
    from_tar = tar[1] if tar and PMCID.match(tar[1]) else ""
    ref = _ref(nothing, pair_id or f"{from_path or from_tar}_{_stem(name)}", from_path or from_tar, file_name=name)
    if not ref.pmcid:
        return refused(ref, "unresolvable", f"no PMCID in {path!r} or {tar_url!r}")
    if from_path and from_tar and from_path != from_tar:
        return refused(ref, "unresolvable", f"the row names two articles: {from_path} and {from_tar}")
    return ref


def _ref(
    nothing: FigureRef,
    pair_id: str,
    pmcid: str,
    *,
    file_name: str = "",
    figure_id: str = "",
    pmid: int | None = None,
    panel: str | None = None,
) -> FigureRef:
    prefix, _, suffix = pair_id.partition("_")
    if pmid is None and prefix.isascii() and prefix.isdigit() and len(prefix) < len(str(PMID_LIMIT)):
        pmid = int(prefix)
        figure_id = figure_id or suffix
    return FigureRef(
        row=nothing.row,
        pair_id=pair_id,
        pmcid=pmcid,
        file_name=file_name,
        figure_id=figure_id,
        pmid=pmid,
        panel=panel or "",
    )


def _stem(name: str) -> str:
    return name.rsplit(".", 1)[0] if "." in name else name


def _is_plain_name(name: str) -> bool:
    return bool(name) and name not in {".", ".."} and "\\" not in name and name.isprintable()


def read_refs(path: Path) -> Iterator[FigureRef | FetchOutcome]:
    """Every row of a list, streamed: a reference, or the outcome of a row that is none.

    Raises:
        InputError: The file is missing, empty, or one JSON array.
    """
    for row, _, line in _lines(path):
        yield parse_row(row, line)


def _lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Row number, byte offset and text of every line that is not blank."""
    try:
        stream = path.open("rb")
    except OSError as error:
        raise InputError(
            f"the list cannot be opened: {error.strerror}", where=str(path), hint="check --urls"
        ) from error
    offset, found = 0, False
    with stream:
        for row, line in enumerate(stream):
            blank = not line.strip() or line == b"\xef\xbb\xbf\n"
            if not found and not blank and line.lstrip(b"\xef\xbb\xbf \t").startswith(b"["):
                raise InputError(
                    "the list is one JSON array",
                    where=str(path),
                    hint="write one object a line: jq -c '.[]' list.json > list.jsonl",
                )
            if not blank:
                found = True
                yield row, offset, line
            offset += len(line)
    if not found:
        raise InputError("the list is empty", where=str(path), hint="give a file with one row a line")


@dataclass(frozen=True)
class ArticleRows:
    """The rows of one article, in the order of the list."""

    pmcid: str
    refs: tuple[FigureRef, ...]


@dataclass(frozen=True)
class ListIndex:
    """Where the rows of each article stand in a list; about 32 bytes a row, no text.

    Articles are in the order of their object keys, so that one page of a bucket's listing
    answers for many of them.
    """

    path: Path
    rows: npt.NDArray[np.int64]
    """Line numbers of the rows, ascending. Position in this array is the row's ordinal."""
    offsets: npt.NDArray[np.int64]
    order: npt.NDArray[np.int64]
    """Ordinals, grouped by article."""
    starts: npt.NDArray[np.int64]
    """Where each article begins in ``order``, and the end."""
    bad: npt.NDArray[np.int64]
    """Ordinals of the rows that name no article."""

    def articles(self) -> Iterator[ArticleRows]:
        """Articles with their rows, parsed anew from the file."""
        with self.path.open("rb") as stream:
            for begin, end in zip(self.starts[:-1], self.starts[1:], strict=True):
                refs: list[FigureRef] = []
                for ordinal in np.sort(self.order[begin:end]):
                    ref = self._row(stream, int(ordinal))
                    if isinstance(ref, FigureRef):
                        refs.append(ref)
                yield ArticleRows(refs[0].pmcid, tuple(refs))

    def bad_rows(self) -> Iterator[FetchOutcome]:
        """Outcomes of the rows that name no article."""
        with self.path.open("rb") as stream:
            for ordinal in self.bad:
                outcome = self._row(stream, int(ordinal))
                if isinstance(outcome, FetchOutcome):
                    yield outcome

    def _row(self, stream: Any, ordinal: int) -> FigureRef | FetchOutcome:
        stream.seek(int(self.offsets[ordinal]))
        return parse_row(int(self.rows[ordinal]), stream.readline())


def index_list(path: Path, *, block_rows: int, part: tuple[int, int] = (1, 1)) -> ListIndex:
    """Read a list once and note where each article's rows are.

    Args:
        path: The list.
        block_rows: Rows of a block; a part is a run of whole blocks.
        part: ``(i, n)``: only the i-th of n parts of the list, counted from 1.

    Raises:
        InputError: The file is missing, empty, or one JSON array.
    """
    rows, offsets, articles = array("q"), array("q"), array("q")
    for row, offset, line in _lines(path):
        ref = parse_row(row, line)
        rows.append(row)
        offsets.append(offset)
        articles.append(int(ref.pmcid[3:]) if isinstance(ref, FigureRef) else BAD_ARTICLE)
    blocks = -(-len(rows) // block_rows)
    begin, end = (blocks * step // part[1] * block_rows for step in (part[0] - 1, part[0]))
    ids = np.frombuffer(articles, np.int64) if articles else np.empty(0, np.int64)
    chosen = np.arange(len(ids))[begin:end]
    good = chosen[ids[chosen] != BAD_ARTICLE]
    # "PMC12." comes before "PMC123." in a bucket: keys are compared as text, with their dot.
    names = np.char.add(ids[good].astype("S"), b".") if len(good) else np.empty(0, "S1")
    order = good[np.argsort(names, kind="stable")]
    sorted_ids = ids[order]
    starts = np.flatnonzero(np.r_[True, sorted_ids[1:] != sorted_ids[:-1]]) if len(order) else np.empty(0, np.int64)
    return ListIndex(
        path=path,
        rows=np.frombuffer(rows, np.int64),
        offsets=np.frombuffer(offsets, np.int64),
        order=order.astype(np.int64),
        starts=np.r_[starts, len(order)].astype(np.int64),
        bad=chosen[ids[chosen] == BAD_ARTICLE].astype(np.int64),
    )


def refuse_bad_rows(outcomes: Path, urls: Path) -> None:
    """Make rows that nobody can read an error, once all others have been fetched.

    Args:
        outcomes: Shards of ``FetchOutcome`` records of the list.
        urls: The list, for the message.

    Raises:
        InputError: There are such rows; it names the first three lines.
    """
    found = pq.read_table(outcomes, columns=["row", "detail"], filters=[("status", "=", "bad_row")])
    if not found.num_rows:
        return
    first = [f"line {row['row'] + 1}: {row['detail']}" for row in found.slice(0, 3).to_pylist()]
    more = f", and {found.num_rows - 3:,} more" if found.num_rows > 3 else ""
    raise InputError(
        f"{found.num_rows:,} rows of the list cannot be read: {'; '.join(first)}{more}",
        where=str(urls),
        hint="mend the lines and run the same command again (what was fetched is kept), "
        "or accept the loss with --tolerate-bad-rows",
    )
