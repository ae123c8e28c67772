"""What surrounds every call: who asks, how it ends, what is counted and logged.

A call to TeacherService: identity -> room for one more -> its message -> decode -> servicer -> encode. Errors become
statuses with a reason; what nobody foresaw becomes ENGINE_FAILED with a reference into the log, and no text of its
own. Health and reflection want an identity, room and a message that can be decoded too, and with authentication so
does a method that does not exist.

Every method is a streaming one to gRPC, which on the wire is the same: of others it reads the whole message before
anybody is asked who sends it, and holds it for as long as the rest is missing.
"""

import asyncio
import contextlib
import logging
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from stillhouse.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    StillhouseError,
    Unavailable,
    to_grpc_status,
)
from stillhouse.v1 import teacher_pb2 as pb
from teacher_server.caller import CALLER, Caller, request_ids
from teacher_server.failures import engine_failed
from teacher_server.identity import Authenticator
from teacher_server.logs import log_fields
from teacher_server.metrics import Metrics

logger = logging.getLogger("teacher_server.requests")

SERVICE = "stillhouse.v1.TeacherService"


@dataclass(frozen=True, slots=True)
class CallLimits:
    """What one tenant may have open, whatever the queue would take: bounds on memory, not on work.

    Health and reflection are counted apart, each with the same limits: who floods one does not close the other.
    """

    requests: int = 4096
    """Not yet answered in full."""
    unsent_bytes: int = 2**28
    """Of answers that wait for the caller to read them. Each is in memory twice, here and in gRPC."""
    receiving: int = 16
    """Whose message is read at once. gRPC takes little of one before it is asked for it."""
    receive_s: float = 120.0
    """Time for a message to come."""


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every method; see the module's text. It decodes requests itself: gRPC would answer malformed bytes with
    UNKNOWN and the exception's text."""

    def __init__(self, metrics: Metrics, authenticator: Authenticator, limits: CallLimits | None = None) -> None:
        self._metrics = metrics
        self._authenticator = authenticator
        self._limits = limits or CallLimits()
        self._open: Counter[str] = Counter()  # by tenant
        self._unsent_bytes: Counter[str] = Counter()
        self._receiving: dict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(self._limits.receiving))
        self.in_flight = 0
        self.stopping = False

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """The method's handler, wrapped; None (UNIMPLEMENTED) if there is no such method and everybody may know."""
        handler: Any = await continuation(handler_call_details)
        path: str = handler_call_details.method  # pyright: ignore[reportAttributeAccessIssue]
        service, _, method = path.strip("/").rpartition("/")
        if handler is None:
            return self._missing() if self._authenticator.enabled else None
        if service != SERVICE:
            return self._beside(service, method, handler)

        async def call(_: Any, context: Any) -> bytes:
            return await self._call(method, handler, context)

        return grpc.stream_unary_rpc_method_handler(call)

    def _missing(self) -> Any:
        """A method that does not exist, for callers with an identity only."""

        async def answer(_: Any, context: Any) -> None:
            async with self._entered("", "", context):
                await context.abort(grpc.StatusCode.UNIMPLEMENTED, "no such method")

        return grpc.stream_stream_rpc_method_handler(answer)

    def _beside(self, service: str, method: str, handler: Any) -> Any:
        """A method of health or reflection."""

        async def unary(_: Any, context: Any) -> Any:
            async with self._entered(service, method, context) as key:
                return await handler.unary_unary(await self._message(key, handler, context), context)

        async def watch(_: Any, context: Any) -> None:
            async with self._entered(service, method, context) as key:
                await handler.unary_stream(await self._message(key, handler, context), context)

        async def stream(_: Any, context: Any) -> Any:
            async with self._entered(service, method, context) as key:
                async for answer in handler.stream_stream(self._messages(key, handler, context), context):
                    yield answer

        if handler.unary_unary is not None:
            return grpc.stream_unary_rpc_method_handler(unary, None, handler.response_serializer)
        chosen = stream if handler.unary_stream is None else watch
        return grpc.stream_stream_rpc_method_handler(chosen, None, handler.response_serializer)

    @contextlib.asynccontextmanager
    async def _entered(self, service: str, method: str, context: Any) -> AsyncIterator[str]:
        """Inside, the caller is known and has room; gives under what the call is counted. Refusals are answered."""
        started_s = time.monotonic()
        metadata, tenant = context.invocation_metadata(), ""
        try:
            tenant = (await self._authenticator.authenticate(metadata, context.auth_context())).name
            key = f"{tenant} {service}"
            self._open_one(key, context)
            yield key
        except StillhouseError as error:
            self._note(method, tenant, *request_ids(metadata), context, error, time.monotonic() - started_s)
            await _abort(context, error)

    async def _messages(self, key: str, handler: Any, context: Any) -> AsyncIterator[Any]:
        while (data := await self._read(key, context)) is not None:
            yield _decode(handler, data)

    async def _message(self, key: str, handler: Any, context: Any) -> Any:
        return _decode(handler, await self._read(key, context))

    async def _read(self, key: str, context: Any) -> bytes | None:
        """The next message; None if there is none. Raises DeadlineExceeded."""
        limit_s = self._limits.receive_s
        async with self._receiving[key]:
            try:
                async with asyncio.timeout(limit_s):
                    data = await context.read()
            except TimeoutError:
                raise DeadlineExceeded(f"the request did not arrive within {limit_s:g} s") from None
        return None if data is grpc.aio.EOF else data  # pyright: ignore[reportAttributeAccessIssue]

    async def _call(self, method: str, handler: Any, context: Any) -> bytes:
        started_s = time.monotonic()
        metadata = context.invocation_metadata()
        request_id, attempt = request_ids(metadata)
        request = response = None
        answer = b""
        error: StillhouseError | None = None
        tenant = ""
        received = False
        try:
            self._check_stopping()
            identity = await self._authenticator.authenticate(metadata, context.auth_context())
            tenant = identity.name
            CALLER.set(Caller(identity, request_id, attempt))
            self._open_one(tenant, context)
            data = await self._read(tenant, context)
            started_s = time.monotonic()
            received = True
            self.in_flight += 1
            self._metrics.in_flight.set(self.in_flight)
            self._check_stopping()
            request = _decode(handler, data)
            response = await handler.unary_unary(request, context)
            answer = handler.response_serializer(response)
            self._note_unsent(tenant, len(answer), context)
        except StillhouseError as refused:
            error = refused
        except asyncio.CancelledError:
            remaining_s = context.time_remaining()
            late = remaining_s is not None and remaining_s <= 0
            error = DeadlineExceeded("deadline passed") if late else Cancelled("cancelled by the caller")
            raise  # the caller is gone; gRPC sends the status
        except Exception as unexpected:
            error = engine_failed(unexpected)
        finally:
            if received:
                self.in_flight -= 1
                self._metrics.in_flight.set(self.in_flight)
            seconds = time.monotonic() - started_s
            # Taken back before there was a request: nothing to account for, and anybody can do it very often.
            if received or not isinstance(error, Cancelled):
                self._note(method, tenant, request_id, attempt, context, error, seconds, request, response, len(answer))
        if error is not None:
            await _abort(context, error)
        return answer

    def _note(
        self,
        method: str,
        tenant: str,
        request_id: str,
        attempt: int,
        context: Any,
        error: StillhouseError | None,
        seconds: float,
        request: Any = None,
        response: Any = None,
        size: int = 0,
    ) -> None:
        """Counts and logs one call."""
        self._metrics.observe_call(method, tenant, request, response, size, error, seconds)
        fields: dict[str, Any] = {
            "method": method,
            "code": "OK" if error is None else error.code.name,
            "tenant": tenant,
            "request_id": request_id,
            "attempt": attempt,
            "peer": context.peer(),
            "ms": round(1e3 * seconds, 1),
        }
        fields |= _facts(request, response, size) if error is None else _cause(error)
        log_fields(logger, logging.INFO if error is None else logging.WARNING, "answered", fields)

    def _check_stopping(self) -> None:
        if self.stopping:
            raise Unavailable("the server is stopping")

    def _open_one(self, key: str, context: Any) -> None:
        """Counts a call until its answer is sent. Raises Overloaded if `key` has no room for it."""
        limits = self._limits
        if self._open[key] >= limits.requests:
            raise Overloaded(
                f"{self._open[key]} requests of this tenant are open; the server takes {limits.requests}",
                retry_delay_s=1.0,
                field="requests",
                max=limits.requests,
            )
        if self._unsent_bytes[key] >= limits.unsent_bytes:
            raise Overloaded(
                f"{self._unsent_bytes[key]} bytes of answers wait for this tenant to read them",
                retry_delay_s=1.0,
                field="requests",
                max=limits.unsent_bytes,
            )
        self._open[key] += 1

        def done(_: Any) -> None:
            self._open[key] -= 1

        context.add_done_callback(done)

    def _note_unsent(self, tenant: str, size: int, context: Any) -> None:
        self._unsent_bytes[tenant] += size

        def sent(_: Any) -> None:
            self._unsent_bytes[tenant] -= size

        context.add_done_callback(sent)


async def _abort(context: Any, error: StillhouseError) -> None:
    status = to_grpc_status(error)
    await context.abort(status.code, status.details, status.trailing_metadata)


def _facts(request: Any, response: Any, size: int) -> dict[str, Any]:
    if not isinstance(request, pb.ScoreRequest):
        return {}
    return {
        "tokens": request.token_ids.shape[0],
        "score_start": request.score_start,
        "top_k": request.top_k,
        "priority": request.priority,
        "revision": response.echo.model_revision,
        "queue_ms": round(response.timings.queue_wait_ms, 1),
        "engine_ms": round(response.timings.engine_ms, 1),
        "batch": response.timings.batch_sequences,
        "bytes": size,
    }


def _cause(error: StillhouseError) -> dict[str, Any]:
    return {"reason": error.reason, "error": error.message[:300]}


def _decode(handler: Any, data: bytes | None) -> Any:
    if data is None:
        raise InvalidRequest("the call ended without a message", field="request", value="")
    try:
        return handler.request_deserializer(data)
    except DecodeError:
        raise InvalidRequest(
            f"the request's {len(data)} bytes are not the method's message; see teacher.proto",
            field="request",
            value=f"{len(data)} bytes",
        ) from None
