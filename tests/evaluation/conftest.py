"""Fixtures of the tests of scores."""

from __future__ import annotations

import pytest
from vqa_factory import QUESTIONS, make_item

from medvlm.records import VQAItem


@pytest.fixture
def items() -> list[VQAItem]:
    """Three closed and three open questions about four images."""
    return [make_item(str(number), *row) for number, row in enumerate(QUESTIONS, 10)]
