"""What the endpoint counts, for Prometheus."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from framework.engine.request import Load

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TOKEN_SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)


class Metrics:
    """All figures of one server."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter("requests", "HTTP requests by path and status", ["path", "status"], registry=registry)
        self.first_token = Histogram(
            "time_to_first_token_seconds", "From the request to its first token", buckets=_SECONDS, registry=registry
        )
        self.next_token = Histogram(
            "inter_token_latency_seconds", "Between two tokens of an answer", buckets=_TOKEN_SECONDS, registry=registry
        )
        self.duration = Histogram(
            "request_duration_seconds", "From the request to its last token", buckets=_SECONDS, registry=registry
        )
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts answered", registry=registry)
        self.generation_tokens = Counter("generation_tokens", "Tokens generated", registry=registry)
        self.pictures = Counter("pictures", "Pictures drawn", registry=registry)
        self.cancelled = Counter("answers_cancelled", "Answers that nobody waited for any more", registry=registry)
        self.restarts = Counter("replica_restarts", "Times that a replica was lost", ["replica"], registry=registry)
        self._ready = Gauge("replica_ready", "Whether the replica takes requests", ["replica"], registry=registry)
        self._running = Gauge("requests_running", "Answers being generated", ["replica"], registry=registry)
        self._waiting = Gauge("requests_waiting", "Answers that wait to be begun", ["replica"], registry=registry)
        self._pages = Gauge("kv_cache_pages", "Pages of 128 tokens in the KV cache", ["replica"], registry=registry)
        self._used = Gauge("kv_cache_pages_used", "Pages that answers hold", ["replica"], registry=registry)
        self._ratio = Gauge(
            "kv_cache_usage_ratio", "Share of the pages that answers hold", ["replica"], registry=registry
        )

    def ready(self, replica: int, pages: int, *, ready: bool) -> None:
        """Note that a replica came or went; in both cases nothing runs on it."""
        self._ready.labels(replica).set(ready)
        self._pages.labels(replica).set(pages)
        self.load(replica, pages, Load(0, 0, 0))

    def load(self, replica: int, pages: int, load: Load) -> None:
        """Note how busy a replica is."""
        self._running.labels(replica).set(load.running)
        self._waiting.labels(replica).set(load.waiting)
        self._used.labels(replica).set(load.pages_used)
        self._ratio.labels(replica).set(load.pages_used / pages if pages else 0.0)

    def totals(self) -> dict[str, float]:
        """Return what was served in all."""
        found = {
            "answers": "request_duration_seconds_count",
            "answers_cancelled": "answers_cancelled_total",
            "prompt_tokens": "prompt_tokens_total",
            "generation_tokens": "generation_tokens_total",
            "pictures": "pictures_total",
        }
        return {name: self._registry.get_sample_value(sample) or 0.0 for name, sample in found.items()}

    def text(self) -> bytes:
        """Return all figures in Prometheus' text format."""
        return generate_latest(self._registry)


class Stopwatch:
    """Times of one answer, from its request on."""

    def __init__(self, metrics: Metrics, begun_s: float) -> None:
        self._metrics, self._begun_s, self._last_s = metrics, begun_s, 0.0

    def token(self) -> None:
        """A token came."""
        now_s = time.perf_counter()
        if self._last_s:
            self._metrics.next_token.observe(now_s - self._last_s)
        else:
            self._metrics.first_token.observe(now_s - self._begun_s)
        self._last_s = now_s
        self._metrics.generation_tokens.inc()

    def end(self, prompt_tokens: int) -> None:
        """The answer is complete."""
        self._metrics.duration.observe(time.perf_counter() - self._begun_s)
        self._metrics.prompt_tokens.inc(prompt_tokens)

    def picture(self) -> None:
        """The answer is a picture, and it is complete."""
        self._metrics.duration.observe(time.perf_counter() - self._begun_s)
        self._metrics.pictures.inc()
