"""The queue's promises: shares, bursts, bounds, quotas, deadlines, and that its books balance."""

import asyncio
import random
from collections import Counter
from dataclasses import replace

import pytest

from stillhouse.errors import DeadlineExceeded, Overloaded, QuotaExceeded, StillhouseError, Unavailable
from teacher_server.access import Tenant
from teacher_server.fair_queue import Bounds, Entry, FairQueue
from teacher_server.gate import Gate

ROOMY = Bounds(max_tokens=10**9, max_bytes=10**12, window_tokens=100, burst_tokens=0)


def tenant(name: str, **settings: object) -> Tenant:
    defaults = {"models": ("*",), "weight": 1.0, "tokens_per_s": None, "burst_tokens": None}
    return Tenant(name, **{**defaults, "max_tokens_in_flight": None, **settings})  # type: ignore[arg-type]


class Bench:
    """A queue with its clock and what was dropped."""

    def __init__(self, bounds: Bounds = ROOMY) -> None:
        self.now_s = 100.0
        self.dropped: list[tuple[Entry, StillhouseError]] = []
        self.queue = FairQueue(bounds, lambda entry, error: self.dropped.append((entry, error)))

    def admit(self, who: Tenant, tokens: int = 10, **options: object) -> Entry:
        return self.queue.admit(who, tokens=tokens, now_s=self.now_s, **{"size_bytes": tokens, **options})  # type: ignore[arg-type]

    def take(self) -> Entry | None:
        return self.queue.take(self.now_s)

    def leave(self, entry: Entry, *, scored: bool = True, ended: bool = True) -> None:
        self.queue.leave(entry, self.now_s, scored=scored, ended=ended)

    def serve(self, seconds: float = 0.0) -> Entry | None:
        """The next one, from its turn to its answer."""
        entry = self.take()
        self.now_s += seconds
        if entry is not None:
            self.leave(entry)
        return entry


A, B, C = tenant("a"), tenant("b"), tenant("c")


def test_alone_a_tenant_is_served_in_order() -> None:
    bench = Bench()
    entries = [bench.admit(A, tokens) for tokens in (5, 50, 1)]
    assert [bench.serve() for _ in range(4)] == [*entries, None]


def test_two_tenants_with_work_share_by_tokens_not_by_requests() -> None:
    bench = Bench()
    for _ in range(100):
        bench.admit(A, 40)
        bench.admit(B, 10)
    served = Counter[str]()
    while sum(served.values()) < 1_600:
        entry = bench.serve()
        assert entry
        served[entry.tenant.name] += entry.tokens
    assert abs(served["a"] - served["b"]) <= 40


@pytest.mark.parametrize("weights", [(1.0, 2.0, 5.0), (0.1, 0.1, 0.1), (3.0, 0.5, 1.0)])
def test_shares_follow_the_weights_at_any_time(weights: tuple[float, ...]) -> None:
    bench = Bench()
    rng = random.Random(1)
    tenants = [tenant(name, weight=weight) for name, weight in zip("abc", weights, strict=True)]
    for who in tenants:
        for _ in range(3_000):
            bench.admit(who, rng.randint(1, 60))
    served = Counter[str]()
    for _ in range(1_500):
        entry = bench.serve()
        assert entry
        served[entry.tenant.name] += entry.tokens
        normal = [served[who.name] / who.weight for who in tenants]
        assert max(normal) - min(normal) <= 60 / min(weights) + 1e-6


def test_a_flood_does_not_delay_a_newcomer_by_more_than_the_window() -> None:
    bench = Bench()
    for _ in range(1_000):
        bench.admit(A, 10)
    ahead = 0
    while bench.take():
        ahead += 10
    assert ahead == ROOMY.window_tokens
    late = bench.admit(B, 10)
    bench.leave(bench.queue._tenants["a"].head() or late)  # a waiting one goes: makes no room with the engine
    assert bench.take() is None


def test_the_newcomer_is_next_once_the_engine_has_room() -> None:
    bench = Bench()
    running = []
    for _ in range(1_000):
        bench.admit(A, 10)
    while entry := bench.take():
        running.append(entry)
    late = bench.admit(B, 10)
    bench.leave(running[0])
    assert bench.take() is late


def test_a_quiet_tenant_may_burst_ahead_and_then_shares() -> None:
    bench = Bench(replace(ROOMY, burst_tokens=100))
    for _ in range(1_000):
        bench.admit(A, 10)
    for _ in range(50):
        bench.serve()
    for _ in range(50):
        bench.admit(B, 10)
    order = "".join(entry.tenant.name for _ in range(40) if (entry := bench.serve()))
    assert order.startswith("bbbbbbbbbb")
    assert order.count("b") <= 10 + 15 + 1
    assert order.count("b") >= 10 + 14


def test_idle_time_is_not_saved_up() -> None:
    bench = Bench(replace(ROOMY, burst_tokens=20))
    bench.admit(B, 10)
    bench.serve()
    for _ in range(1_000):
        bench.admit(A, 10)
    for _ in range(500):
        bench.serve()
    for _ in range(100):
        bench.admit(B, 10)
    order = [entry.tenant.name for _ in range(40) if (entry := bench.serve())]
    assert order.count("b") <= 2 + 20


def test_who_used_what_nobody_else_wanted_is_not_behind_a_newcomer_for_it() -> None:
    bench = Bench(replace(ROOMY, burst_tokens=100))
    for _ in range(20):  # alone, a burst at a time
        for _ in range(10):
            bench.admit(A, 10)
        while bench.serve():
            pass
    for _ in range(50):  # then a flood begins
        bench.admit(B, 10)
    for _ in range(5):
        bench.serve()
    for _ in range(10):
        bench.admit(A, 10)
    order = "".join(entry.tenant.name for _ in range(20) if (entry := bench.serve()))
    # B has used half of its burst, A none of its own: A is ahead by as much, and from there they share.
    assert order[:5] == "aaaaa"
    assert order[:15].count("a") == 10


def test_priority_orders_a_tenants_own_work_and_gains_nothing_over_others() -> None:
    bench = Bench()
    low, high, older = bench.admit(A, priority=-5), bench.admit(A, priority=7), bench.admit(B)
    newer_high = bench.admit(A, priority=7)
    order = [bench.serve() for _ in range(4)]
    assert [entry for entry in order if entry and entry.tenant is A] == [high, newer_high, low]
    assert order.index(older) <= 1


def test_one_sequence_beyond_the_window_is_still_served_alone() -> None:
    bench = Bench()
    small, large = bench.admit(A, 10), bench.admit(A, 1_000)
    assert bench.take() is small
    assert bench.take() is None
    bench.leave(small)
    assert bench.take() is large
    bench.admit(B, 1)
    assert bench.take() is None


def test_a_full_queue_refuses_with_a_delay() -> None:
    bench = Bench(replace(ROOMY, max_tokens=50))
    for _ in range(5):
        bench.admit(A, 10)
    with pytest.raises(Overloaded) as refused:
        bench.admit(A, 1)
    assert refused.value.retry_delay_s and 0.05 <= refused.value.retry_delay_s <= 12.5
    assert refused.value.fields["pending_tokens"] == "50"


def test_a_full_queue_refuses_by_bytes_too() -> None:
    bench = Bench(replace(ROOMY, max_bytes=1_000))
    bench.admit(A, 1, size_bytes=900)
    with pytest.raises(Overloaded, match="bytes"):
        bench.admit(A, 1, size_bytes=200)


def test_what_is_larger_than_the_queue_is_taken_when_nothing_else_is_there() -> None:
    bench = Bench(replace(ROOMY, max_tokens=50, max_bytes=50))
    assert bench.admit(A, 500).state == "queued"


def test_a_flood_that_fills_the_queue_is_displaced_by_another_tenant() -> None:
    bench = Bench(replace(ROOMY, max_tokens=100))
    flood = [bench.admit(A, 10) for _ in range(10)]
    late = bench.admit(B, 15)
    assert late.state == "queued"
    assert [entry for entry, _ in bench.dropped] == flood[:-3:-1], "the newest two of the flood"
    assert all(isinstance(error, Overloaded) and error.retry_delay_s for _, error in bench.dropped)
    assert bench.queue.pending_tokens == 95


def test_displacing_ends_at_equal_shares() -> None:
    bench = Bench(replace(ROOMY, max_tokens=100))
    for _ in range(10):
        bench.admit(A, 10)
    with pytest.raises(Overloaded):
        for _ in range(10):
            bench.admit(B, 10)
    assert bench.queue.pending_of("a") == bench.queue.pending_of("b") == 50


def test_a_refused_newcomer_displaces_nobody() -> None:
    bench = Bench(replace(ROOMY, max_tokens=100))
    for _ in range(10):
        bench.admit(A, 10)
    with pytest.raises(Overloaded):
        bench.admit(B, 90)
    assert not bench.dropped
    assert bench.queue.pending_of("a") == 100


def test_displaced_work_is_the_lowest_priority_first() -> None:
    bench = Bench(replace(ROOMY, max_tokens=30))
    low = bench.admit(A, 10, priority=-1)
    bench.admit(A, 10, priority=3)
    bench.admit(A, 10, priority=0)
    bench.admit(B, 10)
    assert [entry for entry, _ in bench.dropped] == [low]


def test_work_with_the_engine_is_never_displaced() -> None:
    bench = Bench(replace(ROOMY, max_tokens=30))
    for _ in range(3):
        bench.admit(A, 10)
    while bench.take():
        pass
    with pytest.raises(Overloaded):
        bench.admit(B, 10)
    assert not bench.dropped


def test_a_quota_in_flight_refuses_only_its_tenant() -> None:
    bench = Bench()
    limited = tenant("limited", max_tokens_in_flight=25)
    first = bench.admit(limited, 20)
    with pytest.raises(QuotaExceeded, match=r"'limited' has 20 tokens in flight; it may have 25"):
        bench.admit(limited, 10)
    bench.admit(A, 1_000)
    bench.leave(first)
    assert bench.admit(limited, 40), "alone, one larger than the limit is taken"


def test_a_quota_by_time_reserves_refuses_and_refills() -> None:
    bench = Bench()
    limited = tenant("limited", tokens_per_s=10.0, burst_tokens=100)
    bench.admit(limited, 100)
    with pytest.raises(QuotaExceeded) as refused:
        bench.admit(limited, 30)
    assert refused.value.retry_delay_s == pytest.approx(3.0)
    bench.now_s += 3.0
    bench.admit(limited, 30)
    with pytest.raises(QuotaExceeded):
        bench.admit(limited, 1)


def test_callers_over_their_quota_are_told_to_come_again_one_after_the_other() -> None:
    bench = Bench()
    limited = tenant("limited", tokens_per_s=10.0, burst_tokens=10)
    bench.admit(limited, 10)
    delays = []
    for _ in range(5):
        with pytest.raises(QuotaExceeded) as refused:
            bench.admit(limited, 10)
        delays.append(refused.value.retry_delay_s)
    assert delays == pytest.approx([1.0, 2.0, 3.0, 4.0, 5.0])
    for _ in range(5):  # and when they come, they are admitted
        bench.now_s += 1.0
        bench.admit(limited, 10)


def test_what_the_engine_did_not_score_is_given_back() -> None:
    bench = Bench()
    limited = tenant("limited", tokens_per_s=1.0, burst_tokens=100)
    entry = bench.admit(limited, 100)
    bench.take()
    bench.leave(entry, scored=False)
    bench.leave(entry, scored=False)  # once only
    scored = bench.admit(limited, 100)
    bench.take()
    bench.leave(scored)
    with pytest.raises(QuotaExceeded):
        bench.admit(limited, 1)


def test_a_refusal_by_the_queue_costs_no_quota() -> None:
    bench = Bench(replace(ROOMY, max_tokens=60))
    limited = tenant("limited", tokens_per_s=1.0, burst_tokens=100)
    first = bench.admit(limited, 60)
    with pytest.raises(Overloaded):
        bench.admit(limited, 40)
    bench.take()
    bench.leave(first)
    assert bench.admit(limited, 40)


def test_a_request_larger_than_the_bucket_goes_when_it_is_full_and_leaves_a_debt() -> None:
    bench = Bench()
    limited = tenant("limited", tokens_per_s=10.0, burst_tokens=100)
    bench.admit(limited, 300)
    bench.now_s += 10.0
    with pytest.raises(QuotaExceeded) as refused:
        bench.admit(limited, 10)
    assert refused.value.retry_delay_s == pytest.approx(11.0)


def test_a_quota_that_changes_counts_from_the_next_request() -> None:
    bench = Bench()
    bench.admit(tenant("t", tokens_per_s=1.0, burst_tokens=10), 10)
    bench.admit(tenant("t", tokens_per_s=None), 1_000)
    bench.admit(tenant("t", tokens_per_s=1.0, burst_tokens=10), 10)
    with pytest.raises(QuotaExceeded):
        bench.admit(tenant("t", tokens_per_s=1.0, burst_tokens=10), 10)


def learn_speed(bench: Bench, tokens_per_s: float) -> None:
    for _ in range(6):
        bench.admit(C, 10)
        assert bench.serve(seconds=10 / tokens_per_s)


def test_the_speed_is_that_of_busy_time() -> None:
    bench = Bench()
    learn_speed(bench, 20.0)
    bench.now_s += 1_000.0
    learn_speed(bench, 20.0)
    assert bench.queue.tokens_per_s == pytest.approx(20.0)


def test_the_speed_of_batches_counts_whole_batches() -> None:
    bench = Bench()
    for _ in range(100):
        bench.admit(A, 10)
    for _ in range(10):
        batch = [entry for _ in range(10) if (entry := bench.take())]
        bench.now_s += 2.0
        for entry in batch:
            bench.leave(entry)
    assert bench.queue.tokens_per_s == pytest.approx(50.0)


def test_what_cannot_be_ready_in_time_is_refused_at_once() -> None:
    bench = Bench()
    learn_speed(bench, 10.0)
    for _ in range(10):
        bench.admit(A, 10)
    bench.admit(A, 10, deadline_s=bench.now_s + 11.5)
    with pytest.raises(Overloaded, match=r"the deadline leaves 5\.0 s") as refused:
        bench.admit(A, 10, deadline_s=bench.now_s + 5.0)
    assert refused.value.retry_delay_s and refused.value.retry_delay_s > 4
    bench.admit(B, 10, deadline_s=bench.now_s + 5.0)  # its share of the engine suffices
    bench.admit(A, 10, deadline_s=bench.now_s + 5.0, priority=1)  # goes ahead of A's others


def test_an_idle_engine_is_given_what_the_estimate_says_is_late() -> None:
    bench = Bench()
    learn_speed(bench, 10.0)
    assert bench.admit(A, 1_000, deadline_s=bench.now_s + 1.0)


def test_what_expired_while_it_waited_never_reaches_the_engine() -> None:
    bench = Bench()
    running = bench.admit(A, 100)
    bench.take()
    late, fine = bench.admit(A, 10, deadline_s=bench.now_s + 1.0), bench.admit(A, 10, deadline_s=bench.now_s + 9.0)
    bench.now_s += 2.0
    bench.leave(running)
    assert bench.take() is fine
    ((entry, error),) = bench.dropped
    assert entry is late
    assert isinstance(error, DeadlineExceeded)


def test_no_progress_counts_only_time_with_work_and_no_end() -> None:
    bench = Bench()
    bench.now_s += 100.0
    assert bench.queue.no_progress_s(bench.now_s) == 0.0
    first, second = bench.admit(A), bench.admit(A)
    bench.take(), bench.take()
    bench.now_s += 7.0
    bench.leave(first, scored=False, ended=False)  # its caller gave up: that says nothing of the engine
    assert bench.queue.no_progress_s(bench.now_s) == pytest.approx(7.0)
    bench.leave(second, scored=False, ended=False)
    bench.now_s += 50.0
    third = bench.admit(A)
    bench.take()
    bench.now_s += 2.0
    assert bench.queue.no_progress_s(bench.now_s) == pytest.approx(9.0)
    bench.leave(third, scored=False)
    assert bench.queue.no_progress_s(bench.now_s) == 0.0


@pytest.mark.parametrize("seed", range(30))
def test_the_books_balance_whatever_happens(seed: int) -> None:
    rng = random.Random(seed)
    bounds = Bounds(max_tokens=400, max_bytes=900, window_tokens=80, burst_tokens=50)
    bench = Bench(bounds)
    tenants = [
        tenant("a"),
        tenant("b", weight=3.0),
        tenant("c", tokens_per_s=200.0, burst_tokens=150),
        tenant("d", max_tokens_in_flight=90),
    ]
    live: list[Entry] = []
    admitted, answered = 0, 0
    for _ in range(2_000):
        bench.now_s += rng.expovariate(50.0)
        action = rng.random()
        if action < 0.45:
            deadline_s = bench.now_s + rng.expovariate(2.0) if rng.random() < 0.3 else None
            try:
                live.append(
                    bench.admit(
                        rng.choice(tenants),
                        rng.randint(1, 120),
                        size_bytes=rng.randint(1, 300),
                        priority=rng.randint(-2, 2),
                        deadline_s=deadline_s,
                    )
                )
                admitted += 1
            except (Overloaded, QuotaExceeded) as refused:
                assert refused.retry_delay_s and refused.retry_delay_s > 0
        elif action < 0.75:
            bench.take()
        elif live:
            entry = rng.choice(live)
            answered += entry.state == "running"
            bench.leave(entry, scored=rng.random() < 0.8, ended=rng.random() < 0.9)
        live = [entry for entry in live if entry.state != "done"]
        queue = bench.queue
        assert queue.pending_tokens == sum(entry.tokens for entry in live)
        assert queue.pending_bytes == sum(entry.size_bytes for entry in live)
        running = [entry for entry in live if entry.state == "running"]
        assert queue.running_tokens == sum(entry.tokens for entry in running)
        assert queue.running_tokens <= bounds.window_tokens or len(running) == 1
        assert queue.pending_tokens <= bounds.max_tokens or len(live) == 1
        assert queue.pending_bytes <= bounds.max_bytes or len(live) == 1
        for who in tenants:
            assert queue.pending_of(who.name) == sum(entry.tokens for entry in live if entry.tenant is who)
    for entry in live:
        bench.leave(entry)
    assert (bench.queue.pending_tokens, bench.queue.pending_bytes, bench.queue.running_tokens) == (0, 0, 0)
    assert admitted > 300
    assert answered > 100


def test_every_admitted_entry_is_served_or_dropped_exactly_once() -> None:
    rng = random.Random(3)
    bench = Bench(Bounds(max_tokens=300, max_bytes=10**6, window_tokens=60, burst_tokens=30))
    admitted: list[Entry] = []
    served: list[Entry] = []
    for _ in range(3_000):
        bench.now_s += 0.01
        if rng.random() < 0.6:
            try:
                admitted.append(bench.admit(rng.choice((A, B, C)), rng.randint(1, 50)))
            except Overloaded:
                continue
        elif entry := bench.serve():
            served.append(entry)
    while entry := bench.serve():
        served.append(entry)
    dropped = [entry for entry, _ in bench.dropped]
    assert sorted(map(id, admitted)) == sorted(map(id, served + dropped))
    assert dropped, "the case was too mild to test displacing"


# --- on the event loop


async def test_the_gate_lets_through_what_the_engine_has_room_for_and_measures_the_wait() -> None:
    now_s = 0.0
    gate = Gate(ROOMY, clock=lambda: now_s)
    order: list[str] = []
    release = asyncio.Event()

    async def call(name: str, who: Tenant) -> float:
        async with gate.turn(who, tokens=60, size_bytes=1) as waited_s:
            order.append(name)
            await release.wait()
            return waited_s

    calls = [asyncio.create_task(call(name, who)) for name, who in (("a1", A), ("a2", A), ("b1", B))]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert order == ["a1"]
    now_s = 5.0
    release.set()
    assert await asyncio.gather(*calls) == [0.0, 5.0, 5.0]
    assert order == ["a1", "b1", "a2"]
    assert gate.queue.pending_tokens == 0


async def three_callers(gate: Gate) -> tuple[asyncio.Event, list[str], list[asyncio.Task[None]]]:
    """Calls 1, 2 and 3, each of the whole window: what lets those go that have the engine, and who had it so far."""
    release = asyncio.Event()
    reached: list[str] = []

    async def call(name: str) -> None:
        async with gate.turn(A, tokens=100, size_bytes=1):
            reached.append(name)
            await release.wait()

    tasks = [asyncio.create_task(call(name)) for name in "123"]
    await asyncio.sleep(0.01)
    return release, reached, tasks


async def test_a_cancelled_caller_leaves_the_queue_at_once() -> None:
    gate = Gate(ROOMY)
    release, reached, (first, second, third) = await three_callers(gate)
    second.cancel()
    await asyncio.sleep(0.01)
    assert gate.queue.pending_tokens == 200
    first.cancel()
    await asyncio.sleep(0.01)
    assert reached == ["1", "3"]
    release.set()
    await third
    assert (gate.queue.pending_tokens, gate.queue.running_tokens) == (0, 0)


async def test_cancelled_in_the_moment_of_its_turn_it_still_makes_room() -> None:
    gate = Gate(ROOMY)
    release, reached, (first, second, third) = await three_callers(gate)
    release.set()
    await first  # its turn is over, and the second one's future is set but not yet seen
    second.cancel()
    await third
    assert gate.queue.running_tokens == 0
    assert "3" in reached


async def test_a_displaced_caller_gets_the_error() -> None:
    gate = Gate(replace(ROOMY, max_tokens=200))

    async def call(who: Tenant, tokens: int) -> None:
        async with gate.turn(who, tokens=tokens, size_bytes=1):
            await asyncio.sleep(0.01)

    calls = [asyncio.create_task(call(A, 100)) for _ in range(2)]
    await asyncio.sleep(0)
    await call(B, 50)
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(result) for result in results] == [type(None), Overloaded]


async def test_a_failure_of_the_engine_gives_the_quota_back_and_passes_through() -> None:
    gate = Gate(ROOMY)
    limited = tenant("limited", tokens_per_s=0.001, burst_tokens=100)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="broken"):
            async with gate.turn(limited, tokens=100, size_bytes=1):
                raise RuntimeError("broken")


async def test_a_closed_gate_admits_nobody_and_lets_the_admitted_go_on() -> None:
    gate = Gate(ROOMY)
    release = asyncio.Event()

    async def call() -> str:
        async with gate.turn(A, tokens=100, size_bytes=1):
            await release.wait()
            return "done"

    calls = [asyncio.create_task(call()) for _ in range(2)]
    await asyncio.sleep(0)
    gate.close()
    with pytest.raises(Unavailable):
        await call()
    release.set()
    assert await asyncio.gather(*calls) == ["done", "done"]
