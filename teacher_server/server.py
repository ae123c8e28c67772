"""The gRPC server around an engine, from its first request to its last.

At SIGTERM or SIGINT: health says NOT_SERVING and new requests are refused as Unavailable, so that clients
go to another server; what was admitted is finished, for at most `drain_s` seconds; what is left then is
failed as Unavailable, which clients send again elsewhere.

When the engine dies (not when it is busy), the same happens at once and without a drain, and `serve` raises, so
that the program ends with an error and its supervisor starts it anew.
"""

import asyncio
import logging
import shlex
import signal
import time
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from stillhouse.v1 import teacher_pb2_grpc as pb_grpc
from teacher_server.engine import Engine, EngineLost
from teacher_server.interceptors import SERVICE, CallInterceptor
from teacher_server.metrics import Metrics
from teacher_server.servicer import TeacherServicer

logger = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 256 * 2**20
"""Largest message either way; the clients of the contract have the same limit."""

SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),  # a port that is taken is an error, not a share of its connections
    # Clients ping every 10 s, also between calls; by default gRPC would close their connections for that.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
)
_NOTICE_S = 1.0
"""How long an idle server still answers after the signal, so that health's watchers have turned away."""


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A started server and what stopping it takes."""

    port: int
    server: grpc.aio.Server
    calls: CallInterceptor
    status: Any  # grpc_health's asyncio servicer
    engine: Engine


async def start(engine: Engine, metrics: Metrics, listen: str) -> RunningServer:
    """Serves `engine` at `listen` (HOST:PORT, port 0: a free one). Raises RuntimeError if it cannot."""
    calls = CallInterceptor(metrics)
    server = grpc.aio.server(interceptors=(calls,), options=SERVER_OPTIONS)
    pb_grpc.add_TeacherServiceServicer_to_server(TeacherServicer(engine), server)
    status = health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue]
    health_pb2_grpc.add_HealthServicer_to_server(status, server)
    reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    port = server.add_insecure_port(listen)
    await server.start()
    for service in ("", SERVICE):
        await status.set(service, health_pb2.HealthCheckResponse.SERVING)
    metrics.describe(engine.describe(), lambda: engine.pending_tokens)
    return RunningServer(port, server, calls, status, engine)


async def stop(running: RunningServer, drain_s: float) -> None:
    """Drains and stops `running` as the module's text says; closes its engine."""
    calls = running.calls
    logger.info("stopping: in_flight=%d drain_s=%g", calls.in_flight, drain_s)
    calls.stopping = True
    await running.status.enter_graceful_shutdown()
    started_s = time.monotonic()
    while time.monotonic() - started_s < (drain_s if calls.in_flight else min(_NOTICE_S, drain_s)):
        await asyncio.sleep(0.02)
    if calls.in_flight:
        logger.warning("drain time is over: failing in_flight=%d", calls.in_flight)
    await running.engine.close()
    await running.server.stop(1.0)
    logger.info("stopped")


async def serve(
    engine: Engine, metrics: Metrics, *, listen: str, metrics_host: str, metrics_port: int, drain_s: float
) -> None:
    """Serves until a signal; prints one line on standard output when ready. Closes the engine.

    Raises EngineLost if the engine dies.
    """
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        # Kept to the end: launchers often pass one signal on twice.
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    running = await start(engine, metrics, listen)
    bound_metrics_port, stop_metrics = metrics.listen(metrics_host, metrics_port)
    teacher = engine.describe()
    host = listen.rpartition(":")[0]
    print(
        f"teacher-server ready: model={shlex.quote(teacher.model)} "
        f"revision={shlex.quote(teacher.model_revision)} listen={host}:{running.port} "
        f"metrics=http://{host}:{bound_metrics_port}/metrics",
        flush=True,
    )
    death = asyncio.create_task(engine.died())
    signalled = asyncio.create_task(stopped.wait())
    await asyncio.wait({death, signalled}, return_when=asyncio.FIRST_COMPLETED)
    if not death.done():
        stopping = asyncio.create_task(stop(running, drain_s))
        # An engine that dies while it drains leaves nothing to wait for.
        await asyncio.wait({death, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if stopping.done():
            death.cancel()
            signalled.cancel()
            await stopping
            stop_metrics()
            return
        stopping.cancel()
        await asyncio.gather(stopping, return_exceptions=True)
    signalled.cancel()
    reason = death.result()
    logger.error("%s", reason)
    await stop(running, 0.0)
    stop_metrics()
    raise EngineLost(reason)
