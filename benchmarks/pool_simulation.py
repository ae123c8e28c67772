"""A discrete-event simulation of clients and servers. No clock but its own, so an hour takes as long as its events.

What decides is the real code: `FairQueue` admits, orders, displaces and refuses, `stillhouse.balancing` chooses the
server from what the client knows, `Hedging` when to send twice, `Backoff` how long to wait. Modelled are the engine
(`benchmarks.synthetic_server`'s: whatever waits, up to a batch, after overhead + tokens / speed), the network (a
constant delay each way), the CPU of a call on the server's event loop (one after the other), and the client's attempts
(`stillhouse.attempts` and `Pool.pick`, restated here: who rests, who is busy, who was asked; deadlines; at once to
another server after a refusal, else after its delay and a backoff).

Not modelled: bandwidth, connecting, name look-ups, TLS, memory, CPUs that are shared between processes.
"""

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.pool_workload import Outcome, Server, Work
from stillhouse.balancing import POLICIES, Load
from stillhouse.errors import DeadlineExceeded, Overloaded, QuotaExceeded, StillhouseError, Unavailable
from stillhouse.hedging import Hedging
from stillhouse.pool import Backoff
from teacher_server.access import ANONYMOUS, Tenant
from teacher_server.fair_queue import Bounds, Entry, FairQueue

SPARE_SERVERS = 8
"""Of the servers that a client does not use, how many it knows: to stand in for those that rest."""


@dataclass(frozen=True)
class Costs:
    """What the network and the event loops take, measured on real processes. Seconds."""

    delay_s: float = 0.0005
    """One way."""
    server_cpu_s: float = 0.001
    """Of one call, half before the queue and half after the engine."""
    client_cpu_s: float = 0.0
    """Of one call, half before it is sent and half when it is answered. One after the other in each process."""


class Cpu:
    """One event loop's time: work is done in the order in which it came."""

    def __init__(self) -> None:
        self._free_s = 0.0

    def done_s(self, now_s: float, work_s: float) -> float:
        """When work that comes now is done."""
        self._free_s = max(self._free_s, now_s) + work_s
        return self._free_s


class Loop:
    """Events in the order of their times."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._numbers = itertools.count()
        self.count = 0

    def at(self, time_s: float, do: Callable[..., None], *arguments: Any) -> None:
        """Does it then."""
        heapq.heappush(self._events, (time_s, next(self._numbers), do, arguments))

    def after(self, delay_s: float, do: Callable[..., None], *arguments: Any) -> None:
        """Does it so much later."""
        self.at(self.now_s + delay_s, do, *arguments)

    def run(self, until_s: float) -> None:
        """Up to that time."""
        while self._events and self._events[0][0] <= until_s:
            self.now_s, _, do, arguments = heapq.heappop(self._events)
            self.count += 1
            do(*arguments)
        self.now_s = until_s


@dataclass(eq=False, slots=True)
class Copy:
    """One attempt of a call, on its way, in a server or on its way back."""

    call: "Call"
    link: "Link"
    sent_s: float
    entry: Entry | None = None
    waited_s: float = 0.0
    over: bool = False


@dataclass(eq=False, slots=True)
class Call:
    """One sequence to score."""

    client: "SimClient"
    created_s: float
    tokens: int
    end_s: float = math.inf
    asked: list["Link"] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    waits: int = 0
    waited_s: float = 0.0
    over: bool = False


@dataclass(eq=False, slots=True)
class Link:
    """What one client knows of one server (as `stillhouse.pool.Server`)."""

    server: "SimServer"
    load: Load = field(default_factory=Load)
    failures: int = 0
    resting_until_s: float = 0.0
    busy_until_s: float = 0.0


class SimServer:
    """One server: event loop, queue, engine."""

    def __init__(self, loop: Loop, spec: Server, costs: Costs) -> None:
        self._loop = loop
        self.spec = spec
        self._costs = costs
        self.alive = True
        self.refusals = 0
        self.displaced = 0
        self.assigned_tokens = 0  # on their way to here or pending here
        self.reported_tokens = 0  # what `assigned_tokens` was when last reported
        self.busy_s = 0.0
        self._cpu = Cpu()
        self._start()

    def _start(self) -> None:
        spec = self.spec
        self._queue = FairQueue(
            Bounds(
                max_tokens=spec.max_queue_tokens,
                max_bytes=spec.max_queue_bytes,
                window_tokens=int(spec.window_batches * spec.max_batch_tokens),
                burst_tokens=spec.burst_tokens,
            ),
            self._dropped,
        )
        self._engine: deque[Copy] = deque()
        self._inside: set[Copy] = set()
        self._running = False
        self._life = object()

    def arrive(self, copy: Copy) -> None:
        """A request came in from the network."""
        if not self.alive:
            self._answer(copy, Unavailable("refused"))
            return
        self._loop.at(self._half_s(), self._admit, copy)

    def withdraw(self, copy: Copy) -> None:
        """The caller has gone."""
        if copy.entry is not None and copy.entry.state != "done":
            with_engine = copy.entry.state == "running"
            self._queue.leave(copy.entry, self._loop.now_s, scored=False, ended=False)
            self._inside.discard(copy)
            if with_engine and copy in self._engine:
                self._engine.remove(copy)
            self._pump()

    def kill(self) -> None:
        """Fails everything inside, and whatever comes."""
        self.alive = False
        inside, self._inside = self._inside, set()
        for copy in inside:
            self._answer(copy, Unavailable("reset"))
        self._start()

    def revive(self) -> None:
        """A new process, empty."""
        self.alive = True

    def _half_s(self) -> float:
        """When the event loop has done half of a call's work."""
        return self._cpu.done_s(self._loop.now_s, self._costs.server_cpu_s / 2)

    def _admit(self, copy: Copy) -> None:
        call, now_s = copy.call, self._loop.now_s
        client = call.client
        if copy.over or not self.alive:
            if not copy.over:
                self._answer(copy, Unavailable("reset"))
            return
        try:
            copy.entry = self._queue.admit(
                client.tenant,
                tokens=call.tokens,
                size_bytes=client.token_bytes * call.tokens,
                now_s=now_s,
                deadline_s=call.end_s,
                payload=copy,
            )
        except StillhouseError as error:
            self.refusals += 1
            self._answer(copy, error)
            return
        self._inside.add(copy)
        self._pump()

    def _dropped(self, entry: Entry, error: StillhouseError) -> None:
        self._inside.discard(entry.payload)
        self.displaced += isinstance(error, Overloaded)
        self._answer(entry.payload, error)

    def _pump(self) -> None:
        idle = not self._running and not self._engine
        while (entry := self._queue.take(self._loop.now_s)) is not None:
            self._engine.append(entry.payload)
        if idle and self._engine:
            # The engine starts once all that are ready at this moment are there.
            self._loop.after(0.0, self._batch, self._life)

    def _batch(self, life: object) -> None:
        if life is not self._life or self._running or not self._engine:
            return
        spec, batch, tokens = self.spec, [], 0
        while self._engine:
            size = self._engine[0].call.tokens
            if batch and tokens + size > spec.max_batch_tokens:
                break
            batch.append(self._engine.popleft())
            tokens += size
        for copy in batch:
            assert copy.entry is not None
            copy.waited_s = self._loop.now_s - copy.entry.arrived_s
        duration_s = (spec.overhead_ms / 1e3 + tokens / spec.tokens_per_s) * spec.slow_factor
        if spec.pause_share and random.random() < spec.pause_share:
            duration_s += spec.pause_ms / 1e3
        self._running = True
        self.busy_s += duration_s
        self._loop.after(duration_s, self._ended, batch, life)

    def _ended(self, batch: list[Copy], life: object) -> None:
        if life is not self._life:
            return
        self._running = False
        self._batch(life)  # from what is in the window already, as the engine does
        for copy in batch:
            if copy.entry is not None and copy.entry.state != "done":
                self._queue.leave(copy.entry, self._loop.now_s, scored=True)
                self._inside.discard(copy)
                self._loop.at(self._half_s(), self._answer, copy, None)
        self._pump()
        if not self._running and self._engine:
            self._loop.after(0.0, self._batch, life)

    def _answer(self, copy: Copy, error: StillhouseError | None) -> None:
        self._loop.after(self._costs.delay_s, copy.call.client.arrived, copy, error)


class SimClient:
    """One client: its attempts, and what it knows of its servers."""

    def __init__(
        self,
        loop: Loop,
        servers: Sequence[SimServer],
        work: Work,
        tenant: Tenant,
        costs: Costs,
        cpu: Cpu,
        outcome: Outcome,
        *,
        max_servers: int = 32,
        counted_from_s: float = 0.0,
    ) -> None:
        self._loop = loop
        self.work = work
        self.tenant = tenant
        self.token_bytes = 4 + 6 * work.top_k + 20
        self._costs = costs
        self._cpu = cpu
        self._outcome = outcome
        self._counted_from_s = counted_from_s
        # As the rendezvous hashing of the real client: an order of its own, the same chance for each server.
        known = random.sample(range(len(servers)), min(len(servers), max_servers + SPARE_SERVERS))
        self._links = [Link(servers[index]) for index in known]
        self._max_servers = max_servers
        self._loads = [link.load for link in self._links[:max_servers]]
        self._policy = POLICIES.get(work.balancing)
        self._trouble_until_s = 0.0
        self._backoff = Backoff()
        self._hedging = Hedging(work.hedge_share)
        self._in_flight = 0
        self._queue: deque[Call] = deque()
        self._burst_left = 0
        self._burst_started_s = 0.0

    def start(self) -> None:
        """Begins its work."""
        if self.work.burst:
            self._loop.after(random.uniform(0, self.work.period_s), self._burst)
        else:
            for _ in range(self.work.in_flight):
                self._submit()

    def _burst(self) -> None:
        work, now_s = self.work, self._loop.now_s
        self._burst_started_s = now_s
        self._burst_left = work.burst
        for _ in range(work.burst):
            self._submit()
        if work.open_loop:
            self._loop.at(now_s + work.period_s * random.uniform(0.8, 1.2), self._burst)

    def _submit(self) -> None:
        self._queue.append(Call(self, self._loop.now_s, self.work.length()))
        self._next()

    def _next(self) -> None:
        while self._queue and self._in_flight < self.work.in_flight:
            self._in_flight += 1
            call = self._queue.popleft()
            call.end_s = self._loop.now_s + self.work.deadline_s
            if self.work.pinned:
                self._hedging.called()
            self._loop.at(call.end_s, self._expire, call)
            self._attempt(call, None)

    def done(self, call: Call, error: StillhouseError | None) -> None:
        """A call is over."""
        now_s, work, outcome = self._loop.now_s, self.work, self._outcome
        call.over = True
        for copy in call.copies:
            self._withdraw(copy)
        self._in_flight -= 1
        outcome.calls += 1
        if error is not None:
            if now_s >= self._counted_from_s:
                outcome.failures[error.reason] = outcome.failures.get(error.reason, 0) + 1
        elif (call.created_s if work.burst else now_s) >= self._counted_from_s:
            outcome.tokens += call.tokens
            outcome.latencies_s.append(now_s - call.created_s)
            outcome.waits_s.append(call.waited_s)
        self._next()
        if not work.burst:
            self._submit()
            return
        self._burst_left -= 1
        if not self._burst_left and not work.open_loop:
            wanted_s = self._burst_started_s + work.period_s * random.uniform(0.8, 1.2) + work.rest_s
            next_s = max(now_s + work.rest_s, wanted_s)
            if self._burst_started_s >= self._counted_from_s:
                outcome.bursts_s.append(now_s - self._burst_started_s)
                outcome.late_s.append(next_s - wanted_s)
            self._loop.at(next_s, self._burst)

    def arrived(self, copy: Copy, error: StillhouseError | None) -> None:
        """An answer came in from the network."""
        if self._costs.client_cpu_s:
            self._loop.at(self._half_s(), self._received, copy, error)
        else:
            self._received(copy, error)

    def _half_s(self) -> float:
        return self._cpu.done_s(self._loop.now_s, self._costs.client_cpu_s / 2)

    def _received(self, copy: Copy, error: StillhouseError | None) -> None:
        if copy.over:
            return
        call, link, now_s = copy.call, copy.link, self._loop.now_s
        copy.over = True
        call.copies.remove(copy)
        link.load.end(copy.call.tokens, now_s, answered=error is None)
        link.server.assigned_tokens -= copy.call.tokens
        if error is None:
            link.failures, link.resting_until_s = 0, 0.0
            if self.work.pinned:
                self._hedging.answered(now_s - copy.sent_s)
            call.waited_s = copy.waited_s
            self.done(call, None)
            return
        if isinstance(error, Unavailable):
            self._gone(link)
        elif isinstance(error, (Overloaded, QuotaExceeded)):
            link.busy_until_s = now_s + (error.retry_delay_s or 0.0)
        self._trouble_until_s = max(self._trouble_until_s, link.busy_until_s, link.resting_until_s)
        if not call.copies:  # else the other copy may still be answered
            self._again(call, link, error)

    def _again(self, call: Call, link: Link, error: StillhouseError) -> None:
        if not error.retryable:
            self.done(call, error)
            return
        now_s = self._loop.now_s
        retries = self._outcome.retries
        if isinstance(error, (Overloaded, QuotaExceeded)):
            other = self._pick(call, free_only=True)
            if other is not None:
                retries[error.reason] = retries.get(error.reason, 0) + 1
                self._attempt(call, other)
                return
        delays = [link.busy_until_s - now_s for link in call.asked if link.busy_until_s > now_s]
        asked_s = min(delays) if delays and error.retry_delay_s else 0.0
        call.waits += 1
        delay_s = asked_s + self._backoff.delay_s(call.waits - 1)
        if now_s + delay_s >= call.end_s:
            self.done(call, error)
            return
        retries[error.reason] = retries.get(error.reason, 0) + 1
        self._loop.after(delay_s, self._attempt, call, None)

    def _attempt(self, call: Call, link: Link | None) -> None:
        if call.over:
            return
        link = link or self._pick(call, free_only=False)
        assert link is not None
        self._send(call, link)
        after_s = self._hedging.after_s if self.work.pinned else None
        if after_s is not None:
            self._loop.after(after_s, self._second, call, call.copies[-1])

    def _second(self, call: Call, first: Copy) -> None:
        if call.over or first.over:
            return
        link = self._pick(call, free_only=True)
        if link is not None and self._hedging.take():
            self._outcome.hedges += 1
            self._send(call, link)

    def _send(self, call: Call, link: Link) -> None:
        call.asked.append(link)
        link.load.start(call.tokens, self._loop.now_s)
        link.server.assigned_tokens += call.tokens
        copy = Copy(call, link, self._loop.now_s)
        call.copies.append(copy)
        self._loop.at(self._half_s() + self._costs.delay_s, link.server.arrive, copy)

    def _withdraw(self, copy: Copy) -> None:
        if not copy.over:
            copy.over = True
            copy.link.load.end(copy.call.tokens, self._loop.now_s, answered=False)
            copy.link.server.assigned_tokens -= copy.call.tokens
            self._loop.after(self._costs.delay_s, copy.link.server.withdraw, copy)

    def _expire(self, call: Call) -> None:
        if not call.over:
            self.done(call, DeadlineExceeded("deadline"))

    def _gone(self, link: Link) -> None:
        now_s = self._loop.now_s
        if link.resting_until_s <= now_s:
            link.failures += 1
            link.resting_until_s = now_s + min(10.0, 0.25 * 2.0 ** min(link.failures, 10))
        link.load.forget()

    def _pick(self, call: Call, *, free_only: bool) -> Link | None:
        """The server for this attempt, as `Pool.pick` chooses; None if all that are left speak against it."""
        now_s = self._loop.now_s
        if not call.asked and self._trouble_until_s <= now_s:
            return self._links[self._choose(call, self._loads, self._links)]
        awake = [link for link in self._links if link.resting_until_s <= now_s][: self._max_servers]
        candidates = [*awake, *(link for link in self._links[: self._max_servers] if link.resting_until_s > now_s)]
        standings = {
            link: (link.resting_until_s > now_s, link in call.asked, link.busy_until_s > now_s) for link in candidates
        }
        best = min(standings.values())
        if free_only and any(best):
            return None
        equals = [link for link in candidates if standings[link] == best]
        if best[0]:
            return min(equals, key=lambda link: link.resting_until_s)
        return equals[self._choose(call, [link.load for link in equals], equals)]

    def _choose(self, call: Call, loads: Sequence[Load], links: Sequence[Link]) -> int:
        if self._policy is not None:
            return self._policy(loads, call.tokens, self._loop.now_s)
        # Baselines that know what no client knows: every server's work, now or as last reported.
        now = self.work.balancing == "informed"
        return min(
            range(len(loads)),
            key=lambda i: (
                (links[i].server.assigned_tokens if now else links[i].server.reported_tokens)
                * links[i].server.spec.slow_factor,
                loads[i].turn,
            ),
        )


class Simulation:
    """Servers, groups of clients, a run.

    tenants: by name; a group's clients belong to its tenant, or take turns among `tenant_names`. report_every_s: how
    old at most what servers report is, for the balancing "reported". one_process: the clients of a group share a CPU,
    as in the real runs; else each has one.
    """

    def __init__(
        self,
        specs: Sequence[Server],
        works: Sequence[Work],
        *,
        costs: Costs,
        warm_s: float,
        tenants: dict[str, Tenant] | None = None,
        tenant_names: Sequence[str] = (),
        max_servers: int = 32,
        report_every_s: float = 0.0,
        one_process: bool = False,
        seed: int = 0,
    ) -> None:
        random.seed(seed)
        self.loop = Loop()
        self.warm_s = warm_s
        self.servers = [SimServer(self.loop, spec, costs) for spec in specs]
        self.outcomes = [Outcome() for _ in works]
        self._report_every_s = report_every_s
        by_name = tenants or {}
        cpus = [Cpu() for _ in works]
        self.clients = [
            SimClient(
                self.loop,
                self.servers,
                work,
                by_name.get(tenant_names[index % len(tenant_names)] if tenant_names else work.tenant, ANONYMOUS),
                costs,
                cpu if one_process else Cpu(),
                outcome,
                max_servers=max_servers,
                counted_from_s=warm_s,
            )
            for work, outcome, cpu in zip(works, self.outcomes, cpus, strict=True)
            for index in range(work.clients)
        ]

    def run(self, duration_s: float) -> list[Outcome]:
        """Warms up, then counts for `duration_s`; an outcome a group."""
        for client in self.clients:
            client.start()
        if self._report_every_s:
            self._report()
        self.loop.run(self.warm_s + duration_s)
        for outcome in self.outcomes:
            outcome.duration_s = duration_s
        return self.outcomes

    def _report(self) -> None:
        for server in self.servers:
            server.reported_tokens = server.assigned_tokens
        self.loop.after(self._report_every_s, self._report)
