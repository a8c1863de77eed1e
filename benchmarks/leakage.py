"""How long 10,000 perceptual hashes take against 600,000: ours, a plain numpy loop, and faiss.

    python benchmarks/leakage.py [--train 600000] [--test 10000]

All three answer the same question exactly: the distance of the nearest training hash to each test
hash, if it is within the radius. Hashes come in clusters, as those of real figures do. faiss is not
a dependency of this project: `pip install faiss-cpu` to have it compared.
"""

from __future__ import annotations

import argparse
import importlib.util
import resource
import sys
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from medvlm.data.hamming import nearest_within

TARGET_S = 60.0
RADII = (4, 8)
Hashes = NDArray[np.uint64]


def main() -> None:
    """Print a line a search and radius; exit 1 if ours is too slow or any two disagree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=600_000)
    parser.add_argument("--test", type=int, default=10_000)
    arguments = parser.parse_args()
    train, test = clustered(arguments.train, seed=0), clustered(arguments.test, seed=1)
    print(f"{arguments.train:,} training hashes x {arguments.test:,} test hashes of 64 bits")
    good = True
    for radius in RADII:
        ours, ours_s = timed(lambda: nearest_within(train, test, radius).distance)  # noqa: B023
        # Of the whole process so far: at the first radius, before any peer ran, it is ours.
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        touched = int((ours >= 0).sum())
        print(f"  radius {radius}: ours           {ours_s:7.2f} s   {peak_mb:,} MB   {touched:,} test hashes touched")
        good &= ours_s < TARGET_S
        for name, search in PEERS.items():
            if name == "faiss flat" and not importlib.util.find_spec("faiss"):
                print(f"  radius {radius}: {name:14} not installed")
                continue
            theirs, theirs_s = timed(lambda: search(train, test, radius))  # noqa: B023
            same = np.array_equal(ours, theirs)
            good &= same
            verdict = "same answer" if same else "ANOTHER ANSWER"
            print(f"  radius {radius}: {name:14} {theirs_s:7.2f} s   {verdict}, this / ours: {theirs_s / ours_s:.1f}")
    print(f"target under {TARGET_S:g} s: {'met' if good else 'MISSED'}")
    sys.exit(not good)


def timed(search: Callable[[], NDArray[np.int64]]) -> tuple[NDArray[np.int64], float]:
    """A search's answer and its seconds."""
    started = time.perf_counter()
    answer = search()
    return answer, time.perf_counter() - started


def clustered(count: int, *, seed: int) -> Hashes:
    """Hashes a few bits from one of 300 centres: similar figures have similar hashes."""
    centres = np.random.default_rng(99).integers(0, 2**64, 300, dtype=np.uint64)
    rng = np.random.default_rng(seed)
    hashes = centres[rng.integers(0, len(centres), count)]
    for _ in range(8):
        hashes = hashes ^ (np.uint64(1) << rng.integers(0, 64, count).astype(np.uint64))
    return hashes


def numpy_loop(train: Hashes, test: Hashes, radius: int) -> NDArray[np.int64]:
    """One test hash after the other against all training hashes."""
    nearest = np.array([int(np.bitwise_count(train ^ query).min()) for query in test])
    return np.where(nearest <= radius, nearest, -1)


def faiss_flat(train: Hashes, test: Hashes, radius: int) -> NDArray[np.int64]:
    """faiss's exhaustive binary index, nearest neighbour."""
    import faiss

    index = faiss.IndexBinaryFlat(64)
    index.add(train.view(np.uint8).reshape(-1, 8))
    nearest, _ = index.search(test.view(np.uint8).reshape(-1, 8), 1)
    return np.where(nearest[:, 0] <= radius, nearest[:, 0], -1).astype(np.int64)


PEERS: dict[str, Callable[[Hashes, Hashes, int], NDArray[np.int64]]] = {
    "numpy loop": numpy_loop,
    "faiss flat": faiss_flat,
}


if __name__ == "__main__":
    main()
