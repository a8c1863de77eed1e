"""Judges that say which of two answers about an image is better."""

from __future__ import annotations

import re
from collections import Counter
from typing import Literal, Protocol

from medvlm.data.conversations import prompt_text
from medvlm.data.endpoint import ChatClient, Unanswered

__all__ = ["EndpointJudge", "Judge", "OverlapJudge", "Verdict", "word_f1"]

Verdict = Literal["first", "second", "tie"]


class Judge(Protocol):
    """Says which of two answers is better."""

    name: str
    """Goes into each pair as ``judge:<name>``."""

    def rank(self, question: str, reference: str, first: str, second: str) -> Verdict | Unanswered:
        """The better answer, a tie, or why there is no verdict.

        Args:
            question: Without the image slot.
            reference: What is known of the image: its caption or conversation.
            first: One answer.
            second: The other.
        """
        ...


class OverlapJudge:
    """The offline rule: the answer whose words overlap more with the reference (F1 over words) is better.

    A crude stand-in for a reader. Answers closer than ``margin`` are a tie.
    """

    name = "overlap-offline"

    def __init__(self, margin: float = 0.05) -> None:
        self._margin = margin

    def rank(self, question: str, reference: str, first: str, second: str) -> Verdict:
        """The answer with the larger F1 against the reference, or a tie."""
        difference = word_f1(first, reference) - word_f1(second, reference)
        if abs(difference) < self._margin:
            return "tie"
        return "first" if difference > 0 else "second"


class EndpointJudge:
    """A chat endpoint as judge, asked in both orders: where the order decides, it is a tie."""

    def __init__(self, client: ChatClient) -> None:
        self._client = client
        self.name = client.endpoint.model

    def rank(self, question: str, reference: str, first: str, second: str) -> Verdict | Unanswered:
        """The endpoint's verdict, or why it gave none.

        Raises:
            EndpointError: The endpoint cannot be reached, or refuses everything.
        """
        verdicts: list[Verdict] = []
        for one, other in ((first, second), (second, first)):
            said = f"Description: {reference}\n\nQuestion: {question}\n\nFirst: {one}\n\nSecond: {other}"
            messages = [{"role": "system", "content": prompt_text("preference_judge")}]
            answer = self._client.complete([*messages, {"role": "user", "content": said}], max_tokens=8)
            if isinstance(answer, Unanswered):
                return answer
            words = set(re.findall(r"\b(first|second|tie)\b", answer.text.lower()))
            if len(words) != 1:
                return Unanswered("verdict_malformed", answer.text[:80])
            verdicts.append("first" if "first" in words else "second" if "second" in words else "tie")
        swapped: dict[Verdict, Verdict] = {"first": "second", "second": "first", "tie": "tie"}
        return verdicts[0] if verdicts[0] == swapped[verdicts[1]] else "tie"


def word_f1(answer: str, reference: str) -> float:
    """F1 over the words of an answer and a reference, 0 to 1; Chinese characters count as words."""
    said, known = (Counter(re.findall(r"[\u4e00-\u9fff]|[^\W_]+", text.lower())) for text in (answer, reference))
    common = sum((said & known).values())
    return 2 * common / (sum(said.values()) + sum(known.values())) if common else 0.0
