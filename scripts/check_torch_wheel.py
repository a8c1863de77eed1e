"""Says which torch pip would install, and refuses gigabytes of CUDA on a machine without a GPU.

    python scripts/check_torch_wheel.py 2.13.0

Asks pip for a dry run without dependencies, so nothing but the wheel's metadata is read. Standard
library only: it runs before anything is installed.
"""

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version


def main() -> int:
    """0 if the install may go on; 1 with the next step if it would fetch CUDA for nothing."""
    wanted = sys.argv[1]
    try:
        if version("torch").split("+")[0] == wanted:
            return 0
    except PackageNotFoundError:
        pass
    if shutil.which("nvidia-smi") or os.environ.get("ALLOW_CUDA"):
        return 0
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--no-deps", "--report", "-"]
    answer = subprocess.run([*command, f"torch=={wanted}"], stdout=subprocess.PIPE, text=True, check=False)
    if answer.returncode:
        return answer.returncode
    (wheel,) = json.loads(answer.stdout)["install"]
    cuda = [need for need in wheel["metadata"].get("requires_dist", []) if need.startswith("nvidia")]
    if not cuda:
        return 0
    sys.stderr.write(
        f"error: pip would install a CUDA build of torch {wanted} (with {len(cuda)} nvidia packages, gigabytes),\n"
        "       but this machine has no GPU (no nvidia-smi).\n"
        "  next: point PIP_INDEX_URL or PIP_FIND_LINKS at PyTorch's CPU builds (see 'Start locally' on pytorch.org),\n"
        "        or run again with ALLOW_CUDA=1 to take the CUDA build all the same.\n"
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
