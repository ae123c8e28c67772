"""The health port: what it says of a process that loads, serves, stalls or stands still."""

import socket
import time
from collections.abc import Callable, Iterator

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from teacher_server import health_port
from teacher_server.health_port import LIVENESS, HealthPort
from tests.calls import until
from tests.chaos.attacked import CHECK, WATCH, RawClient, frame

SERVING, NOT_SERVING = HealthCheckResponse.SERVING, HealthCheckResponse.NOT_SERVING
STALL_S = 50.0


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[HealthPort]:
    monkeypatch.setattr(health_port, "_LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(health_port, "_LOOP_S", 0.5)
    running = HealthPort("127.0.0.1:0", ("a.Service",), STALL_S)
    yield running
    running.stop()


@pytest.fixture
def state(port: HealthPort) -> Iterator[Callable[[str], int]]:
    with grpc.insecure_channel(f"127.0.0.1:{port.port}") as channel:

        def ask(service: str) -> int:
            request = HealthCheckRequest(service=service).SerializeToString()
            return HealthCheckResponse.FromString(channel.unary_unary(CHECK)(request, timeout=20)).status

        yield ask


State = Callable[[str], int]


def test_it_is_alive_and_not_ready_before_it_is_told_anything(state: State) -> None:
    assert [state(service) for service in ("", "a.Service", LIVENESS)] == [NOT_SERVING, NOT_SERVING, SERVING]


def test_readiness_is_what_it_was_told_last_for_every_service_but_liveness(port: HealthPort, state: State) -> None:
    for ready in (True, False, True):
        port.set_ready(ready)
        wanted = SERVING if ready else NOT_SERVING
        assert [state(service) for service in ("", "a.Service", LIVENESS)] == [wanted, wanted, SERVING]


def test_a_process_that_loads_for_long_is_alive(
    port: HealthPort, state: State, caplog: pytest.LogCaptureFixture
) -> None:
    time.sleep(0.8)  # longer than a loop may stand still; there is none yet
    assert state(LIVENESS) == SERVING
    assert caplog.text == ""


def test_an_event_loop_that_stands_still_is_not_alive_until_it_moves(
    port: HealthPort, state: State, caplog: pytest.LogCaptureFixture
) -> None:
    port.set_ready(True)
    until(lambda: port.beat(0.0) or state(LIVENESS) == SERVING)
    until(lambda: state(LIVENESS) == NOT_SERVING)
    assert not port.alive
    assert state("") == SERVING  # another question
    until(lambda: port.beat(0.0) or state(LIVENESS) == SERVING)
    until(lambda: [record.levelname for record in caplog.records][:2] == ["ERROR", "WARNING"])


def test_an_engine_that_ends_nothing_for_too_long_is_not_alive_until_it_does(port: HealthPort, state: State) -> None:
    until(lambda: port.beat(STALL_S - 1) or state(LIVENESS) == SERVING)
    for _ in range(2):
        until(lambda: port.beat(STALL_S) or state(LIVENESS) == NOT_SERVING)
        until(lambda: port.beat(0.0) or state(LIVENESS) == SERVING)


def code_of(port: HealthPort, path: str, data: bytes) -> grpc.StatusCode:
    with grpc.insecure_channel(f"127.0.0.1:{port.port}") as channel, pytest.raises(grpc.RpcError) as raised:
        channel.unary_unary(path)(data, timeout=20)
    return raised.value.code()  # pyright: ignore[reportAttributeAccessIssue]


def test_there_is_nothing_but_check(port: HealthPort) -> None:
    unknown = HealthCheckRequest(service="other").SerializeToString()
    assert code_of(port, CHECK, unknown) is grpc.StatusCode.NOT_FOUND
    assert code_of(port, CHECK, b"\xff\xff") is grpc.StatusCode.INVALID_ARGUMENT
    for path in (WATCH, "/a.Service/Method", "/"):
        assert code_of(port, path, b"") is grpc.StatusCode.UNIMPLEMENTED


def test_callers_that_read_nothing_do_not_keep_it_from_answering_or_being_told(port: HealthPort, state: State) -> None:
    with RawClient(port.port, window=0) as client:
        for path in (WATCH, CHECK) * 40:
            client.send(client.start(path), frame(b""))
        port.set_ready(True)
        assert state("") == SERVING


def test_a_port_that_is_taken_is_an_error() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        bound.listen()
        with pytest.raises(RuntimeError, match="address"):
            HealthPort(f"127.0.0.1:{bound.getsockname()[1]}", (), STALL_S)
