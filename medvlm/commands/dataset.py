"""`medvlm dataset`: build and describe training datasets and benchmarks."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from medvlm.cli import print_json
from medvlm.store import Report, Workspace, iterate_records

if TYPE_CHECKING:
    from medvlm.data.endpoint import ChatClient
    from medvlm.data.preference import GenerationRequest

__all__ = ["dataset"]

BUDGET_OPTION = click.option("--token-budget", type=click.IntRange(1), help="Most tokens to spend on the endpoint.")
KEEP_OPTION = click.option(
    "--keep-leaked", is_flag=True, help="Keep images that a benchmark of this workspace tests with."
)
JSON_OPTION = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


@click.group()
def dataset() -> None:
    """Build and describe training datasets and benchmarks.

    \b
    Examples:
      medvlm dataset build alignment --official alignment_500k.json
      medvlm dataset build-benchmark vqa-rad --source ~/data/vqa-rad
      medvlm dataset describe alignment
    """


@dataset.command("build")
@click.argument("name", type=click.Choice(["alignment", "instruct"]))
@click.option(
    "--official",
    "--from",
    "sources",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Published file, or a folder of them, joined to the fetched figures; repeat for several. "
    "Or a folder of figure shards.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Decides which prompt each figure gets.")
@KEEP_OPTION
@click.option("--endpoint", is_flag=True, help="A chat model writes the conversations.")
@BUDGET_OPTION
@click.option("--concurrency", type=click.IntRange(1, 256), default=8, show_default=True, help="Requests at a time.")
@JSON_OPTION
@click.pass_obj
def build(
    obj: str,
    name: str,
    sources: tuple[Path, ...],
    seed: int,
    keep_leaked: bool,
    endpoint: bool,
    token_budget: int | None,
    concurrency: int,
    as_json: bool,
) -> None:
    """Build the training dataset NAME from the fetched figures.

    Without --official, captions are the alignment texts, and rules write the conversations; with
    --endpoint, a chat model writes them: set MEDVLM_ENDPOINT_URL (up to and with /v1),
    MEDVLM_ENDPOINT_MODEL and, if it wants one, MEDVLM_ENDPOINT_KEY. Answers are kept, so that a
    stopped run goes on where it was.

    \b
    medvlm dataset build alignment
    medvlm dataset build instruct --official llava_med_instruct_60k_inline_mention.json
    medvlm dataset build alignment --official texts      a folder: LLaVA-Med's JSON, ChiMed-VL's JSONL
    medvlm dataset build instruct --endpoint --token-budget 2000000
    """
    from medvlm.data.alignment import build_alignment
    from medvlm.data.official_texts import holds_shards

    workspace = Workspace(Path(obj)).ensure()
    folders = [source for source in sources if source.is_dir() and holds_shards(source)]
    official = [source for source in sources if source not in folders]
    if len(folders) > 1 or (folders and official):
        raise click.UsageError("give one folder of figure shards, or published files, not both")
    shards = folders[0] if folders else None
    if endpoint and (name == "alignment" or official):
        raise click.UsageError("--endpoint writes instruct conversations, and not together with a published file")
    if name == "alignment":
        report = build_alignment(workspace, official=official, figures=shards, seed=seed, keep_leaked=keep_leaked)
    else:
        from medvlm.data.instruct import build_instruct

        with ChatAccess(token_budget, concurrency).opened(workspace) if endpoint else nullcontext() as chat:
            report = build_instruct(
                workspace, official=official, figures=shards, client=chat, seed=seed, keep_leaked=keep_leaked
            )
    _print_report(report, as_json)


@dataset.command("build-preference")
@click.option("--recipe", required=True, help="Whose pairs these are, and whose model asks and answers.")
@click.option("--official", type=click.Path(path_type=Path), help="STLLaVA-Med-DPO's JSON, joined to the figures.")
@click.option(
    "--checkpoint", type=click.Path(path_type=Path), help="The model; the recipe's own after stage 2 by default."
)
@click.option("--about", default="instruct", show_default=True, help="The dataset whose images are asked about.")
@click.option(
    "--ask",
    type=click.Choice(["model", "dataset"]),
    default="model",
    show_default=True,
    help="Whose questions; dataset for a model that was not taught to ask.",
)
@click.option("--questions", type=click.IntRange(1, 20), default=1, show_default=True, help="For each image.")
@click.option(
    "--temperature",
    type=click.FloatRange(0.01, 5),
    default=0.8,
    show_default=True,
    help="Of the answers.",
)
@click.option("--max-tokens", type=click.IntRange(1), default=128, show_default=True, help="Of an answer.")
@click.option("--limit", type=click.IntRange(1), help="As many images, the first ones.")
@click.option("--seed", type=int, default=0, show_default=True, help="Decides requests and sampling.")
@click.option("--endpoint", is_flag=True, help="A chat model judges; else the overlap with the known answer does.")
@BUDGET_OPTION
@KEEP_OPTION
@JSON_OPTION
@click.pass_obj
def build_preference(
    obj: str,
    recipe: str,
    official: Path | None,
    checkpoint: Path | None,
    endpoint: bool,
    token_budget: int | None,
    keep_leaked: bool,
    as_json: bool,
    **asking: Any,
) -> None:
    """Build a recipe's preference pairs: its model answers each question twice, or published ones.

    What people preferred in the chat is added. The judge's endpoint is named by the environment, as for
    'dataset build --endpoint'.

    \b
    medvlm dataset build-preference --recipe tiny-llava-med --limit 200
    medvlm dataset build-preference --recipe llava-med --official stllava_dpo.json
    """
    from medvlm.data import preference
    from medvlm.data.conversations import decisions

    workspace = Workspace(Path(obj)).ensure()
    if official and (checkpoint or endpoint):
        raise click.UsageError("with --official, the published JSON, no model asks and none judges")
    if official:
        rows = preference.join_preferences(workspace.figure_shards, official, decisions(workspace, "figures"))
        report = preference.build_preference(workspace, recipe, rows, official=official, keep_leaked=keep_leaked)
    else:
        access = ChatAccess(token_budget, concurrency=1) if endpoint else None
        folder = checkpoint or workspace.checkpoint(recipe, 2)
        report = _ask_checkpoint(workspace, recipe, folder, access, Asking(**asking), keep_leaked)
    _print_report(report, as_json)


@dataclasses.dataclass(frozen=True)
class Asking:
    """How a model is asked for preference pairs."""

    about: str
    ask: Literal["model", "dataset"]
    questions: int
    temperature: float
    max_tokens: int
    limit: int | None
    seed: int


@dataclasses.dataclass(frozen=True)
class ChatAccess:
    """How much of the endpoint that the environment names may be used."""

    token_budget: int | None
    concurrency: int

    @contextmanager
    def opened(self, workspace: Workspace) -> Generator[ChatClient]:
        """A client whose answers are kept in the workspace; says in the end what was spent."""
        from medvlm.data.endpoint import ChatClient, Endpoint, EndpointSettings, TokenBudget
        from medvlm.data.response_cache import ResponseCache

        endpoint = Endpoint.from_environment()
        with ResponseCache(workspace.scratch("endpoint") / "answers.sqlite") as cache:
            settings = EndpointSettings(concurrency=self.concurrency)
            client = ChatClient(endpoint, cache, budget=TokenBudget(self.token_budget), settings=settings)
            yield client
            click.echo(f"spent {client.budget.spent:,} tokens", err=True)


def _ask_checkpoint(
    workspace: Workspace,
    recipe: str,
    checkpoint: Path,
    access: ChatAccess | None,
    asking: Asking,
    keep_leaked: bool,
) -> Report:
    from medvlm.data.conversations import count_rows
    from medvlm.data.judges import EndpointJudge, OverlapJudge
    from medvlm.data.preference import build_preference, self_preferences
    from medvlm.data.watched import watched
    from medvlm.records import Sample

    with access.opened(workspace) if access else nullcontext() as client:
        folder = workspace.samples(asking.about)
        total = min(count_rows(folder), asking.limit or count_rows(folder))
        samples = itertools.islice(iterate_records(folder, Sample), total)
        rows = self_preferences(
            watched(samples, total, "images"),
            _answering(checkpoint, asking.temperature, asking.max_tokens),
            EndpointJudge(client) if client else OverlapJudge(),
            questions=asking.questions,
            ask=asking.ask,
            seed=asking.seed,
        )
        return build_preference(workspace, recipe, rows, seed=asking.seed, keep_leaked=keep_leaked)


def _answering(
    checkpoint: Path, temperature: float, max_tokens: int
) -> Callable[[Sequence[GenerationRequest]], list[str]]:
    """The checkpoint as the function that preference building asks."""
    from medvlm.records import Turn
    from medvlm.serving.chat import ChatModel, Sampling

    model = ChatModel.load(checkpoint)

    def answer(requests: Sequence[GenerationRequest]) -> list[str]:
        return [
            "".join(
                model.stream(
                    request.image,
                    [Turn("user", request.prompt)],
                    Sampling(temperature, max_new_tokens=max_tokens, seed=request.seed),
                )
            )
            for request in requests
        ]

    return answer


@dataset.command("build-benchmark")
@click.argument("name")
@click.option(
    "--source",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder of the official release.",
)
@click.option(
    "--tolerated-missing",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="Share of questions whose image may be missing or broken.",
)
@JSON_OPTION
@click.pass_obj
def build_benchmark(workspace: str, name: str, source: Path, tolerated_missing: float, as_json: bool) -> None:
    """Read benchmark NAME from its official release, or from its Parquet copy.

    NAME is vqa-rad, slake, slake-zh, pathvqa, data-rad, pmc-vqa, pneumoniamnist, organcmnist or pathmnist.

    \b
    medvlm dataset build-benchmark vqa-rad --source data/vqa-rad
    medvlm dataset build-benchmark slake-zh --source data/slake --json
    """
    from medvlm.data import benchmarks

    report = benchmarks.build_benchmark(Workspace(Path(workspace)).ensure(), name, source, tolerance=tolerated_missing)
    _print_report(report, as_json)


@dataset.command("describe")
@click.argument("target")
@JSON_OPTION
@click.pass_obj
def describe(obj: str, target: str, as_json: bool) -> None:
    """Count a dataset by split, answer type, language, modality and licence.

    TARGET is a dataset or benchmark of the workspace, a folder of shards, or a published release or file.

    \b
    medvlm dataset describe alignment
    medvlm dataset describe data/slake --json
    medvlm dataset describe llava_med_instruct_10k.json
    """
    from medvlm.data import describe as library

    found = library.describe(Workspace(Path(obj)), target)
    if as_json:
        print_json([dataclasses.asdict(one) for one in found] if len(found) > 1 else dataclasses.asdict(found[0]))
        return
    for one in found:
        licence = f", {one.licence}" if one.licence else ""
        click.echo(f"{one.name}: {one.rows:,} {one.kind}, {one.images:,} images, {one.groups:,} groups{licence}")
        for field, counts in one.by.items():
            if len(counts) <= 40:
                click.echo(f"  {field}")
                for value, count in counts.items():
                    click.echo(f"    {value or '(empty)':<32} {count:>9,}")
            else:
                click.echo(f"  {field}: {len(counts):,} different values")
        for reason, lost in one.dropped.items():
            click.echo(f"  dropped, {reason}: {lost['count']:,}, such as {lost['first'][0]}")
        for file in one.files:
            click.echo(f"  file {file['file']}: SHA-256 {file['sha256'][:16]}…, published content: {file['official']}")


@dataset.command("split")
@click.argument("name")
@click.option("--validation", type=float, default=0.02, show_default=True, help="Share of the articles.")
@click.option("--test", type=float, default=0.0, show_default=True, help="Share of the articles.")
@click.option("--seed", type=int, default=0, show_default=True)
@JSON_OPTION
@click.pass_obj
def split(obj: str, name: str, validation: float, test: float, seed: int, as_json: bool) -> None:
    """Write splits of NAME that never cut through an article or an image.

    \b
    medvlm dataset split instruct --validation 0.05
    """
    from medvlm.data.split import split_dataset

    report = split_dataset(Workspace(Path(obj)).ensure(), name, validation=validation, test=test, seed=seed)
    _print_report(report, as_json)


@dataset.command("card")
@click.argument("names", nargs=-1, required=True)
@click.pass_obj
def card(obj: str, names: tuple[str, ...]) -> None:
    """Write README.md and croissant.json beside datasets, with the leakage found since they were built.

    \b
    medvlm dataset card alignment instruct vqa-rad
    """
    from medvlm.data.card import write_card

    for name in names:
        click.echo(write_card(Workspace(Path(obj)).ensure(), name))


def _print_report(report: Report, as_json: bool) -> None:
    if as_json:
        print_json(dataclasses.asdict(report))
        return
    click.echo(f"{report.step}: done in {report.duration_s:.1f} s")
    for name, count in report.counts.items():
        click.echo(f"  {name:<24} {count:>9,}")
    for reason, lost in report.details.get("dropped", {}).items():
        click.echo(f"  dropped, {reason}: {lost['count']:,}, such as {lost['first'][0]}")
