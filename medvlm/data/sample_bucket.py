"""The sample corpus' articles, in the layout that the PMC Cloud Service has in 2026, trouble included.

Layout: one flat prefix an article version with ``.xml``, ``.txt``, ``.json`` and media, and the same
JSON under ``metadata/`` (source: README.txt of the bucket ``pmc-oa-opendata``).
"""

from __future__ import annotations

import hashlib
import io
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from medvlm.data.phantoms import Finding, Sketchbook, encode_jpeg, encode_png
from medvlm.data.sample_questions import caption, word
from medvlm.records import FetchStatus

__all__ = ["TROUBLES", "SampleArticle", "SampleFigure", "make_articles", "url_rows", "write_bucket"]

TROUBLES: dict[str, FetchStatus] = {
    "article absent": "article_absent",
    "retracted": "retracted",
    "CC BY-NC-ND": "licence_refused",
    "TDM": "licence_refused",
    "null licence": "licence_refused",
    "metadata truncated": "metadata_invalid",
    "pmid of another article": "pmid_mismatch",
    "first image: wrong MD5": "md5_mismatch",
    "first image: zero bytes": "undecodable",
    "first image: truncated": "undecodable",
    "first image: absent": "media_absent",
    "first image: name differs in case": "ok",
    "version 2 is a manuscript without media": "ok",
    "only version 2": "ok",
}
"""One article each: what is wrong with it, and what a fetch under the ``research`` policy makes of it."""

_LICENCES = ("CC BY", "CC BY", "CC BY", "CC0", "CC BY-NC", "CC BY-NC-SA", "CC BY-SA")
_LICENCE_URLS = {
    "CC BY": ("ccbylicense", "https://creativecommons.org/licenses/by/4.0/"),
    "CC BY-SA": ("ccbysalicense", "https://creativecommons.org/licenses/by-sa/4.0/"),
    "CC BY-NC": ("ccbynclicense", "https://creativecommons.org/licenses/by-nc/4.0/"),
    "CC BY-NC-SA": ("ccbyncsalicense", "https://creativecommons.org/licenses/by-nc-sa/4.0/"),
    "CC BY-NC-ND": ("ccbyncndlicense", "https://creativecommons.org/licenses/by-nc-nd/4.0/"),
    "CC0": ("cc0license", "https://creativecommons.org/publicdomain/zero/1.0/"),
}


@dataclass(frozen=True, slots=True)
class SampleFigure:
    """One drawn figure of one invented article."""

    pair_id: str
    label: str
    xml_id: str
    file_name: str
    finding: Finding
    caption: str
    image: bytes
    expected: FetchStatus
    """What the fetch has to make of its row."""


@dataclass(frozen=True, slots=True)
class SampleArticle:
    """One invented article. PMCIDs from 99000001 and PMIDs from 98000001 belong to no real one."""

    pmcid: str
    pmid: int
    number: int
    title: str
    licence: str | None
    trouble: str
    """A key of ``TROUBLES``, or empty."""
    figures: tuple[SampleFigure, ...]


def make_articles(
    rng: random.Random, sketchbook: Sketchbook, findings: Sequence[Finding], *, per_article: int, troubles: bool
) -> list[SampleArticle]:
    """Articles of ``per_article`` figures each, drawn, with the trouble spread evenly over them.

    Args:
        rng: Decides wording and drawing.
        sketchbook: Keeps the figures apart from what it drew for held-out splits.
        findings: One for each figure.
        per_article: Figures an article.
        troubles: Whether each of ``TROUBLES`` gets one article; needs at least as many articles.
    """
    count = len(findings) // per_article
    placed = {(i + 1) * count // (len(TROUBLES) + 1): name for i, name in enumerate(TROUBLES)} if troubles else {}
    return [
        _make_article(
            rng, sketchbook, number, findings[number * per_article : (number + 1) * per_article], placed.get(number, "")
        )
        for number in range(count)
    ]


def _make_article(
    rng: random.Random, sketchbook: Sketchbook, number: int, findings: Sequence[Finding], trouble: str
) -> SampleArticle:
    pmid = 98000001 + number
    listed_pmid = pmid + 500000 if trouble == "pmid of another article" else pmid
    figures: list[SampleFigure] = []
    for index, finding in enumerate(findings):
        extension = "png" if number % 10 == 7 else "jpg"
        stem = (
            f"synth-{number:04d}-g{index + 1:03d}",
            f"nihms-{number + 1:07d}-f{index + 1:04d}",
            f"gr{index + 1}",
            f"10-5555_2026_{number}_Fig{index + 1}_HTML",
        )[number % 4]
        encode = encode_png if extension == "png" else encode_jpeg
        hit = TROUBLES[trouble] if trouble and (index == 0 or not trouble.startswith("first image")) else "ok"
        figures.append(
            SampleFigure(
                pair_id=f"{listed_pmid}_F{index + 1}",
                label=f"{('Figure', 'Fig.')[number % 2]} {index + 1}",
                xml_id=f"F{index + 1}",
                file_name=f"{stem}.{extension}",
                finding=finding,
                caption=caption(rng, finding, "en"),
                image=sketchbook.draw(finding, f"figure/{rng.random()}", held_out=False, encode=encode),
                expected=hit,
            )
        )
    licence: str | None = _LICENCES[number % len(_LICENCES)]
    if trouble in ("CC BY-NC-ND", "TDM"):
        licence = trouble
    if trouble == "null licence":
        licence = None
    shown = ", ".join(sorted({word(f.modality, "en") for f in findings}))
    title = f"Synthetic case {number + 1}: {shown}"
    return SampleArticle(f"PMC{99000001 + number}", pmid, number, title, licence, trouble, tuple(figures))


def url_rows(articles: Sequence[SampleArticle]) -> list[dict[str, str]]:
    """Rows of ``llava_med_image_urls.jsonl``, as LLaVA-Med published them (its issue 58)."""
    rows: list[dict[str, str]] = []
    for article in articles:
        folder = hashlib.md5(article.pmcid.encode(), usedforsecurity=False).hexdigest()
        tar = f"https://ftp.ncbi.nlm.nih.gov/pub/pmc/oa_package/{folder[:2]}/{folder[2:4]}/{article.pmcid}.tar.gz"
        for figure in article.figures:
            rows.append(
                {
                    "pmc_tar_url": tar,
                    "image_file_path": f"{article.pmcid}/{figure.file_name}",
                    "pair_id": figure.pair_id,
                }
            )
    return rows


def write_bucket(bucket: Path, articles: Sequence[SampleArticle]) -> None:
    """Write the articles' objects under ``bucket``, which stands for ``s3://pmc-oa-opendata``."""
    (bucket / "metadata").mkdir(parents=True)
    for article in articles:
        if article.trouble == "article absent":
            continue
        _write_version(bucket, article, 2 if article.trouble == "only version 2" else 1)
        if article.trouble == "version 2 is a manuscript without media":
            _write_version(bucket, replace(article, licence="TDM", figures=()), 2)


def _write_version(bucket: Path, article: SampleArticle, version: int) -> None:
    name = f"{article.pmcid}.{version}"
    media: dict[str, bytes] = {}
    for index, figure in enumerate(article.figures):
        trouble = article.trouble if index == 0 else ""
        if trouble == "first image: absent":
            continue
        stored = figure.file_name
        if trouble == "first image: name differs in case":
            stored = stored.upper()
        media[stored] = figure.image
        if trouble == "first image: zero bytes":
            media[stored] = b""
        if trouble == "first image: truncated":
            media[stored] = figure.image[: len(figure.image) // 2]
        if article.number % 6 == 5:
            media[f"{stored.rpartition('.')[0]}.gif"] = _thumbnail(figure.image)
    objects = {f"{name}.xml": _jats(article).encode(), f"{name}.txt": _plain_text(article).encode()}
    metadata = json.dumps(_metadata(article, version, objects, media), indent=1).encode()
    if article.trouble == "metadata truncated":
        metadata = metadata[: len(metadata) // 2]
    folder = bucket / name
    folder.mkdir()
    for file_name, content in {**objects, **media, f"{name}.json": metadata}.items():
        (folder / file_name).write_bytes(content)
    (bucket / "metadata" / f"{name}.json").write_bytes(metadata)


def _metadata(
    article: SampleArticle, version: int, objects: dict[str, bytes], media: dict[str, bytes]
) -> dict[str, Any]:
    name = f"{article.pmcid}.{version}"
    manuscript = not article.figures or article.licence == "TDM"

    def url(file_name: str, content: bytes) -> str:
        return f"s3://pmc-oa-opendata/{name}/{file_name}?md5={hashlib.md5(content, usedforsecurity=False).hexdigest()}"

    media_urls = [url(file_name, content) for file_name, content in media.items()]
    if article.trouble == "first image: wrong MD5":
        media_urls[0] = media_urls[0].partition("?")[0] + "?md5=" + "0" * 32
    return {
        "pmcid": article.pmcid,
        "version": version,
        "pmid": article.pmid,
        "doi": f"10.5555/synthetic.{article.number + 1}",
        "mid": f"NIHMS{9000000 + article.number}" if manuscript else None,
        "title": article.title,
        "citation": f"Synth J Med Images. 2026;1({article.number + 1}):e{article.number + 1}. "
        f"doi: 10.5555/synthetic.{article.number + 1}",
        "is_pmc_openaccess": not manuscript,
        "is_manuscript": manuscript,
        "is_historical_ocr": False,
        "is_retracted": article.trouble == "retracted",
        "license_code": article.licence,
        "xml_url": url(f"{name}.xml", objects[f"{name}.xml"]),
        "text_url": url(f"{name}.txt", objects[f"{name}.txt"]),
        "media_urls": media_urls,
    }


def _thumbnail(image: bytes) -> bytes:
    from PIL import Image

    with Image.open(io.BytesIO(image)) as picture:
        stream = io.BytesIO()
        picture.resize((32, 32)).convert("P", palette=Image.Palette.ADAPTIVE, colors=64).save(stream, "GIF")
    return stream.getvalue()


def _fig_xref(figure: SampleFigure, text: str) -> str:
    return f'<xref ref-type="fig" rid="{figure.xml_id}">{text}</xref>'


def _paragraphs(article: SampleArticle) -> list[str]:
    """Paragraphs that refer to the figures: one by one, as a range, as a list."""
    figures = article.figures
    texts = [f"<p>{escape(article.title)}. This article was written by a program and describes no patient.</p>"]
    for index, figure in enumerate(figures):
        short = figure.caption.partition(". ")[0].rstrip(".")
        mention = _fig_xref(figure, f"Fig. {index + 1}")
        texts.append(f"<p>{escape(short)} ({mention}).</p>")
    if len(figures) >= 3 and article.number % 3 == 0:
        first, last = figures[0], figures[-1]
        span = f"{_fig_xref(first, '1')}-{_fig_xref(last, str(len(figures)))}"
        texts.append(f"<p>All images of this case are shown (Figs. {span}).</p>")
    elif len(figures) >= 3 and article.number % 3 == 1:
        second, third = figures[1], figures[2]
        texts.append(f"<p>The other images (Figs. {_fig_xref(second, '2')}-{_fig_xref(third, '3')}) agree.</p>")
    elif len(figures) >= 2:
        first, second = figures[0], figures[1]
        texts.append(f"<p>See {_fig_xref(first, 'Figure 1')} and {_fig_xref(second, '2')} for a comparison.</p>")
    return texts


def _fig_element(article: SampleArticle, figure: SampleFigure) -> str:
    # Real articles often leave the extension out of the reference.
    href = figure.file_name.rpartition(".")[0] if article.number % 5 == 3 else figure.file_name
    text = escape(figure.caption)
    if article.number % 4 == 1:
        text = text.replace("lesion", "<italic>lesion</italic>", 1)
    return (
        f'<fig id="{figure.xml_id}" position="float"><label>{figure.label}</label><caption><p>{text}</p></caption>'
        f'<graphic xlink:href="{href}" position="float"/></fig>'
    )


def _jats(article: SampleArticle) -> str:
    licence = ""
    if article.licence in _LICENCE_URLS:
        kind, url = _LICENCE_URLS[article.licence]
        licence = (
            '<license><ali:license_ref xmlns:ali="http://www.niso.org/schemas/ali/1.0/" specific-use="textmining" '
            f'content-type="{kind}">{url}</ali:license_ref><license-p>Synthetic article.</license-p></license>'
        )
    related = '<related-article related-article-type="retraction-forward"/>' if article.trouble == "retracted" else ""
    body = "".join(_paragraphs(article))
    floats = "".join(_fig_element(article, figure) for figure in article.figures)
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        '<!DOCTYPE article PUBLIC "-//NLM//DTD JATS (Z39.96) Journal Archiving and Interchange DTD with MathML3 '
        'v1.3 20210610//EN" "JATS-archivearticle1-3-mathml3.dtd">\n'
        '<article xmlns:xlink="http://www.w3.org/1999/xlink" dtd-version="1.3" xml:lang="en" '
        'article-type="case-report"><front><journal-meta><journal-id journal-id-type="nlm-ta">Synth J Med Images'
        "</journal-id><journal-title-group><journal-title>Synthetic Journal of Medical Images</journal-title>"
        "</journal-title-group></journal-meta>\n<article-meta>"
        f'<article-id pub-id-type="pmid">{article.pmid}</article-id>'
        f'<article-id pub-id-type="pmc">{article.pmcid.removeprefix("PMC")}</article-id>'
        f'<article-id pub-id-type="doi">10.5555/synthetic.{article.number + 1}</article-id>'
        f"<title-group><article-title>{escape(article.title)}</article-title></title-group>"
        f'<pub-date pub-type="collection"><year>2026</year></pub-date>{related}'
        f"<permissions><copyright-statement>No rights reserved: drawn by code</copyright-statement>{licence}"
        f"</permissions></article-meta></front>\n<body><sec><title>Case</title>{body}</sec></body>\n"
        f"<floats-group>{floats}</floats-group></article>\n"
    )


def _plain_text(article: SampleArticle) -> str:
    captions = "\n".join(f"{figure.label} {figure.caption}" for figure in article.figures)
    return f"ARTICLE INFORMATION\n{article.title}\n{article.pmcid}\n{'=' * 40}\n{captions}\n"
