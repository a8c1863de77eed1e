"""What a server counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector

__all__ = ["Meters"]

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
ROWS = (1, 2, 4, 8, 16, 32, 64)


class Meters:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        self.answers = Counter("medvlm_requests", "Requests by status of HTTP", ["status"], registry=registry)
        self.prompt_tokens = Counter("medvlm_prompt_tokens", "Tokens read", registry=registry)
        self.answer_tokens = Counter("medvlm_completion_tokens", "Tokens written", registry=registry)
        self.first_token = Histogram(
            "medvlm_first_token_seconds", "Until the first piece of an answer", buckets=SECONDS, registry=registry
        )
        self.seconds = Histogram("medvlm_request_seconds", "Until an answer's end", buckets=SECONDS, registry=registry)
        self.batch = Histogram("medvlm_batch_rows", "Answers made together, by step", buckets=ROWS, registry=registry)
        self.waiting = Gauge("medvlm_waiting_requests", "Questions without a place", registry=registry)
        self.running = Gauge("medvlm_running_requests", "Answers that are being made", registry=registry)
