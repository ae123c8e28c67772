"""Every error of the contract: one table, used by the server to answer and by the client to raise.

An error is an exception class here, a gRPC status code and a `google.rpc.ErrorInfo.reason` on the wire
(domain `stillhouse`, AIP-193). Match on the class or on `reason`; texts may change. Errors that tell the
caller to come again carry `google.rpc.RetryInfo`.

| exception             | gRPC code           | reason                    | sent again by the client |
|-----------------------|---------------------|---------------------------|--------------------------|
| `InvalidRequest`      | INVALID_ARGUMENT    | `INVALID_REQUEST`         | no |
| `MalformedArray`      | INVALID_ARGUMENT    | `MALFORMED_ARRAY`         | no |
| `TokenIdOutOfRange`   | INVALID_ARGUMENT    | `TOKEN_ID_OUT_OF_RANGE`   | no |
| `TopKOutOfRange`      | INVALID_ARGUMENT    | `TOP_K_OUT_OF_RANGE`      | no |
| `CandidatesOutOfRange`| INVALID_ARGUMENT    | `CANDIDATES_OUT_OF_RANGE` | no |
| `TemperatureOutOfRange`| INVALID_ARGUMENT   | `TEMPERATURE_OUT_OF_RANGE`| no |
| `SequenceTooLong`     | INVALID_ARGUMENT    | `SEQUENCE_TOO_LONG`       | no |
| `ResponseTooLarge`    | INVALID_ARGUMENT    | `RESPONSE_TOO_LARGE`      | no |
| `UnknownModel`        | NOT_FOUND           | `UNKNOWN_MODEL`           | no |
| `ModelRevisionMismatch`| FAILED_PRECONDITION| `MODEL_REVISION_MISMATCH` | no |
| `VocabularyMismatch`  | FAILED_PRECONDITION | `VOCABULARY_MISMATCH`     | no |
| `Unauthenticated`     | UNAUTHENTICATED     | `UNAUTHENTICATED`         | no |
| `PermissionDenied`    | PERMISSION_DENIED   | `PERMISSION_DENIED`       | no |
| `Overloaded`          | RESOURCE_EXHAUSTED  | `OVERLOADED`              | yes, after its delay |
| `QuotaExceeded`       | RESOURCE_EXHAUSTED  | `QUOTA_EXCEEDED`          | yes, after its delay |
| `OutOfMemory`         | RESOURCE_EXHAUSTED  | `OUT_OF_MEMORY`           | no |
| `Unavailable`         | UNAVAILABLE         | `UNAVAILABLE`             | yes |
| `DeadlineExceeded`    | DEADLINE_EXCEEDED   | `DEADLINE_EXCEEDED`       | no |
| `Cancelled`           | CANCELLED           | `CANCELLED`               | yes |
| `NonFiniteScores`     | DATA_LOSS           | `NON_FINITE_SCORES`       | no |
| `WrongAnswer`         | DATA_LOSS           | `WRONG_ANSWER`            | no |
| `EngineFailed`        | INTERNAL            | `ENGINE_FAILED`           | no |
| `TransportFailed`     | UNKNOWN             | `TRANSPORT_FAILED`        | no |
"""

from typing import Any, ClassVar

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2  # pyright: ignore[reportMissingTypeStubs]
from grpc_status import rpc_status

DOMAIN = "stillhouse"
_DETAILS_KEY = "grpc-status-details-bin"
# An error quotes what the caller sent. gRPC refuses trailing metadata over 8 KiB, and the message travels
# twice, once with up to three bytes for each of its own.
_MAX_MESSAGE_BYTES = 1000
_MAX_FIELD_BYTES = 200


class StillhouseError(Exception):
    """Root of the table.

    `fields` names what is wrong (for example `{"field": "top_k", "value": "999", "max": "256"}`) and travels
    in `ErrorInfo.metadata`. `retry_delay_s`, if given, travels in `RetryInfo`. The client adds what servers' logs
    can be searched for: `request_id`, and `address`, the server asked last; "" where there was none.
    """

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNKNOWN
    reason: ClassVar[str] = ""
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, retry_delay_s: float | None = None, **fields: object) -> None:
        super().__init__(message)
        self.message = message
        self.fields = {name: str(value) for name, value in fields.items()}
        self.retry_delay_s = retry_delay_s
        self.request_id = ""
        self.address = ""


class InvalidRequest(StillhouseError, ValueError):
    """The request can never succeed as it is; the message names field, value and fix."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    reason = "INVALID_REQUEST"


class MalformedArray(InvalidRequest):
    """An array's dtype, shape and bytes do not fit each other, or are not what the field takes."""

    reason = "MALFORMED_ARRAY"


class TokenIdOutOfRange(InvalidRequest):
    """A token or candidate id is not in 0 .. vocabulary_size - 1."""

    reason = "TOKEN_ID_OUT_OF_RANGE"


class TopKOutOfRange(InvalidRequest):
    """`top_k` is above the server's `max_top_k` or the vocabulary."""

    reason = "TOP_K_OUT_OF_RANGE"


class CandidatesOutOfRange(InvalidRequest):
    """More candidates a position than the server's `max_candidates`."""

    reason = "CANDIDATES_OUT_OF_RANGE"


class TemperatureOutOfRange(InvalidRequest):
    """`temperature` is not finite or not in `min_temperature .. max_temperature`."""

    reason = "TEMPERATURE_OUT_OF_RANGE"


class SequenceTooLong(InvalidRequest):
    """More tokens than the server's `max_sequence_tokens`."""

    reason = "SEQUENCE_TOO_LONG"


class ResponseTooLarge(InvalidRequest):
    """The answer would be larger than the server's `max_response_bytes`."""

    reason = "RESPONSE_TOO_LARGE"


class UnknownModel(StillhouseError, LookupError):
    """The server does not serve the model named."""

    code = grpc.StatusCode.NOT_FOUND
    reason = "UNKNOWN_MODEL"


class ModelRevisionMismatch(StillhouseError):
    """The server serves another revision than the one the caller pinned."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "MODEL_REVISION_MISMATCH"


class VocabularyMismatch(StillhouseError):
    """Token ids mean other tokens to the server than to the caller."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "VOCABULARY_MISMATCH"


class Unauthenticated(StillhouseError):
    """The server does not know who asks: no certificate or token, or one it does not accept."""

    code = grpc.StatusCode.UNAUTHENTICATED
    reason = "UNAUTHENTICATED"


class PermissionDenied(StillhouseError, PermissionError):
    """The server knows who asks, and the tenant may not do this."""

    code = grpc.StatusCode.PERMISSION_DENIED
    reason = "PERMISSION_DENIED"


class Overloaded(StillhouseError):
    """The server's queue is full, or the answer could not be ready in time; come again after `retry_delay_s`."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "OVERLOADED"
    retryable = True


class QuotaExceeded(StillhouseError):
    """The tenant has used what it may for now; come again after `retry_delay_s`."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "QUOTA_EXCEEDED"
    retryable = True


class OutOfMemory(StillhouseError):
    """The sequence alone does not fit the server's memory; sending it again will not help."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "OUT_OF_MEMORY"


class Unavailable(StillhouseError, ConnectionError):
    """No server answers, or the one that does is starting or stopping."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "UNAVAILABLE"
    retryable = True


class DeadlineExceeded(StillhouseError, TimeoutError):
    """The call's deadline passed, retries included."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED
    reason = "DEADLINE_EXCEEDED"


class Cancelled(StillhouseError):
    """Somebody other than the caller ended the call: a stopping server, a proxy, or closing the client.

    A caller that cancels its own call sees `asyncio.CancelledError` or `concurrent.futures.CancelledError`.
    """

    code = grpc.StatusCode.CANCELLED
    reason = "CANCELLED"
    retryable = True


class NonFiniteScores(StillhouseError, ArithmeticError):
    """The model produced NaN or +inf at a scored position, so no score exists."""

    code = grpc.StatusCode.DATA_LOSS
    reason = "NON_FINITE_SCORES"


class WrongAnswer(StillhouseError):
    """An answer does not belong to its request: another digest, revision or shape. Raised by the client."""

    code = grpc.StatusCode.DATA_LOSS
    reason = "WRONG_ANSWER"


class EngineFailed(StillhouseError):
    """The engine broke on this request; the cause is in the server's log, not in the answer."""

    code = grpc.StatusCode.INTERNAL
    reason = "ENGINE_FAILED"


class TransportFailed(StillhouseError):
    """A failure below the contract: not a stillhouse server, a message over a transport limit, ..."""

    code = grpc.StatusCode.UNKNOWN
    reason = "TRANSPORT_FAILED"


def _table(root: type[StillhouseError]) -> dict[str, type[StillhouseError]]:
    found = {root.reason: root} if root.reason else {}
    for child in root.__subclasses__():
        found |= _table(child)
    return found


BY_REASON: dict[str, type[StillhouseError]] = _table(StillhouseError)

# What a bare status means: one that gRPC itself made (no server, deadline, cancellation), without ErrorInfo.
_BY_BARE_CODE: dict[grpc.StatusCode, type[StillhouseError]] = {
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
}


def to_grpc_status(error: StillhouseError) -> Any:
    """The gRPC status (code, details, trailing metadata) that carries `error` over the wire."""
    fields = {name: _cut(value, _MAX_FIELD_BYTES) for name, value in error.fields.items()}
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=fields)
    details = [any_pb2.Any()]
    details[0].Pack(info)
    if error.retry_delay_s is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(round(error.retry_delay_s * 1000))
        details.append(any_pb2.Any())
        details[1].Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    message = _cut(error.message, _MAX_MESSAGE_BYTES)
    status = status_pb2.Status(code=error.code.value[0], message=message, details=details)
    return rpc_status.to_status(status)  # pyright: ignore[reportUnknownMemberType]


def from_rpc_error(error: grpc.RpcError) -> StillhouseError:
    """The table's exception for a failed call (blocking or asyncio)."""
    call: Any = error
    code: grpc.StatusCode = call.code()
    text = call.details() or code.name
    info, retry = _details(call.trailing_metadata())
    if info.domain == DOMAIN and info.reason in BY_REASON:
        found = BY_REASON[info.reason](text)
        found.fields = dict(info.metadata)
        if retry.HasField("retry_delay"):
            found.retry_delay_s = retry.retry_delay.ToMilliseconds() / 1000
        return found
    kind = _BY_BARE_CODE.get(code, TransportFailed)
    message = f"{code.name}: {text}" if kind is TransportFailed else text
    return kind(message, grpc_code=code.name)


def _details(metadata: Any) -> tuple[error_details_pb2.ErrorInfo, error_details_pb2.RetryInfo]:
    """ErrorInfo and RetryInfo of a call's trailing metadata; empty where there is none."""
    info = error_details_pb2.ErrorInfo()
    retry = error_details_pb2.RetryInfo()
    for key, value in metadata or ():
        if key == _DETAILS_KEY:
            try:
                for detail in status_pb2.Status.FromString(value).details:
                    # Unpack leaves the message alone if the detail is of another type.
                    detail.Unpack(info)
                    detail.Unpack(retry)
            except DecodeError:  # made by something that is no stillhouse server: a bare status
                return error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    return info, retry


def _cut(text: str, max_bytes: int) -> str:
    encoded = text.encode("utf-8", "replace")
    return encoded.decode() if len(encoded) <= max_bytes else encoded[:max_bytes].decode(errors="ignore") + "..."
