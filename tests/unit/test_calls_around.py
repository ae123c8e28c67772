"""What surrounds every call: ids, limits of what is open, and identity before anything is read."""

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from benchmarks.synthetic_server import SyntheticEngine, describe
from stillhouse.codec import Scores, ScoreTask, encode_request
from teacher_server.access import AccessFile
from teacher_server.caller import request_ids
from teacher_server.identity import Authenticator
from teacher_server.interceptors import CallLimits
from teacher_server.metrics import Metrics
from teacher_server.security import Security
from teacher_server.server import RunningServer, start, stop
from tests.chaos.attacked import CHECK, GET_TEACHER, REFLECTION, SCORE, WATCH, Ending, RawClient, ending_of, frame

SMALL = encode_request(ScoreTask("", np.arange(8, dtype=np.int32), 4, 2)).SerializeToString()
LARGE = encode_request(ScoreTask("", np.arange(4000, dtype=np.int32), 1, 256)).SerializeToString()  # 8 MB back


@pytest.mark.parametrize("good", ["a", "trainer-7.4_x", "A" * 64, "0"])
def test_a_request_id_that_can_stand_in_a_log_is_kept(good: str) -> None:
    assert request_ids([("other", "x"), ("stillhouse-request-id", good), ("stillhouse-attempt", "3")]) == (good, 3)


@pytest.mark.parametrize("bad", ["", "a b", "a\n", "a\nb", "é", "a=b", "A" * 65, "../x", b"bytes", '"', "\x1b[31m"])
def test_a_request_id_that_cannot_is_replaced_by_one_of_ours(bad: Any) -> None:
    first, _ = request_ids([("stillhouse-request-id", bad)])
    second, _ = request_ids([("stillhouse-request-id", bad)])
    assert first.startswith("server-") and len(first) == 23
    assert first != second


@pytest.mark.parametrize("bad", ["", "-1", "1.0", "x", "99999", "1\n", "\u0663", b"2"])
def test_an_attempt_that_is_no_small_number_is_the_first(bad: Any) -> None:
    assert request_ids([("stillhouse-attempt", bad)])[1] == 1


class GatedEngine(SyntheticEngine):
    """Answers nothing before `gate` is set."""

    def __init__(self, gate: asyncio.Event | None) -> None:
        super().__init__(describe("synthetic", "r1"), tokens_per_s=1e9, overhead_s=0.0, max_batch_tokens=8192)
        self._gate = gate

    async def score(self, task: ScoreTask) -> Scores:
        if self._gate is not None:
            await self._gate.wait()
        return await super().score(task)


@contextlib.asynccontextmanager
async def serving(
    limits: CallLimits, *, gate: asyncio.Event | None = None, access: AccessFile | None = None
) -> AsyncIterator[tuple[RunningServer, grpc.aio.Channel]]:
    engine = GatedEngine(gate)
    security = Security(None, access, Authenticator(access, certificates=False, token_review=None))
    running = await start(engine, Metrics(), "127.0.0.1:0", security=security, limits=limits)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{running.port}") as channel:
        yield running, channel
    await stop(running, 0.0)


async def ending(channel: grpc.aio.Channel, data: bytes = SMALL, path: str = SCORE, **options: Any) -> Ending:
    try:
        await channel.unary_unary(path)(data, timeout=20, **options)
    except grpc.RpcError as error:
        return ending_of(error)
    return Ending("OK")


async def until_ok(channel: grpc.aio.Channel) -> None:
    async with asyncio.timeout(20):
        while (await ending(channel)).code != "OK":
            await asyncio.sleep(0.01)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def test_no_more_calls_are_open_than_the_limit_and_those_that_end_make_room() -> None:
    gate = asyncio.Event()
    async with serving(CallLimits(requests=3), gate=gate) as (running, channel):
        calls = [asyncio.create_task(ending(channel)) for _ in range(8)]
        await until(lambda: sum(call.done() for call in calls) + running.calls.in_flight == 8)
        gate.set()
        ends = await asyncio.gather(*calls)
        assert sorted(end.reason for end in ends) == [""] * 3 + ["OVERLOADED"] * 5
        refused = next(end for end in ends if end.reason)
        assert dict(refused.fields) == {"field": "requests", "max": "3"}
        assert "RetryInfo" in refused.details
        await until_ok(channel)
        assert running.calls.in_flight == 0


async def test_health_has_room_when_scores_have_none() -> None:
    gate = asyncio.Event()
    async with serving(CallLimits(requests=1), gate=gate) as (running, channel):
        call = asyncio.create_task(ending(channel))
        await until(lambda: running.calls.in_flight == 1)
        assert (await ending(channel)).reason == "OVERLOADED"
        assert await ending(channel, b"", CHECK) == Ending("OK")
        gate.set()
        assert await call == Ending("OK")


async def test_answers_that_wait_to_be_read_close_the_door_until_they_are() -> None:
    async with serving(CallLimits(unsent_bytes=2**20)) as (running, channel):
        client = await asyncio.to_thread(RawClient, running.port, window=1000)
        with client:
            stream = await asyncio.to_thread(client.start)
            await asyncio.to_thread(client.send, stream, frame(LARGE))
            async with asyncio.timeout(20):
                while (refused := await ending(channel)).code == "OK":
                    await asyncio.sleep(0.01)
            assert refused.reason == "OVERLOADED"
            assert "wait for this tenant to read them" in refused.text
        await until_ok(channel)  # the reader that did not read has gone


async def test_a_message_that_does_not_come_in_time_is_given_up_and_its_place_is_free() -> None:
    async with serving(CallLimits(receiving=1, receive_s=0.3)) as (running, channel):
        client = await asyncio.to_thread(RawClient, running.port)
        with client:
            stream = await asyncio.to_thread(client.start)
            assert running.calls.in_flight == 0  # nothing to drain for
            answer = await asyncio.to_thread(client.wait, stream)
        assert (answer.ending.code, answer.ending.reason) == ("DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED")
        await until_ok(channel)  # its message, too, may take longer than 0.3 s


async def test_a_stranger_is_refused_before_he_has_sent_anything(tmp_path: Path) -> None:
    path = tmp_path / "tenants.yaml"
    digest = hashlib.sha256(b"0123456789abcdef").hexdigest()
    path.write_text(f"tenants: {{team-a: {{models: ['*'], tokens_sha256: ['{digest}']}}}}")
    async with serving(CallLimits(), access=AccessFile(path, lambda good: None)) as (running, channel):
        for method in (SCORE, GET_TEACHER, CHECK, WATCH, REFLECTION, "/stillhouse.v1.TeacherService/Train", "/x/Y"):
            client = await asyncio.to_thread(RawClient, running.port)
            with client:
                stream = await asyncio.to_thread(client.start, method)
                answer = await asyncio.to_thread(client.wait, stream)
            assert (answer.ending.code, answer.ending.reason) == ("UNAUTHENTICATED", "UNAUTHENTICATED"), method
        known = (("authorization", "Bearer 0123456789abcdef"),)
        assert await ending(channel, metadata=known) == Ending("OK")


async def test_a_server_that_stops_refuses_whoever_comes_and_whose_message_comes_late() -> None:
    async with serving(CallLimits()) as (running, channel):
        client = await asyncio.to_thread(RawClient, running.port)
        with client:
            stream = await asyncio.to_thread(client.start)
            await until(lambda: running.calls._open.total() == 1)
            running.calls.stopping = True
            await asyncio.to_thread(client.send, stream, frame(SMALL))
            answer = await asyncio.to_thread(client.wait, stream)
        assert answer.ending.reason == "UNAVAILABLE"
        assert (await ending(channel)).reason == "UNAVAILABLE"
