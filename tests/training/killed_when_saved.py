"""A listener that kills its training once a checkpoint of it is in the bucket."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from typing import Any

DEADLINE = time.monotonic() + 60


def listen(event: Mapping[str, Any]) -> None:
    from medvlm.s3 import Bucket

    if event.get("step", 0) < 6:
        return
    while not Bucket(os.environ["MEDVLM_TEST_BUCKET"]).list("manifests/scratch/train/"):
        assert time.monotonic() < DEADLINE, "no checkpoint was put up"
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGKILL)
