"""Chat evaluation: the judge's client against a server on loopback, and the table from reviews."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from medvlm.cli import cli
from medvlm.data.endpoint import ChatClient, Endpoint, EndpointSettings, TokenBudget
from medvlm.data.response_cache import ResponseCache
from medvlm.errors import EndpointError, InputError, PredictionMismatch
from medvlm.evaluation.chat_eval import (
    first_domain,
    judge_prompt,
    parse_marks,
    read_chat_questions,
    review_answers,
    summarise_reviews,
)

Answer = Callable[[int, dict[str, Any]], tuple[int, dict[str, str], str]]
"""(number of the request, its body) → status, headers, body."""


class Server:
    """An OpenAI-compatible server that answers as it is told and remembers what it was asked."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.busy = self.busiest = 0
        self.answer: Answer = lambda number, body: completion("8 6\nWell.")
        lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                with lock:
                    server.busy += 1
                    server.busiest = max(server.busiest, server.busy)
                    body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                    server.requests.append(body)
                    server.headers.append(dict(self.headers))
                    number = len(server.requests)
                status, headers, content = server.answer(number, body)
                with lock:
                    server.busy -= 1
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content.encode())))
                self.end_headers()
                self.wfile.write(content.encode())

            def log_message(self, format: str, *args: object) -> None:
                del format, args

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.http.serve_forever, daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


def completion(text: str, tokens: int = 50) -> tuple[int, dict[str, str], str]:
    body = {
        "model": "tiny-judge-v2",
        "choices": [{"message": {"content": text}}],
        "usage": {"prompt_tokens": tokens, "completion_tokens": 0},
    }
    return 200, {"Content-Type": "application/json"}, json.dumps(body)


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.close()


@pytest.fixture
def ask(server: Server, tmp_path: Path) -> Iterator[Callable[..., ChatClient]]:
    """Makes clients that share one cache, as one run after another does."""
    with ResponseCache(tmp_path / "cache" / "answers.sqlite") as cache:

        def client(budget: int | None = None, **changes: Any) -> ChatClient:
            quick = EndpointSettings(
                **{"attempts": 2, "backoff_s": 0.01, "timeout_s": 10.0, "concurrency": 1, **changes}
            )
            return ChatClient(Endpoint(server.url, "judge"), cache, budget=TokenBudget(budget), settings=quick)

        yield client


# ── Questions, prompts, marks ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("review", "expected"),
    [
        ("8 6\nBecause", (8, 6)),
        ("\n 8.5, 7 \n", (8.5, 7)),
        ("8,6", (8, 6)),
        ("10 10", (10, 10)),
        ("Assistant 1: 8, Assistant 2: 6", "6 words"),
        ("8", "1 words"),
        ("", "0 words"),
        ("8/10 6/10", "not two numbers"),
        ("8 nan", "outside"),
        ("8 11", "outside"),
        ("-1 5", "outside"),
    ],
)
def test_marks_are_two_numbers_alone_on_the_first_line(review: str, expected: tuple[float, float] | str) -> None:
    marks = parse_marks(review)
    if isinstance(expected, str):
        assert isinstance(marks, str)
        assert expected in marks
    else:
        assert marks == expected


@given(review=st.text())
def test_no_review_breaks_the_parser(review: str) -> None:
    marks = parse_marks(review)
    assert isinstance(marks, str) or all(0 <= mark <= 10 for mark in marks)


def test_the_first_true_domain_wins_in_the_scripts_order() -> None:
    assert first_domain({"ct_scan": True, "gross": True}) == "gross"
    assert first_domain({"ct_scan": False}) == ""


def test_the_real_questions_are_counted_as_the_paper_counts_them(real_data: Path) -> None:
    questions = read_chat_questions(real_data / "llava-med" / "llava_med_eval_qa50_qa.jsonl")
    assert len(questions) == 193
    assert not any("<image>" in question.text for question in questions)
    kinds = [question.kind for question in questions]
    assert (kinds.count("conversation"), kinds.count("detailed_description")) == (143, 50)
    domains = [question.domain for question in questions]
    assert [domains.count(name) for name in ("chest_xray", "mri", "histology", "gross", "ct_scan")] == [
        37,
        38,
        44,
        34,
        40,
    ]


def question_row(number: int, kind: str = "conversation", **domains: bool) -> dict[str, Any]:
    return {
        "question_id": number,
        "pair_id": f"figure-{number // 2}",
        "type": kind,
        "domain": {name: domains.get(name, False) for name in ("chest_xray", "mri", "histology", "gross", "ct_scan")},
        "text": f"What is shown in {number}?\n<image>",
        "gpt4_answer": f"reference {number}",
        "fig_label": "Fig. 1",
        "fig_caption": "A caption.",
        "in_text_mention": None,
    }


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def test_a_question_file_of_another_format_is_refused(tmp_path: Path) -> None:
    row = question_row(1)
    for broken, message in (
        ({**row, "type": "quiz"}, "no question type 'quiz'"),
        ({name: value for name, value in row.items() if name != "gpt4_answer"}, "gpt4_answer"),
        ({**row, "domain": None}, "not in LLaVA-Med's format"),
    ):
        with pytest.raises(InputError, match=message):
            read_chat_questions(write_lines(tmp_path / "questions.jsonl", [broken]))


def test_the_prompt_shows_the_answers_in_the_order_asked(tmp_path: Path) -> None:
    question = read_chat_questions(write_lines(tmp_path / "questions.jsonl", [question_row(1, mri=True)]))[0]
    there = judge_prompt(question, "our answer", "reference_first")[1]["content"]
    back = judge_prompt(question, "our answer", "answer_first")[1]["content"]
    assert there.index("reference 1") < there.index("our answer")
    assert back.index("reference 1") > back.index("our answer")
    assert "A caption." in there


# ── Reviews to a table ──────────────────────────────────────────────────────────────────────────


def review_row(number: int, text: str, kind: str = "conversation", order: str = "", **domains: bool) -> dict[str, Any]:
    row = {
        key: value
        for key, value in question_row(number, kind, **domains).items()
        if key in ("question_id", "type", "domain")
    }
    return {**row, "gpt_eval": text} | ({"order": order} if order else {})


def test_the_relative_score_is_the_mean_of_ratios(tmp_path: Path) -> None:
    rows = [
        review_row(0, "10 5\nx", mri=True),
        review_row(1, "2 4\nx", mri=True, gross=True),
        review_row(2, "8 2\nx", "detailed_description", ct_scan=True),
    ]
    summary = summarise_reviews(write_lines(tmp_path / "reviews.jsonl", rows))
    table = summary["table"]
    assert table["conversation"]["relative"] == pytest.approx((50 + 200) / 2)
    assert table["mri"]["n"] == 2  # the second is mri, not gross: the first true one
    assert table["gross"] == {"n": 0, "reference": None, "answer": None, "relative": None, "low": None, "high": None}
    assert table["overall"]["relative"] == pytest.approx((50 + 200 + 25) / 3, abs=1e-5)
    assert (table["overall"]["reference"], table["overall"]["answer"]) == (
        pytest.approx(20 / 3, abs=1e-5),
        pytest.approx(11 / 3, abs=1e-5),
    )
    assert table["overall"]["low"] <= table["overall"]["relative"] <= table["overall"]["high"]


def test_malformed_reviews_are_counted_and_listed(tmp_path: Path) -> None:
    rows = [review_row(0, "10 5"), review_row(1, "I cannot judge this."), review_row(2, "0 5")]
    summary = summarise_reviews(write_lines(tmp_path / "reviews.jsonl", rows))
    assert [(entry["line"], entry["question_id"]) for entry in summary["malformed"]] == [(2, "1"), (3, "2")]
    assert summary["table"]["overall"]["n"] == 1
    assert summary["questions"] == 3


def test_a_judge_that_never_marks_leaves_an_empty_table(tmp_path: Path) -> None:
    """As SmolLM2 does behind a real server: it answers the question instead."""
    reviews = write_lines(tmp_path / "reviews.jsonl", [review_row(n, "The organ is the lung.") for n in range(3)])
    summary = summarise_reviews(reviews)
    assert len(summary["malformed"]) == 3
    assert summary["table"]["overall"] == dict.fromkeys(("reference", "answer", "relative", "low", "high")) | {"n": 0}
    table = CliRunner().invoke(cli, ["chat-eval", "summarise", "--reviews", str(reviews)])
    assert table.exit_code == 0
    assert "line 1, question 0" in table.stdout


def test_both_orders_cancel_a_bias_for_the_first_place(tmp_path: Path) -> None:
    """A judge that gives two marks more to whatever stands first, on answers of equal worth."""
    rows = [review_row(0, "8 6", order="reference_first"), review_row(0, "8 6", order="answer_first")]
    table = summarise_reviews(write_lines(tmp_path / "reviews.jsonl", rows))["table"]
    assert table["overall"]["relative"] == 100
    one = summarise_reviews(write_lines(tmp_path / "one.jsonl", rows[:1]))["table"]
    assert one["overall"]["relative"] == 75


def test_bad_review_files_are_refused(tmp_path: Path) -> None:
    for rows, message in (
        ([{"question_id": 1, "review": "8 8"}], "no review"),
        ([review_row(1, "8 8"), review_row(1, "7 7")], "two reviews"),
        ([review_row(1, "8 8", order="sideways")], "no order"),
    ):
        with pytest.raises(InputError, match=message):
            summarise_reviews(write_lines(tmp_path / "reviews.jsonl", rows))


def test_questions_give_what_reviews_lack(tmp_path: Path) -> None:
    questions = write_lines(tmp_path / "questions.jsonl", [question_row(1, mri=True)])
    reviews = write_lines(tmp_path / "reviews.jsonl", [{"question_id": 1, "review": "8 4"}])
    assert summarise_reviews(reviews, questions)["table"]["mri"]["relative"] == 50


# ── The whole way ───────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, Path]:
    questions = write_lines(
        tmp_path / "questions.jsonl", [question_row(n, mri=n % 2 == 0, gross=True) for n in range(4)]
    )
    answers = write_lines(tmp_path / "answers.jsonl", [{"question_id": n, "text": f"answer {n}"} for n in (3, 1, 0, 2)])
    return questions, answers, tmp_path / "reviews.jsonl"


Files = tuple[Path, Path, Path]
Ask = Callable[..., ChatClient]


def judged(number: int, body: dict[str, Any]) -> tuple[int, dict[str, str], str]:
    """Ten for the reference and five for the answer, wherever they stand."""
    text = body["messages"][1]["content"]
    question = int(text.split("What is shown in ")[1][0])
    assert f"answer {question}" in text
    assert f"reference {question}" in text
    return completion("10 5\nx" if text.index("reference ") < text.index("=== Answer 2") else "5 10\nx")


def test_answers_are_reviewed_by_id_in_both_orders(server: Server, ask: Ask, files: Files) -> None:
    server.answer = judged
    summary = review_answers(*files, ask(concurrency=3), both_orders=True)
    assert summary["table"]["overall"]["relative"] == 50
    assert (summary["reviews"], summary["questions"], summary["tokens"]) == (8, 4, 400)
    assert summary["judges"] == ["judge"]
    assert server.busiest <= 3
    assert server.requests[0]["temperature"] == 0


def test_a_second_run_asks_nothing_and_writes_the_same(server: Server, ask: Ask, files: Files) -> None:
    server.answer = judged
    review_answers(*files, ask())
    before, asked = files[2].read_bytes(), len(server.requests)
    assert review_answers(*files, ask())["tokens"] == 0
    assert files[2].read_bytes() == before
    assert len(server.requests) == asked == 4


def test_a_run_that_breaks_off_goes_on_where_it_was(server: Server, ask: Ask, files: Files) -> None:
    server.answer = lambda number, body: judged(number, body) if number <= 2 else (500, {}, "broken")
    with pytest.raises(EndpointError, match="500"):
        review_answers(*files, ask())
    assert not files[2].exists()
    server.answer = judged
    assert review_answers(*files, ask())["tokens"] == 100


def test_the_token_budget_is_kept_and_the_reviews_too(server: Server, ask: Ask, files: Files) -> None:
    server.answer = lambda number, body: completion("5 5", tokens=1000)
    with pytest.raises(EndpointError, match=r"3000 tokens are spent.*3 of 4 reviews are there"):
        review_answers(*files, ask(budget=3500), max_tokens=100)
    assert len(server.requests) == 3
    assert review_answers(*files, ask(budget=3500), max_tokens=100)["questions"] == 4
    assert len(server.requests) == 4


def test_a_review_that_the_judge_refuses_is_counted(server: Server, ask: Ask, files: Files) -> None:
    server.answer = lambda number, body: (422, {}, "no") if number == 1 else judged(number, body)
    summary = review_answers(*files, ask())
    assert [entry["question_id"] for entry in summary["malformed"]] == ["0"]
    assert summary["table"]["overall"]["n"] == 3
    assert "endpoint_refused" in files[2].read_text("utf-8").splitlines()[0]


def test_answers_that_do_not_join_are_listed(server: Server, ask: Ask, files: Files) -> None:
    write_lines(files[1], [{"question_id": n, "text": ""} for n in (0, 1, 1, 2, 7)])
    with pytest.raises(PredictionMismatch) as caught:
        review_answers(*files, ask())
    assert all(part in caught.value.what for part in ("no answer: 3", "twice: 1", "not of this set: 7"))
    assert not server.requests


def test_the_verbs(server: Server, files: tuple[Path, Path, Path], tmp_path: Path) -> None:
    names = ("--questions", "--answers", "--reviews")
    arguments = [part for name, path in zip(names, files, strict=True) for part in (name, str(path))]
    workspace = ["--workspace", str(tmp_path / "workspace"), "chat-eval"]
    result = CliRunner().invoke(
        cli, [*workspace, "run", *arguments, "--base-url", server.url, "--judge", "judge", "--json"]
    )
    assert result.exception is None, result.exception
    assert json.loads(result.stdout)["table"]["overall"]["relative"] == 75
    summary = CliRunner().invoke(cli, [*workspace, "summarise", "--reviews", str(files[2]), "--json"])
    assert json.loads(summary.stdout)["table"]["gross"]["n"] == 2
    table = CliRunner().invoke(cli, [*workspace, "summarise", "--reviews", str(files[2])])
    assert table.exit_code == 0
    assert "LLaVA-Med 60K-IM" in table.stdout
