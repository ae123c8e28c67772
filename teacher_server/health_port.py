"""Health for whoever supervises the process, on a port of its own: plaintext, from before the model is loaded.

`grpc.health.v1` with three services: "" and the name of TeacherService say whether requests should come here
(readiness), `liveness` whether the process should be started anew: NOT_SERVING when the event loop has not moved for
`_LOOP_S`, or the engine has had work and ended none for `stall_s`. Long queues and long batches are no reason.

It runs on threads and not on the event loop that it watches: a second loop would take a fifth of the throughput,
since gRPC wakes all for everything. There is Check and no Watch: a watcher who does not read would keep a thread, and
with grpcio's servicer the lock that every check and change needs.
"""

import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from teacher_server.health_service import NOT_SERVING, SERVING

logger = logging.getLogger(__name__)

LIVENESS = "liveness"
_LOOP_S = 60.0
_LOOK_EVERY_S = 0.5
_MAX_CALLS = 1024
"""At once; everybody who reaches the port may call."""


class HealthPort:
    """A running health server at `listen` (HOST:PORT); alive and not ready. Raises RuntimeError if it cannot listen.

    stall_s: how long an engine with work may end nothing.
    """

    def __init__(self, listen: str, services: tuple[str, ...], stall_s: float) -> None:
        self._services = ("", *services)
        self._stall_s = stall_s
        self._beat_s: float | None = None  # None: no event loop yet
        self._no_progress_s = 0.0
        self._alive = True
        self._ready = False
        self._end = threading.Event()
        self._server = grpc.server(
            ThreadPoolExecutor(4, "health"), options=(("grpc.so_reuseport", 0),), maximum_concurrent_rpcs=_MAX_CALLS
        )
        # The message is decoded here: gRPC would log a traceback for bytes that are none.
        check = grpc.unary_unary_rpc_method_handler(self._check, None, HealthCheckResponse.SerializeToString)
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(health.SERVICE_NAME, {"Check": check}),)
        )
        self.port: int = self._server.add_insecure_port(listen)
        self._server.start()
        self._thread = threading.Thread(target=self._watch, name="liveness", daemon=True)
        self._thread.start()

    def set_ready(self, ready: bool) -> None:
        """Whether requests should come to this server."""
        self._ready = ready

    def beat(self, no_progress_s: float) -> None:
        """The event loop moves, and the engine has ended nothing for so long. Call it about once a second."""
        self._no_progress_s = no_progress_s
        self._beat_s = time.monotonic()

    @property
    def alive(self) -> bool:
        """What liveness says."""
        return self._alive

    def stop(self) -> None:
        """Closes the port."""
        self._end.set()
        self._thread.join()
        self._server.stop(0.5).wait()

    def _check(self, data: bytes, context: grpc.ServicerContext) -> HealthCheckResponse:
        try:
            service = HealthCheckRequest.FromString(data).service
        except DecodeError:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the request is no HealthCheckRequest")
        if service == LIVENESS:
            good = self._alive
        elif service in self._services:
            good = self._ready
        else:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such service")
        return HealthCheckResponse(status=SERVING if good else NOT_SERVING)

    def _watch(self) -> None:
        while not self._end.wait(_LOOK_EVERY_S):
            still_s = 0.0 if self._beat_s is None else time.monotonic() - self._beat_s
            stalled = self._no_progress_s >= self._stall_s
            alive = still_s < _LOOP_S and not stalled
            if alive != self._alive:
                self._alive = alive
                if alive:
                    logger.warning("alive again")
                else:
                    logger.error(
                        "not alive: engine_no_progress_s=%.0f event_loop_still_s=%.0f", self._no_progress_s, still_s
                    )
