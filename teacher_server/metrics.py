"""What the server counts, as Prometheus series named `stillhouse_teacher_*`."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import (
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    start_http_server,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from stillhouse.codec import Teacher
from stillhouse.errors import InvalidRequest, StillhouseError
from stillhouse.v1 import teacher_pb2 as pb
from teacher_server.gate import Gate
from teacher_server.memory import devices
from teacher_server.start_failures import REASONS

logger = logging.getLogger(__name__)

_SCRAPE_TIMEOUT_S = 30.0
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


class _MemoryCollector(Collector):
    """Memory at the moment of the scrape."""

    def collect(self) -> Iterator[GaugeMetricFamily]:
        prefix, by = "stillhouse_teacher_memory", ("device",)
        used = GaugeMetricFamily(f"{prefix}_used_bytes", "Memory in use, caches of files left out, bytes", labels=by)
        limit = GaugeMetricFamily(f"{prefix}_limit_bytes", "Memory there is, bytes", labels=by)
        for device, memory in devices().items():
            used.add_metric([device], memory.used)
            limit.add_metric([device], memory.limit)
        yield used
        yield limit


class Metrics:
    """All series of one server, in a registry of their own."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"stillhouse_teacher_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"stillhouse_teacher_{name}", text, buckets=buckets, registry=registry)

        def gauge(name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
            return Gauge(f"stillhouse_teacher_{name}", text, labels, registry=registry)

        self.ready = gauge("ready", "1 while requests should come here, as the health port says, else 0")
        self._start_failed = gauge("start_failed", "1 if the server could not start, by the reason why", ("reason",))
        for reason in REASONS:
            self._start_failed.labels(reason).set(0)
        registry.register(_MemoryCollector())
        self._process = ProcessCollector(registry=registry)
        # Tenants are those of the file of rights (and "" before anybody is known), models those of one server: the
        # number of series is bounded by the operator, never by callers.
        by = ("tenant", "model")
        self._model = ""
        self.requests = counter(
            "requests", "Requests answered; reason is empty if none", (*by, "method", "code", "reason")
        )
        self.in_flight = gauge("requests_in_flight", "Requests not yet answered")
        self.request_seconds = Histogram(
            "stillhouse_teacher_request_seconds",
            "Time from request to answer, seconds",
            ("method",),
            buckets=_SECONDS,
            registry=registry,
        )
        self.scored_tokens = counter("scored_tokens", "Response tokens scored", by)
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens read in requests that were scored", by)
        self.refused_tokens = counter(
            "refused_tokens", "Tokens of requests that were well-formed and refused or failed", (*by, "reason")
        )
        self.response_bytes = histogram("response_bytes", "Size of a ScoreResponse, bytes", _BYTES)
        self.queue_wait_seconds = Histogram(
            "stillhouse_teacher_queue_wait_seconds",
            "Time from arrival to the start of the batch, seconds",
            by,
            buckets=_SECONDS,
            registry=registry,
        )
        self.engine_seconds = histogram("engine_seconds", "The engine's time on a sequence's batch, seconds", _SECONDS)
        self._tenant_pending_tokens = gauge(
            "tenant_pending_tokens", "Tokens admitted and not yet answered, by tenant", ("tenant",)
        )
        self._running_tokens = gauge("running_tokens", "Tokens with the engine")
        self._pending_bytes = gauge("pending_bytes", "Bytes of requests and answers admitted and not yet answered")
        self._tokens_per_s = gauge("engine_tokens_per_second", "The engine's speed of late while it has work")
        self._no_progress_s = gauge("engine_no_progress_seconds", "Time with work and without ending any, seconds")
        self.reloads = counter(
            "reloads", "Files read again while serving: tls, access, model; result is ok or failed", ("what", "result")
        )
        self.certificate_expires = gauge(
            "tls_certificate_expires_timestamp_seconds", "When the server's certificate ends; 0 without TLS"
        )
        self.batch_seconds = histogram("batch_seconds", "The model's time on a batch, seconds", _SECONDS)
        self.batch_sequences = histogram("batch_sequences", "Sequences in a batch", _POWERS_OF_TWO)
        self.batch_tokens = histogram("batch_tokens", "Tokens in a batch, without padding", _TOKENS)
        self.padding_tokens = counter("padding_tokens", "Padding computed and thrown away, tokens")
        self.cached_tokens = counter("cached_tokens", "Prompt tokens reused from another sequence, not computed (vllm)")
        self.resent_sequences = counter(
            "resent_sequences", "Sequences computed twice because a reused prefix hid rows to score (vllm)"
        )
        self._pending_tokens = gauge("pending_tokens", "Tokens admitted and not yet scored")
        self._model_info = gauge(
            "model_info",
            "1, labelled with what is served",
            ("model", "revision", "engine", "dtype", "version"),
        )

    def start_failed(self, reason: str) -> None:
        """Says that the server could not start; one of REASONS."""
        self._start_failed.labels(reason).set(1)

    def describe(self, teacher: Teacher) -> None:
        """Says what is served from now on."""
        self._model = teacher.model
        self._model_info.clear()
        self._model_info.labels(
            teacher.model,
            teacher.model_revision,
            teacher.engine,
            teacher.compute_dtype,
            teacher.server_version,
        ).set(1)

    def watch_queue(self, gate: Gate) -> None:
        """Reads the state of the queue whenever it is asked for."""
        queue = gate.queue
        self._pending_tokens.set_function(lambda: queue.pending_tokens)
        self._pending_bytes.set_function(lambda: queue.pending_bytes)
        self._running_tokens.set_function(lambda: queue.running_tokens)
        self._tokens_per_s.set_function(lambda: queue.tokens_per_s)
        self._no_progress_s.set_function(gate.last_no_progress_s)

    def watch_tenant(self, tenant: str, gate: Gate) -> None:
        """The same for one tenant's share of it."""
        self._tenant_pending_tokens.labels(tenant).set_function(lambda: gate.queue.pending_of(tenant))

    def reloaded(self, what: str, ok: bool) -> None:
        """Counts a file that was read again. Safe from any thread."""
        self.reloads.labels(what, "ok" if ok else "failed").inc()

    def observe_call(
        self,
        method: str,
        tenant: str,
        request: Any,
        response: Any,
        size: int,
        error: StillhouseError | None,
        seconds: float,
    ) -> None:
        """Counts one call. request: None if it was refused before it was decoded."""
        by = tenant, self._model
        code, reason = ("OK", "") if error is None else (error.code.name, error.reason)
        self.requests.labels(*by, method, code, reason).inc()
        self.request_seconds.labels(method).observe(seconds)
        if not isinstance(request, pb.ScoreRequest) or len(request.token_ids.shape) != 1:
            return
        tokens = request.token_ids.shape[0]
        if error is not None:
            # The shape is the caller's word: only of requests that were checked is it the truth.
            if not isinstance(error, InvalidRequest):
                self.refused_tokens.labels(*by, reason).inc(tokens)
            return
        self.prompt_tokens.labels(*by).inc(request.score_start)
        self.scored_tokens.labels(*by).inc(tokens - request.score_start)
        self.queue_wait_seconds.labels(*by).observe(response.timings.queue_wait_ms / 1e3)
        self.engine_seconds.observe(response.timings.engine_ms / 1e3)
        self.response_bytes.observe(size)

    def observe_batch(self, sequences: int, tokens: int, padded_tokens: int, engine_s: float) -> None:
        """Counts one batch. Safe from any thread."""
        self.batch_seconds.observe(engine_s)
        self.batch_sequences.observe(sequences)
        self.batch_tokens.observe(tokens)
        self.padding_tokens.inc(padded_tokens - tokens)

    def include_default_registry(self) -> None:
        """Adds the series of the process's default registry, where vLLM keeps its own."""
        self.registry.unregister(self._process)  # it is in that one too
        self.registry.register(_DefaultRegistry())

    def listen(self, host: str, port: int) -> tuple[int, Callable[[], None]]:
        """Serves `/metrics`; returns the port (a free one for 0) and what stops it."""
        server, thread = start_http_server(port, addr=host, registry=self.registry)
        # A connection holds a thread: one that says nothing, or does not read, is not kept.
        page: Any = server
        page.RequestHandlerClass = type("Scrape", (page.RequestHandlerClass,), {"timeout": _SCRAPE_TIMEOUT_S})
        page.handle_error = lambda request, address: logger.debug("a scrape broke off", exc_info=True)

        def stop() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        return server.server_port, stop
