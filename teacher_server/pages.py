"""What a server shows of itself from its first second to its last: the metrics page and the health port."""

import logging

from teacher_server.health_port import HealthPort
from teacher_server.interceptors import SERVICE
from teacher_server.metrics import Metrics
from teacher_server.options import OptionError

logger = logging.getLogger(__name__)


class Pages:
    """Both, open; alive and not ready. health_listen: HOST:PORT, or "" for no health port. Raises OptionError."""

    def __init__(self, *, metrics_host: str, metrics_port: int, health_listen: str, stall_s: float) -> None:
        self.metrics = Metrics()
        self.health: HealthPort | None = None
        self.served = False
        """Whether the server has been ready: what ends it then is no failed start."""
        try:
            port, self._stop_metrics = self.metrics.listen(metrics_host, metrics_port)
        except OSError as error:
            raise OptionError(
                f"--metrics-port {metrics_port}: cannot listen there ({error}); give a free port"
            ) from error
        host = f"[{metrics_host}]" if ":" in metrics_host else metrics_host
        self.metrics_url = f"http://{host}:{port}/metrics"
        self._closed = False
        if health_listen:
            try:
                self.health = HealthPort(health_listen, (SERVICE,), stall_s)
            except RuntimeError as error:
                self.close()
                raise OptionError(
                    f"--health-listen {health_listen}: cannot listen there ({error}); give a free port"
                ) from error
        logger.info(
            "alive and not ready: metrics=%s health_port=%s",
            self.metrics_url,
            self.health.port if self.health else None,
        )

    def close(self) -> None:
        """Closes both. May be called again."""
        if self._closed:
            return
        self._closed = True
        self._stop_metrics()
        if self.health:
            self.health.stop()
