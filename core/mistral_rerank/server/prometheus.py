"""Prometheus metrics of a server; docs/server.md lists the names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mistral_rerank.reranker import Observer

if TYPE_CHECKING:
    from collections.abc import Callable

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
SEQUENCES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
TOKENS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)


class Metrics(Observer):
    """The metrics of one server; the observer of its reranker."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()

        def histogram(name: str, text: str, buckets: tuple[float, ...], labels: tuple[str, ...] = ()) -> Histogram:
            return Histogram(f"mistral_rerank_{name}", text, labels, buckets=buckets, registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"mistral_rerank_{name}", text, labels, registry=registry)

        self.requests = counter("requests", "answered requests", "route", "status")
        self.rejections = counter("rejections", "requests refused before they were scored", "reason")
        self.prompt_tokens = counter("prompt_tokens", "tokens read by the model for answered requests")
        self.request_seconds = histogram("request_duration_seconds", "from first byte to answer", SECONDS, ("route",))
        self._queue_seconds = histogram("queue_duration_seconds", "a call waits for its first batch", SECONDS)
        self._inference_seconds = histogram("inference_duration_seconds", "one forward of the model", SECONDS)
        self._tokenization_seconds = histogram("tokenization_duration_seconds", "the texts of one call", SECONDS)
        self._batch_size = histogram("batch_size", "sequences of a forward", SEQUENCES)
        self._batch_tokens = histogram("batch_tokens", "padded tokens of a forward", TOKENS)
        self._queue_size = Gauge("mistral_rerank_queue_size", "requests waiting or running", registry=registry)

    def watch_queue(self, size: Callable[[], int]) -> None:
        """Set the function that gives the length of the queue."""
        self._queue_size.set_function(size)

    def tokenized(self, seconds: float) -> None:
        """See `Observer`."""
        self._tokenization_seconds.observe(seconds)

    def started(self, waited: float) -> None:
        """See `Observer`."""
        self._queue_seconds.observe(waited)

    def ran_batch(self, sequences: int, tokens: int, seconds: float) -> None:
        """See `Observer`."""
        self._batch_size.observe(sequences)
        self._batch_tokens.observe(tokens)
        self._inference_seconds.observe(seconds)

    def text(self) -> bytes:
        """Give all metrics in Prometheus' text format."""
        return generate_latest(self._registry)
