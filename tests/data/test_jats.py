"""Captions and mentions from JATS, compared with pubmed-parser on real articles."""

from __future__ import annotations

import contextlib
import unicodedata
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medvlm.data.jats import ArticleText, FigureText, JatsError, find_figure, parse_jats


def article_of(body: str, *, meta: str = "", head: str = "") -> ArticleText:
    text = (
        f'<?xml version="1.0"?>{head}<article xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'xmlns:mml="http://www.w3.org/1998/Math/MathML" xmlns:ali="http://www.niso.org/schemas/ali/1.0/">'
        f"<front><article-meta>{meta}</article-meta></front><body>{body}</body></article>"
    )
    return parse_jats(text.encode())


def caption_of(caption: str) -> str:
    (figure,) = article_of(f'<fig id="F1"><caption>{caption}</caption></fig>').figures
    return figure.caption


def numbered(count: int) -> str:
    return "".join(f'<fig id="F{n}"><label>Figure {n}</label></fig>' for n in range(1, count + 1))


def mentioned(paragraph: str, count: int = 9) -> set[int]:
    """Numbers of the figures that one paragraph refers to."""
    found = article_of(f"<p>{paragraph}</p>{numbered(count)}").figures
    return {int(figure.figure_id[1:]) for figure in found if figure.mentions}


def xref(rid: str, text: str) -> str:
    return f'<xref ref-type="fig" rid="{rid}">{text}</xref>'


# --- parity


def plain(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text.replace("−", "-")).split())


def test_parity_with_pubmed_parser_on_the_real_articles(real_data: Path) -> None:
    import pubmed_parser

    compared = 0
    for path in sorted((real_data / "jats").glob("*.nxml")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pubmed-parser's own
            theirs = pubmed_parser.parse_pubmed_caption(str(path)) or []
        ours = parse_jats(path.read_bytes()).figures
        assert [figure.figure_id for figure in ours] == [figure["fig_id"] for figure in theirs]
        for figure, peer in zip(ours, theirs, strict=True):
            assert plain(figure.label) == plain(peer["fig_label"])
            assert peer["graphic_ref"] in figure.graphics
            # Theirs loses text below the first level of tags; what it has stands in ours, in order.
            rest = iter(plain(figure.caption))
            assert all(character in rest for character in plain(peer["fig_caption"])), path.name
            assert len(plain(figure.caption)) >= len(plain(peer["fig_caption"]))
            compared += 1
    assert compared == 15


def test_every_figure_of_the_real_articles_has_a_caption_and_is_mentioned(real_data: Path) -> None:
    for path in sorted((real_data / "jats").glob("*.nxml")):
        article = parse_jats(path.read_bytes())
        assert article.title
        assert article.pmid
        for figure in article.figures:
            assert len(figure.caption) > 30
            assert figure.mentions
            assert all("  " not in mention and "\n" not in mention for mention in figure.mentions)


def test_no_reference_of_the_real_articles_is_lost(real_data: Path) -> None:
    from lxml import etree

    for path in sorted((real_data / "jats").glob("*.nxml")):
        tree = etree.fromstring(path.read_bytes())
        article = parse_jats(path.read_bytes())
        for figure in article.figures:
            references = tree.xpath(f"//body//p[not(ancestor::caption)]//xref[contains(@rid, '{figure.figure_id}')]")
            assert len(figure.mentions) >= min(1, len(references))
            assert len(figure.mentions) <= max(1, len(references))


# --- captions


@pytest.mark.parametrize(
    ("caption", "text"),
    [
        ("<title>Liver.</title><p>Axial CT.</p>", "Liver. Axial CT."),
        ("<p>A <bold>bold <italic>and</italic></bold> tail</p>", "A bold and tail"),
        ("<p>10<sup>6</sup> cells, CO<sub>2</sub>, Ca<sup>2+</sup>, 4<sup>th</sup></p>", "10⁶ cells, CO₂, Ca²⁺, 4th"),
        ("<p>(<bold>A</bold>) one</p><p>(<bold>B</bold>) two</p>", "(A) one (B) two"),
        ("<p>x<list><list-item><p>a</p></list-item><list-item><p>b</p></list-item></list></p>", "x a b"),
        ("<p>value <inline-formula><mml:math><mml:mi>x</mml:mi><mml:mo>=</mml:mo><mml:mn>2</mml:mn></mml:math>"
         "</inline-formula>.</p>", "value x=2."),
        ("<p>a<inline-formula><alternatives><tex-math>\\usepackage{x}\\begin{document}$y$\\end{document}</tex-math>"
         "<mml:math><mml:mi>y</mml:mi></mml:math></alternatives></inline-formula>b</p>", "ayb"),
        ("<p>a<tex-math>\\documentclass{m}\\begin{document}$$\\alpha$$\\end{document}</tex-math>b</p>", "a\\alphab"),
        ("<p>many\n   blanks\tand&#160;such</p>", "many blanks and such"),
        ("<p>before<!-- never --><?pi never?> after</p>", "before after"),
        ("", ""),
    ],
)  # fmt: skip
def test_a_caption_is_clean_text(caption: str, text: str) -> None:
    assert caption_of(caption) == text


def test_entities_of_html_are_characters_and_others_are_dropped() -> None:
    head = '<!DOCTYPE article PUBLIC "-//NLM//DTD" "x.dtd" [<!ENTITY own "secret">]>'
    (figure,) = article_of('<fig id="F1"><caption><p>a &beta; &own; z</p></caption></fig>', head=head).figures
    assert figure.caption == "a β z"


def test_external_entities_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    head = f'<!DOCTYPE article [<!ENTITY x SYSTEM "file://{tmp_path}/secret">]>'
    (figure,) = article_of('<fig id="F1"><caption><p>a &x; z</p></caption></fig>', head=head).figures
    assert figure.caption == "a z"


def test_the_caption_of_a_group_holds_for_its_figures() -> None:
    body = (
        "<fig-group><caption><p>Both.</p></caption><fig id='A'><caption><p>One.</p></caption></fig>"
        "<fig id='B'/></fig-group>"
    )
    assert [figure.caption for figure in article_of(body).figures] == ["Both. One.", "Both."]


def test_several_graphics_of_one_figure() -> None:
    body = (
        '<fig id="F1"><caption><p>x <inline-graphic xlink:href="no"/></p></caption><alternatives>'
        '<graphic xlink:href="a.tif"/><graphic xlink:href="a.jpg"/></alternatives><graphic xlink:href="b"/></fig>'
    )
    (figure,) = article_of(body).figures
    assert figure.graphics == ("a.tif", "a.jpg", "b")


def test_a_deeply_nested_file_does_not_exhaust_the_stack() -> None:
    depth = 200
    assert caption_of("<p>" + "<italic>" * depth + "deep" + "</italic>" * depth + "</p>") == "deep"
    with pytest.raises(JatsError):
        caption_of("<p>" + "<italic>" * 5000 + "x" + "</italic>" * 5000 + "</p>")


@pytest.mark.parametrize(
    "body", [b"", b"text", b"<a>", b"<html/>", b"\xff\xfe", b"<?xml version='1.0' encoding='x'?><a/>"]
)
def test_what_is_no_article_is_refused(body: bytes) -> None:
    with pytest.raises(JatsError):
        parse_jats(body)


# --- mentions


@pytest.mark.parametrize(
    ("paragraph", "numbers"),
    [
        (f"See {xref('F2', 'Figure 2')}.", {2}),
        (f"See {xref('F2', 'Figs. 2')}-{xref('F4', '4')}.", {2, 3, 4}),
        (f"See {xref('F2', 'Figs. 2A')} – {xref('F4', '4C')}.", {2, 3, 4}),
        (f"See {xref('F2', 'Figure 2')} to {xref('F4', 'Figure 4')}.", {2, 3, 4}),
        (f"See {xref('F2', 'Fig. 2')}, {xref('F4', '4')}.", {2, 4}),
        (f"See {xref('F2', 'Fig. 2')} and {xref('F5', '5')}.", {2, 5}),
        (f"See {xref('F2 F3 F6', 'Figs. 2, 3 and 6')}.", {2, 3, 6}),
        (f"See {xref('F2', 'Figs. 2-4')}.", {2, 3, 4}),
        (f"See {xref('F2', '2A–C')}.", {2}),
        (f"See {xref('T1', 'Table 1')} and <xref ref-type='bibr' rid='F3'>3</xref>.", set()),
        ("As Figures 1A, 3 and 5-7 show.", {1, 3, 5, 6, 7}),
        ("( Fig. 3 , 4 , 5 )", {3, 4, 5}),
        ("Supplementary Figure 2, Extended Data Fig. 3, Fig. S4.", set()),
        ("Fig. 2, 40 patients and figure it out in 3 days", {2}),
        ("Figures 1-99999999", set(range(1, 10))),
    ],
)
def test_which_figures_a_paragraph_refers_to(paragraph: str, numbers: set[int]) -> None:
    assert mentioned(paragraph) == numbers


def test_words_count_only_where_a_figure_has_no_reference() -> None:
    body = f"<p>One {xref('F1', 'Figure 1')}.</p><p>Two, as Figure 1 of Smith shows, and Figure 2.</p>{numbered(2)}"
    one, two = article_of(body).figures
    assert one.mentions == ("One Figure 1.",)
    assert two.mentions == ("Two, as Figure 1 of Smith shows, and Figure 2.",)


def test_a_paragraph_around_a_figure_is_its_text_without_the_figure() -> None:
    figure = f'<fig id="F1"><label>Figure 1</label><caption><p>C {xref("F1", "1")}</p></caption></fig>'
    body = f"<p>See {xref('F1', 'Figure 1')}.{figure} Then.</p>"
    (figure,) = article_of(body).figures
    assert figure.mentions == ("See Figure 1. Then.",)
    assert figure.caption == "C 1"


def test_captions_tables_and_replies_are_no_mentions() -> None:
    body = (
        f"<table-wrap><caption><p>{xref('F1', 'Figure 1')}</p></caption></table-wrap>{numbered(1)}"
        f"<fig id='F9'><caption><p>As {xref('F1', 'Figure 1')}</p></caption></fig>"
    )
    assert article_of(body).figures[0].mentions == ()


# --- the rest of the article


@pytest.mark.parametrize(
    ("licence", "code"),
    [
        ('<license><ali:license_ref content-type="ccbyncndlicense">x</ali:license_ref></license>', "CC BY-NC-ND"),
        ('<license><ali:license_ref content-type="ccbylicense"/></license>', "CC BY"),
        ('<license><ali:license_ref content-type="cc0license"/></license>', "CC0"),
        ('<license xlink:href="http://creativecommons.org/licenses/by-nc-sa/3.0/"/>', "CC BY-NC-SA"),
        (
            '<license><p><ext-link xlink:href="https://creativecommons.org/publicdomain/zero/1.0/"/></p></license>',
            "CC0",
        ),
        ("<license><p>All rights reserved.</p></license>", None),
        ("", None),
    ],
)
def test_the_licence_element(licence: str, code: str | None) -> None:
    assert article_of("", meta=f"<permissions>{licence}</permissions>").licence == code


def test_title_and_ids() -> None:
    meta = (
        '<article-id pub-id-type="pmid">12</article-id><article-id pub-id-type="pmc">345</article-id>'
        "<title-group><article-title>Of <italic>E. coli</italic></article-title></title-group>"
    )
    article = article_of("", meta=meta)
    assert (article.pmcid, article.pmid, article.title) == ("PMC345", 12, "Of E. coli")


def some_article() -> ArticleText:
    def figure(name: str, label: str, graphic: str) -> FigureText:
        return FigureText(name, label, "", (graphic,), ())

    figures = (
        figure("F0001", "Figure 1", "x-g001"),
        figure("F0002", "FIG. 2", "X-G002.TIF"),
        figure("f11", "Fig. 11:", "b"),
    )
    return ArticleText("PMC1", None, "", None, figures)


@pytest.mark.parametrize(
    ("wanted", "figure_id"),
    [
        ({"file_name": "x-g001.jpg"}, "F0001"),
        ({"file_name": "x-g002.jpg"}, "F0002"),
        ({"file_name": "x-g003.jpg"}, None),
        ({"file_name": "x-g003.jpg", "figure_id": "F0002"}, "F0002"),
        ({"figure_id": "F0001"}, "F0001"),
        ({"figure_id": "f0001"}, "F0001"),
        ({"figure_id": "Fig1"}, "F0001"),
        ({"figure_id": "Figure 2"}, "F0002"),
        ({"figure_id": "F11"}, "f11"),
        ({"figure_id": "fig_11"}, "f11"),
        ({"figure_id": "F3"}, None),
        ({}, None),
    ],
)
def test_finding_a_figure(wanted: dict[str, str], figure_id: str | None) -> None:
    found = find_figure(some_article(), **wanted)
    assert (found.figure_id if found else None) == figure_id


@given(st.binary(max_size=300))
def test_bytes_are_an_article_or_refused(body: bytes) -> None:
    with contextlib.suppress(JatsError):
        assert isinstance(parse_jats(body), ArticleText)


@given(st.text(alphabet="figureFIGURES .,-–0123456789ab()to and", max_size=80))
def test_any_sentence_can_be_searched_for_figures(sentence: str) -> None:
    assert mentioned(sentence) <= set(range(1, 10))
