"""The table of LLaVA-Med's chat evaluation over its real questions, beside what its own script computes."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from medvlm.cli import cli

DOMAINS = ("chest_xray", "mri", "histology", "gross", "ct_scan")
SIZES = {
    "conversation": 143, "detailed_description": 50, "chest_xray": 37, "mri": 38, "histology": 44, "gross": 34,
    "ct_scan": 40, "overall": 193,
}  # fmt: skip
"""Questions of each column, as the paper's Table 2 has them."""


def review(question: dict[str, Any], number: int) -> dict[str, Any]:
    """A stored review as LLaVA-Med's judge left them: two numbers on the first line, then prose with numbers."""
    marks = f"{(1 + number % 9)}{'.5' if number % 3 == 0 else ''} {1 + (7 * number) % 10}"
    return {
        **{name: question[name] for name in ("question_id", "type", "domain")},
        "gpt_eval": f"{marks}\nAssistant 1 was 10 times clearer than 2.\n9 9",
    }


def of_the_script(reviews: list[dict[str, Any]]) -> dict[str, tuple[float, float, float]]:
    """Mean marks, and the mean of the ratios, by column, as ``summarize_gpt_review.py`` of v1.0.0 takes them."""
    columns: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in reviews:
        one, two = map(float, row["gpt_eval"].split("\n")[0].split(" "))
        domain = next(name for name in DOMAINS if row["domain"][name])
        for column in (row["type"], domain, "overall"):
            columns[column].append((one, two))
    return {
        name: (
            sum(one for one, _ in pairs) / len(pairs),
            sum(two for _, two in pairs) / len(pairs),
            100 * sum(two / one for one, two in pairs) / len(pairs),
        )
        for name, pairs in columns.items()
    }


def test_stored_reviews_of_the_193_questions_give_the_scripts_table(real_data: Path, tmp_path: Path) -> None:
    lines = (real_data / "llava-med" / "llava_med_eval_qa50_qa.jsonl").read_text("utf-8").splitlines()
    reviews = [review(json.loads(line), number) for number, line in enumerate(lines)]
    stored = tmp_path / "reviews.jsonl"
    stored.write_text("".join(json.dumps(row) + "\n" for row in reversed(reviews)), "utf-8")
    result = CliRunner().invoke(cli, ["chat-eval", "summarise", "--reviews", str(stored), "--json"])
    assert result.exception is None, result.exception
    summary = json.loads(result.stdout)
    assert (summary["questions"], summary["malformed"]) == (193, [])
    assert {name: column["n"] for name, column in summary["table"].items()} == SIZES
    expected = of_the_script(reviews)
    # The ratio of the means is another number: a table of it would not be the paper's.
    assert abs(expected["overall"][2] - 100 * expected["overall"][1] / expected["overall"][0]) > 10
    for name, (reference, answer, relative) in expected.items():
        column = summary["table"][name]
        found = (column["reference"], column["answer"], column["relative"])
        assert found == pytest.approx((reference, answer, relative), abs=1e-4), name
        assert column["low"] <= column["relative"] <= column["high"]
