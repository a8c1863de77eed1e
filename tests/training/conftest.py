"""A small workspace with drawn samples, and the twin trained on it through all three stages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from moe_case import RECIPE, SMALL, TunedMixture, fill_labelled
from twin_case import TINY, TrainedTwin, fill

from medvlm.config import load_recipe
from medvlm.store import Workspace

# Third parties': torch's inductor warns about torch's jit, DeepSpeed calls collectives by their old names.
THIRD_PARTY = (
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning",
    "ignore:`torch.distributed:FutureWarning",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            for warning in THIRD_PARTY:
                item.add_marker(pytest.mark.filterwarnings(warning))


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """Samples and items, nothing trained."""
    return fill(Workspace(tmp_path / "ws"))


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainedTwin]:
    """All three stages of the twin, a few steps each."""
    from medvlm.training.run import run_stage

    workspace = fill(Workspace(tmp_path_factory.mktemp("trained")))
    recipe = load_recipe("tiny-llava-med", TINY)
    first, second, third = (run_stage(workspace, recipe, number) for number in (1, 2, 3))
    yield TrainedTwin(workspace, recipe, (first, second, third))


@pytest.fixture(scope="session")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> TunedMixture:
    """All three stages of a mixture of experts and its router, a few steps each."""
    from medvlm.training.router import train_router
    from medvlm.training.run import run_stage

    workspace = fill_labelled(Workspace(tmp_path_factory.mktemp("tuned")))
    recipe = load_recipe(RECIPE, SMALL)
    run_stage(workspace, recipe, 1)
    run_stage(workspace, recipe, 2)
    router = train_router(workspace, recipe)
    return TunedMixture(workspace, recipe, router, run_stage(workspace, recipe, 3))
