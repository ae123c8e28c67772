"""What surrounds every call of the service: errors become statuses, calls are counted and logged."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from stillhouse.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    StillhouseError,
    Unavailable,
    to_grpc_status,
)
from stillhouse.v1 import teacher_pb2 as pb
from teacher_server.failures import engine_failed
from teacher_server.metrics import Metrics, count_answer

logger = logging.getLogger("teacher_server.requests")

SERVICE = "stillhouse.v1.TeacherService"


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps the methods of TeacherService; health and reflection pass untouched.

    It decodes the request itself: gRPC would answer malformed bytes with UNKNOWN and the exception's text.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
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
        if handler is None or not path.startswith(f"/{SERVICE}/"):
            return handler
        method = path.rpartition("/")[2]

        async def call(data: bytes, context: Any) -> bytes:
            return await self._call(method, handler, data, context)

        return grpc.unary_unary_rpc_method_handler(call)

    async def _call(self, method: str, handler: Any, data: bytes, context: Any) -> bytes:
        started_s = time.monotonic()
        request = response = None
        answer = b""
        error: StillhouseError | None = None
        self.in_flight += 1
        self._metrics.in_flight.set(self.in_flight)
        try:
            if self.stopping:
                raise Unavailable("the server is stopping")
            request = _decode(handler, data)
            response = await handler.unary_unary(request, context)
            answer = handler.response_serializer(response)
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
            self._record(method, request, response, len(answer), error, time.monotonic() - started_s, context)
        if error is not None:
            status = to_grpc_status(error)
            await context.abort(status.code, status.details, status.trailing_metadata)
        return answer

    def _record(
        self,
        method: str,
        request: Any,
        response: Any,
        size: int,
        error: StillhouseError | None,
        seconds: float,
        context: Any,
    ) -> None:
        code = "OK" if error is None else error.code.name
        reason = "" if error is None else error.reason
        self._metrics.requests.labels(method, code, reason).inc()
        self._metrics.request_seconds.labels(method).observe(seconds)
        parts = [f"method={method} code={code} peer={context.peer()} ms={1e3 * seconds:.1f}"]
        if error is not None:
            # repr: a request's text must not be able to write lines of its own into the log.
            parts.append(f"reason={reason} message={error.message[:300]!r}")
        elif isinstance(request, pb.ScoreRequest):
            count_answer(self._metrics, request, response, size)
            timings = response.timings
            parts.append(
                f"tokens={request.token_ids.shape[0]} score_start={request.score_start} "
                f"top_k={request.top_k} queue_ms={timings.queue_wait_ms:.1f} "
                f"engine_ms={timings.engine_ms:.1f} batch={timings.batch_sequences} bytes={size}"
            )
        logger.log(logging.INFO if error is None else logging.WARNING, " ".join(parts))


def _decode(handler: Any, data: bytes) -> Any:
    try:
        return handler.request_deserializer(data)
    except DecodeError:
        raise InvalidRequest(
            f"the request's {len(data)} bytes are not the method's message; see teacher.proto",
            field="request",
            value=f"{len(data)} bytes",
        ) from None
