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
    bucket, folder = Bucket(os.environ["MEDVLM_TEST_BUCKET"]), "manifests/scratch/train/"
    # A look that comes before the first checkpoint puts up what says which job it is, and nothing to go on from.
    while not any(b"complete.json" in (bucket.read(folder + name) or (b"", ""))[0] for name in bucket.list(folder)):
        assert time.monotonic() < DEADLINE, "no checkpoint was put up"
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGKILL)
