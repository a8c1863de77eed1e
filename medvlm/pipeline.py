"""What the recipes of a workspace make of the pipeline: the items that dvc.yaml repeats its stages over."""

from __future__ import annotations

from medvlm.config import load_recipe
from medvlm.recipe_schema import Recipe
from medvlm.settings import Evaluation, PipelineItems, RecipeItem, Settings

__all__ = ["pipeline_items", "with_items"]


def with_items(settings: Settings) -> Settings:
    """The settings with ``items`` as their recipes have it now.

    Raises:
        RecipeError: A recipe of the list does not exist or does not validate.
    """
    return settings.model_copy(update={"items": pipeline_items(settings)})


def pipeline_items(settings: Settings) -> PipelineItems:
    """Which routers, preference sets and evaluations the recipes of a workspace need.

    Raises:
        RecipeError: A recipe of the list does not exist or does not validate.
    """
    recipes = [load_recipe(name) for name in settings.recipes]
    return PipelineItems(
        recipes={recipe.name: _recipe_item(settings.workspace, recipe) for recipe in recipes},
        routers=[recipe.name for recipe in recipes if _has_router(recipe)],
        preferences=[recipe.name for recipe in recipes if _prefers(recipe)],
        evaluations={
            f"{recipe.name}-{benchmark}": Evaluation(recipe=recipe.name, benchmark=benchmark)
            for recipe in recipes
            for benchmark in recipe.benchmarks
        },
    )


def _recipe_item(workspace: str, recipe: Recipe) -> RecipeItem:
    contract = f"preference/{recipe.name}" if _prefers(recipe) else "benchmark-items"
    # DVC cannot leave a dependency out for some items, so those without a router name the stage's own file twice.
    part = f"routers/{recipe.name}/router" if _has_router(recipe) else f"recipes/{recipe.name}/stage3.yaml"
    return RecipeItem(stage3_data=f"{workspace}/contracts/{contract}/result.json", stage3_part=f"{workspace}/{part}")


def _has_router(recipe: Recipe) -> bool:
    return recipe.stages[-1].name == "moe_tune"


def _prefers(recipe: Recipe) -> bool:
    return recipe.stages[-1].name == "prefer"
