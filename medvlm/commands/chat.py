"""`medvlm chat`: talk to a checkpoint about an image."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from medvlm import RESEARCH_USE_ONLY
from medvlm.cli import print_json
from medvlm.errors import InputError
from medvlm.records import Turn

if TYPE_CHECKING:
    from medvlm.serving.chat import ChatModel, Sampling


@click.command()
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder of a finished checkpoint, such as workspace/checkpoints/RECIPE/stage3/checkpoint/vqa-rad.",
)
@click.option("--image", type=click.Path(path_type=Path), help="PNG, JPEG, … or DICOM, of which only pixels are read.")
@click.option("--question", help="One question; without it, questions are asked until Ctrl-D.")
@click.option("--temperature", type=click.FloatRange(0, 2), default=0.0, show_default=True, help="0: likeliest word.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True)
@click.option("--max-tokens", type=click.IntRange(1), default=256, show_default=True, help="Of one answer.")
@click.option("--seed", type=int, default=0, show_default=True, help="The same seed gives the same answer.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object: the turns, when all were said.")
def chat(
    checkpoint: Path,
    image: Path | None,
    question: str | None,
    temperature: float,
    top_p: float,
    max_tokens: int,
    seed: int,
    as_json: bool,
) -> None:
    """Ask a checkpoint about an image; its answers are streamed word by word.

    Questions come from --question, from a terminal, or line by line from a pipe.

    \b
    Examples:
      medvlm chat --checkpoint DIR --image xray.png --question "Is there a nodule?"
      medvlm chat --checkpoint DIR --image slice.dcm --temperature 0.2
      medvlm chat --checkpoint DIR --image xray.png --json < questions.txt
    """
    from medvlm.serving.chat import ChatModel, Sampling
    from medvlm.serving.uploads import open_upload

    picture = open_upload(_bytes(image), str(image)) if image else None
    model = ChatModel.load(checkpoint)
    click.echo(RESEARCH_USE_ONLY, err=True)
    sampling = Sampling(temperature, top_p, max_tokens, seed)
    turns: list[Turn] = []
    if question is not None:
        _answer(model, picture, turns, question, sampling, as_json)
    else:
        _talk(lambda asked: _answer(model, picture, turns, asked, sampling, as_json))
    if as_json:
        print_json(
            {
                "model": model.name,
                "image": str(image) if image else None,
                "turns": [{"role": turn.role, "text": turn.text} for turn in turns],
            }
        )


def _talk(answer: Callable[[str], None]) -> None:
    """Questions until the input ends; one that cannot be answered is said and the talk goes on."""
    terminal = sys.stdin.isatty()
    if terminal:
        click.echo("Ask; Ctrl-D ends.", err=True)
    while True:
        if terminal:
            click.echo("> ", nl=False, err=True)
        line = sys.stdin.readline()
        if not line:
            return
        if not line.strip():
            continue
        try:
            answer(line.strip())
        except InputError as error:
            if not terminal:
                raise
            click.echo(f"error: {error}", err=True)


def _answer(
    model: ChatModel, picture: bytes | None, turns: list[Turn], question: str, sampling: Sampling, quiet: bool
) -> None:
    """Ask, and show the answer as it is made; both become turns."""
    said = ""
    stream = model.stream(picture, [*turns, Turn("user", question)], sampling)
    try:
        for piece in stream:
            shown = piece if said else piece.lstrip()
            said += shown
            if not quiet:
                click.echo(shown, nl=False)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        # At a terminal Ctrl-C ends the answer, not the talk: what was said stays.
    if not quiet:
        click.echo()
    turns += [Turn("user", question), Turn("assistant", said.strip())]


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"the image cannot be read: {error.strerror}", where=str(path), hint="give an image file"
        ) from error
