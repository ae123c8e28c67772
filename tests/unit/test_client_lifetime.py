"""How calls and clients end: cancelled, closed, dropped, interrupted, forked."""

import asyncio
import concurrent.futures
import gc
import signal
import subprocess
import sys
import threading
import warnings
from typing import Any

import pytest

from stillhouse.client import AsyncTeacherClient, Backoff, ClientStats, TeacherClient
from stillhouse.errors import (
    Cancelled,
    StillhouseError,
)
from stillhouse.loop_thread import LoopThread
from tests.calls import QUICK, TOKENS, score, submit, until
from tests.fakes import (
    FakeServer,
    child_environment,
)

# --- cancelling and closing


def test_a_cancelled_call_is_cancelled_on_the_server_and_nowhere_else(server: FakeServer) -> None:
    server.faults.hang_at()

    async def scenario() -> None:
        async with AsyncTeacherClient([server.address]) as client:
            kept = asyncio.ensure_future(client.score(TOKENS, score_start=2, top_k=2))
            dropped = asyncio.ensure_future(client.score(TOKENS, score_start=2, top_k=2))
            await asyncio.to_thread(server.wait_for, lambda s: s.in_flight == 2)
            dropped.cancel()
            with pytest.raises(asyncio.CancelledError):
                await dropped
            await asyncio.to_thread(server.wait_for, lambda s: s.cancelled == 1)
            late = asyncio.ensure_future(client.score(TOKENS, score_start=2, top_k=2))
            await asyncio.to_thread(server.wait_for, lambda s: s.in_flight == 2)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(late, 0.1)
            await asyncio.to_thread(server.wait_for, lambda s: s.cancelled == 2)
            server.release()
            assert (await kept).model == "bigram"
            assert client.stats == ClientStats(answered=1, cancelled=2)
            assert [s.in_flight for s in client.servers] == [0]

    asyncio.run(scenario())


def test_closing_ends_every_call_wherever_it_waits(server: FakeServer, free_address: str) -> None:
    server.faults.hang_at()
    client = TeacherClient([server.address], max_in_flight=2)
    futures = [submit(client, deadline_s=600.0) for _ in range(6)]  # two on the wire, four before it
    server.wait_for(lambda s: s.in_flight == 2)
    patient = TeacherClient([free_address], backoff=Backoff(initial_s=1e4, max_s=1e4))
    futures.append(submit(patient, deadline_s=1e6))  # between two attempts
    until(lambda: bool(patient.stats.retries))
    failed: list[BaseException] = []

    def wait() -> None:
        try:
            patient.wait_until_ready(deadline_s=600.0)
        except BaseException as error:
            failed.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    until(lambda: len(patient._client._calls) == 2)
    client.close()
    patient.close()
    waiting.join(timeout=20)
    assert [type(error) for error in failed] == [Cancelled]
    for future in futures:
        with pytest.raises(Cancelled, match="closed"):
            future.result(timeout=20)
    server.wait_for(lambda s: s.cancelled == 2)
    assert client.stats == ClientStats(cancelled=6)


async def test_a_call_that_closing_ends_before_its_first_step_is_counted(server: FakeServer) -> None:
    client = AsyncTeacherClient([server.address])
    call = asyncio.ensure_future(client.score(TOKENS, score_start=2, top_k=2))
    await asyncio.sleep(0)  # the call has a task now, which has not run
    await client.close()
    with pytest.raises(Cancelled, match="closed"):
        await call
    assert client.stats == ClientStats(cancelled=1)


def test_closing_the_asyncio_client_does_not_cancel_its_callers(server: FakeServer) -> None:
    server.faults.hang_at()

    async def scenario() -> None:
        client = AsyncTeacherClient([server.address])
        call = asyncio.create_task(client.score(TOKENS, score_start=2, top_k=2))  # pyright: ignore
        await asyncio.to_thread(server.wait_for, lambda s: s.in_flight == 1)
        await client.close()
        with pytest.raises(Cancelled, match="closed"):
            await call
        assert not call.cancelled()
        await client.close()
        for ask in (
            lambda: client.score(TOKENS, score_start=2, top_k=2),
            lambda: client.get_teacher(),
            lambda: client.wait_until_ready(deadline_s=5.0),
        ):
            with pytest.raises(RuntimeError, match="closed"):
                await ask()
        assert client._pool._servers == [], "a closed client must not connect again"

    asyncio.run(scenario())


def test_a_closed_blocking_client_says_so_and_closing_again_does_nothing(server: FakeServer) -> None:
    threads = threading.active_count()
    client = TeacherClient([server.address])
    score(client)
    client.close()
    client.close()
    assert threading.active_count() <= threads + 1, "gRPC keeps a thread of its own, the client none"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for ask in (
            lambda: score(client),
            lambda: submit(client),
            client.get_teacher,
            lambda: client.wait_until_ready(deadline_s=5.0),
        ):
            with pytest.raises(RuntimeError, match="closed"):
                ask()
        gc.collect()


def test_closing_from_many_threads_while_others_submit_leaves_no_future_open(server: FakeServer) -> None:
    for _ in range(20):
        client = TeacherClient([server.address], max_in_flight=4)
        futures: list[concurrent.futures.Future[Any]] = []
        refused = threading.Event()

        def keep_submitting(
            client: TeacherClient = client,
            futures: list[concurrent.futures.Future[Any]] = futures,
            refused: threading.Event = refused,
        ) -> None:
            try:
                while True:
                    futures.append(submit(client))
            except RuntimeError:
                refused.set()

        submitter = threading.Thread(target=keep_submitting)
        submitter.start()
        closers = [threading.Thread(target=client.close) for _ in range(4)]
        for closer in closers:
            closer.start()
        for thread in (*closers, submitter):
            thread.join(timeout=20)
            assert not thread.is_alive()
        assert refused.is_set()
        done, open_ones = concurrent.futures.wait(futures, timeout=0)
        assert not open_ones
        assert all(future.exception() is None or isinstance(future.exception(), Cancelled) for future in done)


def test_a_callback_that_would_wait_for_itself_is_told_so(server: FakeServer, client: TeacherClient) -> None:
    outcomes: list[BaseException | None] = []
    told = threading.Event()

    def callback(_: object) -> None:
        for ask in (lambda: score(client), client.get_teacher, client.close):
            try:
                ask()
                outcomes.append(None)
            except BaseException as error:
                outcomes.append(error)
        told.set()

    server.faults.hang_at(call=1)
    future = submit(client)
    future.add_done_callback(callback)
    server.release()
    assert told.wait(timeout=20)
    assert all(isinstance(outcome, RuntimeError) for outcome in outcomes)
    assert all("callback" in str(outcome) for outcome in outcomes)
    assert score(client).model == "bigram"


def test_an_error_in_on_wait_reaches_the_caller(free_address: str) -> None:
    def on_wait(elapsed_s: float, error: StillhouseError) -> None:
        raise KeyError("enough")

    with TeacherClient([free_address], backoff=QUICK) as client, pytest.raises(KeyError, match="enough"):
        client.wait_until_ready(deadline_s=1.0, on_wait=on_wait)


def test_a_client_dropped_without_closing_ends_its_thread_and_its_calls(server: FakeServer) -> None:
    server.faults.hang_at()
    client = TeacherClient([server.address])
    thread = client._thread._thread
    future = submit(client)
    server.wait_for(lambda s: s.in_flight == 1)
    del client
    gc.collect()
    thread.join(timeout=20)
    assert not thread.is_alive()
    assert isinstance(future.exception(timeout=0), Cancelled)


def test_a_loop_that_stops_cancels_what_still_runs_and_raises_what_the_last_work_raised() -> None:
    async def last() -> None:
        raise KeyError("the last work")

    thread = LoopThread("test")
    future = thread.submit(asyncio.sleep(3600.0))
    with pytest.raises(KeyError, match="the last work"):
        thread.stop(last)
    assert future.cancelled()
    assert not thread._thread.is_alive()


# --- the whole process


def run_python(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "always", "-X", "faulthandler", "-c", program, *arguments],
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("ending", ["", "raise SystemExit(3)", "sys.exit(3)"])
def test_a_program_that_forgets_to_close_exits_quietly(server: FakeServer, ending: str) -> None:
    server.faults.hang_at(call=5)
    ended = run_python(
        "import sys\n"
        "from concurrent.futures import as_completed\n"
        "from stillhouse.client import TeacherClient\n"
        "client = TeacherClient([sys.argv[1]])\n"
        "futures = [client.submit_score([1, 2, 3], score_start=1, top_k=2) for _ in range(50)]\n"
        # Not the first submitted: gRPC sends those that waited for the connection in any order, so it may hang.
        f"print(next(as_completed(futures)).result().model, flush=True)\n{ending}",
        server.address,
    )
    assert (ended.stdout, ended.stderr) == ("bigram\n", "")
    assert ended.returncode == (3 if ending else 0)


def test_an_interrupt_ends_the_wait_and_the_call_and_the_client_goes_on(server: FakeServer) -> None:
    server.faults.hang_at(call=1)
    program = (
        "import sys\n"
        "from stillhouse.client import TeacherClient\n"
        "client = TeacherClient([sys.argv[1]])\n"
        "try:\n"
        "    client.score([1, 2, 3], score_start=1, top_k=2, deadline_s=600.0)\n"
        "except KeyboardInterrupt:\n"
        "    sys.stdin.read()\n"
        "    print(client.score([1, 2, 3], score_start=1, top_k=2).model)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, server.address],
        env=child_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # Shells start background jobs with SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    server.wait_for(lambda s: s.in_flight == 1)
    process.send_signal(signal.SIGINT)
    server.wait_for(lambda s: s.cancelled == 1)
    text, _ = process.communicate(timeout=30)
    assert (text, process.returncode) == ("bigram\n", 0)


def test_an_interrupt_before_the_wait_has_begun_ends_the_call_too(
    server: FakeServer, client: TeacherClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.faults.hang_at(call=1)
    start = client._thread.submit

    def interrupted(work: Any) -> Any:
        start(work)
        server.wait_for(lambda s: s.in_flight == 1)
        raise KeyboardInterrupt

    monkeypatch.setattr(client._thread, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        score(client, deadline_s=600.0)
    server.wait_for(lambda s: s.cancelled == 1)
    monkeypatch.undo()
    assert score(client).model == "bigram"


def test_a_client_from_before_a_fork_is_refused_in_the_child(server: FakeServer) -> None:
    ended = run_python(
        "import os, sys\n"
        "from stillhouse.client import TeacherClient\n"
        "client = TeacherClient([sys.argv[1]])\n"
        "if os.fork() == 0:\n"
        "    try:\n"
        "        client.get_teacher()\n"
        "    except RuntimeError as error:\n"
        "        os.write(1, str(error).encode())\n"
        "    os._exit(0)\n"
        "os.wait()\n",
        server.address,
    )
    assert "fork" in ended.stdout
