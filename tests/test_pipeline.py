"""The items that dvc.yaml repeats its stages over follow from the recipes."""

from __future__ import annotations

import pytest

from medvlm.config import load_recipe
from medvlm.errors import RecipeError
from medvlm.pipeline import with_items
from medvlm.settings import Settings


def test_a_plain_recipe_is_evaluated_on_the_benchmarks_that_it_names() -> None:
    items = with_items(Settings.sample()).items
    assert [e.benchmark for e in items.evaluations.values()] == list(load_recipe("tiny-llava-med").benchmarks)
    assert set(items.evaluations) == {f"tiny-llava-med-{e.benchmark}" for e in items.evaluations.values()}
    assert (items.routers, items.preferences) == ([], [])
    item = items.recipes["tiny-llava-med"]
    assert item.stage3_data == "workspace/contracts/benchmark-items/result.json"
    assert item.stage3_part == "workspace/recipes/tiny-llava-med/stage3.yaml", "nothing that is not there anyway"


def test_an_unknown_recipe_is_refused_before_anything_is_written() -> None:
    with pytest.raises(RecipeError, match="nothing-like-it"):
        with_items(Settings.sample(recipes=["nothing-like-it"]))
