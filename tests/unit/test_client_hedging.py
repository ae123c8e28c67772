"""Second copies of slow calls: when they are sent, who wins, and that they stay a small share."""

import asyncio
from collections import deque
from collections.abc import Iterator

import pytest

from stillhouse.client import TeacherClient
from stillhouse.errors import InvalidRequest, Unavailable
from stillhouse.hedging import Hedging, first_answer
from tests.calls import QUICK, submit, until
from tests.fakes import FakeServer

# --- when


def test_the_quantile_of_recent_answers_says_what_is_unusual() -> None:
    hedging = Hedging(0.05)
    for n in range(63):
        hedging.answered(float(n))
    assert hedging.after_s is None, "too few to tell"
    for n in range(63, 100):
        hedging.answered(float(n))
    assert hedging.after_s == 94.0  # five of 0 .. 99 took longer
    for _ in range(512):
        hedging.answered(1.0)
    assert hedging.after_s == 1.0, "the old ones are forgotten"


def test_second_copies_are_at_most_the_share_of_all_calls() -> None:
    hedging = Hedging(0.02)
    taken = 0
    for n in range(1, 2001):
        hedging.called()
        taken += hedging.take()
        assert taken <= 0.02 * n + 1e-6
    assert taken >= 38
    for _ in range(10_000):
        hedging.called()
    burst = 0
    while hedging.take():
        burst += 1
    assert burst == 4, "calls that were fast save up no storm"


@pytest.mark.parametrize("share", [-0.01, 0.11, float("nan")])
def test_a_share_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="hedge_share"):
        TeacherClient(["127.0.0.1:1"], hedge_share=share)


# --- the race


async def after(delay_s: float, result: str | Exception) -> str:
    await asyncio.sleep(delay_s)
    if isinstance(result, Exception):
        raise result
    return result


async def test_a_first_copy_that_is_quick_needs_no_second() -> None:
    def second() -> None:
        raise AssertionError("not needed")

    assert await first_answer(after(0.0, "first"), 20.0, second) == ("first", False)


async def test_the_earlier_answer_wins_and_the_other_copy_is_cancelled() -> None:
    ended: list[str] = []

    async def slow() -> str:
        try:
            return await after(3600.0, "first")
        finally:
            ended.append("first")

    assert await first_answer(slow(), 0.01, lambda: after(0.0, "second")) == ("second", True)
    assert ended == ["first"]
    assert len(asyncio.all_tasks()) == 1


async def test_a_copy_that_fails_leaves_the_call_to_the_other() -> None:
    error = Unavailable("gone")
    assert await first_answer(after(0.2, "first"), 0.01, lambda: after(0.0, error)) == ("first", False)
    assert await first_answer(after(0.05, error), 0.01, lambda: after(0.3, "second")) == ("second", True)


async def test_if_both_copies_fail_one_error_is_raised_and_none_is_lost() -> None:
    with pytest.raises(InvalidRequest):
        await first_answer(after(0.05, Unavailable("gone")), 0.01, lambda: after(0.1, InvalidRequest("no")))


async def test_without_a_second_server_the_first_copy_is_waited_for() -> None:
    assert await first_answer(after(0.05, "first"), 0.0, lambda: None) == ("first", False)


# --- the client

PINNED = {"expected_model_revision": "r1", "expected_compute_dtype": "float64"}


@pytest.fixture
def two() -> Iterator[list[FakeServer]]:
    with FakeServer() as one, FakeServer() as other:
        yield [one, other]


def practised(servers: list[FakeServer]) -> TeacherClient:
    """A client with a share of 0.1 that has had 64 answers and takes 0.05 s for usual, and may send two copies."""
    addresses = [server.address for server in servers]
    client = TeacherClient(addresses, backoff=QUICK, hedge_share=0.1, balancing="round_robin")
    hedging = client._client._attempts._hedging
    for future in [submit(client, **PINNED) for _ in range(64)]:  # all begin before 64 are answered
        future.result(timeout=20)
    assert hedging.after_s is not None
    assert client.stats.hedges == 0
    # What was measured on a busy machine may be longer than any delay of a test.
    hedging._times_s = deque([0.05] * 64, maxlen=512)
    hedging._usual_s = None
    hedging._saved = 4.0
    return client


def test_a_call_at_a_server_that_hangs_is_answered_by_another(two: list[FakeServer]) -> None:
    with practised(two) as client:
        for server in two:
            server.faults.hang_at()
        future = submit(client, **PINNED)
        for server in two:
            server.wait_for(lambda s: s.in_flight == 1)
        hangs, other = sorted(two, key=lambda s: str(s.metadata[-1]["stillhouse-attempt"]))
        other.release()
        assert future.result(timeout=20).model == "bigram"
        hangs.wait_for(lambda s: s.cancelled == 1)
        assert (client.stats.hedges, client.stats.hedges_won) == (1, 1)
        assert client.stats.answered == 64 + 1, "two copies are one answer"
        assert not client.stats.failures
        assert [s.metadata[-1]["stillhouse-attempt"] for s in (hangs, other)] == ["1", "2"]
        assert len({s.metadata[-1]["stillhouse-request-id"] for s in two}) == 1


@pytest.mark.parametrize(
    "pins", [{}, {"expected_model_revision": "r1"}, {"expected_compute_dtype": "float64"}], ids=str
)
def test_unless_revision_and_precision_are_pinned_nothing_is_sent_twice(
    two: list[FakeServer], pins: dict[str, str]
) -> None:
    with practised(two) as client:
        for server in two:
            server.delay_s = 0.3
        sent = sum(len(server.requests) for server in two)
        for future in [submit(client, **pins) for _ in range(10)]:
            future.result(timeout=20)
        assert client.stats.hedges == 0
        assert sum(len(server.requests) for server in two) == sent + 10


def test_a_general_slow_down_sends_no_more_than_the_share_twice(two: list[FakeServer]) -> None:
    with practised(two) as client:
        for server in two:
            server.delay_s = 1.0
        for future in [submit(client, **PINNED) for _ in range(120)]:
            future.result(timeout=20)
        assert client.stats.hedges >= 1
        assert client.stats.hedges <= 0.1 * 120 + 4, "4 were saved up"
        # A copy whose other half is answered at once may be cancelled before it is sent.
        assert 184 <= sum(len(server.requests) for server in two) <= 184 + client.stats.hedges


def test_hedging_is_off_unless_asked_for(two: list[FakeServer]) -> None:
    with TeacherClient([server.address for server in two]) as client:
        for server in two:
            server.delay_s = 0.05
        for future in [submit(client, **PINNED) for _ in range(200)]:
            future.result(timeout=20)
        assert client.stats.hedges == 0
        assert sum(len(server.requests) for server in two) == 200


def test_cancelling_a_call_cancels_both_copies(two: list[FakeServer]) -> None:
    with practised(two) as client:
        for server in two:
            server.faults.hang_at()
        future = submit(client, **PINNED)
        for server in two:
            server.wait_for(lambda s: s.in_flight == 1)
        assert future.cancel()
        for server in two:
            server.wait_for(lambda s: s.in_flight == 0)
        until(lambda: [state.in_flight for state in client.servers] == [0, 0])
