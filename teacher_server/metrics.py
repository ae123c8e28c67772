"""What the server counts, as Prometheus series named `stillhouse_teacher_*`."""

from collections.abc import Callable
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.registry import Collector

from stillhouse.codec import Teacher

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_POWERS_OF_TWO = tuple(float(2**power) for power in range(0, 11))
_TOKENS = tuple(float(2**power) for power in range(4, 19))
_BYTES = tuple(float(4**power * 1024) for power in range(0, 10))


class _DefaultRegistry(Collector):
    """What libraries of this process count in the registry that prometheus_client makes by itself."""

    def collect(self) -> Any:
        return REGISTRY.collect()

    def describe(self) -> Any:
        return []  # it grows later


class Metrics:
    """All series of one server, in a registry of their own."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"stillhouse_teacher_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"stillhouse_teacher_{name}", text, buckets=buckets, registry=registry)

        self.requests = counter("requests", "Requests answered; reason is empty if none", ("method", "code", "reason"))
        self.in_flight = Gauge("stillhouse_teacher_requests_in_flight", "Requests not yet answered", registry=registry)
        self.request_seconds = Histogram(
            "stillhouse_teacher_request_seconds",
            "Time from request to answer, seconds",
            ("method",),
            buckets=_SECONDS,
            registry=registry,
        )
        self.scored_tokens = counter("scored_tokens", "Response tokens scored")
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens read in requests that were scored")
        self.response_bytes = histogram("response_bytes", "Size of a ScoreResponse, bytes", _BYTES)
        self.queue_wait_seconds = histogram(
            "queue_wait_seconds", "Time from arrival to the start of the batch, seconds", _SECONDS
        )
        self.batch_seconds = histogram("batch_seconds", "The model's time on a batch, seconds", _SECONDS)
        self.batch_sequences = histogram("batch_sequences", "Sequences in a batch", _POWERS_OF_TWO)
        self.batch_tokens = histogram("batch_tokens", "Tokens in a batch, without padding", _TOKENS)
        self.padding_tokens = counter("padding_tokens", "Padding computed and thrown away, tokens")
        self.cached_tokens = counter("cached_tokens", "Prompt tokens reused from another sequence, not computed (vllm)")
        self.resent_sequences = counter(
            "resent_sequences", "Sequences computed twice because a reused prefix hid rows to score (vllm)"
        )
        self._pending_tokens = Gauge(
            "stillhouse_teacher_pending_tokens", "Tokens admitted and not yet scored", registry=registry
        )
        self._model = Gauge(
            "stillhouse_teacher_model_info",
            "1, labelled with what is served",
            ("model", "revision", "engine", "dtype", "version"),
            registry=registry,
        )

    def describe(self, teacher: Teacher, pending_tokens: Callable[[], int]) -> None:
        """Adds what is served, and where to read the length of the queue."""
        self._model.labels(
            teacher.model,
            teacher.model_revision,
            teacher.engine,
            teacher.compute_dtype,
            teacher.server_version,
        ).set(1)
        self._pending_tokens.set_function(pending_tokens)

    def observe_batch(self, sequences: int, tokens: int, padded_tokens: int, engine_s: float) -> None:
        """Counts one batch. Safe from any thread."""
        self.batch_seconds.observe(engine_s)
        self.batch_sequences.observe(sequences)
        self.batch_tokens.observe(tokens)
        self.padding_tokens.inc(padded_tokens - tokens)

    def include_default_registry(self) -> None:
        """Adds the series of the process's default registry, where vLLM keeps its own."""
        self.registry.register(_DefaultRegistry())

    def listen(self, host: str, port: int) -> tuple[int, Callable[[], None]]:
        """Serves `/metrics`; returns the port (a free one for 0) and what stops it."""
        server, thread = start_http_server(port, addr=host, registry=self.registry)

        def stop() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        return server.server_port, stop


def count_answer(metrics: Metrics, request: Any, response: Any, size: int) -> None:
    """Counts what an answered ScoreRequest was about."""
    tokens = request.token_ids.shape[0]
    metrics.prompt_tokens.inc(request.score_start)
    metrics.scored_tokens.inc(tokens - request.score_start)
    metrics.queue_wait_seconds.observe(response.timings.queue_wait_ms / 1e3)
    metrics.response_bytes.observe(size)
