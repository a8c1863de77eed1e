"""The `medvlm` command: a table of verbs, each loaded only when it is called."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import click

from medvlm import RESEARCH_USE_ONLY, __version__
from medvlm.errors import MedVLMError

# Verb → (module:function, help in one line). The table keeps `medvlm --help` under half a second:
# no verb's own imports are paid for until it runs.
VERBS: dict[str, tuple[str, str]] = {
    "configure": ("medvlm.commands.configure:configure", "Choose URL list, store, sources and recipes."),
    "workspace": ("medvlm.commands.workspace:workspace", "Bring in and put up a workspace that lies in a bucket."),
    "corpus": ("medvlm.commands.corpus:corpus", "Draw the synthetic sample corpus."),
    "fetch": ("medvlm.commands.fetch:fetch", "Fetch the figures of a URL list from the PMC Cloud Service."),
    "find": ("medvlm.commands.find:find", "Find articles with E-utilities and write them as a list to fetch."),
    "recheck": ("medvlm.commands.recheck:recheck", "Look for retractions and licence changes since the fetch."),
    "dataset": ("medvlm.commands.dataset:dataset", "Build and describe training datasets and benchmarks."),
    "leakage": ("medvlm.commands.leakage:leakage", "Find benchmark images and questions that are in a training set."),
    "privacy": ("medvlm.commands.privacy:privacy", "Flag burned-in text for review; de-identify DICOM files."),
    "recipe": ("medvlm.commands.recipe:recipe", "List, show and check recipes."),
    "plan": ("medvlm.commands.plan:plan", "Reckon memory, hours and cost of a recipe on given hardware."),
    "train": ("medvlm.commands.train:train", "Train one stage of a recipe as a DeepSpeed job."),
    "features": ("medvlm.commands.features:features", "Show and remove what frozen towers made of images."),
    "delta": ("medvlm.commands.delta:delta", "Add published delta weights to their base model, or make them."),
    "import-checkpoint": (
        "medvlm.commands.import_checkpoint:import_checkpoint",
        "Read a checkpoint of the original LLaVA layout, every tensor accounted for.",
    ),
    "train-router": (
        "medvlm.commands.train_router:train_router",
        "Train the domain router of a mixture of experts, between stages 2 and 3.",
    ),
    "export": ("medvlm.commands.export:export", "Write a checkpoint as stock LLaVA, which vLLM and others serve."),
    "predict": ("medvlm.commands.predict:predict", "Answer a benchmark with a checkpoint, with and without the image."),
    "score": ("medvlm.commands.score:score", "Score predictions under every named rule."),
    "compare": ("medvlm.commands.compare:compare", "Compare two models' answers, pair by pair."),
    "chat-eval": ("medvlm.commands.chat_eval:chat_eval", "Judge chat answers beside LLaVA-Med's table."),
    "export-benchmark": (
        "medvlm.commands.export_benchmark:export_benchmark",
        "Write a benchmark for another harness, such as lmms-eval.",
    ),
    "leaderboard": ("medvlm.commands.leaderboard:leaderboard", "Show all scores beside the published ones."),
    "chat": ("medvlm.commands.chat:chat", "Talk to a checkpoint about an image."),
    "serve": ("medvlm.commands.serve:serve", "Serve a checkpoint as OpenAI's chat completions."),
    "release": ("medvlm.commands.release:release", "Bundle a model with card, credit and checksums; promote it."),
}


class LazyGroup(click.Group):
    """A command group whose commands are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The verbs in the order of the pipeline."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The verb's command, imported now; None if there is no such verb."""
        if cmd_name not in VERBS:
            return None
        module, function = VERBS[cmd_name][0].split(":")
        return getattr(importlib.import_module(module), function)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Remember the verb and its arguments, which say what of a bucket is brought in."""
        typed = list(args)
        rest = super().parse_args(ctx, args)
        ctx.meta["command"] = typed[len(typed) - len(rest) - 1 :]
        return rest

    def invoke(self, ctx: click.Context) -> Any:
        """Run the verb, on a local copy where the workspace is a bucket; its failure is noted for the dashboard."""
        if not ctx.params["workspace"].startswith("s3://"):
            return self._noted(ctx)
        from medvlm.step_files import opened_copy

        ctx.meta["bucket"] = ctx.params["workspace"]
        with opened_copy(ctx.meta["bucket"], ctx.meta["command"]) as folder:
            ctx.params["workspace"] = str(folder)
            return self._noted(ctx)

    def _noted(self, ctx: click.Context) -> Any:
        from medvlm.failures import underway

        root = Path(ctx.params["workspace"])
        try:
            with underway(root, () if "--help" in ctx.meta["command"] else ctx.meta["command"]):
                return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            from medvlm.failures import record_failure

            record_failure(Path(ctx.params["workspace"]), ctx.meta.get("command", ()), error)
            raise

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table of verbs without importing any of them."""
        with formatter.section("Verbs, in the order of the pipeline"):
            formatter.write_dl([(verb, line) for verb, (_, line) in VERBS.items()])


@click.command(cls=LazyGroup, epilog=f"{RESEARCH_USE_ONLY} Start with: make demo")
@click.version_option(__version__)
@click.option(
    "--workspace",
    type=click.Path(file_okay=False),
    default="workspace",
    envvar="MEDVLM_WORKSPACE",
    show_default=True,
    help="Folder that holds everything the pipeline makes, or s3://bucket/prefix: see 'medvlm workspace --help'.",
)
@click.pass_context
def cli(ctx: click.Context, workspace: str) -> None:
    """From PubMed Central figure URLs to benchmarked medical vision-language models."""
    ctx.obj = workspace


def print_json(value: Any) -> None:
    """Print one JSON object, or list, and nothing else, on standard output."""
    click.echo(json.dumps(value, ensure_ascii=False, indent=2))


def main() -> None:
    """Run the command line: exit 0 when done, 1 with a readable error, 2 on wrong usage, 130 on Ctrl-C."""
    try:
        cli(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("stopped; run the same command again to go on", err=True)
        sys.exit(130)
    except MedVLMError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    except Exception as error:  # noqa: BLE001  # the command line is one of three places that may
        import traceback

        traceback.print_exc()
        click.echo(f"\nerror: {type(error).__name__}: {error}", err=True)
        click.echo("  next:  this is a bug in medvlm; please report it", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
