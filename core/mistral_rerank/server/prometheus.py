"""Prometheus metrics of a server; docs/reference/server.md lists the names."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

from mistral_rerank._version import __version__
from mistral_rerank.reranker import Observer
from mistral_rerank.server.request_log import current_record

if TYPE_CHECKING:
    from mistral_rerank.server.backlog import Backlog

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
SEQUENCES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
TOKENS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)


class Metrics:
    """The metrics of one server."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()

        def histogram(name: str, text: str, buckets: tuple[float, ...], labels: tuple[str, ...] = ()) -> Histogram:
            return Histogram(f"mistral_rerank_{name}", text, labels, buckets=buckets, registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"mistral_rerank_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"mistral_rerank_{name}", text, labels, registry=registry)

        self.requests = counter("requests", "answered requests", "route", "status")
        self.key_requests = counter("key_requests", "answered requests by the name of their key", "key", "status")
        self.rejections = counter("rejections", "requests refused before they were scored", "reason")
        self.cancelled = counter("cancelled_passages", "passages of requests that ended before they were scored")
        self.prompt_tokens = counter("prompt_tokens", "tokens read by the model for answered requests")
        self.request_seconds = histogram("request_duration_seconds", "from first byte to answer", SECONDS, ("route",))
        self.passages = histogram("request_passages", "passages of a request", SEQUENCES)
        self.queue_seconds = histogram("queue_duration_seconds", "a call waits for its first batch", SECONDS)
        self.inference_seconds = histogram("inference_duration_seconds", "one forward of the model", SECONDS)
        self.tokenization_seconds = histogram("tokenization_duration_seconds", "the texts of one call", SECONDS)
        self.batch_size = histogram("batch_size", "sequences of a forward", SEQUENCES)
        self.batch_tokens = histogram("batch_tokens", "padded tokens of a forward", TOKENS)
        self.cache_hits = counter("passage_cache_hits", "passages of a batch that were in the passage cache")
        self.cache_misses = counter("passage_cache_misses", "passages of a batch that were not")
        self.cache_tokens = counter("passage_cache_saved_tokens", "tokens of the hits, which were not computed")
        self.cache_bytes = gauge("passage_cache_bytes", "size of the passage cache")
        self.model_requests = counter("model_requests", "answered requests by their model", "model", "status")
        self.model_loads = counter("model_loads", "loads of a model of several", "model")
        self.model_weight_bytes = gauge("model_weight_bytes", "weights in memory of a model of several", "model")
        self.queue_size = gauge("queue_size", "requests waiting or running")
        self.queue_tokens = gauge("queue_tokens", "estimated tokens of these requests")
        self.ready = gauge("ready", "1 if the server is ready, else 0")
        build = {"version": __version__, "python": platform.python_version()}
        Info("mistral_rerank_build", "versions of the software", registry=registry).info(build)
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)

    def text(self) -> bytes:
        """Give all metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class ModelMetrics(Observer):
    """The observer of one reranker of a server.

    Args:
        metrics: of the server.
        backlog: learns the model's speed from the batches.

    """

    def __init__(self, metrics: Metrics, backlog: Backlog) -> None:
        self._metrics, self._backlog = metrics, backlog
        self._saved = self._cache_bytes = 0

    def tokenized(self, seconds: float) -> None:
        """See `Observer`."""
        self._metrics.tokenization_seconds.observe(seconds)

    def started(self, waited: float) -> None:
        """See `Observer`."""
        self._metrics.queue_seconds.observe(waited)
        current_record().queue_ms = waited * 1000

    def ran_batch(self, sequences: int, tokens: int, seconds: float) -> None:
        """See `Observer`."""
        self._metrics.batch_size.observe(sequences)
        self._metrics.batch_tokens.observe(tokens)
        self._metrics.inference_seconds.observe(seconds)
        self._backlog.ran_batch(tokens + self._saved, seconds)  # it estimates the tokens of texts, cached or not
        self._saved = 0

    def used_prefixes(self, hits: int, misses: int, tokens_saved: int, cache_bytes: int) -> None:
        """See `Observer`."""
        self._metrics.cache_hits.inc(hits)
        self._metrics.cache_misses.inc(misses)
        self._metrics.cache_tokens.inc(tokens_saved)
        self._metrics.cache_bytes.inc(cache_bytes - self._cache_bytes)  # the sum of all models
        self._cache_bytes = cache_bytes
        self._saved += tokens_saved
