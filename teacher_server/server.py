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
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from stillhouse.codec import Teacher
from stillhouse.v1 import teacher_pb2_grpc as pb_grpc
from teacher_server.access import ANONYMOUS, AccessFile
from teacher_server.engine import Engine, EngineLost
from teacher_server.fair_queue import Bounds
from teacher_server.gate import Gate
from teacher_server.health_port import HealthPort
from teacher_server.health_service import NOT_SERVING, SERVING, HealthService
from teacher_server.interceptors import SERVICE, CallInterceptor, CallLimits
from teacher_server.metrics import Metrics
from teacher_server.options import OptionError
from teacher_server.pages import Pages
from teacher_server.security import Security
from teacher_server.servicer import TeacherServicer
from teacher_server.serving import Serving

logger = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 256 * 2**20
"""Largest message either way; the clients of the contract have the same limit."""
DEFAULT_BOUNDS = Bounds(max_tokens=2**20, max_bytes=2**31, window_tokens=2**14, burst_tokens=2**17)

SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),  # a port that is taken is an error, not a share of its connections
    # Clients ping every 10 s, also between calls; by default gRPC would close their connections for that.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    # A connection that says nothing, or whose client vanished, is not kept: it costs memory and a descriptor.
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.max_metadata_size", 16 * 2**10),
    # No guessing how much a fast network could hold: what a caller may send before its message is read (64 KiB, and
    # not megabytes) is memory that each of its calls costs.
    ("grpc.http2.bdp_probe", 0),
    # Clients come again, with the certificates and the addresses of then; calls in flight are not touched.
    ("grpc.max_connection_age_ms", 1_800_000),
)
_NOTICE_S = 1.0
"""How long an idle server still answers after the signal, so that health's watchers have turned away."""
_BEAT_S = 1.0


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A started server and what stopping it takes."""

    port: int
    server: grpc.aio.Server
    calls: CallInterceptor
    status: HealthService
    serving: Serving
    gate: Gate
    metrics: Metrics
    health: HealthPort | None


async def start(
    engine: Engine,
    metrics: Metrics,
    listen: str,
    *,
    bounds: Bounds = DEFAULT_BOUNDS,
    security: Security | None = None,
    health_port: HealthPort | None = None,
    limits: CallLimits | None = None,
) -> RunningServer:
    """Serves `engine` at `listen` (HOST:PORT, port 0: a free one). Raises RuntimeError if it cannot."""
    security = security or Security()
    serving = Serving(engine, on_switch=metrics.describe)
    gate = Gate(bounds)
    calls = CallInterceptor(metrics, security.authenticator, limits)
    largest = ("grpc.max_receive_message_length", _largest_request(engine.describe()))
    server = grpc.aio.server(interceptors=(calls,), options=(*SERVER_OPTIONS, largest))
    pb_grpc.add_TeacherServiceServicer_to_server(TeacherServicer(serving, gate), server)
    status = HealthService()
    health_pb2_grpc.add_HealthServicer_to_server(status, server)
    reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    credentials = security.credentials
    port = server.add_secure_port(listen, credentials) if credentials else server.add_insecure_port(listen)
    await server.start()
    running = RunningServer(port, server, calls, status, serving, gate, metrics, health_port)
    metrics.describe(engine.describe())
    metrics.watch_queue(gate)
    _set_ready(running, True)
    return running


async def stop(running: RunningServer, drain_s: float) -> None:
    """Drains and stops `running` as the module's text says; closes its engines."""
    calls = running.calls
    logger.info("stopping: in_flight=%d drain_s=%g", calls.in_flight, drain_s)
    calls.stopping = True
    _set_ready(running, False)
    started_s = time.monotonic()
    while time.monotonic() - started_s < (drain_s if calls.in_flight else min(_NOTICE_S, drain_s)):
        await asyncio.sleep(0.02)
    if calls.in_flight:
        logger.warning("drain time is over: failing in_flight=%d", calls.in_flight)
    await running.serving.close()
    await running.server.stop(1.0)
    logger.info("stopped")


async def serve(
    engine: Engine,
    pages: Pages,
    *,
    listen: str,
    drain_s: float,
    bounds: Bounds = DEFAULT_BOUNDS,
    security: Security | None = None,
    stall_s: float = 300.0,
    follow: Callable[[Serving], tuple[Callable[[], None], Awaitable[None]]] | None = None,
) -> None:
    """Serves until a signal; prints one line on standard output when ready. Closes the engine and the pages.

    stall_s: an engine that had work for so long and ended none is not ready. follow: gets what is served, gives what
    SIGHUP calls and what has to run beside the server. Raises OptionError if it cannot listen, and leaves the pages
    open then; EngineLost if the engine dies.
    """
    metrics = pages.metrics
    security = security or Security()
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        # Kept to the end: launchers often pass one signal on twice.
        loop.add_signal_handler(number, stopped.set)
    try:
        running = await start(engine, metrics, listen, bounds=bounds, security=security, health_port=pages.health)
    except RuntimeError as error:
        raise OptionError(f"--listen {listen}: cannot listen there ({error}); give a free port") from error
    pages.served = True
    beside: list[asyncio.Future[None]] = [asyncio.create_task(_beat(running, stall_s))]
    if security.access is not None:
        beside.append(asyncio.create_task(security.access.watch()))
        beside.append(asyncio.create_task(_watch_tenants(running, security.access)))
    else:
        metrics.watch_tenant(ANONYMOUS.name, running.gate)
        logger.warning(
            "NO AUTHENTICATION: whoever reaches %s may use this teacher. Give --access and --tls-certificate, or "
            "see that only those reach it who may",
            listen,
        )
    if follow is not None:
        look, watch = follow(running.serving)
        loop.add_signal_handler(signal.SIGHUP, look)
        beside.append(asyncio.ensure_future(watch))
    print(_ready_line(running, listen, pages), flush=True)
    try:
        reason = await _until_the_end(running, stopped, drain_s)
    finally:
        for task in beside:
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)
        pages.close()
    if reason is not None:
        raise EngineLost(reason)


async def _until_the_end(running: RunningServer, stopped: asyncio.Event, drain_s: float) -> str | None:
    """Serves until a signal, drains, stops. Returns why the engine died, if it did."""
    death = asyncio.create_task(running.serving.died())
    signalled = asyncio.create_task(stopped.wait())
    try:
        await asyncio.wait({death, signalled}, return_when=asyncio.FIRST_COMPLETED)
        if not death.done():
            stopping = asyncio.create_task(stop(running, drain_s))
            # An engine that dies while it drains leaves nothing to wait for.
            await asyncio.wait({death, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if stopping.done():
                await stopping
                return None
            stopping.cancel()
            await asyncio.gather(stopping, return_exceptions=True)
        reason = death.result()
        logger.error("%s", reason)
        await stop(running, 0.0)
        return reason
    finally:
        death.cancel()
        signalled.cancel()


def _set_ready(running: RunningServer, ready: bool) -> None:
    """A server that stops is not ready, whatever its engine does."""
    ready = ready and not running.calls.stopping
    running.status.set(dict.fromkeys(("", SERVICE), SERVING if ready else NOT_SERVING))
    running.metrics.ready.set(ready)
    if running.health:
        running.health.set_ready(ready)


async def _beat(running: RunningServer, stall_s: float) -> None:
    """Tells health once a second that the event loop moves, and whether the engine does."""
    ready = True
    while True:
        no_progress_s = running.gate.no_progress_s()
        if running.health:
            running.health.beat(no_progress_s)
        if ready != (no_progress_s < stall_s):
            ready = not ready
            logger.log(
                logging.WARNING if ready else logging.ERROR,
                "the engine moves again" if ready else "the engine stalls: no_progress_s=%.0f",
                *(() if ready else (no_progress_s,)),
            )
            _set_ready(running, ready)
        await asyncio.sleep(_BEAT_S)


async def _watch_tenants(running: RunningServer, access: AccessFile) -> None:
    known: set[str] = set()
    while True:
        for tenant in access.current.tenants.keys() - known:
            running.metrics.watch_tenant(tenant, running.gate)
            known.add(tenant)
        await asyncio.sleep(_BEAT_S)


def _largest_request(teacher: Teacher) -> int:
    """Bytes of the largest request worth reading: with room for one that is too large by a factor and is told so."""
    ids = 4 * teacher.max_sequence_tokens * (1 + teacher.max_candidates)
    return min(MAX_MESSAGE_BYTES, max(4 * 2**20, 4 * ids))


def _ready_line(running: RunningServer, listen: str, pages: Pages) -> str:
    teacher = running.serving.describe()
    host = listen.rpartition(":")[0]
    parts = [
        f"teacher-server ready: model={shlex.quote(teacher.model)}",
        f"revision={shlex.quote(teacher.model_revision)}",
        f"listen={host}:{running.port}",
        f"metrics={pages.metrics_url}",
    ]
    if running.health:
        parts.append(f"health_port={running.health.port}")
    return " ".join(parts)
