"""The policies of balancing, with time as an argument: who is picked, and what that gives in a simulated pool."""

import heapq
import random
from collections.abc import Sequence

import pytest

from stillhouse.balancing import (
    POLICIES,
    Load,
    Policy,
    least_expected_wait,
    least_outstanding_tokens,
    round_robin,
)


def answered(tokens: int, seconds: float, *, at_s: float = 0.0) -> Load:
    """A server that had one call of `tokens`, which it answered in so long."""
    load = Load()
    load.start(tokens, at_s - seconds)
    load.end(tokens, at_s, answered=True)
    return load


def picks(policy: Policy, loads: Sequence[Load], count: int, cost_tokens: int = 100, now_s: float = 0.0) -> list[int]:
    """Who gets `count` calls that come at the same moment."""
    taken: list[int] = []
    for _ in range(count):
        taken.append(policy(loads, cost_tokens, now_s))
        loads[taken[-1]].start(cost_tokens, now_s)
    return taken


@pytest.mark.parametrize("name", POLICIES)
def test_servers_of_which_nothing_is_known_take_turns(name: str) -> None:
    taken = picks(POLICIES[name], [Load() for _ in range(3)], 9)
    assert [taken.count(i) for i in range(3)] == [3, 3, 3]
    assert sorted(taken[:3]) == [0, 1, 2]


def test_round_robin_looks_at_nothing_but_the_turn() -> None:
    loads = [answered(100, 50.0), answered(100, 0.1), Load()]
    loads[1].start(10**6, 0.0)
    assert sorted(picks(round_robin, loads, 3)) == [0, 1, 2]


def test_tokens_outstanding_count_and_not_calls() -> None:
    loads = [Load(), Load()]
    for _ in range(5):
        loads[0].start(10, 0.0)
    loads[1].start(1000, 0.0)
    assert least_outstanding_tokens(loads, 1, 0.0) == 0
    assert least_expected_wait(loads, 1, 0.0) == 0


def test_a_server_five_times_slower_gets_a_sixth_of_the_tokens() -> None:
    loads = [answered(1000, 1.0), answered(1000, 5.0)]
    taken = picks(least_expected_wait, loads, 60)
    assert 49 <= taken.count(0) <= 51


def test_servers_that_differ_by_less_than_can_be_told_apart_share_equally() -> None:
    loads = [answered(1000, 1.0), answered(1000, 2.9)]
    taken = picks(least_expected_wait, loads, 60)
    assert taken.count(0) == taken.count(1)
    loads = [answered(1000, 1.0), answered(1000, 3.1)]
    assert picks(least_expected_wait, loads, 60).count(0) > 40


def test_a_server_never_measured_counts_as_the_fastest() -> None:
    loads = [answered(1000, 1.0), answered(1000, 5.0), Load()]
    taken = picks(least_expected_wait, loads, 110)
    assert 49 <= taken.count(2) <= 51
    assert 49 <= taken.count(0) <= 51


def test_slowness_shows_after_about_one_length_of_the_queue() -> None:
    load = answered(1000, 1.0)
    now_s = 0.0
    for _ in range(4):
        load.start(1000, now_s)
    for _ in range(4):
        now_s += 10.0
        load.end(1000, now_s, answered=True)
    assert load.seconds_per_token is not None
    assert load.seconds_per_token > 0.006, "from 0.001 nearly to the 0.010 that it is now"


def test_a_server_that_falls_silent_is_left_before_any_call_of_its_ends() -> None:
    loads = [answered(1000, 1.0), answered(1000, 1.0)]
    loads[0].start(1000, 0.0)
    for _ in range(12):
        loads[1].start(1000, 0.0)
    assert least_expected_wait(loads, 100, 0.0) == 0
    for second in range(1, 10):
        loads[1].end(1000, float(second), answered=True)
    assert least_expected_wait(loads, 100, 10.0) == 1, "the other has said nothing for ten seconds"
    assert least_outstanding_tokens(loads, 100, 10.0) == 0


def test_calls_that_are_given_up_show_slowness_and_refusals_at_once_show_nothing() -> None:
    slow, refusing = answered(1000, 1.0), answered(1000, 1.0)
    for load, seconds in ((slow, 30.0), (refusing, 0.001)):
        load.start(1000, 0.0)
        load.end(1000, seconds, answered=False)
    assert slow.seconds_per_token is not None and refusing.seconds_per_token is not None
    assert slow.seconds_per_token > 0.01
    assert refusing.seconds_per_token == pytest.approx(0.001, rel=0.01)
    unknown = Load()
    unknown.start(1000, 0.0)
    unknown.end(1000, 0.001, answered=False)
    assert unknown.seconds_per_token is None


def test_an_idle_servers_slowness_is_forgotten_while_others_answer() -> None:
    fast, slow = answered(1000, 1.0), answered(1000, 50.0)
    assert picks(least_expected_wait, [fast, slow], 1) == [0]
    fast.end(100, 0.1, answered=True)
    fast.start(1000, 59.0)
    fast.end(1000, 60.0, answered=True)
    assert sorted(picks(least_expected_wait, [fast, slow], 2, now_s=60.0)) == [0, 1]


def test_a_slow_server_that_has_calls_is_not_forgotten_to_be_slow() -> None:
    fast, slow = answered(1000, 1.0), answered(1000, 50.0)
    slow.start(100, 59.9)
    fast.start(1000, 59.0)
    fast.end(1000, 60.0, answered=True)
    assert picks(least_expected_wait, [fast, slow], 20, now_s=60.0) == [0] * 20


def test_a_pause_of_all_calls_makes_nobody_forget() -> None:
    loads = [answered(1000, 1.0), answered(1000, 5.0)]
    assert picks(least_expected_wait, loads, 60, now_s=3600.0).count(0) >= 49


def test_short_sequences_do_not_make_a_server_look_slow() -> None:
    # Both need 10 ms for anything and 0.1 ms a token; one happened to get the short ones.
    long, short = Load(), Load()
    for n in range(200):
        for load, tokens in ((long, 2000), (short, 2000 if n % 2 else 10)):
            load.start(tokens, float(n))
            load.end(tokens, n + 0.01 + 1e-4 * tokens, answered=True)
    assert long.seconds_per_token is not None and short.seconds_per_token is not None
    assert short.seconds_per_token < 1.3 * long.seconds_per_token


def test_a_call_of_one_token_measures_nothing() -> None:
    load = answered(1, 7.0)
    assert load.seconds_per_token is None
    assert (load.outstanding_calls, load.outstanding_tokens) == (0, 0)


def test_a_server_that_was_replaced_is_unknown_again() -> None:
    loads = [answered(1000, 1.0), answered(1000, 500.0)]
    loads[1].forget()
    assert sorted(picks(least_expected_wait, loads, 2)) == [0, 1]


# --- a simulated pool


def simulated_s(policy: Policy, slowness: Sequence[float], *, calls: int = 1500, in_flight: int = 64) -> float:
    """How long a pool takes, each server batching what waits: 20 ms a batch and 20 us a token, times its slowness."""
    rng = random.Random(1)
    loads = [Load() for _ in slowness]
    waiting: list[list[int]] = [[] for _ in slowness]
    batches: list[list[int]] = [[] for _ in slowness]
    ends: list[tuple[float, int]] = []
    now_s, left = 0.0, calls

    def send() -> None:
        nonlocal left
        if left:
            left -= 1
            tokens = int(min(8192, max(16, rng.lognormvariate(6.5, 1.0))))
            i = policy(loads, tokens, now_s)
            loads[i].start(tokens, now_s)
            waiting[i].append(tokens)

    def begin_batches() -> None:
        for i, slow in enumerate(slowness):
            if waiting[i] and not batches[i]:
                while waiting[i] and sum(batches[i]) < 16_384:
                    batches[i].append(waiting[i].pop(0))
                heapq.heappush(ends, (now_s + slow * (0.02 + 2e-5 * sum(batches[i])), i))

    for _ in range(in_flight):
        send()
    begin_batches()
    while ends:
        now_s, i = heapq.heappop(ends)
        done, batches[i] = batches[i], []
        for tokens in done:
            loads[i].end(tokens, now_s, answered=True)
        for _ in done:
            send()
        begin_batches()
    assert all(load.outstanding_calls == load.outstanding_tokens == 0 for load in loads)
    return now_s


def test_one_of_two_servers_five_times_slower_costs_little() -> None:
    slow_s = simulated_s(least_expected_wait, [1.0, 5.0])
    assert simulated_s(round_robin, [1.0, 5.0]) > 2.4 * slow_s
    assert slow_s < 1.75 * simulated_s(least_expected_wait, [1.0, 1.0]), "ideal is 2 / 1.2 = 1.67"


def test_among_equals_expecting_waits_costs_nothing() -> None:
    equal = [1.0, 1.0, 1.0]
    assert simulated_s(least_expected_wait, equal) < 1.05 * simulated_s(round_robin, equal)
