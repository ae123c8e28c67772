"""The servers of one model: connections, who takes the next call, who is left alone for a moment.

A call goes where `stillhouse.balancing` says, among those that nothing speaks against. Spoken against are, worst
first: servers that are down, which rest (longer each time); those that lately refused the revision wanted; those
that this call has asked already; those that said when to come again. If all rest, the one whose rest ends first
is asked at once.

Of many servers a client uses `max_servers`: the first in an order of its own, without those that rest.
"""

import asyncio
import contextlib
import itertools
import random
import time
import uuid
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import grpc

from stillhouse.balancing import POLICIES, Load
from stillhouse.discovery import SOONEST_S, Discovery, Resolve, Target, hash_order
from stillhouse.errors import ModelRevisionMismatch, Overloaded, QuotaExceeded, StillhouseError, Unavailable
from stillhouse.security import Security
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

# How long a server that refused a pinned revision is asked last for it: a rolling update is over some day.
REFUSAL_S = 30.0

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


@dataclass(frozen=True, slots=True)
class ServerState:
    """One server at one moment, for metrics and for whoever looks for a fault."""

    address: str
    connected: bool  # there is a channel; gRPC may still be connecting
    in_flight: int
    outstanding_tokens: int
    seconds_per_token: float | None  # None before the first answer
    resting: bool
    failures: int  # in a row


@dataclass(slots=True, eq=False)
class Connection:
    """One channel. A retired one gets no new calls and is closed with its last."""

    stub: Any
    channel: grpc.aio.Channel
    tls_version: int
    calls: int = 0
    retired: bool = False


@dataclass(slots=True, eq=False)
class Server:
    """One target of the pool, and what is known of it."""

    target: Target
    load: Load = field(default_factory=Load)
    connection: Connection | None = None
    vanished: bool = False  # no target of the pool any more
    failures: int = 0  # in a row
    resting_until_s: float = 0.0
    busy_until_s: float = 0.0
    refused_revision: str = ""
    refused_until_s: float = 0.0

    @property
    def address(self) -> str:
        """Where it is, "host:port"."""
        return self.target.address


class Standing(NamedTuple):
    """What speaks against a server for one call; the least in this order is asked."""

    resting: bool
    refuses: bool
    asked: bool
    busy: bool


class Pool:
    """Connections to what `addresses` stand for, made when first needed: they belong to the event loop that
    runs then."""

    def __init__(
        self,
        addresses: Sequence[str],
        security: Security,
        *,
        balancing: str = "least_expected_wait",
        max_servers: int = 32,
        look_up: Resolve | None = None,
    ) -> None:
        if balancing not in POLICIES:
            raise ValueError(f'balancing is "{balancing}"; give one of {", ".join(POLICIES)}')
        if max_servers < 1:
            raise ValueError(f"max_servers is {max_servers}; it must be at least 1")
        self._policy = POLICIES[balancing]
        self._max_servers = max_servers
        self._security = security
        self._tls_version = security.tls_version
        self._client_id = uuid.uuid4().bytes
        self._servers: list[Server] = []
        self._closing: set[asyncio.Task[None]] = set()
        self._discovery = Discovery(addresses, self._targets_changed, look_up)
        self._targets_changed()

    @property
    def servers(self) -> tuple[ServerState, ...]:
        """All servers known now, in order of address. From any thread."""
        now_s = time.monotonic()
        return tuple(_state(server, now_s) for server in sorted(self._servers, key=lambda server: server.address))

    async def ready(self, timeout_s: float) -> None:
        """Looks after names and files; waits only as long as no server is known at all, then raises Unavailable."""
        self._security.look()
        if self._tls_version != self._security.tls_version:
            # Those that refused the old certificate, or whose own we refused, may well take this one.
            self._tls_version = self._security.tls_version
            for server in self._servers:
                server.resting_until_s = 0.0
        self._discovery.look()
        if not self._servers:
            await self._discovery.first(timeout_s)
            if not self._servers:
                raise Unavailable(self._discovery.error or "looking up the servers' addresses takes too long")

    def pick(
        self,
        cost_tokens: int,
        *,
        revision: str = "",
        asked: Collection[Server] = (),
        only: Callable[[Standing], bool] = lambda _: True,
    ) -> Server | None:
        """The server for a call of `cost_tokens` that wants `revision`; None if `only` admits none."""
        now_s = time.monotonic()
        standings: dict[Server, Standing] = {}
        for server in self._candidates(now_s):
            standing = Standing(
                resting=server.resting_until_s > now_s,
                refuses=server.refused_until_s > now_s and server.refused_revision == revision,
                asked=server in asked,
                busy=server.busy_until_s > now_s,
            )
            if only(standing):
                standings[server] = standing
        if not standings:
            return None
        best = min(standings.values())
        equals = [server for server, standing in standings.items() if standing == best]
        if best.resting:
            return min(equals, key=lambda server: server.resting_until_s)
        return equals[self._policy([server.load for server in equals], cost_tokens, now_s)]

    @contextlib.contextmanager
    def calling(self, server: Server, cost_tokens: int) -> Generator[Connection]:
        """A connection for one call; what the call raises inside decides whether the server rests."""
        connection = self._connection(server)
        connection.calls += 1
        server.load.start(cost_tokens, time.monotonic())
        answered = False
        try:
            yield connection
            answered = True
        except grpc.RpcError as error:
            if error.code() in _GONE:
                self._gone(server)
            raise
        finally:
            server.load.end(cost_tokens, time.monotonic(), answered=answered)
            if answered:
                server.failures = 0
                server.resting_until_s = 0.0
            connection.calls -= 1
            if server.vanished:  # perhaps just before the call connected to it
                self._retire(server)
            self._close_if_over(connection)

    def refused(self, server: Server, error: StillhouseError, revision: str) -> None:
        """Remembers what `error` says about `server` for further calls."""
        if isinstance(error, ModelRevisionMismatch):
            server.refused_revision = revision
            server.refused_until_s = time.monotonic() + REFUSAL_S
        elif isinstance(error, (Overloaded, QuotaExceeded)):
            server.busy_until_s = time.monotonic() + (error.retry_delay_s or 0.0)

    async def close(self) -> None:
        """Closes the connections. No call may be on its way."""
        await self._discovery.close()
        servers, self._servers = self._servers, []
        for server in servers:
            self._retire(server)
        await asyncio.gather(*self._closing)

    def _candidates(self, now_s: float) -> list[Server]:
        """The servers that this client uses: as many as it may that do not rest, and those they stand in for."""
        awake = (server for server in self._servers if server.resting_until_s <= now_s)
        resting = [server for server in self._servers[: self._max_servers] if server.resting_until_s > now_s]
        return [*itertools.islice(awake, self._max_servers), *resting]

    def _gone(self, server: Server) -> None:
        now_s = time.monotonic()
        # Calls that fail together are one failure: a rest is not made longer by those it came too late for.
        if server.resting_until_s <= now_s:
            server.failures += 1
            server.resting_until_s = now_s + min(10.0, 0.25 * 2.0 ** min(server.failures, 10))
        server.load.forget()
        self._security.look(at_once=True)
        self._discovery.look(older_than_s=SOONEST_S)

    def _targets_changed(self) -> None:
        known = {server.target: server for server in self._servers}
        order = hash_order(self._discovery.targets, self._client_id)
        self._servers = [known.pop(target, None) or Server(target) for target in order]
        for server in known.values():
            server.vanished = True
            self._retire(server)

    def _connection(self, server: Server) -> Connection:
        found = server.connection
        if found is not None and found.tls_version == self._security.tls_version:
            return found
        self._retire(server)  # a channel keeps the credentials that it was made with
        made = server.connection = self._connect(server.target)
        self._close_surplus(server)
        return made

    def _connect(self, target: Target) -> Connection:
        options: list[tuple[str, int | str]] = [*CHANNEL_OPTIONS]
        credentials, name = self._security.credentials, self._security.server_name
        if credentials is not None and (name or target.host):
            options.append(("grpc.ssl_target_name_override", name or target.host))
        if target.name and not (credentials is not None and name):
            options.append(("grpc.default_authority", target.name))  # what proxies route on
        if credentials is None:
            channel = grpc.aio.insecure_channel(target.address, options=options)
        else:
            channel = grpc.aio.secure_channel(target.address, credentials, options=options)
        return Connection(pb_grpc.TeacherServiceStub(channel), channel, self._security.tls_version)

    def _close_surplus(self, needed: Server) -> None:
        """Closes connections to servers that stood in for others and are not needed any more."""
        connected = [server for server in self._servers if server.connection is not None]
        if len(connected) > self._max_servers:
            used = [needed, *self._candidates(time.monotonic())]
            for server in connected:
                if server not in used:
                    self._retire(server)

    def _retire(self, server: Server) -> None:
        connection, server.connection = server.connection, None
        if connection is not None:
            connection.retired = True
            self._close_if_over(connection)

    def _close_if_over(self, connection: Connection) -> None:
        if connection.retired and connection.calls == 0:
            closing = asyncio.ensure_future(connection.channel.close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)


def _state(server: Server, now_s: float) -> ServerState:
    return ServerState(
        address=server.address,
        connected=server.connection is not None,
        in_flight=server.load.outstanding_calls,
        outstanding_tokens=server.load.outstanding_tokens,
        seconds_per_token=server.load.seconds_per_token,
        resting=server.resting_until_s > now_s,
        failures=server.failures,
    )
