"""The Prometheus endpoint of a run. Up before anything heavy is imported, so that a start can be watched, too."""

import logging
import threading
import time
from typing import Any

from prometheus_client import CollectorRegistry, Gauge, ProcessCollector, start_http_server

import stillhouse
from student_trainer.config import ConfigError, MetricsPage, RunConfig

logger = logging.getLogger(__name__)

_SCRAPE_TIMEOUT_S = 30.0


class Exporter:
    """Serves each figure of the last step as a gauge `stillhouse_student_<name>`, and how the run stands.

    From any thread. Raises ConfigError if the port cannot be had.
    """

    def __init__(self, page: MetricsPage) -> None:
        self._registry = CollectorRegistry()
        self._lock = threading.Lock()
        self._has_failed = False
        ProcessCollector(registry=self._registry)
        self._info = self._gauge(
            "info",
            "1, labelled with what is trained by what",
            ("recipe", "teacher_model", "teacher_revision", "version"),
        )
        self._failed = self._gauge("failed", "1 when the run ends with an error, labelled with why", ("reason",))
        self._gauges = {
            "steps": self._gauge("steps", "Steps planned"),
            "step": self._gauge("step", "Steps made"),
            "last_step_timestamp_seconds": self._gauge(
                "last_step_timestamp_seconds", "When the last step was made; before the first, when the program began"
            ),
            "last_checkpoint_timestamp_seconds": self._gauge(
                "last_checkpoint_timestamp_seconds",
                "When the newest checkpoint was written; before the first, when the program began",
            ),
        }
        for moment in ("last_step", "last_checkpoint"):
            self.happened(moment)
        try:
            server, self._thread = start_http_server(page.port, addr=page.host, registry=self._registry)
        except OSError as error:
            raise ConfigError(
                f"metrics_port: {page.port} of {page.host} cannot be used ({error.strerror}); 0 takes a free one"
            ) from error
        # A connection holds a thread: one that says nothing, or does not read, is not kept.
        self._server: Any = server
        self._server.RequestHandlerClass = type(
            "Scrape", (self._server.RequestHandlerClass,), {"timeout": _SCRAPE_TIMEOUT_S}
        )
        self._server.handle_error = lambda request, address: logger.debug("a scrape broke off", exc_info=True)
        host = f"[{page.host}]" if ":" in page.host else page.host
        self.url = f"http://{host}:{server.server_port}/metrics"

    def describe(self, config: RunConfig, model: str = "", revision: str = "") -> None:
        """Says what is trained; again once the teacher is known, and whenever its revision changes."""
        self.set("steps", config.steps)
        teacher = model or (config.teacher.model if config.teacher else "")
        self._info.clear()
        self._info.labels(config.objective.recipe or "", teacher, revision, stillhouse.__version__).set(1)

    def failed(self, reason: str) -> None:
        """Says that the run ends with an error; the first reason stands."""
        with self._lock:
            if not self._has_failed:
                self._failed.labels(reason).set(1)
            self._has_failed = True

    def happened(self, what: str) -> None:
        """Notes the time of a `last_step` or `last_checkpoint`."""
        self.set(f"{what}_timestamp_seconds", time.time())

    def show(self, row: dict[str, Any]) -> None:
        """Sets a gauge for every number of `row`."""
        for name, value in row.items():
            if isinstance(value, int | float):
                self.set(name, value)

    def set(self, name: str, value: float) -> None:
        """Sets one gauge, also in the middle of a step."""
        with self._lock:
            if name not in self._gauges:
                self._gauges[name] = self._gauge(name, f"{name} of the last step")
            self._gauges[name].set(value)

    def close(self) -> None:
        """Stops the endpoint."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _gauge(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
        return Gauge(f"stillhouse_student_{name}", text, labels, registry=self._registry)
