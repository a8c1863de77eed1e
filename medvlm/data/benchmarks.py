"""Medical VQA benchmarks: their official files, brought to ``VQAItem`` records of every split."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import medvlm
from medvlm.data.card import write_card
from medvlm.data.images import image_hashes
from medvlm.data.official import is_synthetic, official_state, question_files
from medvlm.data.readers.data_rad import read_data_rad
from medvlm.data.readers.hub_parquet import hub_files, read_hub_parquet
from medvlm.data.readers.medmnist import COLLECTIONS, read_medmnist
from medvlm.data.readers.pathvqa import SPLIT_OF_PREFIX, read_pathvqa
from medvlm.data.readers.pmc_vqa import read_pmc_vqa
from medvlm.data.readers.slake import SPLIT_OF_FILE, read_slake
from medvlm.data.readers.source import Dropped
from medvlm.data.readers.vqa_rad import IMAGE_FOLDER, PUBLIC_FILE, read_vqa_rad
from medvlm.data.tally import Tally
from medvlm.data.watched import watched
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


def _hub(name: str, path: Path) -> Rows:
    for file in hub_files(path):
        yield from read_hub_parquet(file, name)


def _vqa_rad(path: Path) -> Rows:
    if hub_files(path):
        return _hub("vqa-rad", path)
    return read_vqa_rad(path / PUBLIC_FILE if path.is_dir() else path)


def _slake_root(path: Path) -> Path:
    return path / "Slake1.0" if (path / "Slake1.0").is_dir() else path


def _slake(language: Literal["en", "zh"], path: Path) -> Rows:
    root = _slake_root(path)
    for file in [root / name for name in SPLIT_OF_FILE] if path.is_dir() else [path]:
        yield from read_slake(file, language)


def _pathvqa(path: Path) -> Rows:
    if hub_files(path):
        yield from _hub("pathvqa", path)
        return
    # Of PathVQA one may hold the test questions alone; of nothing, the last read says what is missing.
    for file in _files(path, [f"pvqa_{part}.json" for part in SPLIT_OF_PREFIX]) or _files(
        path, [f"{part}_vqa.pkl" for part in SPLIT_OF_PREFIX], required="pvqa_test.json"
    ):
        yield from read_pathvqa(file)


def _pmc_vqa(path: Path) -> Rows:
    # The second version is a cleaned first one: where both are there, they are not mixed.
    for file in _files(path, ["train_2.csv", "test_2.csv"]) or _files(
        path, ["train.csv", "test.csv"], required="test_2.csv"
    ):
        yield from read_pmc_vqa(file)


def _medmnist(name: str, path: Path) -> Rows:
    if path.is_dir():
        # The shortest name is the smallest resolution, 28 pixels, which papers score.
        path = min(
            path.glob(f"{name}*.npz"), key=lambda file: (len(file.name), file.name), default=path / f"{name}.npz"
        )
    return read_medmnist(path)


def _files(path: Path, names: list[str], *, required: str = "") -> list[Path]:
    """Those of the named files that are there; ``required``, absent as it is, where none is."""
    if not path.is_dir():
        return [path]
    present = [path / name for name in names if (path / name).exists()]
    return present or ([path / required] if required else [])


def _pmc_vqa_images(root: Path) -> Path:
    return next((root / name for name in ("images_2", "images", "figures") if (root / name).is_dir()), root)


BENCHMARKS = {
    "vqa-rad": Benchmark(_vqa_rad, lambda root: root / IMAGE_FOLDER, "CC0 1.0", "Lau et al. 2018, OSF 89kps"),
    "slake": Benchmark(
        functools.partial(_slake, "en"), lambda root: _slake_root(root) / "imgs", "CC BY 4.0", "Liu et al. 2021"
    ),
    "slake-zh": Benchmark(
        functools.partial(_slake, "zh"), lambda root: _slake_root(root) / "imgs", "CC BY 4.0", "Liu et al. 2021"
    ),
    "pathvqa": Benchmark(_pathvqa, lambda root: root / "images", "MIT (questions)", "He et al. 2020"),
    "data-rad": Benchmark(read_data_rad, lambda root: root / IMAGE_FOLDER, "CC0 1.0", "LLaVA-Med's split of VQA-RAD"),
    "pmc-vqa": Benchmark(_pmc_vqa, _pmc_vqa_images, "CC BY-SA (unverified)", "Zhang et al. 2023"),
    **{
        name: Benchmark(functools.partial(_medmnist, name), lambda root: root, "CC BY 4.0", "Yang et al. 2023")
        for name in COLLECTIONS
    },
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
        details={
            **tally.details(),
            "licence": benchmark.licence,
            "source": benchmark.source,
            "files": [official_state(file) for file in question_files(source)],
            "synthetic": is_synthetic(workspace, source),
        },
        fingerprint=fingerprint(medvlm.__version__, *shard_paths(workspace.items(name))),
    )
    packages = ("pyarrow", "pillow", "imagehash")
    report = write_report(workspace.benchmark(name), report, started=started, packages=packages)
    write_card(workspace, name)
    return report


def finetune_samples(items: Iterable[VQAItem], *, without: Collection[str] = ()) -> Iterator[Sample]:
    """The train split as single-turn training samples: question and ``<image>``, then the answer.

    Args:
        items: Of any splits.
        without: SHA-256 of images to leave out, such as those of test items.
    """
    for item in items:
        if item.split == "train" and item.image_sha256 not in without:
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
    rows = _unique(tally.sift(benchmark.read(path)), path)
    first = next(rows, None)
    if first is None:
        raise InputError("no question was found", where=str(path), hint="give the release's folder or question file")
    rows = itertools.chain([first], rows)
    folder = benchmark.images(path)
    if not first.image.bytes:
        grouped = _grouped_by_image(rows)
        rows = watched(grouped, len(grouped), "questions") if images else iter(grouped)
    for item in tally.sift(_with_images(rows, folder)) if images else map(_without_image, rows):
        tally.keep_item(item)
        yield item
    lost = tally.dropped_for(*IMAGE_REASONS)
    if lost > tolerance * (tally.kept + lost):
        names = "; ".join(tally.first(*IMAGE_REASONS))
        raise InputError(
            f"{lost} of {tally.kept + lost} questions have no usable image: {names}",
            where=str(folder),
            hint="complete the images, or tolerate a share of missing ones with --tolerated-missing",
        )


def _grouped_by_image(rows: Iterable[VQAItem]) -> list[VQAItem]:
    """The rows in their order, but those of one image together: it is opened once and compresses well."""
    listed = list(rows)
    place = {image_id: index for index, image_id in enumerate(dict.fromkeys(row.image_id for row in listed))}
    return sorted(listed, key=lambda row: place[row.image_id])


def _unique(rows: Iterable[VQAItem], path: Path) -> Iterator[VQAItem]:
    seen: set[str] = set()
    for row in rows:
        if row.item_id in seen:
            raise InputError(
                f"the question id {row.item_id!r} is there twice",
                where=str(path),
                hint="question ids must be unique; compare the file with the published one",
            )
        seen.add(row.item_id)
        yield row


def _without_image(item: VQAItem) -> VQAItem:
    return dataclasses.replace(item, image=Image(b"", item.image.path))


def _with_images(rows: Iterable[VQAItem], folder: Path) -> Iterator[VQAItem | Dropped]:
    load = functools.lru_cache(maxsize=1)(functools.partial(load_image, folder))
    for item in rows:
        loaded = hashed(item.image) if item.image.bytes else load(item.image.path)
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
    return hashed(Image(path.read_bytes(), name))


@functools.lru_cache(maxsize=1)
def hashed(image: Image) -> tuple[Image, str, str] | Dropped:
    """The image with its SHA-256 and perceptual hash, or why it is refused."""
    try:
        return image, *image_hashes(image.bytes)
    except InputError as error:
        return Dropped("", "image_undecodable", f"{image.path}: {error.what}")
