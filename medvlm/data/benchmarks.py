"""Medical VQA benchmarks: their official files, brought to ``VQAItem`` records of every split."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from medvlm.data.images import image_hashes
from medvlm.data.readers.pathvqa import SPLIT_OF_PREFIX, read_pathvqa
from medvlm.data.readers.slake import SPLIT_OF_FILE, read_slake
from medvlm.data.readers.source import Dropped
from medvlm.data.readers.vqa_rad import IMAGE_FOLDER, PUBLIC_FILE, read_vqa_rad
from medvlm.data.tally import Tally
from medvlm.errors import InputError
from medvlm.records import Image, Sample, Turn, VQAItem
from medvlm.store import Report, Workspace, fingerprint, shard_paths, write_records, write_report

__all__ = ["BENCHMARKS", "Benchmark", "build_benchmark", "finetune_samples", "read_benchmark"]

Rows = Iterator[VQAItem | Dropped]
IMAGE_REASONS = ("image_missing", "image_outside_folder", "image_undecodable")


@dataclass(frozen=True, slots=True)
class Benchmark:
    """Where a benchmark's files lie and how they are read."""

    read: Callable[[Path], Rows]
    """Rows of one question file, or of the release's folder."""
    images: Callable[[Path], Path]
    """The image folder below the release's folder."""
    licence: str
    source: str


def _vqa_rad(path: Path) -> Rows:
    return read_vqa_rad(path / PUBLIC_FILE if path.is_dir() else path)


def _slake_root(path: Path) -> Path:
    return path / "Slake1.0" if (path / "Slake1.0").is_dir() else path


def _slake(language: Literal["en", "zh"], path: Path) -> Rows:
    root = _slake_root(path)
    for file in [root / name for name in SPLIT_OF_FILE] if path.is_dir() else [path]:
        yield from read_slake(file, language)


def _pathvqa(path: Path) -> Rows:
    files = [path / f"pvqa_{part}.json" for part in SPLIT_OF_PREFIX] if path.is_dir() else [path]
    present = [file for file in files if file.exists()]
    # Of PathVQA one may hold the test questions alone; of nothing, the first read says what is missing.
    for file in present or files[-1:]:
        yield from read_pathvqa(file)


BENCHMARKS = {
    "vqa-rad": Benchmark(_vqa_rad, lambda root: root / IMAGE_FOLDER, "CC0 1.0", "Lau et al. 2018, OSF 89kps"),
    "slake": Benchmark(
        functools.partial(_slake, "en"), lambda root: _slake_root(root) / "imgs", "CC BY 4.0", "Liu et al. 2021"
    ),
    "slake-zh": Benchmark(
        functools.partial(_slake, "zh"), lambda root: _slake_root(root) / "imgs", "CC BY 4.0", "Liu et al. 2021"
    ),
    "pathvqa": Benchmark(_pathvqa, lambda root: root / "images", "MIT (questions)", "He et al. 2020"),
}


def read_benchmark(name: str, path: Path, *, images: bool = True) -> Iterator[VQAItem]:
    """The items of every split of a benchmark, grouped by image.

    Args:
        name: A key of ``BENCHMARKS``.
        path: The release's folder, or one of its question files; a file never brings images.
        images: Whether to open the images. Without, image bytes and hashes are empty.

    Raises:
        InputError: No such benchmark, a file is not in its published format, or an image is missing
            or does not decode.
    """
    benchmark = _benchmark(name)
    tally = Tally()
    yield from _items(benchmark, path, tally, images=images and path.is_dir(), tolerance=0.0)


def build_benchmark(workspace: Workspace, name: str, source: Path, *, tolerance: float = 0.0) -> Report:
    """Write a benchmark's items of every split, images included, and ``report.json``.

    Args:
        workspace: Gets ``items(name)``.
        name: A key of ``BENCHMARKS``.
        source: The release's folder.
        tolerance: Share of items, 0 to 1, whose image may be missing or broken.

    Returns:
        Counts by split and answer type (``test_closed``, …), and dropped rows with their reasons.

    Raises:
        InputError: As ``read_benchmark``, or more images are missing than tolerated. What was
            built before stays in place.
    """
    started = time.monotonic()
    benchmark = _benchmark(name)
    if not source.is_dir():
        raise InputError(
            f"{source.name!r} is not a folder", where=str(source), hint=f"give the folder of the {name} release"
        )
    tally = Tally()
    write_records(workspace.items(name), VQAItem, _items(benchmark, source, tally, images=True, tolerance=tolerance))
    report = Report(
        step=f"build-benchmark {name}",
        counts={"items": tally.kept, "dropped": tally.dropped, **tally.by("split"), **tally.by("split_answer_type")},
        details={**tally.details(), "licence": benchmark.licence, "source": benchmark.source},
        fingerprint=fingerprint(*shard_paths(workspace.items(name))),
    )
    return write_report(workspace.benchmark(name), report, started=started, packages=("pyarrow", "pillow", "imagehash"))


def finetune_samples(items: Iterable[VQAItem]) -> Iterator[Sample]:
    """The train split as single-turn training samples: question and ``<image>``, then the answer."""
    for item in items:
        if item.split == "train":
            yield Sample(
                sample_id=f"{item.benchmark}-{item.item_id}",
                dataset=item.benchmark,
                image=item.image,
                image_sha256=item.image_sha256,
                image_phash=item.image_phash,
                group_id=item.image_id,
                turns=(Turn("user", f"{item.question}\n<image>"), Turn("assistant", item.answer)),
                modality=item.modality,
                language=item.language,
                licence=_benchmark(item.benchmark).licence,
                source="official",
            )


def _benchmark(name: str) -> Benchmark:
    if name not in BENCHMARKS:
        raise InputError(f"there is no benchmark {name!r}", where="NAME", hint=f"choose from {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def _items(benchmark: Benchmark, path: Path, tally: Tally, *, images: bool, tolerance: float) -> Iterator[VQAItem]:
    """Items with unique ids, grouped by image; raises after the last one if too many images are missing."""
    rows = list(tally.sift(benchmark.read(path)))
    _refuse_repeated(rows, path)
    if not rows:
        raise InputError("no question was found", where=str(path), hint="give the release's folder or question file")
    folder = benchmark.images(path)
    # Grouped, so that each image is opened once and compresses well beside its copies.
    place = {image_id: index for index, image_id in enumerate(dict.fromkeys(row.image_id for row in rows))}
    rows.sort(key=lambda row: place[row.image_id])
    for item in tally.sift(_with_images(rows, folder)) if images else rows:
        tally.keep_item(item)
        yield item
    lost = tally.dropped_for(*IMAGE_REASONS)
    if lost > tolerance * len(rows):
        first = "; ".join(tally.first(*IMAGE_REASONS))
        raise InputError(
            f"{lost} of {len(rows)} questions have no usable image: {first}",
            where=str(folder),
            hint="complete the images, or tolerate a share of missing ones with --tolerated-missing",
        )


def _refuse_repeated(rows: list[VQAItem], path: Path) -> None:
    seen: set[str] = set()
    for row in rows:
        if row.item_id in seen:
            raise InputError(
                f"the question id {row.item_id!r} is there twice",
                where=str(path),
                hint="question ids must be unique; compare the file with the published one",
            )
        seen.add(row.item_id)


def _with_images(rows: Iterable[VQAItem], folder: Path) -> Iterator[VQAItem | Dropped]:
    load = functools.lru_cache(maxsize=1)(functools.partial(load_image, folder))
    for item in rows:
        loaded = load(item.image.path)
        if isinstance(loaded, Dropped):
            yield dataclasses.replace(loaded, where=f"item {item.item_id}")
        else:
            image, sha256, phash = loaded
            yield dataclasses.replace(item, image=image, image_sha256=sha256, image_phash=phash)


def load_image(folder: Path, name: str) -> tuple[Image, str, str] | Dropped:
    """An image below ``folder`` with its SHA-256 and perceptual hash, or why it cannot be had.

    Args:
        folder: No name leads out of it.
        name: As a foreign file gives it; also found one level down, in the folder named by its
            first part, as PathVQA's ``images/test/test_0001.jpg`` is.
    """
    candidates = [folder / name, folder / name.split("_")[0] / name]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None or not name:
        return Dropped(str(folder), "image_missing", name)
    if not path.resolve().is_relative_to(folder.resolve()):
        return Dropped(str(folder), "image_outside_folder", name)
    data = path.read_bytes()
    try:
        sha256, phash = image_hashes(data)
    except InputError as error:
        return Dropped(str(folder), "image_undecodable", f"{name}: {error.what}")
    return Image(data, name), sha256, phash
