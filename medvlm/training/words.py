"""A projector that starts by saying the words that are said of an image, before any language model is asked.

A projector drawn at random gives a language model tokens that mean nothing to it, and only captions by the hundred
thousand teach it to read them. The words that a train split uses of each image are known, though, and so are the
embeddings that the language model has for them: the projector is first fitted so that the mean of an image's
embeddings points to the embeddings of what is said of it and away from those of what is denied. It is the loss of
bag-of-words pretraining (Joulin et al. 2016, "Learning visual features from large weakly supervised data", equation
3, one-against-all) with the language model's own embeddings as the classifier. The language model never runs, so it
takes a minute.

Shape letters: N images, P patches, V tower width, D model width, K words.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from medvlm.errors import InputError
from medvlm.models.features import tower_features
from medvlm.models.template import IMAGE_MARK
from medvlm.recipe_schema import WordStart

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

    from medvlm.training.data import ImageStore, StageSample

__all__ = ["ImageWords", "fit_words", "image_words", "word_facts"]

RARE = 5
"""A word of fewer facts is left out."""
BATCH = 48
"""Images a step."""
WEIGHT_DECAY = 0.05
WARMUP = 0.1
"""Share of the steps."""
_FACTS_COUNTED = 2.0
"""What is said of an image more often counts no more than this."""

_AFFIRMED, _DENIED = "yes", "no"
# Words without a meaning that an image could have.
_FUNCTION_WORDS = re.compile(
    "a|an|and|any|are|be|by|do|does|from|have|has|image|in|is|it|of|on|or|picture|that|the|there|this|to|what|which|with"
)


def _words(text: str) -> list[str]:
    return [word for word in re.findall(r"[a-z][a-z0-9]*", text.lower()) if not _FUNCTION_WORDS.fullmatch(word)]


def word_facts(samples: Sequence[StageSample]) -> Iterator[tuple[str, str, bool]]:
    """What single questions and answers say: an image's SHA-256, a word, and whether it is so.

    A question that is answered with yes says its own words of the image, one answered with no denies them. Any other
    answer says its words, and denies those that other images have as answers to the same question.
    """
    turns = [(s.image_sha256, s.turns[0].text.replace(IMAGE_MARK, ""), s.turns[-1].text) for s in samples]
    asked = [(image, question.strip().lower(), answer.strip(" .\n").lower()) for image, question, answer in turns]
    others: dict[str, set[str]] = defaultdict(set)
    for _, question, answer in asked:
        if answer not in (_AFFIRMED, _DENIED):
            others[question].update(_words(answer))
    for image, question, answer in asked:
        if answer in (_AFFIRMED, _DENIED):
            yield from ((image, word, answer == _AFFIRMED) for word in sorted(set(_words(question))))
        else:
            said = set(_words(answer))
            yield from ((image, word, word in said) for word in sorted(said | others[question]))


@dataclass(frozen=True, slots=True)
class ImageWords:
    """What is said of images."""

    images: list[str]
    """SHA-256."""
    words: list[str]
    truth: Tensor
    """How often what is said of an image affirms a word, 0 to 1: (N, K)."""
    weight: Tensor
    """How often it is said at all, at most 2: (N, K)."""

    @property
    def base(self) -> Tensor:
        """Log-odds (K,) of each word over all images: what is known without looking."""
        import torch

        share_K = (self.truth * self.weight).sum(0) / self.weight.sum(0)
        return torch.logit(share_K.clamp(0.02, 0.98))


def image_words(samples: Sequence[StageSample]) -> ImageWords:
    """The facts of samples with one question each, gathered by image and word.

    Raises:
        InputError: No word is said often enough to be learned.
    """
    import torch

    facts = list(word_facts(samples))
    counts = Counter(word for _, word, _ in facts)
    words = sorted(word for word, count in counts.items() if count >= RARE)
    if not words:
        raise InputError(
            f"no word is said of images {RARE} times or more",
            where=f"{len(samples)} samples",
            hint="a stage with few questions, or not in English, starts better without: set its word_start to null",
        )
    images = list(dict.fromkeys(sample.image_sha256 for sample in samples))
    row, column = ({name: i for i, name in enumerate(names)} for names in (images, words))
    said_NK, weight_NK = torch.zeros(len(images), len(words)), torch.zeros(len(images), len(words))
    for image, word, so in facts:
        if word in column:
            said_NK[row[image], column[word]] += so
            weight_NK[row[image], column[word]] += 1
    return ImageWords(images, words, said_NK / weight_NK.clamp(min=1), weight_NK.clamp(max=_FACTS_COUNTED))


def word_directions(model: Any, tokenizer: PreTrainedTokenizerFast, words: Sequence[str]) -> Tensor:
    """Unit vectors (K, D) from the mean of the vocabulary to each word, as the language model embeds it."""
    import torch
    import torch.nn.functional as F  # noqa: N812

    tokens: Any = tokenizer
    embeddings_VD = model.get_input_embeddings().weight.detach().float()
    mean_D = embeddings_VD.mean(0)
    # As it stands within a sentence: most vocabularies have other tokens for a word that begins one.
    ids = [tokens(f" {word}", add_special_tokens=False)["input_ids"] for word in words]
    return F.normalize(torch.stack([(embeddings_VD[i] - mean_D).mean(0) for i in ids]), dim=1)


def fit_words(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    samples: Sequence[StageSample],
    images: ImageStore,
    start: WordStart,
    *,
    seed: int,
    device: str = "cpu",
) -> dict[str, float]:
    """Fit a model's projector to the words said of images; everything else of the model stays.

    Deterministic on one device: every process of a job does it and comes to the same.

    Args:
        model: Changed in place, and back on the CPU afterwards.
        tokenizer: Its own.
        samples: One question each.
        images: Gives a sample's pixels or features.
        start: Epochs and rate.
        seed: Of the images' order.
        device: Where it computes.

    Returns:
        ``words``, ``images``, ``steps``; ``loss_before``, of what is known without looking, and ``loss``, over
        the last epoch. Nats a fact.

    Raises:
        InputError: No word is said often enough to be learned, or an image does not decode.
    """
    import torch

    said = image_words(samples)
    base_K = said.base.to(device)
    directions_DK = word_directions(model, tokenizer, said.words).T.to(device)
    seen = _seen(model, samples, images, device)
    projector = model.model.multi_modal_projector
    dtypes = {name: value.dtype for name, value in projector.named_parameters()}
    learns = [parameter.requires_grad for parameter in projector.parameters()]
    projector.float().to(device).requires_grad_(True)
    per_epoch = -(-len(said.images) // BATCH)
    steps = max(1, round(start.epochs * per_epoch))
    optimizer = torch.optim.AdamW(projector.parameters(), lr=start.learning_rate, weight_decay=WEIGHT_DECAY)
    schedule: Any = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, start.learning_rate, total_steps=steps + 1, pct_start=WARMUP
    )
    losses: list[float] = []
    for _, rows in zip(range(steps), _batches(len(said.images), seed), strict=False):
        scores_NK = projector(seen([said.images[i] for i in rows])).mean(1) @ directions_DK + base_K
        loss = _loss(scores_NK, said, rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    everywhere = list(range(len(said.images)))
    before = _loss(base_K.expand(len(everywhere), -1), said, everywhere).item()
    for (name, parameter), was in zip(projector.named_parameters(), learns, strict=True):
        parameter.data = parameter.data.to("cpu", dtypes[name])
        parameter.grad = None
        parameter.requires_grad_(was)
    tail = losses[-per_epoch:]
    return {
        "words": len(said.words),
        "images": len(said.images),
        "steps": steps,
        "loss_before": round(before, 4),
        "loss": round(sum(tail) / len(tail), 4),
    }


def _loss(scores_NK: Tensor, said: ImageWords, rows: Sequence[int]) -> Tensor:
    """Cross-entropy of a fact, the mean over all facts of some images."""
    import torch.nn.functional as F  # noqa: N812

    index = list(rows)
    truth_NK, weight_NK = (table[index].to(scores_NK.device) for table in (said.truth, said.weight))
    losses_NK = F.binary_cross_entropy_with_logits(scores_NK, truth_NK, reduction="none")
    return (losses_NK * weight_NK).sum() / weight_NK.sum().clamp(min=1)


def _batches(images: int, seed: int) -> Iterator[list[int]]:
    """Rows of images without end, each image once an epoch."""
    import numpy as np

    for epoch in itertools.count():
        order: list[int] = np.random.default_rng((seed, epoch)).permutation(images).tolist()
        yield from (order[i : i + BATCH] for i in range(0, images, BATCH))


def _seen(
    model: Any, samples: Sequence[StageSample], images: ImageStore, device: str
) -> Callable[[Sequence[str]], Tensor]:
    """Gives what the tower makes of images, (N, P, V), by their SHA-256."""
    import torch

    first = {sample.image_sha256: sample for sample in reversed(samples)}

    def seen(names: Sequence[str]) -> Tensor:
        stacked = torch.stack([images(first[name]) for name in names])
        if stacked.ndim == 3:
            return stacked.to(device).float()
        tower = next(model.model.vision_tower.parameters())
        with torch.no_grad():
            return tower_features(model, stacked.to(tower.device, tower.dtype)).to(device).float()

    return seen
