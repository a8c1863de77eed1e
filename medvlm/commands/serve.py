"""`medvlm serve`: a checkpoint behind OpenAI's chat completions."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path

import click

from medvlm import RESEARCH_USE_ONLY
from medvlm.errors import InputError


@click.command()
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder of a finished checkpoint, such as workspace/checkpoints/RECIPE/stage3/checkpoint/vqa-rad.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Beyond this machine only with MEDVLM_API_KEY.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option("--model-name", help="What requests call the model.  [default: the recipe's name]")
@click.option("--max-batch", type=click.IntRange(1), default=16, show_default=True, help="Answers made together.")
@click.option("--queue-limit", type=click.IntRange(1), default=64, show_default=True, help="Waiting; more get 429.")
@click.option("--max-tokens", type=click.IntRange(1), default=1024, show_default=True, help="Of one answer.")
@click.option("--max-request-mb", type=click.FloatRange(0.001), default=20.0, show_default=True, help="Image included.")
@click.option("--time-limit", type=click.FloatRange(0.1), default=120.0, show_default=True, help="Seconds an answer.")
@click.option("--grace", type=click.IntRange(0), default=30, show_default=True, help="Seconds to finish after SIGTERM.")
@click.option("--allow-remote-images", is_flag=True, help="Fetch images from public addresses that requests name.")
def serve(
    checkpoint: Path,
    host: str,
    port: int,
    model_name: str | None,
    max_batch: int,
    queue_limit: int,
    max_tokens: int,
    max_request_mb: float,
    time_limit: float,
    grace: int,
    allow_remote_images: bool,
) -> None:
    """Serve a checkpoint as /v1/chat/completions, with /v1/models, /healthz and /metrics.

    Requests that come together are decoded together. An answer takes text and one image, given as a
    data URL. With MEDVLM_API_KEY in the environment, requests must bear that key.

    \b
    Examples:
      medvlm serve --checkpoint workspace/checkpoints/tiny-llava-med/stage3/checkpoint/vqa-rad
      MEDVLM_API_KEY=… medvlm serve --checkpoint DIR --host 0.0.0.0 --port 9000
      curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"model": "tiny-llava-med", "messages": [{"role": "user", "content": "Hello?"}]}'
    """
    key = os.environ.get("MEDVLM_API_KEY", "")
    if not key and not _is_loopback(host):
        raise InputError(
            f"{host} can be reached from other machines, and no API key is set",
            where="--host",
            hint="set MEDVLM_API_KEY, or serve on 127.0.0.1",
        )
    import uvicorn

    from medvlm.serving.api import Limits, create_app
    from medvlm.serving.chat import ChatModel
    from medvlm.serving.engine import Engine
    from medvlm.serving.meters import Meters

    chat, meters = ChatModel.load(checkpoint), Meters()
    engine = Engine(chat, max_batch=max_batch, queue_limit=queue_limit, observe=meters.batch.observe)
    limits = Limits(body_bytes=int(max_request_mb * 2**20), answer_s=time_limit, answer_tokens=max_tokens)
    name = model_name or chat.name
    app = create_app(engine, meters, name=name, limits=limits, key=key, remote_images=allow_remote_images)
    click.echo(f"{RESEARCH_USE_ONLY} Serving {name} from {checkpoint}", err=True)
    uvicorn.run(app, host=host, port=port, log_level="info", access_log=False, timeout_graceful_shutdown=grace)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
