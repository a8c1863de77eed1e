"""The model card: everything a stranger must know about a recipe's model, read from the lineage itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from medvlm import RESEARCH_USE_ONLY
from medvlm.config import load_recipe
from medvlm.errors import WorkspaceError
from medvlm.evaluation.accepted import read_scores
from medvlm.evaluation.metrics import HEADLINE
from medvlm.recipe_schema import Recipe, Stage
from medvlm.records import Score
from medvlm.store import Report, Workspace, read_report

__all__ = ["dataset_names", "licences_of", "model_card", "scores_of"]

LEAKED_SLICE = "leaked=false"


def model_card(workspace: Workspace, name: str) -> str:
    """README.md of a release, with the metadata header that model hubs read.

    Args:
        workspace: With the recipe's three stages trained and its benchmarks scored.
        name: The recipe.

    Raises:
        WorkspaceError: A stage or a score is missing; it says which command makes it.
        RecipeError: There is no such recipe.
    """
    recipe = load_recipe(name)
    sections = [
        _summary(recipe),
        _stages(workspace, recipe),
        _data(workspace, recipe),
        _scores(scores_of(workspace, recipe)),
        _leakage(workspace, recipe),
        _use(recipe),
    ]
    return f"---\n{_header(workspace, recipe)}\n---\n\n" + "\n\n".join(sections) + "\n"


def dataset_names(recipe: Recipe) -> tuple[str, ...]:
    """Step folders under ``datasets/`` that the recipe's stages learn from."""
    named = {"alignment": "alignment", "instruct": "instruct", "preference": f"preference/{recipe.name}"}
    return tuple(dict.fromkeys(named[stage.data] for stage in recipe.stages if stage.data in named))


def licences_of(workspace: Workspace, recipe: Recipe) -> dict[str, int]:
    """Samples and items that the recipe learned from, by licence."""
    counts: dict[str, int] = {}
    for report in _reports(workspace, recipe).values():
        for licence, count in report.details.get("by", {}).get("licence", {}).items():
            counts[licence] = counts.get(licence, 0) + count
    return dict(sorted(counts.items()))


def scores_of(workspace: Workspace, recipe: Recipe) -> list[Score]:
    """Every score of the recipe on its benchmarks.

    Raises:
        WorkspaceError: A benchmark has not been scored.
    """
    return [
        score
        for benchmark in recipe.benchmarks
        for score in read_scores(workspace.scores(recipe.name, benchmark) / "scores" / "scores.parquet")
    ]


def _reports(workspace: Workspace, recipe: Recipe) -> dict[str, Report]:
    folders = {name: workspace.dataset(name) for name in dataset_names(recipe)}
    if any(stage.data == "benchmarks" for stage in recipe.stages):
        folders |= {name: workspace.benchmark(name) for name in recipe.benchmarks}
    return {name: report for name, folder in folders.items() if (report := read_report(folder)) is not None}


def _header(workspace: Workspace, recipe: Recipe) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="visual-question-answering",
            dataset_type=score.benchmark,
            dataset_name=score.benchmark,
            metric_type=f"{score.answer_type} {score.rule}",
            metric_value=score.value,
            metric_name=f"{score.answer_type} ({score.rule})",
        )
        for score in _headline(scores_of(workspace, recipe))
        if not score.blind
    ]
    licences = licences_of(workspace, recipe)
    data = ModelCardData(
        language=recipe.language,
        library_name="transformers",
        license="other",
        license_name="research-use-only",
        model_name=recipe.name,
        pipeline_tag="image-text-to-text",
        tags=["medical", "vision-language", "research-use-only", "not-for-clinical-use", *_tags(licences)],
        eval_results=results,
    )
    return data.to_yaml()


def _tags(licences: dict[str, int]) -> list[str]:
    return ["non-commercial-data"] if any("NC" in licence for licence in licences) else []


def _summary(recipe: Recipe) -> str:
    model = recipe.model
    return "\n".join(
        (
            f"# {recipe.title}",
            "",
            f"**{RESEARCH_USE_ONLY}**",
            "",
            f"A model of the recipe `{recipe.name}` ({recipe.system}).",
            "",
            _table(
                ("part", "what"),
                [
                    ("vision tower", f"{model.vision_tower.architecture}, from `{model.vision_tower.weights}`"),
                    ("projector", model.projector.kind),
                    (
                        "language model",
                        f"{model.language_model.architecture}, {model.language_model.layers} layers of "
                        f"{model.language_model.hidden_size}, from `{model.language_model.weights}`",
                    ),
                    ("language", recipe.language),
                ],
            ),
        )
    )


def _stages(workspace: Workspace, recipe: Recipe) -> str:
    rows: list[Sequence[object]] = []
    for number, stage in enumerate(recipe.stages, start=1):
        report = read_report(workspace.stage(recipe.name, number))
        if report is None:
            raise WorkspaceError(
                f"stage {number} of {recipe.name} has not been trained",
                where=str(workspace.stage(recipe.name, number)),
                hint=f"run: medvlm train --recipe {recipe.name} --stage {number}",
            )
        rows.append(_stage_row(number, stage, report))
    header = ("stage", "data", "samples", "steps", "rate", "parameters trained", "loss", "hardware", "seconds", "run")
    return f"## Training\n\n{_table(header, rows)}"


def _stage_row(number: int, stage: Stage, report: Report) -> Sequence[object]:
    counts = report.counts
    losses = [f"{value:.4f}" for name, value in report.metrics.items() if name.startswith("loss")]
    return (
        f"{number} {stage.name}",
        stage.data,
        counts.get("samples", ""),
        counts.get("steps", ""),
        f"{stage.learning_rate:g}",
        f"{counts.get('parameters_trained', 0):,} of {counts.get('parameters', 0):,}",
        ", ".join(losses),
        report.details.get("engine", ""),
        f"{report.duration_s:.0f}",
        report.fingerprint,
    )


def _data(workspace: Workspace, recipe: Recipe) -> str:
    rows = [
        (name, sum(report.counts.get(key, 0) for key in ("samples", "items", "pairs")), _licences(report))
        for name, report in _reports(workspace, recipe).items()
    ]
    synthetic = any(report.details.get("synthetic") for report in _reports(workspace, recipe).values())
    note = "\n\nThe pictures are synthetic phantoms drawn by code, not medical data." if synthetic else ""
    credit = "\n\nEach figure's authors, article and licence stand in `ATTRIBUTION.csv`."
    return f"## Data\n\n{_table(('dataset', 'samples', 'licences'), rows)}{note}{credit}"


def _licences(report: Report) -> str:
    by = report.details.get("by", {}).get("licence", {})
    return ", ".join(f"{licence} ({count:,})" for licence, count in sorted(by.items())) or "see its release"


def _headline(scores: Iterable[Score], *, slice_: str = "all") -> list[Score]:
    return [s for s in scores if s.slice == slice_ and HEADLINE[s.answer_type] == s.rule]


def _scores(scores: list[Score]) -> str:
    def value(like: Score, *, blind: bool, slice_: str) -> str:
        for score in _headline(scores, slice_=slice_):
            same = (score.benchmark, score.stage, score.answer_type) == (like.benchmark, like.stage, like.answer_type)
            if same and score.blind == blind:
                interval = "" if score.low is None else f" ({score.low:.1f} to {score.high:.1f})"
                return f"{score.value:.1f}{interval}"
        return "–"

    rows = [
        (
            score.benchmark,
            score.stage,
            score.answer_type,
            f"`{score.rule}`",
            value(score, blind=False, slice_="all"),
            value(score, blind=True, slice_="all"),
            value(score, blind=False, slice_=LEAKED_SLICE),
            score.n,
        )
        for score in _headline(scores)
        if not score.blind
    ]
    header = ("benchmark", "stage", "answers", "rule", "score (95 %)", "blind", "clean items only", "n")
    text = (
        "Per cent. *Blind* is the same model shown a mean image: what it knows without looking. *Clean items only* "
        "leaves out items whose image was trained on; a dash says that none was."
    )
    return f"## Scores\n\n{_table(header, rows)}\n\n{text}"


def _leakage(workspace: Workspace, recipe: Recipe) -> str:
    report = read_report(workspace.leakage)
    if report is None:
        return "## Leakage\n\nNot measured: `medvlm leakage` was not run."
    learned = {*dataset_names(recipe), *(f"{name}:train" for name in recipe.benchmarks)}
    tested = {f"{name}:test" for name in recipe.benchmarks}
    rows = [
        (row["train"], row["test"], f"{row['leaked_images']} of {row['test_images']}", row["near_images"])
        for row in report.details.get("comparisons", [])
        if row["train"] in learned and row["test"] in tested
    ]
    return f"## Leakage\n\n{_table(('trained on', 'tested on', 'same test images', 'similar test images'), rows)}"


def _use(recipe: Recipe) -> str:
    return "\n".join(
        (
            "## Use and limits",
            "",
            "For research on medical vision-language models: reproducing published systems, studying their data and "
            "their errors. Not for clinical use: it answers fluently and is often wrong, and was never tested on "
            "patients. Scores on small public sets say little about other hospitals, devices, people or languages. "
            "Anyone who gives the model on must keep this notice and obey the licences of the data.",
            "",
            "Made again with:",
            "",
            "```",
            f"medvlm configure --recipe {recipe.name}",
            "dvc repro",
            "```",
        )
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
