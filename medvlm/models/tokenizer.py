"""The tokenizer of a recipe: a published one, or byte-level BPE learned here from the training text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from medvlm.errors import CheckpointError
from medvlm.models.sources import pretrained
from medvlm.models.template import IMAGE_MARK, TEMPLATES, fixed_phrases
from medvlm.recipe_schema import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["IM_END", "IM_START", "PAD", "load_tokenizer", "special_marks", "train_tokenizer"]

PAD = "<pad>"
IM_START, IM_END = "<im_start>", "<im_end>"
_BOS, _EOS = "<s>", "</s>"


def special_marks(recipe: Recipe) -> list[str]:
    """Marks that medvlm needs beyond a language model's own."""
    return [IMAGE_MARK, *([IM_START, IM_END] if recipe.model.mm_use_im_start_end else [])]


def train_tokenizer(recipe: Recipe, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE over ``texts``: any text of any language can be encoded, and read back exactly.

    The phrases that the recipe's templates repeat in every sample are single tokens, so that a system
    prompt costs the twin one position and not thirty. Same texts, same tokenizer.

    Args:
        recipe: Gives the size of the vocabulary (an upper bound) and the templates.
        texts: Of the turns, without template.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    specials = [PAD, _BOS, _EOS, *special_marks(recipe)]
    phrases = sorted({p for stage in recipe.stages for p in fixed_phrases(TEMPLATES[stage.template])})
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.model.tokenizer.vocab_size - len(phrases),
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # A turn's text always follows a blank in the templates; learn the words as they will stand.
    tokenizer.train_from_iterator((f" {text.replace(IMAGE_MARK, '').strip()}" for text in texts), trainer)
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=_BOS,
        eos_token=_EOS,
        additional_special_tokens=special_marks(recipe),
        clean_up_tokenization_spaces=False,
        model_max_length=recipe.model.language_model.max_positions,
    )


def load_tokenizer(source: str | Path, marks: Sequence[str]) -> PreTrainedTokenizerFast:
    """A published or saved tokenizer, with the marks added where they are not there yet.

    Args:
        source: A hub id, a folder, a GGUF file, or a package that brings one.
        marks: See ``special_marks``.

    Raises:
        CheckpointError: There is none, or it is not a fast tokenizer.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    name, options = pretrained(str(source))
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"the tokenizer cannot be loaded: {error}", where=str(source), hint="check the hub id or the folder"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise CheckpointError(
            f"{type(tokenizer).__name__} gives no character offsets", where=str(source), hint="use a fast tokenizer"
        )
    missing = [mark for mark in marks if mark not in tokenizer.get_vocab()]
    if missing:
        tokenizer.add_special_tokens({"additional_special_tokens": missing}, replace_extra_special_tokens=False)
    if tokenizer.pad_token is None:
        # As LLaVA does: padding never carries loss, so it needs no embedding of its own.
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer
