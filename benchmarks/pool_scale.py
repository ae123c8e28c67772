"""What the simulation says: beside the real runs, then for pools that no one machine can hold, and where they break.

Pools of the extrapolation: servers of 20,000 tokens a second with the queue's defaults; clients that send bursts of
sequences of 1,000 to 3,000 tokens, as trainers do, from 50 tenants of equal weight; 80% of the servers' speed unless
said otherwise. A cell simulates a number of sequences and not a number of seconds, so large pools are seen for a short
time.
"""

import gc
import itertools
import math
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from benchmarks import pool_real
from benchmarks.pool_simulation import Costs, Simulation
from benchmarks.pool_workload import Server, Work
from stillhouse.balancing import POLICIES, Load
from teacher_server.access import Tenant
from teacher_server.fair_queue import Bounds, FairQueue

Row = dict[str, Any]
Say = Callable[[str], None]
TENANTS = {f"team-{index:02d}": Tenant(f"team-{index:02d}", ("*",)) for index in range(50)}
LOCAL = {
    "quiet": Tenant("quiet", ("*",)),
    "flood": Tenant("flood", ("*",)),
    "limited": Tenant(
        "limited", ("*",), tokens_per_s=pool_real.QUOTA_TOKENS_PER_S, burst_tokens=pool_real.BATCH_TOKENS
    ),
}
COMPARED = ("tokens_per_s", "p50_ms", "p99_ms")


@dataclass(frozen=True)
class Local:
    """A real run again, simulated."""

    table: str
    name: str
    specs: tuple[Server, ...]
    works: tuple[Work, ...]
    warm_s: float
    duration_s: float
    measured: Row

    def run(self, costs: Costs) -> Row:
        """One row: measured, simulated, relative errors."""
        simulation = Simulation(
            self.specs,
            self.works,
            costs=costs,
            warm_s=self.warm_s,
            tenants=LOCAL,
            one_process=True,
        )
        found = simulation.run(self.duration_s)[0].summary()
        row: Row = {"table": self.table, "name": self.name}
        for figure in COMPARED:
            if figure == "tokens_per_s" and self.works[0].burst and self.works[0].clients == 1:
                row |= {figure: math.nan, f"simulated_{figure}": math.nan, f"error_{figure}": math.nan}
                continue  # of a few bursts, one more or less is in the time measured
            row[figure] = self.measured[figure]
            row[f"simulated_{figure}"] = found[figure]
            row[f"error_{figure}"] = _over(found[figure], self.measured[figure]) - 1
        return row


def _over(one: float, other: float) -> float:
    return one / other if other else math.nan


def locals_of(real: Row) -> list[Local]:
    """The real runs that are simulated too, of the tables that there are."""
    found: list[Local] = []
    for row in real.get("scaling", ()):
        work = Work(clients=row["clients"], in_flight=4)
        pending_s = row["clients"] * 4 * work.tokens / row["bound_tokens_per_s"]
        name = f"{row['servers']} servers, {row['clients']} clients"
        found.append(Local("scaling", name, (Server(),) * row["servers"], (work,), 0.5 + pending_s, 20.0, row))
    for row in real.get("fairness", ()):
        spec, quiet, flood = pool_real.fairness_works(row)
        name = f"burst {row['burst']}, window {row['window_batches']:g}"
        found.append(Local("fairness", f"{name}, alone", (spec,), (quiet,), 0.5, 60.0, row["alone"]))
        name += f", {row['flood']}" + (", burst-tokens 0" if not row["burst_tokens"] else "")
        found.append(Local("fairness", name, (spec,), (quiet, flood), 2.0, 60.0, row["flooded"]))
    for row in real.get("slow_server", ()):
        if row["balancing"] in POLICIES:
            work = Work(clients=row["clients"], in_flight=row["in_flight"], balancing=row["balancing"])
            name = f"{row['clients']} clients, {row['balancing']}"
            found.append(Local("slow server", name, pool_real.SLOW, (work,), 5.0, 30.0, row))
    for row in real.get("sharing", ()):
        if row["balancing"] in POLICIES:
            work = replace(pool_real.SHARING, balancing=row["balancing"])
            found.append(Local("sharing", row["balancing"], pool_real.SHARED, (work,), 6.0, 40.0, row))
    for row in real.get("hedging", ()):
        work = replace(pool_real.HEDGED, hedge_share=row["hedge_share"])
        name = f"share {row['hedge_share']:g}"
        found.append(Local("hedging", name, (pool_real.PAUSING,) * 3, (work,), 2.0, 120.0, row))
    return found


@dataclass(frozen=True)
class Cell:
    """One pool of the extrapolation. sequences: that are simulated, after a warm-up of a third of them."""

    table: str
    name: str
    servers: int
    clients: int
    balancing: str = "least_expected_wait"
    load: float = 0.8
    sequences: int = 30_000
    slow_share: float = 0.0
    killed_share: float = 0.0
    down_s: float = 10.0
    report_every_s: float = 0.0
    max_servers: int = 32
    deadline_s: float = 30.0
    in_flight: int = 64
    open_loop: bool = False
    tokens: int = 2000
    hedge_share: float = 0.0

    def run(self, costs: Costs) -> Row:
        """One row."""
        started_s = time.monotonic()
        spec = Server()
        slow = round(self.slow_share * self.servers)
        specs = [replace(spec, slow_factor=5.0)] * slow + [spec] * (self.servers - slow)
        rate = self.load * self.servers * spec.tokens_per_s / self.tokens
        # Of 8 sequences at least, and so that a step takes 4 s at least.
        burst = max(8, round(4.0 * rate / self.clients))
        work = Work(
            clients=self.clients,
            in_flight=self.in_flight,
            tokens=self.tokens,
            spread=0.5,
            burst=burst,
            period_s=burst * self.clients / rate,
            open_loop=self.open_loop,
            balancing=self.balancing,
            hedge_share=self.hedge_share,
            pinned=bool(self.hedge_share),
            deadline_s=self.deadline_s,
        )
        duration_s = self.sequences / rate
        simulation = Simulation(
            specs,
            [work],
            costs=costs,
            warm_s=duration_s / 3,
            tenants=TENANTS,
            tenant_names=tuple(TENANTS),
            max_servers=self.max_servers,
            report_every_s=self.report_every_s,
        )
        watched = _Watched(simulation, slow)
        if self.killed_share:
            watched.kill(max(1, round(self.killed_share * self.servers)), self.down_s)
        outcome = simulation.run(duration_s)[0]
        found = outcome.summary()
        attempts = outcome.calls + sum(outcome.retries.values()) + outcome.hedges
        ended = len(outcome.latencies_s) + sum(outcome.failures.values())
        return {
            "table": self.table,
            "name": self.name,
            "servers": self.servers,
            "clients": self.clients,
            "balancing": self.balancing,
            "load": self.load,
            "burst": burst,
            "simulated_s": duration_s,
            "share_of_capacity": found["tokens_per_s"] / sum(s.tokens_per_s / s.slow_factor for s in specs),
            "p50_ms": found["p50_ms"],
            "p99_ms": found["p99_ms"],
            "p999_ms": found["p999_ms"],
            "wait_p99_ms": found["wait_p99_ms"],
            "failed_share": sum(outcome.failures.values()) / max(1, ended),
            "failures": outcome.failures,
            "attempts_a_call": attempts / max(1, outcome.calls),
            "refusals": sum(server.refusals for server in simulation.servers),
            "displaced": sum(server.displaced for server in simulation.servers),
            "attempts_per_s_and_server": attempts / (duration_s * 4 / 3) / self.servers,
            **watched.found(),
            "connections_a_server": self.clients * min(self.servers, self.max_servers) / self.servers,
            "took_s": time.monotonic() - started_s,
        }


class _Watched:
    """Looks at the servers every 0.2 s: who has how much, and who comes back from a failure."""

    def __init__(self, simulation: Simulation, slow: int) -> None:
        self._simulation = simulation
        self._slow = slow
        self._spread: list[float] = []
        self._revived_peak = 0.0
        self._usual: list[float] = []
        self._killed = 0
        simulation.loop.at(simulation.warm_s, self._look)

    def kill(self, count: int, down_s: float) -> None:
        """The last `count` servers fail when the counting begins, and are back after `down_s`."""
        self._killed = count
        for server in self._simulation.servers[-count:]:
            self._simulation.loop.at(self._simulation.warm_s, server.kill)
            self._simulation.loop.at(self._simulation.warm_s + down_s, server.revive)

    def found(self) -> Row:
        """busiest_to_mean: tokens of the busiest server over the mean's, on average. unused: servers without work in
        the whole run."""
        row: Row = {
            "busiest_to_mean": sum(self._spread) / max(1, len(self._spread)),
            "unused_share": sum(not server.busy_s for server in self._simulation.servers)
            / len(self._simulation.servers),
        }
        if self._killed:
            usual = sum(self._usual) / max(1, len(self._usual))
            row["revived_peak_to_mean"] = self._revived_peak / usual if usual else float("nan")
        return row

    def _look(self) -> None:
        servers = self._simulation.servers
        usual = servers[self._slow : len(servers) - self._killed]
        tokens = [server.assigned_tokens for server in usual]
        mean = sum(tokens) / max(1, len(tokens))
        if mean:
            self._spread.append(max(tokens) / mean)
        self._usual.append(mean)
        for server in servers[len(servers) - self._killed :]:
            if server.alive:
                self._revived_peak = max(self._revived_peak, server.assigned_tokens)
        self._simulation.loop.after(0.2, self._look)


OURS = ("least_expected_wait", "least_outstanding_tokens", "round_robin")
SIZES = (
    # servers, clients, sequences: three steps of each client, or 20,000
    (10, 100, 20_000),
    (100, 1000, 24_000),
    (1000, 100, 64_000),
    (1000, 1000, 96_000),
    (10, 10_000, 160_000),
    (1000, 10_000, 200_000),
)


def cells(quick: bool) -> list[Cell]:
    """The extrapolation."""
    found: list[Cell] = []
    for servers, clients, sequences in SIZES:
        large = sequences > 50_000
        policies = ("least_expected_wait", "least_outstanding_tokens") if large else OURS
        for policy in (*policies, "informed"):
            found.append(Cell("size", "", servers, clients, policy, sequences=sequences))
    for every_s in (0.1, 1.0, 10.0):
        found.append(Cell("information", f"reported, {every_s:g} s old", 100, 1000, "reported", report_every_s=every_s))
    for name, policy in (
        ("own calls", "least_expected_wait"),
        ("own calls, speeds not used", "least_outstanding_tokens"),
        ("all servers, now", "informed"),
    ):
        found.append(Cell("information", name, 100, 1000, policy))
    for clients, sequences in ((100, 40_000), (1000, 60_000)):
        for policy in (*OURS, "informed"):
            found.append(Cell("one slow", "", 100, clients, policy, slow_share=0.01, sequences=sequences))
    found.append(Cell("one slow", "hedging 5%", 100, 1000, slow_share=0.01, sequences=60_000, hedge_share=0.05))
    for servers, clients, sequences in ((100, 1000, 40_000), (1000, 10_000, 160_000)):
        found.append(Cell("failures", "", servers, clients, killed_share=0.01, sequences=sequences))
    for load, in_flight, deadline_s in ((0.95, 64, 30.0), (1.2, 64, 30.0), (1.2, 64, 120.0), (1.2, 256, 120.0)):
        name = f"{in_flight} in flight, deadline {deadline_s:g} s"
        cell = Cell("overload", name, 10, 100, load=load, in_flight=in_flight, deadline_s=deadline_s)
        found += [replace(cell, open_loop=True, sequences=60_000, balancing=policy) for policy in OURS[:2]]
    for most in (2, 8, 16, 32, 100):
        for policy in OURS[:2]:
            found.append(Cell("max_servers", f"{most}", 100, 100, policy, max_servers=most, sequences=15_000))
    # The longest first, so that no process is left alone with one in the end.
    if quick:
        found = [replace(cell, sequences=cell.sequences // 5) for cell in found if cell.sequences < 50_000]
    return sorted(found, key=lambda cell: -cell.sequences)


@dataclass(frozen=True)
class FairCell:
    """The fairness of one server at a burst and a window, longer than real time allows."""

    burst: int
    window_batches: float
    duration_s: float

    def run(self, costs: Costs) -> Row:
        """One row: the quiet tenant beside the flooder over the quiet tenant alone."""
        cell = {
            "window_batches": self.window_batches,
            "burst": self.burst,
            "burst_tokens": 2**17,
            "flood": "fair queueing",
        }
        spec, quiet, flood = pool_real.fairness_works(cell)
        found = []
        for works in ((quiet,), (quiet, flood)):
            simulation = Simulation(
                [spec], works, costs=costs, warm_s=20.0 if len(works) > 1 else 0.5, tenants=LOCAL, one_process=True
            )
            found.append([outcome.summary() for outcome in simulation.run(self.duration_s)])
        alone, flooded = found[0][0], found[1][0]
        return {
            "table": "fairness",
            "burst": self.burst,
            "window_batches": self.window_batches,
            "alone_p99_ms": alone["p99_ms"],
            "flooded_p99_ms": flooded["p99_ms"],
            "p99_ratio": _over(flooded["p99_ms"], alone["p99_ms"]),
            "burst_p50_ratio": _over(flooded["burst_p50_ms"], alone["burst_p50_ms"]),
            "tokens_per_s": flooded["tokens_per_s"] + found[1][1]["tokens_per_s"],
        }


def run_all(jobs: Sequence[Local | Cell | FairCell], costs: Costs, say: Say) -> list[Row]:
    """Two at a time; rows in the order of the jobs."""
    say(f"simulation: {len(jobs)} cells")
    with ProcessPoolExecutor(2) as pool:
        return list(pool.map(_run, jobs, [costs] * len(jobs)))


def _run(job: Local | Cell | FairCell, costs: Costs) -> Row:
    gc.disable()  # nothing here makes cycles, and looking for them takes longer the more clients there are
    return job.run(costs)


def queue_costs(quick: bool, say: Say) -> list[Row]:
    """CPU of the fair queue for one request, in µs, with so many tenants and entries waiting."""
    rows = []
    for tenants in (1, 50, 1000):
        for waiting in (10, 1000, 10_000 if quick else 100_000):
            say(f"fair queue: {tenants} tenants, {waiting} waiting")
            rows.append({"tenants": tenants, "waiting": waiting} | _queue_cost(tenants, waiting))
    return rows


def _queue_cost(tenants: int, waiting: int, times: int = 500) -> Row:
    names = [Tenant(f"t{index}", ("*",)) for index in range(tenants)]
    now_s = 0.0
    dropped: list[Any] = []

    def filled(max_tokens: int) -> FairQueue:
        queue = FairQueue(Bounds(max_tokens, 2**62, 2**14, 2**17), lambda entry, error: dropped.append(entry))
        for index in range(waiting):
            queue.admit(names[index % tenants], tokens=500, size_bytes=1, now_s=0.0)
        return queue

    def us(do: Callable[[], None]) -> float:
        started_s = time.process_time()
        for _ in range(times):
            do()
        return 1e6 * (time.process_time() - started_s) / times

    queue = filled(2**60)

    def admit() -> None:
        queue.admit(random.choice(names), tokens=500, size_bytes=1, now_s=now_s, deadline_s=1e9)

    def turn() -> None:
        nonlocal now_s
        entry = queue.take(now_s)
        assert entry is not None
        now_s += 0.025
        queue.leave(entry, now_s, scored=True)

    row: Row = {"admit_us": us(admit), "take_and_leave_us": us(turn)}
    # Newcomers displace the work of the others, one for one, as long as these have more than they.
    queue = filled(500 * waiting)
    times = min(times, waiting // 2)
    newcomers = [Tenant(f"n{index}", ("*",)) for index in range(max(10, math.ceil(2 * tenants * times / waiting)))]
    turns = itertools.cycle(newcomers)

    def displace() -> None:
        queue.admit(next(turns), tokens=500, size_bytes=1, now_s=now_s, deadline_s=1e9)

    row["displace_us"] = us(displace) if waiting // tenants > 2 * times // len(newcomers) else None
    row["displaced"] = len(dropped)
    return row


def policy_costs() -> list[Row]:
    """CPU of choosing one of so many servers, in µs."""
    rows = []
    for count in (3, 32, 100):
        loads = [Load() for _ in range(count)]
        for index, load in enumerate(loads):
            load.start(500, 0.0)
            load.start(500, 0.0)
            load.end(500, 0.1 + index / count, answered=True)
        for name, policy in POLICIES.items():

            def choose(policy: Any = policy, loads: Sequence[Load] = loads) -> None:
                policy(loads, 500, 2.0)

            rows.append({"servers": count, "policy": name, "us": 1e6 * pool_real.best_s(choose, rounds=3, times=500)})
    return rows
