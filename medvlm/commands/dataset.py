"""`medvlm dataset`: build and describe training datasets and benchmarks."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from pathlib import Path

import click

from medvlm.cli import print_json
from medvlm.commands.building import BUDGET_OPTION, JSON_OPTION, KEEP_OPTION, ChatAccess, print_report
from medvlm.commands.preference import build_preference
from medvlm.store import Workspace

__all__ = ["dataset"]


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
    print_report(report, as_json)


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
    print_report(report, as_json)


@dataset.command("describe")
@click.argument("target")
@JSON_OPTION
@click.pass_obj
def describe(obj: str, target: str, as_json: bool) -> None:
    """Count a dataset by split, answer type, language, modality and licence.

    What was dropped on the way is counted by its reason, and published files are compared by their SHA-256.
    TARGET is figures, a dataset or benchmark of the workspace, a folder of shards, or a published release or file.

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

    For experiments of your own: the recipes train on all samples, as the published systems do, and are tested
    on benchmarks. The splits are a table of sample_id and split in datasets/NAME/splits, to be joined to the samples.

    \b
    medvlm dataset split instruct --validation 0.05
    medvlm dataset split preference/tiny-stllava-med --test 0.1
    """
    from medvlm.data.split import split_dataset

    report = split_dataset(Workspace(Path(obj)).ensure(), name, validation=validation, test=test, seed=seed)
    print_report(report, as_json)


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


dataset.add_command(build_preference)
