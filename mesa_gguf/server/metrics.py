"""Numbers for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)


class Metrics:
    """What one server counts."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("mesa_requests", "Requests", ["route", "status"], registry=self.registry)
        self.waiting = Gauge("mesa_queue_waiting", "Requests that wait for the model", registry=self.registry)
        self.refused = Counter("mesa_queue_refused", "Requests that the queue refused", registry=self.registry)
        self.cancelled = Counter("mesa_cancelled", "Requests whose client went away", registry=self.registry)
        self.computed = Counter("mesa_tokens_computed", "Tokens of prompts and documents that were computed", ["of"],
                                registry=self.registry)  # fmt: skip
        self.reused = Counter("mesa_tokens_reused", "Tokens of prompts that were not computed", registry=self.registry)
        self.generated = Counter("mesa_tokens_generated", "Tokens that were generated", registry=self.registry)
        self.documents = Gauge("mesa_documents_pending", "Documents that are not read yet", registry=self.registry)
        self.wait = Histogram(
            "mesa_wait_seconds", "Until a request had the model", buckets=SECONDS, registry=self.registry
        )
        self.first = Histogram("mesa_first_token_seconds", "Until the first token of a request", buckets=SECONDS,
                               registry=self.registry)  # fmt: skip
        self.took = Histogram(
            "mesa_request_seconds", "Of a request to the model", buckets=SECONDS, registry=self.registry
        )

    def text(self) -> bytes:
        return generate_latest(self.registry)
