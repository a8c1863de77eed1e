"""The workspace that the dashboard's tests look at."""

from __future__ import annotations

from pathlib import Path

import pytest
from workspace_builder import build_workspace


@pytest.fixture(scope="session")
def built_workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of a workspace that nothing writes to."""
    return build_workspace(tmp_path_factory.mktemp("dashboards") / "workspace").root
