"""A checkpoint's answers to a benchmark: batched, greedy, each image encoded once, resumable.

Shape letters: B batch, L sequence, D model width, P placeholders (patches) of an image.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from medvlm.data.watched import watched
from medvlm.errors import InputError, WorkspaceError
from medvlm.models.template import IMAGE_MARK
from medvlm.recipe_schema import Recipe
from medvlm.records import Prediction, VQAItem
from medvlm.store import Report, Workspace, atomic_path, fingerprint, iterate_records, write_records, write_report

if TYPE_CHECKING:
    from torch import Tensor

    from medvlm.models.checkpoint import Checkpoint

__all__ = ["Answerer", "mean_image", "predict_benchmark"]

BATCH = 64
IMAGES_A_BATCH = 32
"""Images encoded at once."""
IMAGES_AT_ONCE = 256
"""Images whose features are kept: 1 GB for a 7B model in float32 at 256 patches."""

T = TypeVar("T")


def predict_benchmark(
    workspace: Workspace,
    recipe: Recipe,
    benchmark: str,
    *,
    stage_number: int = 3,
    limit: int | None = None,
    batch_size: int = BATCH,
) -> Report:
    """Answer a benchmark's test split with and without the image, and write the answers.

    Args:
        workspace: Gives checkpoint and items; gets ``answers/`` and ``report.json``.
        recipe: Whose checkpoint answers.
        benchmark: Such as ``vqa-rad``.
        stage_number: Whose checkpoint answers: 1, 2 or 3.
        limit: Only the first so many items.
        batch_size: Questions answered at once.

    Returns:
        Counts of items, images and answers, and how many were kept from a run that was stopped.

    Raises:
        CheckpointError: The stage has no finished checkpoint.
        WorkspaceError: The benchmark was not built, has no test items, or the disk is full.
        InputError: An image does not decode; the item is named.
    """
    from medvlm.models.checkpoint import load_checkpoint

    started = time.monotonic()
    folder = _checkpoint(workspace, recipe, benchmark, stage_number)
    checkpoint = load_checkpoint(folder)
    items, mean = _items_and_mean(workspace, checkpoint, benchmark, limit)
    inputs = fingerprint(checkpoint.metadata["fingerprint"], [(i.item_id, i.question, i.image_sha256) for i in items])
    scratch = workspace.scratch("predict", recipe.name, f"{benchmark}-stage{stage_number}.jsonl")
    answerer = Answerer(checkpoint, recipe.stages[stage_number - 1].name, batch_size=batch_size)
    with _Journal.of(scratch, inputs) as journal:
        kept = len(journal.answers)
        todo = [(item, blind) for blind in (False, True) for item in items]
        todo = [(item, blind) for item, blind in todo if (item.item_id, blind) not in journal.answers]
        for blind in (False, True):
            batches = list(answerer.batches([item for item, is_blind in todo if is_blind == blind]))
            for batch in watched(batches, len(batches), f"{benchmark}{', blind' if blind else ''}"):
                journal.append(answerer.answer(batch, image=mean if blind else None))
        # In the order of the items whatever the batches were, so that equal answers are equal bytes.
        answers = [journal.answers[item.item_id, blind] for blind in (False, True) for item in items]
        step = workspace.predictions(recipe.name, benchmark)
        write_records(step / "answers", Prediction, answers)
    scratch.unlink()
    seconds = time.monotonic() - started
    report = Report(
        step=f"predict {recipe.name} {benchmark}",
        counts={
            "items": len(items),
            "images": len({item.image_sha256 for item in items}),
            "answers": len(answers),
            "resumed": kept,
        },
        metrics={"answers_per_s": round((len(answers) - kept) / seconds, 3)},
        details={"checkpoint": checkpoint.metadata["fingerprint"], "prompt": "the question, then the image"},
        seed=recipe.seed,
        fingerprint=fingerprint([dataclasses.asdict(answer) for answer in answers]),
    )
    return write_report(step, report, started=started, packages=("torch", "transformers"))


def _checkpoint(workspace: Workspace, recipe: Recipe, benchmark: str, stage_number: int) -> Path:
    targets = recipe.targets(stage_number)
    return workspace.checkpoint(recipe.name, stage_number, benchmark if benchmark in targets else targets[0])


def _items_and_mean(
    workspace: Workspace, checkpoint: Checkpoint, benchmark: str, limit: int | None
) -> tuple[list[VQAItem], Tensor]:
    """The test items, and the mean image of the train split (of the test split where there is no other)."""
    records = iterate_records(workspace.items(benchmark), VQAItem)
    test: list[VQAItem] = []
    train_images: dict[str, bytes] = {}
    for item in records:
        if item.split == "test":
            test.append(item)
        elif item.split == "train":
            train_images.setdefault(item.image_sha256, item.image.bytes)
    if not test:
        raise WorkspaceError(
            f"the benchmark {benchmark} has no test items",
            where=str(workspace.items(benchmark)),
            hint=f"build it again: medvlm dataset build-benchmark {benchmark} --source DIR",
        )
    images = train_images or {item.image_sha256: item.image.bytes for item in test}
    return test[:limit], mean_image(checkpoint, images.values())


def mean_image(checkpoint: Checkpoint, images: Iterable[bytes]) -> Tensor:
    """Mean of the pixels that the tower would see, (3, H, W): what a blind model is shown.

    Args:
        checkpoint: Its processor makes the pixels.
        images: Encoded images, at least one.
    """
    total: Any = 0
    count = 0
    for image in images:
        total = total + checkpoint.processor(image).double()
        count += 1
    return (total / count).float()


class Answerer:
    """Greedy answers of one checkpoint; image features are kept for as long as their questions last.

    Args:
        checkpoint: In evaluation mode from here on, on the GPU where there is one.
        stage: Its stage's name, for the records.
        batch_size: Questions answered at once.
    """

    def __init__(self, checkpoint: Checkpoint, stage: str, *, batch_size: int = BATCH) -> None:
        import torch

        from medvlm.training.collate import ConversationEncoder

        self._checkpoint = checkpoint
        self._stage = stage
        self._batch_size = batch_size
        model: Any = checkpoint.model  # transformers' own types contradict each other here
        self._model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        _, spec = checkpoint.recipe.stage(stage)
        positions = checkpoint.recipe.model.language_model.max_positions
        self._encoder = ConversationEncoder(checkpoint.recipe, checkpoint.tokenizer, spec.template, positions)
        self._features: dict[str, Tensor] = {}

    def batches(self, items: Sequence[VQAItem]) -> list[list[VQAItem]]:
        """Batches of prompts of like length; each item once, each image within one run of batches.

        Images are taken a few hundred at a time with all their questions, so that each is encoded
        once and its features need not be kept until the end.
        """
        by_image: dict[str, list[VQAItem]] = {}
        for item in items:
            by_image.setdefault(item.image_sha256, []).append(item)
        batches: list[list[VQAItem]] = []
        for images in _chunks(list(by_image.values()), IMAGES_AT_ONCE):
            questions = [item for group in images for item in group]
            questions.sort(key=lambda item: (len(self._prompt_ids(item)), item.item_id))
            batches += _chunks(questions, self._batch_size)
        return batches

    def answer(self, items: Sequence[VQAItem], *, image: Tensor | None = None) -> list[Prediction]:
        """One greedy answer an item, in their order.

        Args:
            items: A batch.
            image: Pixels (3, H, W) in place of every item's own: the blind baseline.

        Raises:
            InputError: An image does not decode; the item is named.
        """
        import torch

        with torch.inference_mode():
            texts = self._generate([self._prompt_ids(item) for item in items], self._image_features(items, image))
        return [
            Prediction(
                item_id=item.item_id,
                benchmark=item.benchmark,
                model=self._checkpoint.recipe.name,
                stage=self._stage,
                blind=image is not None,
                prompt=_prompt(item),
                text=text,
            )
            for item, text in zip(items, texts, strict=True)
        ]

    def _prompt_ids(self, item: VQAItem) -> list[int]:
        return self._encoder.prompt(_prompt(item))

    def _image_features(self, items: Sequence[VQAItem], image: Tensor | None) -> Tensor:
        """Projected features (B, P, D), one encoding an image however many questions it has."""
        import torch

        if image is not None:
            return self._encoded([image]).expand(len(items), -1, -1)
        new = {item.image_sha256: item for item in items if item.image_sha256 not in self._features}
        for group in _chunks(list(new.values()), IMAGES_A_BATCH):
            features_NPD = self._encoded([self._pixels(item) for item in group])
            self._features |= {item.image_sha256: one_PD for item, one_PD in zip(group, features_NPD, strict=True)}
        for old in list(self._features)[: max(0, len(self._features) - IMAGES_AT_ONCE)]:
            del self._features[old]
        return torch.stack([self._features[item.image_sha256] for item in items])

    def _pixels(self, item: VQAItem) -> Tensor:
        try:
            return self._checkpoint.processor(item.image.bytes)
        except InputError as error:
            where = f"item {item.item_id} of {item.benchmark}, image {item.image_id}"
            raise InputError(error.what, where=where, hint=error.hint) from error

    def _encoded(self, pixels: Sequence[Tensor]) -> Tensor:
        import torch

        pixels_NCHW = torch.stack(list(pixels)).to(self._model.device, self._model.dtype)
        features: Any = self._model.get_image_features(pixel_values=pixels_NCHW)
        features = getattr(features, "pooler_output", features)
        return torch.stack(list(features)) if isinstance(features, list | tuple) else features

    def _generate(self, prompts: list[list[int]], features_BPD: Tensor) -> list[str]:
        """Greedy answers to prompts, padded on the left so that all answers begin at one place."""
        import torch

        from medvlm.models.vlm import merge_image_features

        model, tokenizer = self._model, self._checkpoint.tokenizer
        length = max(map(len, prompts))
        pad: Any = tokenizer.pad_token_id
        ids_BL = torch.tensor([[pad] * (length - len(ids)) + ids for ids in prompts], device=model.device)
        mask_BL = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts], device=model.device)
        text_BLD = model.get_input_embeddings()(ids_BL)
        embeddings_BLD = merge_image_features(
            text_BLD, features_BPD, ids_BL, image_token_id=model.config.image_token_id
        )
        answers = model.generate(
            inputs_embeds=embeddings_BLD,
            attention_mask=mask_BL,
            max_new_tokens=self._checkpoint.recipe.decoding.max_new_tokens,
            do_sample=False,
        )
        return [text.strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]


def _prompt(item: VQAItem) -> str:
    """The user turn, as stage 3 learned it: the question, then the image."""
    return f"{item.question}\n{IMAGE_MARK}"


def _chunks(values: Sequence[T], size: int) -> Iterator[list[T]]:
    for start in range(0, len(values), size):
        yield list(values[start : start + size])


class _Journal:
    """Answers so far, appended batch by batch, so that a killed run loses at most one batch."""

    def __init__(self, stream: TextIO, answers: Iterable[Prediction]) -> None:
        self._stream = stream
        self.answers = {(answer.item_id, answer.blind): answer for answer in answers}

    @classmethod
    @contextmanager
    def of(cls, path: Path, inputs: str) -> Generator[_Journal]:
        """The journal of a run; one that a run with other inputs left is begun anew.

        Args:
            path: A JSONL file; its first line says for which checkpoint and items it is.
            inputs: Their fingerprint.
        """
        head = json.dumps({"inputs": inputs})
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        answers: list[Prediction] = []
        if lines and lines[0] == head:
            for line in lines[1:]:
                # A run killed while writing leaves half a last line; its answer is made again.
                with contextlib.suppress(json.JSONDecodeError, TypeError):
                    answers.append(Prediction(**json.loads(line)))
        with atomic_path(path) as temporary:
            temporary.write_text("\n".join([head, *map(_line, answers)]) + "\n", "utf-8")
        with path.open("a", encoding="utf-8") as stream:
            yield cls(stream, answers)

    def append(self, answers: Sequence[Prediction]) -> None:
        """Remember a batch, on disk first."""
        self._stream.write("".join(_line(answer) + "\n" for answer in answers))
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self.answers |= {(answer.item_id, answer.blind): answer for answer in answers}


def _line(answer: Prediction) -> str:
    return json.dumps(dataclasses.asdict(answer), ensure_ascii=False)
