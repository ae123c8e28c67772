"""The servers of one model: connections, who takes the next call, who is left alone for a moment.

A call goes to the address with the fewest calls outstanding. An address that turns out to be down rests
(longer each time) while others are up; if all rest, the one whose rest ends first is asked at once.
"""

import contextlib
import random
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from stillhouse.v1 import teacher_pb2_grpc as pb_grpc

MAX_MESSAGE_BYTES = 256 * 2**20

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A server that hangs or vanishes is noticed in about 13 s. Without ping_timeout_ms gRPC waits 60 s
    # whatever keepalive_timeout_ms says; without max_pings_without_data = 0 it stops asking after two pings,
    # which a long batch outlasts.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.http2.ping_timeout_ms", 3_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # In spite of its name also how long connecting may take: 20 s for an address that swallows packets.
    ("grpc.min_reconnect_backoff_ms", 5_000),
    ("grpc.enable_retries", 0),  # ours know the error table; gRPC's own skip requests over 256 KiB
)

# Statuses that say "this server is gone": refused, reset, or a call that the server or a proxy dropped.
_GONE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)

# Not the module's generator: drawing from that would change the random numbers of the program we run in.
_random = random.Random()


@dataclass(frozen=True, slots=True)
class Backoff:
    """Waits between attempts: uniform in 0 .. min(max_s, initial_s * 2^attempt) (full jitter)."""

    initial_s: float = 0.1
    max_s: float = 5.0

    def delay_s(self, attempt: int) -> float:
        """The wait after attempt 0, 1, ..."""
        return _random.uniform(0.0, min(self.max_s, self.initial_s * 2.0 ** min(attempt, 30)))


@dataclass(slots=True)
class Server:
    """One address of the pool."""

    address: str
    stub: Any
    channel: grpc.aio.Channel
    in_flight: int = 0
    failures: int = 0  # in a row
    resting_until_s: float = 0.0


class Pool:
    """Connections to `addresses`, made when first needed: they belong to the event loop that runs then."""

    def __init__(self, addresses: Sequence[str], credentials: grpc.ChannelCredentials | None) -> None:
        self._addresses = tuple(addresses)
        self._credentials = credentials
        self._servers: list[Server] = []

    @contextlib.asynccontextmanager
    async def server(self) -> AsyncGenerator[Server]:
        """The server for the next call; what the call raises inside decides whether it rests."""
        server = self._next()
        server.in_flight += 1
        try:
            yield server
        except grpc.RpcError as error:
            now_s = time.monotonic()
            # Calls that fail together are one failure: a rest is not made longer by those it came too late for.
            if error.code() in _GONE and server.resting_until_s <= now_s:
                server.failures += 1
                server.resting_until_s = now_s + min(10.0, 0.25 * 2.0 ** min(server.failures, 10))
            raise
        else:
            server.failures = 0
            server.resting_until_s = 0.0
        finally:
            server.in_flight -= 1

    async def close(self) -> None:
        """Closes the connections."""
        servers, self._servers = self._servers, []
        for server in servers:
            await server.channel.close()

    def _next(self) -> Server:
        if not self._servers:
            self._servers = [self._connect(address) for address in self._addresses]
        now_s = time.monotonic()
        awake = [server for server in self._servers if server.resting_until_s <= now_s]
        if not awake:
            return min(self._servers, key=lambda server: server.resting_until_s)
        fewest = min(server.in_flight for server in awake)
        return _random.choice([server for server in awake if server.in_flight == fewest])

    def _connect(self, address: str) -> Server:
        if self._credentials is None:
            channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        else:
            channel = grpc.aio.secure_channel(address, self._credentials, options=CHANNEL_OPTIONS)
        return Server(address, pb_grpc.TeacherServiceStub(channel), channel)
