"""Whose turn it is: a bounded queue that is fair between tenants. No clock, no event loop: time is an argument.

**Turns.** Every tenant has a virtual time: the tokens it was served, divided by its weight. The tenant that is
furthest behind goes next (start-time fair queueing, Goyal et al. 1996, with tenants for flows), so while several
have work each gets its weight's share of the engine. A tenant that had nothing to do may lag behind the others by
`burst_tokens` and no more: so a short burst of a quiet tenant goes ahead of a long queue of a busy one, and nobody
can save up turns for hours. When there is no work at all any more, all is forgotten: what somebody used while nobody
else wanted it is not held against him when a neighbour comes. Inside a tenant the higher priority goes first, then the
older.

**The engine's window.** At most `window_tokens` are with the engine at once (one sequence always may be): enough to
keep it busy, and little enough that a newcomer waits for a batch or two and not for a queue that is past changing.

**Bounds.** What is admitted and not yet answered is bounded in tokens and in bytes. When it is full, the newcomer of
a tenant with less than its share displaces the newest work of the tenant with most (longest queue drop), which is
told to come again; otherwise the newcomer is. Quotas are a tenant's own: a bucket of tokens that fills with time
(reserved when admitted, given back if the engine did not score), and tokens in flight.

**Deadlines.** What by the engine's speed of late cannot be ready in time is refused at once. What expired while it
waited is dropped when its turn comes.
"""

import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from stillhouse.errors import DeadlineExceeded, Overloaded, QuotaExceeded, StillhouseError
from teacher_server.access import Tenant

_LONGEST_PROMISE_S = 30.0
_RATE_WINDOW_S = 1.0
_SAME_BATCH_S = 0.02
"""Answers closer together than this came from one batch: the engine's speed is measured between batches."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much the queue takes. Tokens are prompt and response together."""

    max_tokens: int
    """Admitted and not yet answered."""
    max_bytes: int
    """Of requests admitted and of their answers, which are held in memory together."""
    window_tokens: int
    """With the engine at once."""
    burst_tokens: int
    """A tenant that was quiet may be served so much ahead of its share."""


@dataclass(slots=True, eq=False)
class Entry:
    """One admitted request."""

    tenant: Tenant
    tokens: int
    size_bytes: int
    priority: int
    deadline_s: float | None
    arrived_s: float
    payload: Any = None
    state: str = "queued"  # then "running", then "done"
    started_s: float = 0.0


@dataclass(slots=True)
class _State:
    """What is known of one tenant."""

    virtual_time: float
    weight: float
    since: int = -1  # how often there had been no work when `virtual_time` began
    queued: dict[int, deque[Entry]] = field(default_factory=dict)  # by priority; entries that left stay until met
    tokens_of: dict[int, int] = field(default_factory=dict)  # queued, by priority
    queued_tokens: int = 0
    running_tokens: int = 0
    size_bytes: int = 0
    bucket_tokens: float | None = None  # None: not used yet, full
    bucket_s: float = 0.0
    promised_until_s: float = 0.0  # callers that were sent away come again until then

    def add(self, entry: Entry) -> None:
        self.queued.setdefault(entry.priority, deque()).append(entry)
        self.tokens_of[entry.priority] = self.tokens_of.get(entry.priority, 0) + entry.tokens
        self.queued_tokens += entry.tokens
        self.size_bytes += entry.size_bytes

    def unqueue(self, entry: Entry) -> None:
        self.tokens_of[entry.priority] -= entry.tokens
        self.queued_tokens -= entry.tokens

    def head(self) -> Entry | None:
        """The next one. Forgets entries that left."""
        while self.queued:
            priority = max(self.queued)
            line = self.queued[priority]
            while line and line[0].state != "queued":
                line.popleft()
            if line:
                return line[0]
            del self.queued[priority]
        return None

    def last_first(self) -> Iterator[Entry]:
        """Those that wait, from the one that would go last."""
        for priority in sorted(self.queued):
            line = self.queued[priority]
            while line and line[-1].state != "queued":  # forgets those that left
                line.pop()
            for entry in reversed(line):
                if entry.state == "queued":
                    yield entry


class FairQueue:
    """See the module's text. Not thread-safe.

    on_dropped(entry, error): called for an entry that is thrown out while it waits, displaced or expired.
    """

    def __init__(self, bounds: Bounds, on_dropped: Callable[[Entry, StillhouseError], None]) -> None:
        self.bounds = bounds
        self._on_dropped = on_dropped
        self._tenants: dict[str, _State] = {}
        self._virtual_time = 0.0
        self._emptied = 0
        self._tokens = 0
        self._bytes = 0
        self._running_tokens = 0
        self._clock_s = 0.0
        self._busy_s = 0.0  # since the engine last ended anything
        self._speed = _Speed()

    @property
    def pending_tokens(self) -> int:
        """Tokens admitted and not yet answered."""
        return self._tokens

    @property
    def pending_bytes(self) -> int:
        """Bytes of requests and answers admitted and not yet answered."""
        return self._bytes

    @property
    def running_tokens(self) -> int:
        """Tokens with the engine."""
        return self._running_tokens

    @property
    def tokens_per_s(self) -> float:
        """The engine's speed of late; 0 while it is not known."""
        return self._speed.tokens_per_s

    def pending_of(self, tenant: str) -> int:
        """Tokens that one tenant has admitted and not yet answered."""
        state = self._tenants.get(tenant)
        return state.queued_tokens + state.running_tokens if state else 0

    def no_progress_s(self, now_s: float) -> float:
        """How long the engine has had work and ended none of it. Time without work does not count."""
        self._advance(now_s)
        return self._busy_s

    def admit(
        self,
        tenant: Tenant,
        *,
        tokens: int,
        size_bytes: int,
        now_s: float,
        priority: int = 0,
        deadline_s: float | None = None,
        payload: Any = None,
    ) -> Entry:
        """Takes a request on. deadline_s: on the clock of `now_s`; None: none. Raises Overloaded, QuotaExceeded."""
        self._advance(now_s)
        state = self._state(tenant)
        self._check_in_flight(tenant, state, tokens)
        self._check_in_time(tenant, state, tokens, priority, deadline_s, now_s)
        bucket = self._filled_bucket(tenant, state, now_s)
        if bucket is not None and tenant.burst_tokens is not None and tenant.tokens_per_s is not None:
            # A request larger than the whole bucket goes when that is full, and the bucket is in debt then.
            missing = min(tokens, tenant.burst_tokens) - bucket
            if missing > 1e-6 * tenant.burst_tokens:
                # After those that were sent away before: each is told a time of its own, or all would come at once.
                due_s = max(now_s + missing / tenant.tokens_per_s, state.promised_until_s)
                state.promised_until_s = min(due_s + tokens / tenant.tokens_per_s, now_s + _LONGEST_PROMISE_S)
                raise QuotaExceeded(
                    f"tenant {tenant.name!r} has used its {tenant.tokens_per_s:g} tokens a second; "
                    f"{tokens} more have to wait",
                    retry_delay_s=max(0.05, due_s - now_s),
                    field="tokens_per_s",
                    max=tenant.tokens_per_s,
                )
        self._make_room(tenant, state, tokens, size_bytes)
        if bucket is not None:
            state.bucket_tokens = bucket - tokens
        state.weight = tenant.weight  # as the rights have it now
        entry = Entry(tenant, tokens, size_bytes, priority, deadline_s, now_s, payload)
        behind = self._virtual_time - self.bounds.burst_tokens / tenant.weight
        if not self._tokens:
            self._emptied += 1  # everybody begins anew
        if state.since != self._emptied:
            state.virtual_time, state.since = behind, self._emptied
        elif not state.queued_tokens:  # from idle: not further behind than a burst
            state.virtual_time = max(state.virtual_time, behind)
        state.add(entry)
        self._tokens += tokens
        self._bytes += size_bytes
        return entry

    def take(self, now_s: float) -> Entry | None:
        """The entry whose turn it is, now with the engine; None if nothing waits or the window is full."""
        self._advance(now_s)
        while (found := self._next()) is not None:
            state, entry = found
            if entry.deadline_s is not None and entry.deadline_s <= now_s:
                self._drop(entry, DeadlineExceeded("the deadline passed while the request waited for its turn"))
                continue
            if self._running_tokens and self._running_tokens + entry.tokens > self.bounds.window_tokens:
                return None
            self._virtual_time = max(self._virtual_time, state.virtual_time)
            state.virtual_time += entry.tokens / entry.tenant.weight
            state.unqueue(entry)
            state.running_tokens += entry.tokens
            self._running_tokens += entry.tokens
            entry.state, entry.started_s = "running", now_s
            return entry
        return None

    def leave(self, entry: Entry, now_s: float, *, scored: bool, ended: bool = True) -> None:
        """`entry` is answered or withdrawn. Twice does nothing.

        scored: the tokens are used up. ended: the engine ended it, well or not; False: the caller withdrew it.
        """
        self._advance(now_s)
        if entry.state == "done":
            return
        state = self._tenants[entry.tenant.name]
        if entry.state == "queued":
            state.unqueue(entry)
        else:
            state.running_tokens -= entry.tokens
            self._running_tokens -= entry.tokens
            if ended:
                self._busy_s = 0.0
            if scored:
                self._speed.note(entry.tokens, now_s)
            if not self._running_tokens:
                self._speed.pause(now_s)
        self._tokens -= entry.tokens
        self._bytes -= entry.size_bytes
        state.size_bytes -= entry.size_bytes
        if not scored and state.bucket_tokens is not None:
            state.bucket_tokens += entry.tokens
        entry.state = "done"

    def _advance(self, now_s: float) -> None:
        if self._running_tokens:
            self._busy_s += now_s - self._clock_s
            self._speed.busy(now_s - self._clock_s)
        self._clock_s = now_s

    def _state(self, tenant: Tenant) -> _State:
        if tenant.name not in self._tenants:
            self._tenants[tenant.name] = _State(0.0, tenant.weight)
        return self._tenants[tenant.name]

    def _next(self) -> tuple[_State, Entry] | None:
        waiting = [state for state in self._tenants.values() if state.queued_tokens]
        if not waiting:
            return None
        state = min(waiting, key=lambda state: state.virtual_time)
        entry = state.head()
        assert entry is not None
        return state, entry

    def _drop(self, entry: Entry, error: StillhouseError) -> None:
        self.leave(entry, self._clock_s, scored=False)
        self._on_dropped(entry, error)

    def _filled_bucket(self, tenant: Tenant, state: _State, now_s: float) -> float | None:
        """Tokens in the tenant's bucket by now; None without a quota."""
        if tenant.tokens_per_s is None or tenant.burst_tokens is None:
            state.bucket_tokens = None
            return None
        if state.bucket_tokens is None:
            state.bucket_tokens = float(tenant.burst_tokens)
        elapsed_s = now_s - state.bucket_s
        state.bucket_tokens = min(tenant.burst_tokens, state.bucket_tokens + tenant.tokens_per_s * elapsed_s)
        state.bucket_s = now_s
        return state.bucket_tokens

    def _check_in_flight(self, tenant: Tenant, state: _State, tokens: int) -> None:
        pending, limit = state.queued_tokens + state.running_tokens, tenant.max_tokens_in_flight
        if limit is not None and pending and pending + tokens > limit:
            raise QuotaExceeded(
                f"tenant {tenant.name!r} has {pending} tokens in flight; it may have {limit}",
                retry_delay_s=self._retry_delay_s(pending + tokens - limit),
                field="max_tokens_in_flight",
                value=pending,
                max=limit,
            )

    def _check_in_time(
        self, tenant: Tenant, state: _State, tokens: int, priority: int, deadline_s: float | None, now_s: float
    ) -> None:
        if deadline_s is None or not self.tokens_per_s:
            return
        remaining_s = deadline_s - now_s
        # The engine alone, without anybody before: the deadline is the caller's to choose, and speed an estimate.
        if (self._tokens + tokens) / self.tokens_per_s <= remaining_s or not self._tokens:
            return
        own = tokens + sum(ahead for of, ahead in state.tokens_of.items() if of >= priority)
        others = sum(
            min(other.queued_tokens, own * other.weight / tenant.weight)
            for other in self._tenants.values()
            if other is not state and other.queued_tokens
        )
        wait_s = (self._running_tokens + own + others) / self.tokens_per_s
        if wait_s > remaining_s:
            raise Overloaded(
                f"the answer would take about {wait_s:.1f} s; the deadline leaves {remaining_s:.1f} s",
                retry_delay_s=min(10.0, max(0.1, wait_s - remaining_s)) * random.uniform(0.75, 1.25),
                field="deadline",
                pending_tokens=self._tokens,
            )

    def _make_room(self, tenant: Tenant, state: _State, tokens: int, size_bytes: int) -> None:
        """Displaces work of tenants above their share until the newcomer fits. Raises Overloaded if it cannot."""
        if not self._tokens:
            return  # what is larger than the whole queue is still taken when nothing else is there
        missing_tokens = self._tokens + tokens - self.bounds.max_tokens
        missing_bytes = self._bytes + size_bytes - self.bounds.max_bytes
        if missing_tokens <= 0 and missing_bytes <= 0:
            return
        victims: list[Entry] = []
        above = _Above(
            (state.queued_tokens + tokens) / tenant.weight,
            [other for other in self._tenants.values() if other is not state and other.queued_tokens],
        )
        while missing_tokens > 0 or missing_bytes > 0:
            entry = above.next()
            if entry is None:
                raise Overloaded(
                    f"{self._tokens} tokens and {self._bytes} bytes are waiting; the queue takes "
                    f"{self.bounds.max_tokens} and {self.bounds.max_bytes}",
                    retry_delay_s=self._retry_delay_s(0.5 * self._tokens),
                    pending_tokens=self._tokens,
                    max=self.bounds.max_tokens,
                )
            victims.append(entry)
            missing_tokens -= entry.tokens
            missing_bytes -= entry.size_bytes
        for entry in victims:
            self._drop(
                entry,
                Overloaded(
                    "the queue is full, and another tenant has less than its share of it",
                    retry_delay_s=self._retry_delay_s(0.5 * self._tokens),
                    pending_tokens=self._tokens,
                    max=self.bounds.max_tokens,
                ),
            )

    def _retry_delay_s(self, tokens: float) -> float:
        """Time in which the engine does `tokens`, 0.1 .. 10 s, spread so that not all come at once."""
        estimate_s = tokens / self.tokens_per_s if self.tokens_per_s else 1.0
        return min(10.0, max(0.1, estimate_s)) * random.uniform(0.75, 1.25)


class _Above:
    """Waiting work of tenants that have more of the queue, for their weight, than `own`: most first, newest first."""

    def __init__(self, own: float, states: list[_State]) -> None:
        self._own = own
        self._lines = [(state, state.last_first()) for state in states]
        self._left = [state.queued_tokens for state in states]

    def next(self) -> Entry | None:
        """The next one to displace; None if nobody is above any more."""
        while self._lines:
            shares = [left / state.weight for left, (state, _) in zip(self._left, self._lines, strict=True)]
            index = max(range(len(shares)), key=shares.__getitem__)
            if shares[index] <= self._own:
                return None
            entry = next(self._lines[index][1], None)
            if entry is not None:
                self._left[index] -= entry.tokens
                return entry
            del self._lines[index], self._left[index]
        return None


class _Speed:
    """Tokens a second while there is work, of late. Measured from the end of one batch to the end of another: in
    between no answer comes, whatever the engine does."""

    def __init__(self) -> None:
        self.tokens_per_s = 0.0
        self._busy_s = 0.0  # since the last measurement
        self._busy_at_last_s = 0.0  # of that, up to the last answer
        self._tokens = 0
        self._last_s = float("-inf")

    def busy(self, seconds: float) -> None:
        self._busy_s += seconds

    def note(self, tokens: int, now_s: float) -> None:
        """One answer of `tokens`."""
        between_batches = now_s - self._last_s > _SAME_BATCH_S or self._busy_at_last_s >= 5 * _RATE_WINDOW_S
        if self._busy_at_last_s >= _RATE_WINDOW_S and between_batches:
            self._measure()
        self._tokens += tokens
        self._busy_at_last_s = self._busy_s
        self._last_s = now_s

    def pause(self, now_s: float) -> None:
        """The engine has nothing left to do, so nothing of a batch is still to come."""
        if self._busy_at_last_s > _SAME_BATCH_S:
            self._measure()

    def _measure(self) -> None:
        rate = self._tokens / self._busy_at_last_s
        share = min(1.0, 0.3 * self._busy_at_last_s / _RATE_WINDOW_S)  # a short measurement says little
        self.tokens_per_s += (rate - self.tokens_per_s) * (share if self.tokens_per_s else 1.0)
        self._busy_s -= self._busy_at_last_s
        self._busy_at_last_s = 0.0
        self._tokens = 0
