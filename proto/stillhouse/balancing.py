"""Which server takes the next call: what is known of each, and policies over that.

Nothing here knows gRPC or a clock: times are arguments, in seconds of any clock that does not go back. So a
simulation runs the very code that the client runs.

A policy is a function `(loads, cost_tokens, now_s) -> index` into `loads`. Among equals it takes the server
that was started on longest ago, so that equals take turns.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# How fast a measurement is forgotten while others are newer.
MEMORY_S = 10.0
# Servers that differ by less than this factor are not told apart.
ALIKE = 3.0
# Over how many lengths of its queue the speed of a server is measured.
QUEUES = 2.0

_turns = itertools.count(1)  # orders starts, also those at the same moment


@dataclass(slots=True)
class Load:
    """What one client knows of one server. Only its own calls: others' show in how long these take.

    `busy_s` and `answered_tokens` say how fast answers came: seconds in which calls were outstanding, and the
    tokens of those answered meanwhile. Both fade as the queue turns over, twice as slowly: a slow-down shows
    after about one queue's length. Their quotient times the tokens outstanding is what a call will wait
    (Little's law). The duration of single calls says less where calls are batched: then it belongs to the
    whole batch, also to what arrived after the call.
    """

    outstanding_tokens: int = 0
    outstanding_calls: int = 0
    busy_s: float = 0.0
    answered_tokens: float = 0.0  # 0: never measured
    measured_s: float = -math.inf  # when last
    waiting_since_s: float = 0.0  # the last answer, or the start of the first call that waits for one
    turn: int = 0

    def start(self, cost_tokens: int, now_s: float) -> None:
        """A call that costs `cost_tokens` goes to this server."""
        if self.outstanding_calls == 0:
            self.waiting_since_s = now_s
        self.outstanding_calls += 1
        self.outstanding_tokens += cost_tokens
        self.turn = next(_turns)

    def end(self, cost_tokens: int, now_s: float, *, answered: bool) -> None:
        """The call is over. The time of one without an answer counts too: the server was not faster than that."""
        if answered:
            self._measure(cost_tokens, now_s)
        elif self.answered_tokens:
            self.busy_s += self.silent_s(now_s)
            self.waiting_since_s = now_s
        self.outstanding_calls -= 1
        self.outstanding_tokens -= cost_tokens

    def forget(self) -> None:
        """The server is another one now, for example restarted: what was measured says nothing."""
        self.busy_s = self.answered_tokens = 0.0
        self.measured_s = -math.inf

    @property
    def seconds_per_token(self) -> float | None:
        """How long an outstanding token takes, as last measured; None before the first answer."""
        return self.busy_s / self.answered_tokens if self.answered_tokens else None

    def silent_s(self, now_s: float) -> float:
        """How long calls have waited here without any of them being answered."""
        return now_s - self.waiting_since_s if self.outstanding_calls else 0.0

    def _measure(self, cost_tokens: int, now_s: float) -> None:
        if cost_tokens > 1:  # one token is no work: such a call measures the network
            keep = math.exp(-cost_tokens / (QUEUES * self.outstanding_tokens))
            self.busy_s = self.busy_s * keep + self.silent_s(now_s)
            self.answered_tokens = self.answered_tokens * keep + cost_tokens
            self.measured_s = now_s
        self.waiting_since_s = now_s


Policy = Callable[[Sequence[Load], int, float], int]


def round_robin(loads: Sequence[Load], cost_tokens: int, now_s: float) -> int:
    """Everyone in turn, whatever is outstanding. For comparison."""
    return _least(loads, [0.0] * len(loads))


def least_outstanding_tokens(loads: Sequence[Load], cost_tokens: int, now_s: float) -> int:
    """The server with the fewest tokens outstanding: right if all are equally fast."""
    return _least(loads, [float(load.outstanding_tokens) for load in loads])


def least_expected_wait(loads: Sequence[Load], cost_tokens: int, now_s: float) -> int:
    """The server that will probably answer first: the seconds of an outstanding token, times all tokens.

    A server that was never measured counts as the fastest. So does, more and more, one that has no calls while
    others answer theirs: after about 20 s of that it gets its full share again and shows what it can. A pause
    of all calls ages nothing. One that has been silent for some time with calls outstanding will not answer
    sooner than that.

    Speeds within a factor of `ALIKE` of the fastest count as the same: what one client measures of a server that
    others use too is mostly the others, and clients that all went after such differences would herd.
    """
    known = [speed for load in loads if (speed := load.seconds_per_token) is not None]
    fastest = min(known, default=1.0)
    newest_s = max(load.measured_s for load in loads)
    return _least(
        loads,
        [
            max(
                _told_apart(_faded(load, fastest, newest_s), fastest) * (load.outstanding_tokens + cost_tokens),
                load.silent_s(now_s),
            )
            for load in loads
        ],
    )


POLICIES: dict[str, Policy] = {
    "least_expected_wait": least_expected_wait,
    "least_outstanding_tokens": least_outstanding_tokens,
    "round_robin": round_robin,
}


def _faded(load: Load, fastest: float, newest_s: float) -> float:
    """Seconds per token, nearer to the fastest server's the older the measurement is against the newest."""
    speed = load.seconds_per_token
    if speed is None or fastest <= 0.0:
        return fastest
    if load.outstanding_calls:
        return speed  # it is being measured
    return fastest * (speed / fastest) ** math.exp(-(newest_s - load.measured_s) / MEMORY_S)


def _told_apart(speed: float, fastest: float) -> float:
    return fastest if speed < ALIKE * fastest else speed


def _least(loads: Sequence[Load], weights: Sequence[float]) -> int:
    return min(range(len(loads)), key=lambda i: (weights[i], loads[i].turn))
