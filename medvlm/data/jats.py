"""Captions and inline mentions from JATS, the XML of PubMed Central's articles.

Foreign XML: entities are never expanded, DTDs never loaded, the network never used.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

from lxml import etree  # pyright: ignore[reportAttributeAccessIssue]  # lxml ships no types

__all__ = ["ArticleText", "FigureText", "JatsError", "find_figure", "parse_jats", "text_of"]

XLINK_HREF = "{http://www.w3.org/1999/xlink}href"
ALI_LICENCE = "{http://www.niso.org/schemas/ali/1.0/}license_ref"

_SUPERSCRIPT = str.maketrans("0123456789+-−=()ni", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁻⁼⁽⁾ⁿⁱ")
_SUBSCRIPT = str.maketrans("0123456789+-−=()", "₀₁₂₃₄₅₆₇₈₉₊₋₋₌₍₎")

BLOCKS = frozenset({"p", "title", "list", "list-item", "def-item", "sec", "disp-quote", "disp-formula", "break", "td"})
ELSEWHERE = frozenset({"fig", "fig-group", "table-wrap", "supplementary-material", "boxed-text", "fn-group", "media"})
"""What may stand inside a paragraph without being part of its text."""

_TEX_BODY = re.compile(r"\\begin\{document\}(.*)\\end\{document\}", re.DOTALL)
_LABEL_NUMBER = re.compile(r"\A\s*(fig(?:ure|\.)?)\s*(\d+)\s*[.:]?\s*\Z", re.IGNORECASE)
_MENTION = re.compile(
    r"(?<![\w.])(supp\w*\.?\s+|extended\s+data\s+|appendix\s+|additional\s+)?fig(?:ure)?s?\b\.?\s*"
    r"(\d+\s*[a-z]?(?:(?:\s*(?:[-–—,;&]|and|to|through)\s*)+(?:fig(?:ure)?s?\b\.?\s*)?\d+\s*[a-z]?\b)*)",
    re.IGNORECASE,
)
_NUMBER_OR_DASH = re.compile(r"\d+|[-–—]|\bto\b|\bthrough\b")
_RANGE_BETWEEN = re.compile(r"\s*(?:[a-z]\s*)?(?:[-–—]|to|through)\s*(?:fig(?:ure)?s?\.?\s*)?\Z", re.IGNORECASE)
LONGEST_RANGE = 50


class JatsError(Exception):
    """The bytes are not a JATS article. Never leaves the fetch worker, which notes it in the row."""


@dataclass(frozen=True, slots=True)
class FigureText:
    """What an article says about one of its figures."""

    figure_id: str
    label: str
    caption: str
    graphics: tuple[str, ...]
    """References as written, often without a file extension."""
    mentions: tuple[str, ...]
    """Paragraphs that refer to it, in reading order."""


@dataclass(frozen=True, slots=True)
class ArticleText:
    """What the pipeline takes from one article."""

    pmcid: str
    pmid: int | None
    title: str
    licence: str | None
    """Licence code such as ``CC BY`` from the licence element; None where it names none."""
    figures: tuple[FigureText, ...]


def parse_jats(body: bytes) -> ArticleText:
    """Title, licence and every figure of an article, with captions and mentions.

    Raises:
        JatsError: It is not XML, or holds no article.
    """
    parser = etree.XMLParser(
        resolve_entities=False, no_network=True, load_dtd=False, dtd_validation=False, huge_tree=False,
        remove_comments=True, remove_pis=True,
    )  # fmt: skip
    try:
        root = etree.fromstring(body, parser)
    except (etree.XMLSyntaxError, ValueError) as error:
        raise JatsError(f"the article is not XML: {error}") from error
    if not isinstance(root.tag, str) or not (root.tag == "article" or root.find(".//article") is not None):
        raise JatsError(f"the XML is no article: it begins with <{root.tag}>")
    article = root if root.tag == "article" else root.find(".//article")
    elements = [fig for fig in article.iter("fig") if not _inside(fig, "sub-article", article)]
    figures = [_figure(fig) for fig in elements]
    mentions = _mentions(article, elements, figures)
    ids = {node.get("pub-id-type"): text_of(node) for node in article.iterfind(".//article-meta/article-id")}
    title = article.find(".//article-meta//article-title")
    pmcid = next((ids[kind] for kind in ("pmcid", "pmc", "pmcaid") if kind in ids), "")
    return ArticleText(
        pmcid=pmcid if pmcid.startswith("PMC") or not pmcid else f"PMC{pmcid}",
        pmid=int(ids["pmid"]) if ids.get("pmid", "").isdigit() else None,
        title=text_of(title) if title is not None else "",
        licence=_licence(article),
        figures=tuple(
            FigureText(f.figure_id, f.label, f.caption, f.graphics, tuple(said))
            for f, said in zip(figures, mentions, strict=True)
        ),
    )


def _inside(node: Any, tag: str, root: Any) -> bool:
    return any(parent.tag == tag for parent in node.iterancestors() if parent is not root)


def _figure(fig: Any) -> FigureText:
    label = fig.find("label")
    captions = [text for text in (text_of(caption) for caption in fig.iterfind("caption")) if text]
    group = fig.getparent()
    if group is not None and group.tag == "fig-group":
        # The caption of a group holds for each of its figures.
        captions = [text_of(caption) for caption in group.iterfind("caption")] + captions
    graphics = [node.get(XLINK_HREF) or "" for node in fig.iter("graphic", "media") if not _within_caption(node, fig)]
    return FigureText(
        figure_id=fig.get("id") or "",
        label=text_of(label) if label is not None else "",
        caption=" ".join(captions),
        graphics=tuple(dict.fromkeys(name.rsplit("/", 1)[-1] for name in graphics if name)),
        mentions=(),
    )


def _within_caption(node: Any, fig: Any) -> bool:
    for parent in node.iterancestors():
        if parent is fig:
            return False
        if parent.tag == "caption":
            return True
    return False


def text_of(node: Any, *, skip: frozenset[str] = frozenset()) -> str:
    """Clean text of an element: one line, sub- and superscripts kept apart, formulas once.

    Args:
        node: The element; text after its end is not part of it.
        skip: Tags whose content is left out.
    """
    return " ".join("".join(_pieces(node, skip)).split())


def _pieces(node: Any, skip: frozenset[str]) -> Iterator[str]:
    """Text in reading order. Iterative: a hostile file may nest deeper than Python's stack."""
    stack: list[tuple[Any, bool]] = [(node, False)]
    while stack:
        current, closing = stack.pop()
        if closing:
            if current.tag in BLOCKS:
                yield " "
            if current is not node:
                yield current.tail or ""
            continue
        replacement = _replacement(current, node, skip)
        if replacement is not None:
            yield replacement
            if current is not node:
                yield current.tail or ""
            continue
        if current.tag in BLOCKS:
            yield " "
        yield current.text or ""
        stack.append((current, True))
        stack.extend((child, False) for child in reversed(current))


def _replacement(current: Any, root: Any, skip: frozenset[str]) -> str | None:
    """What stands in for an element as a whole; None where its own content is read."""
    if current.tag is etree.Entity:
        character = html.unescape(current.text)
        return "" if character == current.text else character  # declared in the file itself: never expanded
    if not isinstance(current.tag, str) or (current is not root and current.tag in skip):
        return ""
    if current.tag == "tex-math":
        tex = "".join(current.itertext())
        body = _TEX_BODY.search(tex)
        return (body[1] if body else tex).strip().strip("$")
    if current.tag == "alternatives":
        best = next((child for child in current if str(child.tag).endswith("}math")), None)
        best = best if best is not None else current.find("tex-math")
        return text_of(best) if best is not None else None
    if current.tag in {"sup", "sub"} and current is not root:
        return _script(text_of(current, skip=skip), current.tag)
    return None


def _script(text: str, tag: str) -> str:
    """``10<sup>6</sup>`` is 10⁶, not 106; what Unicode cannot raise or lower stays as it is."""
    table = _SUPERSCRIPT if tag == "sup" else _SUBSCRIPT
    return text.translate(table) if text and all(ord(character) in table for character in text) else text


def _licence(article: Any) -> str | None:
    """Licence code from ``<ali:license_ref content-type>`` or the Creative Commons address."""
    for licence in article.iterfind(".//article-meta//license"):
        addresses = [licence.get(XLINK_HREF) or ""]
        for node in licence.iter():
            if node.tag == ALI_LICENCE:
                kind = re.fullmatch(r"(?:cc0|ccby(?:nc)?(?:sa|nd)?)license", node.get("content-type") or "")
                if kind:
                    return _code(kind[0].removesuffix("license").removeprefix("cc"))
                addresses.append(node.text or "")
            elif isinstance(node.tag, str):
                addresses.append(node.get(XLINK_HREF) or "")
        for address in addresses:
            found = re.search(r"creativecommons\.org/(?:licenses/(by[a-z-]*)|publicdomain/(zero))", address)
            if found:
                return _code((found[1] or "0").replace("-", ""))
    return None


def _code(letters: str) -> str | None:
    found = re.fullmatch(r"(0)|by(nc)?(sa|nd)?", letters)
    if not found:
        return None
    return "CC0" if found[1] else "-".join(["CC BY", *(part.upper() for part in found.groups()[1:] if part)])


def _mentions(article: Any, elements: Sequence[Any], figures: Sequence[FigureText]) -> list[list[str]]:
    """For each figure, the paragraphs that refer to it."""
    by_id = {figure.figure_id: place for place, figure in enumerate(figures) if figure.figure_id}
    by_number = {number: place for place, figure in enumerate(figures) if (number := _number(figure.label)) is not None}
    found: list[list[str]] = [[] for _ in figures]
    paragraphs = [paragraph for paragraph in article.iter("p") if not _is_aside(paragraph, article)]
    for paragraph in paragraphs:
        places = _referred(paragraph, by_id, by_number)
        text = text_of(paragraph, skip=ELSEWHERE) if places else ""
        for place in places:
            found[place].append(text)
    # Some articles tag no reference of a figure; then, and only then, words are trusted.
    untagged = {place for place in by_number.values() if not found[place]}
    for paragraph in paragraphs if untagged else ():
        text = text_of(paragraph, skip=ELSEWHERE)
        for place in _said(text, by_number) & untagged:
            found[place].append(text)
    return found


def _is_aside(paragraph: Any, article: Any) -> bool:
    """Captions, tables, references and whatever is not the running text of this article."""
    aside = {"caption", "table-wrap", "table-wrap-foot", "ref-list", "ref", "permissions", "sub-article", "response"}
    return any(parent.tag in aside for parent in paragraph.iterancestors() if parent is not article)


def _number(label: str) -> int | None:
    found = _LABEL_NUMBER.match(label)
    return int(found[2]) if found else None


def _referred(paragraph: Any, by_id: dict[str, int], by_number: dict[int, int]) -> set[int]:
    """Figures that the paragraph's own ``xref`` elements point to, ranges filled in."""
    places: set[int] = set()
    last: tuple[int, Any] | None = None
    for xref in paragraph.iter("xref"):
        if xref.get("ref-type") not in {"fig", None} or _owner(xref) is not paragraph:
            continue
        targets = [by_id[name] for name in (xref.get("rid") or "").split() if name in by_id]
        if not targets:
            continue
        places.update(targets)
        # "Figs. 2-4" inside one reference that points to figure 2 only.
        places.update(_said(f"Figure {re.sub('(?i)fig(ure)?s?[.]?', '', text_of(xref))}", by_number))
        if last is not None and last[1].getnext() is xref and _RANGE_BETWEEN.match(last[1].tail or ""):
            places.update(range(last[0], targets[0] + 1)[:LONGEST_RANGE])
        last = (targets[-1], xref)
    return places


def _owner(node: Any) -> Any:
    """The paragraph that a node belongs to: none where a figure or table stands between."""
    for parent in node.iterancestors():
        if parent.tag == "p":
            return parent
        if parent.tag in ELSEWHERE:
            return None
    return None


def _said(text: str, by_number: dict[int, int]) -> set[int]:
    """Figures that a text names in words: ``Figs. 1A, 3 and 5-7``."""
    places: set[int] = set()
    for mention in _MENTION.finditer(text):
        if mention[1]:
            continue
        previous, dash = None, False
        for token in cast("list[str]", _NUMBER_OR_DASH.findall(mention[2])):
            if not token.isdigit():
                dash = True
                continue
            number = int(token[:6])
            numbers = range(previous, number + 1)[:LONGEST_RANGE] if dash and previous is not None else (number,)
            places.update(by_number[n] for n in numbers if n in by_number)
            previous, dash = number, False
    return places


def find_figure(article: ArticleText, *, file_name: str = "", figure_id: str = "") -> FigureText | None:
    """The figure that a file or an id means: by graphic, then by id, then by label.

    Args:
        article: The article.
        file_name: Media file name; compared exactly, by case, then without extension.
        figure_id: JATS id, label, or a short form such as ``Fig6``.
    """
    for form in (str, str.lower, _bare) if file_name else ():
        for figure in article.figures:
            if form(file_name) in {form(graphic) for graphic in figure.graphics}:
                return figure
    if not figure_id:
        return None
    by_id = [f for f in article.figures if f.figure_id == figure_id or f.label == figure_id]
    wanted = figure_id.lower()
    by_id += [f for f in article.figures if f.figure_id.lower() == wanted or f.label.lower() == wanted]
    number = re.fullmatch(r"f(?:ig(?:ure)?)?[\s._-]*0*(\d{1,6})", wanted)
    if number:
        by_id += [f for f in article.figures if _number(f.label) == int(number[1])]
    return by_id[0] if by_id else None


def _bare(name: str) -> str:
    return re.sub(r"\.(jpe?g|png|tiff?|gif|bmp|webp|eps|svg)\Z", "", name.lower())
