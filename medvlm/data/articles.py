"""One article of the list: from its metadata to a result for each of its rows."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

from PIL import UnidentifiedImageError

from medvlm.data.figure_image import StoredImage, TooManyPixels, prepare_figure
from medvlm.data.jats import ArticleText, FigureText, JatsError, find_figure, parse_jats
from medvlm.data.lists import ArticleRows, refused
from medvlm.data.objects import Answer, ObjectStore
from medvlm.data.pmc import (
    ArticleVersion,
    MediaObject,
    choose_versions,
    find_media,
    metadata_key,
    parse_metadata,
    source_url,
)
from medvlm.data.verified import read_verified
from medvlm.data.versions import Versions
from medvlm.records import FetchOutcome, FetchStatus, Figure, FigureRef, Image

__all__ = ["NEWEST_VERSIONS", "ArticleFetcher", "FetchSettings", "RowResult"]

METADATA_LIMIT_BYTES = 8 * 2**20
XML_LIMIT_BYTES = 64 * 2**20
NEWEST_VERSIONS = 8
"""Metadata of at most this many versions is read to find the published one."""


@dataclass(frozen=True, slots=True)
class FetchSettings:
    """What is wanted of each figure."""

    policy: str = "research"
    max_side_px: int = 1024
    max_bytes: int = 64 * 2**20
    """A larger file is refused before it is read."""
    captions: bool = True
    """Off, the articles' XML is not read, and captions and mentions stay empty."""


@dataclass(frozen=True, slots=True)
class RowResult:
    """A row's outcome and the figures it yields."""

    outcome: FetchOutcome
    figures: tuple[Figure, ...] = ()


@dataclass(frozen=True, slots=True)
class _Refusal:
    """Why an article, or one of its figures, yields nothing."""

    status: FetchStatus
    detail: str
    attempts: int = 0
    article: ArticleVersion | None = None
    """The version that was looked at; its licence and number stand in the outcome."""


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A figure of an article that one row asks for."""

    version: ArticleVersion
    media: MediaObject
    note: str = ""
    text: FigureText | None = None


@dataclass
class ArticleFetcher:
    """Fetches the rows of one article after another; one instance serves all workers.

    Args:
        store: Where the article lies.
        settings: What is wanted.
        executor: Threads for decoding and parsing; both let go of the interpreter lock.
        emit: Called with each row's result as soon as it is there, exactly once a row.
    """

    store: ObjectStore
    settings: FetchSettings
    executor: Executor
    emit: Callable[[RowResult], None]

    async def fetch(self, rows: ArticleRows, versions: Versions) -> None:
        """Give a result for every row of an article, whatever happens."""
        try:
            articles = await self._metadata(rows.pmcid, versions)
        except Exception as error:  # noqa: BLE001  # the fetch worker writes the row
            articles = _Refusal("store_error", f"unexpected {type(error).__name__}: {error}")
        if isinstance(articles, _Refusal):
            self._refuse(rows.refs, articles, versions)
            return
        texts: dict[int, ArticleText | _Refusal] = {}
        first_of: dict[tuple[str, str], int] = {}
        jobs: list[asyncio.Task[None]] = []
        for ref in rows.refs:
            wanted = await self._guarded_wanted(ref, articles, texts)
            if isinstance(wanted, _Refusal):
                self._refuse([ref], wanted, versions, articles[0])
                continue
            twin = first_of.setdefault((ref.pair_id, wanted[0].media.key), ref.row)
            if twin != ref.row:
                # The same figure under the same id: stored once, so that ids stay unique.
                self._same(ref, wanted[0], twin, versions)
                continue
            jobs.append(asyncio.create_task(self._row(ref, wanted, texts, versions)))
        await asyncio.gather(*jobs)

    def _refuse(
        self, refs: Sequence[FigureRef], why: _Refusal, versions: Versions, article: ArticleVersion | None = None
    ) -> None:
        for ref in refs:
            facts: dict[str, Any] = {"attempts": why.attempts, "metadata_etags": versions.stamps}
            article = article or why.article
            if article is not None:
                facts |= {"version": article.version, "licence": article.licence}
            self.emit(RowResult(refused(ref, why.status, why.detail, **facts)))

    def _same(self, ref: FigureRef, wanted: _Wanted, twin: int, versions: Versions) -> None:
        outcome = refused(
            ref, "ok", f"the same figure as row {twin}, stored once",
            key=wanted.media.key, version=wanted.version.version, licence=wanted.version.licence,
            metadata_etags=versions.stamps,
        )  # fmt: skip
        self.emit(RowResult(outcome))

    async def _metadata(self, pmcid: str, versions: Versions) -> list[ArticleVersion] | _Refusal:
        """The versions to use, best first. Newest first is read, no further than needed."""
        if versions.failure is not None:
            return _unanswered(versions.failure.status, versions.failure.detail, versions.failure.attempts)
        read: list[ArticleVersion] = []
        refusal = _Refusal("article_absent", "the store holds no version of this article")
        for number, _ in versions.etags[::-1][:NEWEST_VERSIONS]:
            key = metadata_key(pmcid, number)
            answer = await self.store.get(key, limit_bytes=METADATA_LIMIT_BYTES)
            await self.store.budget.release(answer.reserved)
            if answer.status != "ok":
                return _unanswered(answer.status, f"{key}: {answer.detail}", answer.attempts, "metadata_invalid")
            parsed = parse_metadata(answer.body, pmcid, number)
            if isinstance(parsed, str):
                return _Refusal("metadata_invalid", parsed, answer.attempts)
            read.append(parsed)
            usable, status, detail = choose_versions(read, self.settings.policy)
            if status == "retracted" or any(v.media and not v.manuscript for v in usable):
                break
        usable, status, detail = choose_versions(read, self.settings.policy)
        if read and status is not None:
            return _Refusal(status, detail, 1, read[0])
        return usable or refusal

    async def _guarded_wanted(
        self, ref: FigureRef, articles: list[ArticleVersion], texts: dict[int, ArticleText | _Refusal]
    ) -> list[_Wanted] | _Refusal:
        try:
            return await self._wanted(ref, articles, texts)
        except Exception as error:  # noqa: BLE001  # the fetch worker writes the row
            return _Refusal("store_error", f"unexpected {type(error).__name__}: {error}")

    async def _wanted(
        self, ref: FigureRef, articles: list[ArticleVersion], texts: dict[int, ArticleText | _Refusal]
    ) -> list[_Wanted] | _Refusal:
        pmids = {article.pmid for article in articles} - {None}
        if ref.pmid is not None and pmids and ref.pmid not in pmids:
            return _Refusal("pmid_mismatch", f"the row says PMID {ref.pmid}, the metadata {sorted(map(str, pmids))[0]}")
        if not ref.file_name:
            return await self._wanted_by_text(ref, articles, texts)
        reasons: list[str] = []
        for article in articles:
            media, note = find_media(article, ref.file_name)
            if media is not None:
                text = await self._text(article, texts) if self.settings.captions else None
                if isinstance(text, _Refusal) and text.status in {"timeout", "store_error"}:
                    return text
                return [_wanted(article, media, note, text, ref)]
            reasons.append(note)
        foreign = any(ref.file_name in article.foreign_names for article in articles)
        return _Refusal("metadata_invalid" if foreign else "media_absent", reasons[0])

    async def _wanted_by_text(
        self, ref: FigureRef, articles: list[ArticleVersion], texts: dict[int, ArticleText | _Refusal]
    ) -> list[_Wanted] | _Refusal:
        """Figures that a row names by id, or every figure of the article."""
        article = articles[0]
        text = await self._text(article, texts)
        if isinstance(text, _Refusal):
            return text if text.status != "ok" else _Refusal("media_absent", text.detail)
        if ref.figure_id:
            figure = find_figure(text, figure_id=ref.figure_id)
            if figure is None:
                return _Refusal("media_absent", f"the article has no figure {ref.figure_id!r}")
            figures: Sequence[FigureText] = [figure]
        else:
            figures = text.figures
        wanted: list[_Wanted] = []
        missing: list[str] = []
        for figure in figures:
            for graphic in figure.graphics[: 1 if ref.figure_id else None]:
                media, note = find_media(article, graphic)
                if media is None:
                    missing.append(graphic)
                else:
                    wanted.append(_Wanted(article, media, _panel_note(ref) or note, figure))
        if not wanted:
            return _Refusal("media_absent", f"none of {missing[:5]} is a media file of {article.prefix}")
        return wanted

    async def _text(self, article: ArticleVersion, texts: dict[int, ArticleText | _Refusal]) -> ArticleText | _Refusal:
        """The parsed XML of a version, read once. A refusal of status ok means: go on without captions."""
        if article.version not in texts:
            texts[article.version] = await self._read_text(article)
        return texts[article.version]

    async def _read_text(self, article: ArticleVersion) -> ArticleText | _Refusal:
        if article.xml is None:
            return _Refusal("ok", "no caption: the metadata lists no XML")
        read = await read_verified(self.store, self.executor, article.xml, parse_jats, limit_bytes=XML_LIMIT_BYTES)
        if read.answer.status in {"timeout", "store_error"}:
            return _unanswered(read.answer.status, f"{article.xml.key}: {read.answer.detail}", read.answer.attempts)
        if read.answer.status != "ok":
            return _Refusal("ok", f"no caption: {article.xml.key}: {read.answer.detail}")
        if read.mismatch:
            return _Refusal("ok", "no caption: the XML's MD5 is not that of the metadata")
        if read.value is not None:
            return read.value
        known = isinstance(read.error, JatsError)
        return _Refusal("ok", f"no caption: {read.error if known else repr(read.error)}")

    async def _row(
        self, ref: FigureRef, wanted: list[_Wanted], texts: dict[int, ArticleText | _Refusal], versions: Versions
    ) -> None:
        started = time.monotonic()
        results = [await self._figure(ref, one, texts, several=len(wanted) > 1) for one in wanted]
        figures = tuple(figure for figure, _, _ in results if figure is not None)
        refusals = [why for _, why, _ in results if why is not None]
        answers = [answer for _, _, answer in results]
        outcome = refused(
            ref,
            "ok" if figures else refusals[0].status,
            _detail(wanted, refusals, texts),
            attempts=max(answer.attempts for answer in answers),
            bytes_read=sum(answer.bytes_read for answer in answers),
            seconds=round(time.monotonic() - started, 4),
            key=wanted[0].media.key,
            version=wanted[0].version.version,
            licence=wanted[0].version.licence,
            figures=len(figures),
            metadata_etags=versions.stamps,
        )
        self.emit(RowResult(outcome, figures))

    async def _figure(
        self, ref: FigureRef, wanted: _Wanted, texts: dict[int, ArticleText | _Refusal], *, several: bool
    ) -> tuple[Figure | None, _Refusal | None, Answer]:
        def prepare(body: bytes) -> StoredImage:
            return prepare_figure(body, max_side_px=self.settings.max_side_px)

        try:
            limit = self.settings.max_bytes
            read = await read_verified(self.store, self.executor, wanted.media, prepare, limit_bytes=limit)
        except Exception as error:  # noqa: BLE001  # the fetch worker writes the row
            return None, _Refusal("store_error", f"unexpected {type(error).__name__}: {error}"), Answer("store_error")
        answer, name = read.answer, wanted.media.name
        if answer.status == "absent":
            return None, _Refusal("media_absent", f"listed, but not in the store: {wanted.media.key}"), answer
        if answer.status != "ok":
            return None, _unanswered(answer.status, f"{wanted.media.key}: {answer.detail}", 0), answer
        if read.mismatch:
            detail = f"{name}: MD5 is {read.mismatch}, the metadata says {wanted.media.md5}"
            return None, _Refusal("md5_mismatch", detail), answer
        if isinstance(read.error, TooManyPixels):
            return None, _Refusal("too_large", f"{name}: {read.error}"), answer
        if read.value is None:
            return None, _Refusal("undecodable", f"{name}, {answer.bytes_read:,} bytes: {_reason(read.error)}"), answer
        text = texts.get(wanted.version.version)
        return _figure_of(ref, wanted, text, read.value, several=several), None, answer


def _figure_of(
    ref: FigureRef, wanted: _Wanted, text: ArticleText | _Refusal | None, stored: StoredImage, *, several: bool
) -> Figure:
    article, figure = wanted.version, wanted.text
    return Figure(
        figure_id=f"{ref.pair_id}_{wanted.media.name.rsplit('.', 1)[0]}" if several else ref.pair_id,
        pmcid=article.pmcid,
        version=article.version,
        pmid=article.pmid if article.pmid is not None else ref.pmid,
        key=wanted.media.key,
        source_url=source_url(wanted.media.key),
        licence=article.licence or "",
        citation=article.citation,
        article_title=(text.title if isinstance(text, ArticleText) else "") or article.title,
        retracted=article.retracted,
        image=Image(bytes=stored.bytes, path=wanted.media.name),
        width_px=stored.width_px,
        height_px=stored.height_px,
        sha256=stored.sha256,
        phash=stored.phash,
        label=figure.label if figure else "",
        caption=figure.caption if figure else "",
        mentions=figure.mentions if figure else (),
    )


def _reason(error: Exception | None) -> str:
    """Pillow's own sentence on unknown formats holds a memory address, so it gets another."""
    if isinstance(error, UnidentifiedImageError):
        return "no image format is recognised"
    return f"{type(error).__name__}: {error}"


def _wanted(
    article: ArticleVersion, media: MediaObject, note: str, text: ArticleText | _Refusal | None, ref: FigureRef
) -> _Wanted:
    if not isinstance(text, ArticleText):
        return _Wanted(article, media, note)
    figure = find_figure(text, file_name=media.name) or find_figure(text, file_name=ref.file_name)
    return _Wanted(article, media, note, figure or find_figure(text, figure_id=ref.figure_id))


def _panel_note(ref: FigureRef) -> str:
    return f"panel {ref.panel} of {ref.figure_id}: the whole figure was taken" if ref.panel else ""


def _detail(wanted: list[_Wanted], refusals: list[_Refusal], texts: dict[int, ArticleText | _Refusal]) -> str:
    """What a reader of the outcome should know: how the file was found, what is missing."""
    notes = [wanted[0].note] if wanted[0].note and len(wanted) == 1 else []
    if len(wanted) > 1:
        notes.append(f"{len(wanted) - len(refusals)} of {len(wanted)} figures")
    notes += [f"{why.status}: {why.detail}" if len(wanted) > 1 else why.detail for why in refusals[:3]]
    text = texts.get(wanted[0].version.version)
    if isinstance(text, _Refusal):
        notes.append(text.detail)
    elif isinstance(text, ArticleText) and wanted[0].text is None:
        notes.append("no caption: the XML has no such figure")
    return "; ".join(notes)


def _unanswered(status: str, detail: str, attempts: int, absent: FetchStatus = "article_absent") -> _Refusal:
    kinds: dict[str, FetchStatus] = {"absent": absent, "too_large": "too_large", "timeout": "timeout"}
    return _Refusal(kinds.get(status, "store_error"), detail, attempts)
