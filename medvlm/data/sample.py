"""The synthetic sample corpus: everything the pipeline reads, drawn by code, in the official formats.

No picture shows a patient and no article exists. It makes the demo and the tests run without a network,
and it is made so that a model that looks at the pictures scores far above one that does not.
"""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from medvlm.data.phantoms import MIN_PHASH_DISTANCE, Modality, Sketchbook, balanced_findings
from medvlm.data.sample_benchmarks import (
    BenchmarkSize,
    draw_panels,
    write_pathvqa,
    write_rows,
    write_slake,
    write_vqa_rad,
)
from medvlm.data.sample_bucket import (
    TROUBLES,
    SampleArticle,
    SampleFigure,
    make_articles,
    url_rows,
    write_bucket,
)
from medvlm.data.sample_chinese import chinese_alignment_rows, chinese_instruct_rows, write_lines
from medvlm.data.sample_conversations import alignment_rows, instruct_rows
from medvlm.errors import InputError
from medvlm.store import Report, Workspace, atomic_folder, fingerprint, write_json, write_report

__all__ = ["STANDARD", "TINY", "CorpusScale", "build_corpus"]

_MODALITIES: tuple[Modality, ...] = ("chest_xray", "ct", "mri", "histology", "gross")


@dataclass(frozen=True, slots=True)
class CorpusScale:
    """How much is drawn."""

    articles: int = 120
    figures_per_article: int = 3
    benchmark: BenchmarkSize = field(default_factory=BenchmarkSize)
    """Of each of the three question sets."""
    troubles: bool = True
    """Whether one article stands for each reason why a figure can be lost."""

    def __post_init__(self) -> None:
        if self.troubles and self.articles <= len(TROUBLES):
            raise InputError(
                f"{self.articles} articles are too few to hold one of each trouble",
                where="CorpusScale.articles",
                hint=f"take more than {len(TROUBLES)}, or troubles=False",
            )


STANDARD = CorpusScale()
"""What ``medvlm corpus`` and the demo draw."""
TINY = CorpusScale(articles=20, figures_per_article=3, benchmark=BenchmarkSize(train=24, validation=12, test=12))
"""For tests: the same formats and the same trouble in a second."""


def build_corpus(workspace: Workspace, *, seed: int = 0, scale: CorpusScale = STANDARD) -> Report:
    """Draw the sample corpus into ``workspace.corpus``, which is replaced whole.

    Equal seed and scale give equal bytes, apart from ``report.json``.

    Args:
        workspace: Owns the folder.
        seed: Decides every picture and every sentence.
        scale: How much to draw.

    Returns:
        The report written beside the data: counts, troubles by name, fingerprint.

    Raises:
        WorkspaceError: The disk is full or read-only; the old corpus is then still in place.
    """
    started = time.monotonic()
    workspace.ensure()
    rng = random.Random(f"corpus/{seed}")  # noqa: S311  # pictures, not secrets
    findings = balanced_findings(rng, _MODALITIES, scale.articles * scale.figures_per_article)
    # Held-out pictures first: whatever is drawn for training afterwards keeps its distance from them.
    sketchbook = Sketchbook()
    panels = draw_panels(sketchbook, seed, scale.benchmark)
    articles = make_articles(rng, sketchbook, findings, per_article=scale.figures_per_article, troubles=scale.troubles)
    figures = [figure for article in articles for figure in article.figures]
    with atomic_folder(workspace.corpus) as folder:
        write_bucket(folder / "bucket" / "pmc-oa-opendata", articles)
        rows = url_rows(articles)
        rng.shuffle(rows)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "llava_med_image_urls.jsonl").write_text(lines, "utf-8")
        write_json(folder / "expected.json", {figure.pair_id: figure.expected for figure in figures})
        _write_texts(folder, rng, random.Random(f"chinese/{seed}"), figures)  # noqa: S311
        questions = {
            "vqa-rad": write_vqa_rad(folder / "vqa-rad", panels),
            "slake": write_slake(folder / "slake", panels),
            "pathvqa": write_pathvqa(folder / "pathvqa", panels),
        }
        counts = _counts(articles, questions)
        expected: dict[str, int] = dict(sorted(Counter(figure.expected for figure in figures).items()))
        (folder / "README.md").write_text(_readme(seed, counts, expected), "utf-8")
        mark = _content_fingerprint(folder)
    details: dict[str, Any] = {
        "scale": asdict(scale),
        "expected_outcomes": expected,
        "troubles": {a.trouble: a.pmcid for a in articles if a.trouble},
    }
    report = Report(step="corpus", counts=counts, details=details, seed=seed, fingerprint=mark)
    return write_report(workspace.corpus, report, started=started, packages=("imagehash", "numpy", "pillow"))


def _write_texts(folder: Path, rng: random.Random, chinese: random.Random, figures: Sequence[SampleFigure]) -> None:
    """One folder a dataset, with an official file a language: English in LLaVA-Med's format, Chinese in ChiMed-VL's."""
    for name, rows in (("alignment", alignment_rows(rng, figures)), ("instruct", instruct_rows(rng, figures))):
        write_rows(folder / name / f"llava_med_{name}.json", rows)
    write_lines(folder / "alignment" / "ChiMed-VL-Alignment.jsonl", chinese_alignment_rows(chinese, figures))
    write_lines(folder / "instruct" / "ChiMed-VL-Instruction.jsonl", chinese_instruct_rows(chinese, figures))


def _counts(articles: list[SampleArticle], questions: dict[str, dict[str, int]]) -> dict[str, int]:
    counts = {"articles": len(articles), "figures": sum(len(article.figures) for article in articles)}
    for name, splits in questions.items():
        counts |= {f"{name}_{split}_questions": number for split, number in splits.items()}
    return counts


def _content_fingerprint(folder: Path) -> str:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return fingerprint(*(part for path in paths for part in (path.relative_to(folder).as_posix(), path)))


def _readme(seed: int, counts: dict[str, int], expected: dict[str, int]) -> str:
    outcomes = "\n".join(f"| {status} | {number} |" for status, number in expected.items())
    table = "\n".join(f"| {name.replace('_', ' ')} | {number} |" for name, number in counts.items())
    return f"""# Synthetic sample corpus

**Everything here is synthetic.** The pictures are phantoms drawn by code, the articles were written by a
program, and no patient, author or journal stands behind them. Licence: CC0 1.0 (the licences in the articles'
metadata are part of the play). Research use only; nothing here is fit for a clinical purpose.

Drawn by `medvlm corpus --seed {seed}`.

- `bucket/pmc-oa-opendata/`: articles in the layout of the PMC Cloud Service, some with trouble on purpose;
  `expected.json` says what a fetch under the `research` policy has to make of each row.
- `llava_med_image_urls.jsonl`: the figures wanted, in LLaVA-Med's list format.
- `alignment/`, `instruct/`: texts about those figures, in English (LLaVA-Med's JSON) and Chinese (ChiMed-VL's
  JSON Lines).
- `vqa-rad/`, `slake/`, `pathvqa/`: question sets in the official formats, `slake/` in English and Chinese. A
  Chinese yes or no is said as in SLAKE ("包含", "没有"). No picture is in two splits; by
  perceptual hash, every picture is at least {MIN_PHASH_DISTANCE} bits of 64 away from each held-out one.

"Left" and "right" mean the left and the right of the image. All lesions of one picture lie on one side and
have one size. Each closed question is answered by yes exactly as often as by no, in every split, so that a
model that does not look at the picture is right half of the time.

| what | number |
|---|---|
{table}

| outcome expected of the fetch | figures |
|---|---|
{outcomes}
"""
