"""The error table: one row a class, the same on both sides of a real channel."""

import asyncio
import inspect
import pickle
import re
import socket
from collections.abc import Callable

import grpc
import numpy as np
import pytest
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from stillhouse import errors
from stillhouse.client import AsyncTeacherClient, Backoff, TeacherClient
from stillhouse.codec import ScoreTask, encode_request
from stillhouse.errors import BY_REASON, StillhouseError, from_rpc_error, to_grpc_status
from stillhouse.v1 import teacher_pb2 as pb
from stillhouse.v1 import teacher_pb2_grpc as pb_grpc
from tests.fakes import FakeServer, wrong_digest

TABLE = list(BY_REASON.values())
ONCE = Backoff(initial_s=1e9, max_s=1e9)  # no retry fits any deadline
REQUEST = encode_request(ScoreTask("", np.array([1, 2, 3], np.int32), 1, 2))


def raw_call(address: str, deadline_s: float = 10.0) -> StillhouseError:
    """The error of one attempt, without the client's retries, over a blocking channel."""
    with grpc.insecure_channel(address) as channel:
        try:
            pb_grpc.TeacherServiceStub(channel).Score(REQUEST, timeout=deadline_s)
        except grpc.RpcError as error:
            return from_rpc_error(error)
    raise AssertionError("the call did not fail")


def raw_async_call(address: str, deadline_s: float = 10.0) -> StillhouseError:
    """The same over an asyncio channel."""

    async def call() -> StillhouseError:
        async with grpc.aio.insecure_channel(address) as channel:
            try:
                await pb_grpc.TeacherServiceStub(channel).Score(REQUEST, timeout=deadline_s)
            except grpc.RpcError as error:
                return from_rpc_error(error)
        raise AssertionError("the call did not fail")

    return asyncio.run(call())


def call_blocking_client(address: str) -> StillhouseError:
    with (
        TeacherClient([address], backoff=ONCE) as client,
        pytest.raises(StillhouseError) as caught,
    ):
        client.score([1, 2, 3], score_start=1, top_k=2, deadline_s=10.0)
    return caught.value


def call_async_client(address: str) -> StillhouseError:
    async def call() -> StillhouseError:
        async with AsyncTeacherClient([address], backoff=ONCE) as client:
            with pytest.raises(StillhouseError) as caught:
                await client.score([1, 2, 3], score_start=1, top_k=2, deadline_s=10.0)
            return caught.value

    return asyncio.run(call())


WAYS = [raw_call, raw_async_call, call_blocking_client, call_async_client]


# --- the table


def test_the_table_in_the_docstring_is_the_classes() -> None:
    rows = re.findall(r"^\| `(\w+)` *\| (\w+) *\| `(\w+)` *\| (yes|no)\b", errors.__doc__ or "", re.MULTILINE)
    written = {(name, code, reason, again == "yes") for name, code, reason, again in rows}
    real = {(kind.__name__, kind.code.name, kind.reason, kind.retryable) for kind in TABLE}
    assert written == real
    assert len(rows) == len(written) == len(TABLE)


def test_every_error_of_the_module_is_in_the_table_under_a_reason_of_its_own() -> None:
    classes = [
        kind
        for _, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, StillhouseError) and kind is not StillhouseError
    ]
    assert set(classes) == set(TABLE)
    for kind in classes:
        assert "reason" in kind.__dict__, f"{kind.__name__} has the reason of its parent"
        assert re.fullmatch(r"[A-Z][A-Z0-9_]+[A-Z0-9]", kind.reason), "AIP-193"
        assert kind.__doc__


def test_errors_can_be_caught_as_pythons_own_kinds() -> None:
    assert issubclass(errors.TopKOutOfRange, ValueError)
    assert issubclass(errors.UnknownModel, LookupError)
    assert issubclass(errors.Unavailable, ConnectionError)
    assert issubclass(errors.DeadlineExceeded, TimeoutError)


@pytest.mark.parametrize("kind", TABLE)
def test_an_error_survives_pickling_with_what_it_knows(kind: type[StillhouseError]) -> None:
    error = pickle.loads(pickle.dumps(kind("text", retry_delay_s=0.5, field="x")))
    assert (type(error), str(error), error.message) == (kind, "text", "text")
    assert (error.fields, error.retry_delay_s) == ({"field": "x"}, 0.5)


# --- over the wire


@pytest.mark.parametrize("call", WAYS)
@pytest.mark.parametrize("kind", TABLE)
def test_every_error_arrives_as_its_class_with_fields_and_delay(
    server: FakeServer, kind: type[StillhouseError], call: Callable[[str], StillhouseError]
) -> None:
    server.faults.fail_at(error=kind("what, and the fix", retry_delay_s=0.125, field="top_k", value=999))
    error = call(server.address)
    assert type(error) is kind
    assert error.message == str(error) == "what, and the fix"
    assert error.fields == {"field": "top_k", "value": "999"}
    assert error.retry_delay_s == 0.125


@pytest.mark.parametrize("call", WAYS)
def test_an_error_without_delay_and_fields_arrives_without(
    server: FakeServer, call: Callable[[str], StillhouseError]
) -> None:
    server.faults.fail_at(error=errors.OutOfMemory("too long"))
    error = call(server.address)
    assert (error.retry_delay_s, error.fields) == (None, {})


def test_the_status_on_the_wire_is_the_standard_one(server: FakeServer) -> None:
    server.faults.fail_at(error=errors.Overloaded("full", retry_delay_s=1.5, pending=7))
    with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError) as caught:
        pb_grpc.TeacherServiceStub(channel).Score(REQUEST, timeout=10)
    status = rpc_status.from_call(caught.value)
    assert status is not None
    assert (status.code, status.message) == (code_pb2.RESOURCE_EXHAUSTED, "full")
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    assert status.details[0].Unpack(info)
    assert status.details[1].Unpack(retry)
    assert (info.domain, info.reason, dict(info.metadata)) == ("stillhouse", "OVERLOADED", {"pending": "7"})
    assert retry.retry_delay.ToMilliseconds() == 1500


@pytest.mark.parametrize("letter", ["x", "é", "𝛑", "\n"])
@pytest.mark.parametrize("call", WAYS)
def test_a_huge_text_is_cut_and_the_error_still_arrives(
    server: FakeServer, call: Callable[[str], StillhouseError], letter: str
) -> None:
    huge = letter * 100_000
    server.faults.fail_at(error=errors.UnknownModel(f"no model {huge}", field="model", value=huge, served="m"))
    error = call(server.address)
    assert type(error) is errors.UnknownModel
    assert error.message.startswith(f"no model {letter * 100}")
    assert error.fields["value"].startswith(letter * 20)
    assert error.fields["served"] == "m"
    assert len(error.message) < 1100


def test_a_text_that_is_no_unicode_does_not_break_the_answer() -> None:
    status = to_grpc_status(errors.InvalidRequest("lone \udcff surrogate", value="\udcff"))
    assert "surrogate" in status.details


# --- what is not of the table


@pytest.mark.parametrize("call", WAYS)
@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, errors.Unavailable),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.DeadlineExceeded),
        (grpc.StatusCode.CANCELLED, errors.Cancelled),
        (grpc.StatusCode.UNKNOWN, errors.TransportFailed),
        (grpc.StatusCode.UNIMPLEMENTED, errors.TransportFailed),
        (grpc.StatusCode.INTERNAL, errors.TransportFailed),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, errors.TransportFailed),
        (grpc.StatusCode.UNAUTHENTICATED, errors.Unauthenticated),
        (grpc.StatusCode.PERMISSION_DENIED, errors.PermissionDenied),
    ],
)
def test_a_bare_status_becomes_the_class_that_says_as_much(
    server: FakeServer,
    code: grpc.StatusCode,
    kind: type[StillhouseError],
    call: Callable[[str], StillhouseError],
) -> None:
    server.faults.fail_at(code=code)
    error = call(server.address)
    assert type(error) is kind
    assert error.fields == {"grpc_code": code.name}
    assert "a planned fault" in error.message
    assert (code.name in error.message) == (kind is errors.TransportFailed)


@pytest.mark.parametrize("call", WAYS)
def test_no_server_is_unavailable(call: Callable[[str], StillhouseError]) -> None:
    with socket.socket() as taken:  # bound, not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        error = call(f"127.0.0.1:{taken.getsockname()[1]}")
    assert type(error) is errors.Unavailable


@pytest.mark.parametrize("call", [raw_call, raw_async_call])
def test_a_server_that_does_not_answer_is_deadline_exceeded(
    server: FakeServer, call: Callable[[str, float], StillhouseError]
) -> None:
    server.faults.hang_at()
    assert type(call(server.address, 0.1)) is errors.DeadlineExceeded


def test_a_call_that_the_caller_cancels_is_cancelled(server: FakeServer) -> None:
    server.faults.hang_at()
    with grpc.insecure_channel(server.address) as channel:
        call = pb_grpc.TeacherServiceStub(channel).Score.future(REQUEST, timeout=10)
        server.wait_for(lambda s: s.in_flight == 1)
        call.cancel()
        assert type(from_rpc_error(call)) is errors.Cancelled


def test_a_server_of_something_else_says_so() -> None:
    async def other() -> StillhouseError:
        empty = grpc.aio.server()
        port = empty.add_insecure_port("127.0.0.1:0")
        await empty.start()
        async with AsyncTeacherClient([f"127.0.0.1:{port}"]) as client:
            with pytest.raises(StillhouseError) as caught:
                await client.get_teacher()
        await empty.stop(None)
        return caught.value

    error = asyncio.run(other())
    assert type(error) is errors.TransportFailed
    assert "UNIMPLEMENTED" in error.message


def test_an_answer_over_the_message_limit_is_transport_failed(server: FakeServer) -> None:
    server.faults.answer_at(lambda response: pb.ScoreResponse(top_ids=pb.Array(data=bytes(5 * 2**20))))
    error = raw_call(server.address)  # a channel with gRPC's default limit of 4 MiB
    assert type(error) is errors.TransportFailed
    assert "RESOURCE_EXHAUSTED" in error.message


class OddCall(grpc.RpcError):
    """A failed call whose trailing metadata somebody else made."""

    def __init__(self, *details: bytes) -> None:
        self._metadata = tuple(("grpc-status-details-bin", detail) for detail in details)

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str | None:
        return None

    def trailing_metadata(self) -> tuple[tuple[str, bytes], ...] | None:
        return self._metadata or None


def packed(message: object) -> bytes:
    detail = any_pb2.Any()
    detail.Pack(message)  # pyright: ignore
    return status_pb2.Status(details=[detail]).SerializeToString()


@pytest.mark.parametrize(
    "details",
    [
        (),
        (b"\xff\xff no Status",),
        (
            status_pb2.Status(
                details=[any_pb2.Any(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=b"\xff")]
            ).SerializeToString(),
        ),
        (packed(error_details_pb2.DebugInfo(detail="x")),),
        (packed(error_details_pb2.ErrorInfo(domain="googleapis.com", reason="UNKNOWN_MODEL")),),
        (packed(error_details_pb2.ErrorInfo(domain="stillhouse", reason="OF_A_LATER_VERSION")),),
    ],
)
def test_details_of_another_kind_leave_the_bare_status(details: tuple[bytes, ...]) -> None:
    error = from_rpc_error(OddCall(*details))
    assert type(error) is errors.Unavailable
    assert error.fields == {"grpc_code": "UNAVAILABLE"}
    assert error.message == "UNAVAILABLE"


def test_fields_named_like_our_arguments_are_only_fields() -> None:
    odd = {"message": "m", "retry_delay_s": "r", "self": "s"}
    info = error_details_pb2.ErrorInfo(domain="stillhouse", reason="UNKNOWN_MODEL", metadata=odd)
    error = from_rpc_error(OddCall(packed(info)))
    assert type(error) is errors.UnknownModel
    assert error.fields == odd
    assert error.retry_delay_s is None


def test_a_wrong_answer_is_of_the_table_too(server: FakeServer) -> None:
    server.faults.answer_at(wrong_digest)
    error = call_blocking_client(server.address)
    assert type(error) is errors.WrongAnswer
    assert error.fields == {"field": "request_digest"}
