"""What surrounds every call: who asks, how it ends, what is counted and logged.

A call to TeacherService: identity -> room for one more -> decode -> servicer -> encode. Errors become statuses with a
reason; what nobody foresaw becomes ENGINE_FAILED with a reference into the log, and no text of its own. Health and
reflection pass untouched, except that with authentication they want an identity too.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable
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
    """What one tenant may have open, whatever the queue would take: bounds on memory, not on work."""

    requests: int = 4096
    """Not yet answered in full."""
    unsent_bytes: int = 2**30
    """Of answers that wait for the caller to read them."""


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every method; see the module's text. It decodes requests itself: gRPC would answer malformed bytes with
    UNKNOWN and the exception's text."""

    def __init__(self, metrics: Metrics, authenticator: Authenticator, limits: CallLimits | None = None) -> None:
        self._metrics = metrics
        self._authenticator = authenticator
        self._limits = limits or CallLimits()
        self._open: Counter[str] = Counter()  # by tenant
        self._unsent_bytes: Counter[str] = Counter()
        self.in_flight = 0
        self.stopping = False

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """The method's handler, wrapped; None (UNIMPLEMENTED) if there is no such method."""
        handler: Any = await continuation(handler_call_details)
        path: str = handler_call_details.method  # pyright: ignore[reportAttributeAccessIssue]
        if handler is None:
            return None
        if not path.startswith(f"/{SERVICE}/"):
            return self._guarded(handler) if self._authenticator.enabled else handler
        method = path.rpartition("/")[2]

        async def call(data: bytes, context: Any) -> bytes:
            return await self._call(method, handler, data, context)

        return grpc.unary_unary_rpc_method_handler(call)

    def _guarded(self, handler: Any) -> Any:
        """A method of health or reflection, for callers with an identity only."""

        async def identify(context: Any) -> None:
            try:
                await self._authenticator.authenticate(context.invocation_metadata(), context.auth_context())
            except StillhouseError as error:
                await _abort(context, error)

        async def unary(request: Any, context: Any) -> Any:
            await identify(context)
            return await handler.unary_unary(request, context)

        async def watch(request: Any, context: Any) -> None:
            await identify(context)
            await handler.unary_stream(request, context)

        async def stream(requests: Any, context: Any) -> Any:
            await identify(context)
            async for answer in handler.stream_stream(requests, context):
                yield answer

        codecs = handler.request_deserializer, handler.response_serializer
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(unary, *codecs)
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(watch, *codecs)
        return grpc.stream_stream_rpc_method_handler(stream, *codecs)

    async def _call(self, method: str, handler: Any, data: bytes, context: Any) -> bytes:
        started_s = time.monotonic()
        metadata = context.invocation_metadata()
        request_id, attempt = request_ids(metadata)
        request = response = None
        answer = b""
        error: StillhouseError | None = None
        tenant = ""
        self.in_flight += 1
        self._metrics.in_flight.set(self.in_flight)
        try:
            if self.stopping:
                raise Unavailable("the server is stopping")
            identity = await self._authenticator.authenticate(metadata, context.auth_context())
            tenant = identity.name
            CALLER.set(Caller(identity, request_id, attempt))
            self._check_open(tenant)
            self._open[tenant] += 1
            context.add_done_callback(lambda _: self._done(tenant))
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
            self.in_flight -= 1
            self._metrics.in_flight.set(self.in_flight)
            seconds = time.monotonic() - started_s
            self._metrics.observe_call(method, tenant, request, response, len(answer), error, seconds)
            fields: dict[str, Any] = {
                "method": method,
                "code": "OK" if error is None else error.code.name,
                "tenant": tenant,
                "request_id": request_id,
                "attempt": attempt,
                "peer": context.peer(),
                "ms": round(1e3 * seconds, 1),
            }
            fields |= _facts(request, response, len(answer)) if error is None else _cause(error)
            log_fields(logger, logging.INFO if error is None else logging.WARNING, "answered", fields)
        if error is not None:
            await _abort(context, error)
        return answer

    def _check_open(self, tenant: str) -> None:
        limits = self._limits
        if self._open[tenant] >= limits.requests:
            raise Overloaded(
                f"{self._open[tenant]} requests of this tenant are open; the server takes {limits.requests}",
                retry_delay_s=1.0,
                field="requests",
                max=limits.requests,
            )
        if self._unsent_bytes[tenant] >= limits.unsent_bytes:
            raise Overloaded(
                f"{self._unsent_bytes[tenant]} bytes of answers wait for this tenant to read them",
                retry_delay_s=1.0,
                field="requests",
                max=limits.unsent_bytes,
            )

    def _done(self, tenant: str) -> None:
        self._open[tenant] -= 1

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


def _decode(handler: Any, data: bytes) -> Any:
    try:
        return handler.request_deserializer(data)
    except DecodeError:
        raise InvalidRequest(
            f"the request's {len(data)} bytes are not the method's message; see teacher.proto",
            field="request",
            value=f"{len(data)} bytes",
        ) from None
