"""A small workspace as the pipeline leaves one, with foreign text that tries to become markup."""

from __future__ import annotations

import hashlib
import io
import math
import random
import time
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image as Picture
from PIL import ImageDraw, ImageFilter

from medvlm.data.leakage import Comparison, LeakedItem
from medvlm.evaluation.leaderboard import write_leaderboard
from medvlm.records import (
    FetchOutcome,
    Figure,
    Image,
    Prediction,
    QuarantinedRow,
    Sample,
    Score,
    Turn,
    VQAItem,
    WrongAnswer,
    schema_of,
    to_row,
)
from medvlm.store import Report, Workspace, write_json, write_records, write_report

HOSTILE = (
    "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"> "
    "**bold** [click](http://evil.example/) ![pixel](http://evil.example/p.png) $x^2$ :red[shout] # heading"
)
MODALITIES = ("chest_xray", "ct", "mri", "histology", "gross")


def picture(seed: int, size: int = 224) -> bytes:
    """A soft grey phantom, as PNG."""
    draw_from = random.Random(seed)
    canvas = Picture.new("L", (size, size), 12)
    draw = ImageDraw.Draw(canvas)
    draw.ellipse((28, 18, size - 28, size - 18), fill=70 + draw_from.randrange(50))
    for side in (-1, 1):
        x = size // 2 + side * 42
        draw.ellipse((x - 28, 60, x + 28, 170), fill=25 + draw_from.randrange(25))
    x, y, r = draw_from.randrange(60, 160), draw_from.randrange(60, 160), draw_from.randrange(8, 20)
    draw.ellipse((x - r, y - r, x + r, y + r), fill=225)
    out = io.BytesIO()
    canvas.filter(ImageFilter.GaussianBlur(3)).save(out, "PNG")
    return out.getvalue()


def _figure(n: int) -> Figure:
    data = picture(n)
    caption = HOSTILE if n == 0 else f"Axial view {n} shows a rounded bright lesion in the left lobe, 14 mm across."
    return Figure(
        figure_id=f"3000{n:04d}_F1",
        pmcid=f"PMC70000{n:02d}",
        version=1,
        pmid=30000000 + n,
        key=f"PMC70000{n:02d}.1/fig1.png",
        source_url="javascript:alert(1)" if n == 0 else f"https://pmc.ncbi.nlm.nih.gov/articles/PMC70000{n:02d}/",
        licence="CC BY" if n % 3 else "CC0",
        citation="Journal of Phantoms. 2026.",
        article_title="A synthetic article",
        retracted=False,
        image=Image(data, f"fig{n}.png"),
        width_px=224,
        height_px=224,
        sha256=hashlib.sha256(data).hexdigest(),
        phash=hashlib.sha256(data).hexdigest()[:16],  # far from those of the items: none looks leaked
        label="Figure 1",
        caption=caption,
        mentions=(f"As Figure 1 shows, the lesion of case {n} is round.",),
    )


def _sample(n: int, dataset: str) -> Sample:
    data = picture(n)
    modality = MODALITIES[n % 5]
    turns = (
        Turn("user", "<image>\nWhat does this picture show?"),
        Turn("assistant", HOSTILE if n == 0 else f"A {modality} phantom with a bright lesion, case {n}."),
        Turn("user", "Where is it?"),
        Turn("assistant", "左侧。" if n % 7 == 0 else "On the left."),
    )
    return Sample(
        sample_id=f"{dataset}-{n:04d}",
        dataset=dataset,
        image=Image(data, f"{n}.png"),
        image_sha256=hashlib.sha256(data).hexdigest(),
        image_phash=f"{n:016x}",
        group_id=f"PMC{n}",
        turns=turns if dataset == "instruct" else turns[:2],
        modality=modality,
        language="en",
        licence="CC BY",
        source="caption" if dataset == "alignment" else "generated-offline",
    )


def _item(n: int, benchmark: str) -> VQAItem:
    data = picture(500 + n)
    closed = n % 2 == 0
    return VQAItem(
        item_id=f"{benchmark}-{n}",
        benchmark=benchmark,
        split="test",
        image=Image(data, f"item{n}.png"),
        image_id=f"item{n}",
        image_sha256=hashlib.sha256(data).hexdigest(),
        image_phash=f"{n:016x}",
        question="Is there a lesion?" if closed else "Which organ is shown? <b>bold</b>",
        answer="yes" if closed else "liver",
        answer_type="closed" if closed else "open",
        answer_type_derived=False,
        question_type="presence" if closed else "organ",
        modality=MODALITIES[n % 5],
        organ="chest",
        language="en",
    )


def _outcome(row: int) -> FetchOutcome:
    status = ("ok", "ok", "ok", "ok", "ok", "media_absent", "md5_mismatch", "article_absent", "timeout")[row % 9]
    detail = "" if status == "ok" else f"{status} for <i>row</i> {row}"
    return FetchOutcome(
        row,
        f"p{row}",
        f"PMC{row}",
        status,
        detail,
        1 + row % 2,
        40_000,
        0.2,
        "",
        1,
        "CC BY" if status == "ok" else None,
    )


def _write_contracts(workspace: Workspace) -> None:
    def check(name: str, success: bool, rule: str, observed: object, expected: object, broken: int = 0) -> dict:
        examples = ["30000000_F1: ''", "<b>30000001_F1</b>"] if broken else []
        return {
            "name": name,
            "rule": rule,
            "success": success,
            "observed": observed,
            "expected": expected,
            "broken_rows": broken,
            "examples": examples,
        }

    good = [
        check("image_decodes", True, "every image decodes", 1.0, 1.0),
        check("caption_present", True, "at least 95 % have a caption", 0.975, 0.95, 1),
    ]
    bad = [
        check("turns_alternate", True, "user and assistant take turns", 1.0, 1.0),
        check("no_leakage", False, "no image of a benchmark's test split", 3, 0, 3),
    ]
    for name, checks, success in (("figures", good, True), ("alignment", good, True), ("instruct", bad, False)):
        result = {"contract": name, "success": success, "rows": 40, "checks": checks}
        write_json(workspace.contract(name) / "result.json", result)
    rows = [QuarantinedRow("instruct", "no_leakage", f"instruct-{n:04d}", HOSTILE) for n in range(3)]
    table = pa.Table.from_pylist([to_row(r) for r in rows], schema=schema_of(QuarantinedRow))
    pq.write_table(table, workspace.contract("instruct") / "quarantine.parquet")


def _curve(seed: int, steps: int = 120) -> list[dict]:
    draw_from = random.Random(seed)
    return [
        {
            "step": s,
            "loss": 0.4 + seed * 0.15 + 4 * math.exp(-s / 25) + draw_from.uniform(-0.12, 0.12),
            "lr": 2e-3 * 0.5 * (1 + math.cos(math.pi * s / steps)),
        }
        for s in range(1, steps + 1)
    ]


def _write_runs(workspace: Workspace) -> None:
    for r, recipe in enumerate(("tiny-llava-med", "tiny-cliva-med-phi2")):
        for stage in (1, 2):
            report = Report(
                step=f"train {recipe} {stage}",
                counts={"steps": 120, "samples": 480},
                metrics={"loss": 0.5, "samples_per_second": 31.4},
                details={"curves": {"all": _curve(r + stage)}},
                seed=7,
            )
            write_report(workspace.stage(recipe, stage), report, started=time.monotonic() - 48)
        targets = {name: _curve(r + i + 3) for i, name in enumerate(("vqa-rad", "slake"))}
        write_report(
            workspace.stage(recipe, 3), Report(step="train", details={"curves": targets}), started=time.monotonic()
        )


def _wrong_answer(item: VQAItem, recipe: str, text: str) -> dict:
    answer = WrongAnswer(
        item_id=item.item_id,
        benchmark=item.benchmark,
        model=recipe,
        stage="finetune",
        answer_type=item.answer_type,
        question=item.question,
        answer=item.answer,
        prediction=text,
        blind_prediction="unclear",
        rule="whole_word" if item.answer_type == "closed" else "token.recall",
        score=0.0,
        question_type=item.question_type,
        modality=item.modality,
        organ=item.organ,
        language=item.language,
        image_id=item.image_id,
        image=item.image,
    )
    return to_row(answer)


def _write_scores(workspace: Workspace) -> None:
    for r, recipe in enumerate(("tiny-llava-med", "tiny-cliva-med-phi2")):
        for b, benchmark in enumerate(("slake", "vqa-rad")):
            scores, answers, wrong = [], [], []
            for blind in (False, True):
                for answer_type, rule, base in (("closed", "whole_word", 84), ("open", "token.recall", 61)):
                    value = base - 7 * r - 3 * b - (33 if blind else 0)
                    scores.append(
                        Score(
                            benchmark,
                            recipe,
                            "finetune",
                            blind,
                            "all",
                            answer_type,
                            rule,
                            value,
                            value - 6,
                            value + 5,
                            20,
                        )
                    )
                    for i, modality in enumerate(MODALITIES):
                        v = float(max(0, value - 6 * i))
                        scores.append(
                            Score(
                                benchmark,
                                recipe,
                                "finetune",
                                blind,
                                f"modality={modality}",
                                answer_type,
                                rule,
                                v,
                                None,
                                None,
                                4,
                            )
                        )
            for n in range(40):
                text = HOSTILE if n == 0 else ("no" if n % 2 == 0 else "the lung")
                answers.append(Prediction(f"{benchmark}-{n}", benchmark, recipe, "finetune", False, "q", text))
                answers.append(Prediction(f"{benchmark}-{n}", benchmark, recipe, "finetune", True, "q", "unclear"))
                if n % 3 == 0:
                    wrong.append(_wrong_answer(_item(n, benchmark), recipe, text))
            folder = workspace.scores(recipe, benchmark)
            write_records(folder / "scores", Score, scores)
            (folder / "scores" / "part-00000.parquet").rename(folder / "scores" / "scores.parquet")
            pq.write_table(
                pa.Table.from_pylist(wrong, schema=schema_of(WrongAnswer)), folder / "scores" / "wrong_answers.parquet"
            )
            write_records(workspace.predictions(recipe, benchmark) / "answers", Prediction, answers)


def _write_leakage(workspace: Workspace) -> None:
    leaked = [
        LeakedItem("slake", f"slake-{n}", f"item{n}", "instruct", "bytes" if n < 2 else "phash", f"instruct-{n:04d}", n)
        for n in range(4)
    ]
    write_records(workspace.leaked_items, LeakedItem, leaked)
    ways = {way: {"images": 0, "items": 0} for way in ("bytes", "image_id", "case_id", "phash", "question")}
    ways["bytes"] = ways["phash"] = {"images": 2, "items": 2}
    found = Comparison("instruct", "slake:test", 60, 40, 2, 2, 40, 2, 38, ways, 4, ["item0", "item1"])
    report = Report(step="leakage", details={"comparisons": [asdict(found)]})
    write_report(workspace.leakage, report, started=time.monotonic())


def build_workspace(root: Path) -> Workspace:
    """Every table that the dashboard reads, with a few rows each."""
    workspace = Workspace(root).ensure()
    write_records(workspace.figure_shards, Figure, (_figure(n) for n in range(40)))
    write_records(workspace.fetch_outcomes, FetchOutcome, (_outcome(n) for n in range(72)))
    write_report(workspace.figures, Report(step="fetch", counts={"rows": 72, "figures": 40}), started=time.monotonic())
    for name in ("alignment", "instruct"):
        write_records(workspace.samples(name), Sample, (_sample(n, name) for n in range(60)))
        write_report(workspace.dataset(name), Report(step=name, counts={"samples": 60}), started=time.monotonic())
    for name in ("slake", "vqa-rad"):
        write_records(workspace.items(name), VQAItem, (_item(n, name) for n in range(40)))
        write_report(workspace.benchmark(name), Report(step=name, counts={"items": 40}), started=time.monotonic())
    _write_contracts(workspace)
    _write_runs(workspace)
    _write_scores(workspace)
    write_leaderboard(workspace)
    _write_leakage(workspace)
    return workspace


def write_untrained_checkpoint(workspace: Workspace) -> None:
    """The twin before any training, as its third stage: it answers nonsense, through the real code."""
    from medvlm.config import load_recipe
    from medvlm.models.checkpoint import Checkpoint, build_model, save_checkpoint
    from medvlm.models.tokenizer import train_tokenizer
    from medvlm.models.vision import ImageProcessor

    recipe = load_recipe("tiny-llava-med")
    tokenizer = train_tokenizer(recipe, ["What is shown? A chest radiograph with a nodule."] * 20)
    processor = ImageProcessor.of(recipe.model.vision_tower)
    checkpoint = Checkpoint(build_model(recipe, tokenizer), tokenizer, processor, recipe, {"stage": "finetune"})
    save_checkpoint(workspace.checkpoint(recipe.name, 3), checkpoint)
