"""Many calls and many servers: who gets the next call, and what happens when one is gone or hangs."""

import asyncio
import concurrent.futures
import os
import signal
import socket
import subprocess
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from stillhouse.client import Backoff, ClientStats, TeacherClient
from stillhouse.codec import ScoreTask
from stillhouse.errors import (
    DeadlineExceeded,
    StillhouseError,
    Unavailable,
    UnknownModel,
    WrongAnswer,
)
from tests.calls import QUICK, score, set_channel_options, submit, until
from tests.fakes import (
    BigramTeacher,
    FakeServer,
    garbage,
    served_by_a_process,
)

# --- many calls, many servers


def test_no_more_than_max_in_flight_calls_are_on_the_wire(server: FakeServer) -> None:
    server.faults.hang_at()
    with TeacherClient([server.address], max_in_flight=3) as client:
        futures = [submit(client) for _ in range(20)]
        server.wait_for(lambda s: s.in_flight == 3)
        assert len(server.requests) == 3
        server.release()
        assert all(future.result(timeout=20).model == "bigram" for future in futures)
    assert server.most_in_flight == 3
    assert client.stats == ClientStats(answered=20)


def test_a_place_is_given_back_however_the_call_ends(server: FakeServer) -> None:
    # Not by the call's number: one with a short deadline may be over before the server has seen it.
    server.faults.hang_at()
    with TeacherClient([server.address], max_in_flight=1) as client:
        cancelled = submit(client)
        server.wait_for(lambda s: s.in_flight == 1)
        assert cancelled.cancel()
        with pytest.raises(DeadlineExceeded):
            score(client, deadline_s=0.2)
        server.faults.planned.clear()
        server.faults.fail_at(error=UnknownModel("no"))
        with pytest.raises(UnknownModel):
            score(client)
        server.faults.planned.clear()
        server.faults.answer_at(garbage)
        with pytest.raises(WrongAnswer):
            score(client)
        server.faults.planned.clear()
        assert score(client).model == "bigram"
        failures = {"DEADLINE_EXCEEDED": 1, "UNKNOWN_MODEL": 1, "WRONG_ANSWER": 1}
        assert client.stats == ClientStats(answered=1, cancelled=1, failures=client.stats.failures)
        assert dict(client.stats.failures) == failures


def test_the_deadline_does_not_run_while_a_call_waits_for_its_place(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead_s = 0.0
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + ahead_s)
    monkeypatch.setattr("stillhouse.attempts.time", clock)
    monkeypatch.setattr("stillhouse.client.time", clock)
    server.faults.hang_at(call=1)
    with TeacherClient([server.address], max_in_flight=1) as client:
        first = submit(client)
        server.wait_for(lambda s: s.in_flight == 1)
        second = submit(client, deadline_s=600.0)
        until(lambda: len(client._client._calls) == 2)
        client._thread.submit(asyncio.sleep(0)).result(timeout=20)  # so that it has taken its first step, too
        ahead_s = 3600.0
        server.release()
        assert second.result(timeout=20).model == first.result(timeout=20).model


def test_calls_go_to_the_server_with_the_fewest_outstanding(three: list[FakeServer]) -> None:
    for server in three:
        server.faults.hang_at()
    with TeacherClient([server.address for server in three]) as client:
        futures = []
        for n in range(12):
            futures.append(submit(client))
            until(lambda n=n: sum(server.in_flight for server in three) == n + 1)
            loads = [server.in_flight for server in three]
            assert max(loads) - min(loads) <= 1
        assert [server.in_flight for server in three] == [4, 4, 4]
        three[0].release()
        three[0].wait_for(lambda s: s.in_flight == 0)
        done, _ = concurrent.futures.wait(futures, timeout=20, return_when=concurrent.futures.FIRST_COMPLETED)
        assert done
        for server in three[1:]:
            server.release()
        for future in futures:
            future.result(timeout=20)


def test_a_slow_server_gets_fewer_calls(three: list[FakeServer]) -> None:
    three[0].faults.hang_at()
    with TeacherClient([server.address for server in three], max_in_flight=4) as client:
        futures = [submit(client) for _ in range(100)]
        until(lambda: sum(future.done() for future in futures) >= 96)
        assert len(three[0].requests) <= 4
        three[0].release()
        for future in futures:
            future.result(timeout=20)


def test_one_dead_address_of_three_is_no_error(free_address: str) -> None:
    with FakeServer() as one, FakeServer() as two:
        addresses = [one.address, free_address, two.address]
        # In turn: by speed, one pause would give a server's calls to the other.
        with TeacherClient(addresses, backoff=QUICK, max_in_flight=4, balancing="round_robin") as client:
            futures = [submit(client) for _ in range(200)]
            assert all(future.result(timeout=20).model == "bigram" for future in futures)
            assert client.stats.answered == 200
            assert not client.stats.failures
            # A dead address fails fast and would soon have its turn again; it must rest.
            assert client.stats.retries.total() <= 40
        assert len(one.requests) + len(two.requests) == 200
        assert min(len(one.requests), len(two.requests)) > 20


def test_a_server_that_dies_in_the_middle_is_no_error_and_every_call_is_answered_once(
    three: list[FakeServer],
) -> None:
    for server in three:  # none is measured before each has its share
        server.faults.hang_at()
    with TeacherClient([server.address for server in three], backoff=QUICK) as client:
        futures = [submit(client) for _ in range(60)]
        until(lambda: sum(server.in_flight for server in three) == 60)
        for server in three[1:]:
            server.release()
        three[0].stop()
        assert all(future.result(timeout=20).model == "bigram" for future in futures)
        assert client.stats.answered == 60
        assert not client.stats.failures
        assert client.stats.retries.total() >= 10


def test_a_server_that_comes_back_is_used_again() -> None:
    server = FakeServer()
    with FakeServer() as other, TeacherClient([server.address, other.address], backoff=QUICK) as client:
        for future in [submit(client) for _ in range(20)]:
            future.result(timeout=20)
        server.stop()
        for future in [submit(client) for _ in range(20)]:
            future.result(timeout=20)
        with FakeServer(port=server.port) as again:
            until(lambda: bool(score(client) and again.requests))
        assert [s.failures for s in client.servers] == [0, 0], "its next rest would be longer"
        assert not client.stats.failures


def test_calls_that_fail_together_make_a_server_rest_once() -> None:
    server = FakeServer()
    with FakeServer() as other, TeacherClient([server.address, other.address], backoff=QUICK) as client:
        for each in (server, other):  # neither is measured before it has its share
            each.faults.hang_at()
        futures = [submit(client) for _ in range(40)]
        until(lambda: server.in_flight + other.in_flight == 40)
        other.release()
        server.stop()
        for future in futures:
            future.result(timeout=20)
        assert client.stats.retries.total() >= 10
        assert max(s.failures for s in client.servers) <= 2, "it would rest for many seconds"


def test_an_address_that_accepts_and_never_speaks_does_not_hold_a_call(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_channel_options(monkeypatch, min_reconnect_backoff_ms=300)  # how long connecting may take
    with socket.create_server(("127.0.0.1", 0)) as silent:
        addresses = [f"127.0.0.1:{silent.getsockname()[1]}", server.address]
        with TeacherClient(addresses, backoff=QUICK) as client:
            for future in [submit(client, deadline_s=10.0) for _ in range(10)]:
                assert future.result(timeout=20).model == "bigram"
            assert client.stats.retries["UNAVAILABLE"] > 0, "the silent address was never asked"


def test_many_threads_share_one_blocking_client(server: FakeServer) -> None:
    sequences = [[1 + (i * j) % 18 for j in range(2, 30)] for i in range(1, 65)]
    teacher = BigramTeacher()
    with TeacherClient([server.address], max_in_flight=8) as client:
        with concurrent.futures.ThreadPoolExecutor(16) as threads:
            answers = list(threads.map(lambda s: client.score(s, score_start=5, top_k=3), sequences))
        assert client.stats == ClientStats(answered=64)
    for sequence, answer in zip(sequences, answers, strict=True):
        right = teacher.score(ScoreTask("", np.array(sequence, np.int32), 5, 3))
        assert answer.sampled_logprobs.tobytes() == right.sampled_logprobs.tobytes()
        assert answer.top_ids.tobytes() == right.top_ids.tobytes()


# --- waiting for a server to come up


def test_wait_until_ready_tells_how_it_goes_and_returns_when_the_server_is_there() -> None:
    gone = FakeServer()
    gone.stop()
    told: list[tuple[float, StillhouseError]] = []
    up = threading.Event()
    started: list[FakeServer] = []

    def on_wait(elapsed_s: float, error: StillhouseError) -> None:
        told.append((elapsed_s, error))
        up.set()

    def start_late() -> None:
        up.wait()
        started.append(FakeServer(port=gone.port))

    late = threading.Thread(target=start_late)
    late.start()
    with TeacherClient([gone.address], backoff=Backoff(initial_s=10.0, max_s=10.0)) as client:
        teacher = client.wait_until_ready(deadline_s=30.0, on_wait=on_wait)
    late.join()
    started[0].stop()
    assert teacher == BigramTeacher().describe()
    assert told
    assert all(elapsed_s >= 0 and isinstance(error, Unavailable | DeadlineExceeded) for elapsed_s, error in told)
    assert [elapsed_s for elapsed_s, _ in told] == sorted(elapsed_s for elapsed_s, _ in told)


def test_wait_until_ready_gives_up_with_an_error_that_says_where_and_why(free_address: str) -> None:
    told: list[float] = []
    with (
        TeacherClient([free_address], backoff=QUICK) as client,
        pytest.raises(Unavailable, match=f"{free_address}.*refused"),
    ):
        client.wait_until_ready(deadline_s=3.0, on_wait=lambda elapsed_s, _: told.append(elapsed_s))
    assert told


def test_wait_until_ready_waits_for_a_server_that_hangs_but_not_for_a_wrong_one(
    server: FakeServer, client: TeacherClient
) -> None:
    server.faults.hang_at(method="GetTeacher")
    with pytest.raises(Unavailable, match="no teacher is ready"):
        client.wait_until_ready(deadline_s=0.3)
    server.faults.planned.clear()
    server.faults.fail_at(method="GetTeacher", error=UnknownModel("another model here"))
    with pytest.raises(UnknownModel):
        client.wait_until_ready(deadline_s=60.0)


# --- a server that hangs


def fast_keepalive(monkeypatch: pytest.MonkeyPatch, timeout_ms: int) -> None:
    """A ping after 300 ms, then the one a second that gRPC allows; each must be answered within `timeout_ms`."""
    set_channel_options(
        monkeypatch, keepalive_time_ms=300, keepalive_timeout_ms=timeout_ms, http2_ping_timeout_ms=timeout_ms
    )


def hang(process: subprocess.Popen[str]) -> None:
    """Returns once every thread has stopped; on a busy machine some answer calls for a while after the signal."""
    os.kill(process.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)


def test_a_call_longer_than_several_pings_is_left_alone(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    fast_keepalive(monkeypatch, timeout_ms=20_000)
    server.faults.hang_at(call=1)
    with TeacherClient([server.address]) as client:
        future = submit(client)
        with pytest.raises(concurrent.futures.TimeoutError):
            future.result(timeout=5.0)  # five pings; a server that minds them ends the connection at the fourth
        server.release()
        assert future.result(timeout=20).model == "bigram"
        assert not client.stats.retries


def test_a_server_that_hangs_late_in_a_long_call_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    fast_keepalive(monkeypatch, timeout_ms=5_000)
    with served_by_a_process("--hang-first") as (address, process), TeacherClient([address]) as client:
        future = submit(client, deadline_s=25.0)
        with pytest.raises(concurrent.futures.TimeoutError):
            future.result(timeout=2.0)  # by default gRPC stops asking after two pings without an answer
        assert not client.stats.retries
        hang(process)
        until(lambda: client.stats.retries["UNAVAILABLE"] > 0)
        os.kill(process.pid, signal.SIGCONT)
        assert future.result(timeout=20).model == "bigram"


def test_a_hung_server_costs_no_call_with_the_options_as_they_are(server: FakeServer) -> None:
    with (
        served_by_a_process() as (address, process),
        # In turn: by speed, the one that will hang might get no call.
        TeacherClient([address, server.address], balancing="round_robin") as client,
    ):
        for future in [submit(client) for _ in range(20)]:
            future.result(timeout=20)
        hang(process)
        futures = [submit(client, deadline_s=25.0) for _ in range(20)]
        assert all(future.result(timeout=30).model == "bigram" for future in futures)
        assert client.stats.retries["UNAVAILABLE"] > 0, "no call was with the server that hung"
        assert not client.stats.failures
