"""The tokenizer of an original LLaVA checkpoint, with the marks that medvlm needs."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medvlm.errors import CheckpointError
from medvlm.models.tokenizer import IM_END, IM_START, load_tokenizer, special_marks
from medvlm.recipe_schema import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["original_tokenizer"]

_VOCABULARY = ("tokenizer.json", "tokenizer.model")
_FILES = (*_VOCABULARY, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def original_tokenizer(
    sources: Sequence[str | Path | None], config: dict[str, Any], recipe: Recipe, rows: int
) -> tuple[PreTrainedTokenizerFast, dict[str, int]]:
    """The checkpoint's tokenizer with our marks, and the marks that were added, with their ids.

    ``<im_start>`` and ``<im_end>`` must have been in it where the recipe has them: their rows are in the embedding. A
    saved tokenizer that lost them gets them back with the ids that they had.

    Args:
        sources: Folders or hub ids, the first that holds a tokenizer counts.
        config: The original's ``config.json``.
        recipe: Says which marks.
        rows: Of the checkpoint's embedding.

    Raises:
        CheckpointError: It cannot be loaded, or tokens and rows do not belong together.
    """
    source = next(s for s in sources if s is not None and _holds_one(s))
    tokenizer = _loaded(source)
    before, known = len(tokenizer), tokenizer.get_vocab()
    framed = [IM_START, IM_END] if recipe.model.mm_use_im_start_end else []
    lost = [mark for mark in framed if mark not in known]
    if lost:
        # The original's loader adds them in this order when the saved tokenizer lacks them.
        patch = ["<im_patch>"] if config.get("mm_use_im_patch_token", True) and "<im_patch>" not in known else []
        wanted = next((extra for extra in (patch + lost, lost) if before + len(extra) == rows), None)
        if wanted is None:
            raise CheckpointError(
                f"the tokenizer lacks {' and '.join(lost)}, and the embedding's {rows} rows do not tell where they are "
                f"(the tokenizer has {before} tokens)",
                where=str(source),
                hint="give the tokenizer that was saved with the model (--tokenizer), or, if it was trained without "
                "them, --set model.mm_use_im_start_end=false",
            )
        _add(tokenizer, wanted)
    if len(tokenizer) > rows:
        raise CheckpointError(
            f"the tokenizer has {len(tokenizer)} tokens, the embedding {rows} rows",
            where=str(source),
            hint="give the tokenizer that was saved with the model: --tokenizer",
        )
    _add(tokenizer, [mark for mark in special_marks(recipe) if mark not in tokenizer.get_vocab()])
    return tokenizer, {token: number for token, number in tokenizer.get_vocab().items() if token not in known}


def _add(tokenizer: PreTrainedTokenizerFast, marks: list[str]) -> None:
    if marks:
        tokenizer.add_special_tokens({"additional_special_tokens": marks}, replace_extra_special_tokens=False)


def _holds_one(source: str | Path) -> bool:
    folder = Path(source)
    return not folder.is_dir() or any((folder / name).is_file() for name in _VOCABULARY)


def _loaded(source: str | Path) -> PreTrainedTokenizerFast:
    if not Path(source).is_dir():
        return load_tokenizer(source, [])
    # Without its config.json: transformers would look for a model of that name, and there is none.
    with tempfile.TemporaryDirectory() as name:
        for file in _FILES:
            if (Path(source) / file).is_file():
                shutil.copyfile(Path(source) / file, Path(name) / file)
        return load_tokenizer(name, [])
