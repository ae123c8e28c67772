"""What a server costs, what clients ask, what came out: the words that real runs and the simulation share."""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Server:
    """A synthetic server's cost model and queue: the options of `benchmarks.synthetic_server`."""

    tokens_per_s: float = 20_000.0
    overhead_ms: float = 2.0
    slow_factor: float = 1.0
    pause_share: float = 0.0
    pause_ms: float = 0.0
    max_batch_tokens: int = 8192
    window_batches: float = 2.0
    burst_tokens: int = 2**17
    max_queue_tokens: int = 2**20
    max_queue_bytes: int = 2**31

    def arguments(self) -> list[str]:
        """Of the program."""
        return [part for name, value in asdict(self).items() for part in (f"--{name.replace('_', '-')}", str(value))]


@dataclass(frozen=True)
class Work:
    """What a group of equal clients asks.

    burst 0: each keeps `in_flight` calls open, all the time. Else each has `burst` sequences at once, of which it has
    `in_flight` on the wire, waits for all, and has the next `period_s` after the last (give or take 20%), or as soon as
    it has the answers. rest_s: and not before so long after these. open_loop: it does not wait for the answers (in the
    simulation only).
    A sequence has `tokens` on average, each between 1 - spread and 1 + spread times that.
    """

    clients: int = 1
    in_flight: int = 64
    tokens: int = 500
    spread: float = 0.0
    top_k: int = 8
    burst: int = 0
    period_s: float = 0.0
    rest_s: float = 0.0
    open_loop: bool = False
    tenant: str = ""
    balancing: str = "least_expected_wait"
    hedge_share: float = 0.0
    pinned: bool = False
    deadline_s: float = 120.0

    def length(self) -> int:
        """Tokens of one sequence."""
        return round(self.tokens * random.uniform(1 - self.spread, 1 + self.spread)) if self.spread else self.tokens


@dataclass
class Outcome:
    """The answers that came in the `duration_s` that were measured, and what else happened in it.

    latencies_s: from the call to its answer. waits_s: in the server's queue and in its engine's, as it reports them.
    bursts_s: of whole bursts. late_s: how long after the period (and the rest) each burst's successor came. attempts:
    calls sent to servers, of `answered + failed` calls, in the whole run.
    """

    duration_s: float = 0.0
    tokens: int = 0
    latencies_s: list[float] = field(default_factory=list)
    waits_s: list[float] = field(default_factory=list)
    bursts_s: list[float] = field(default_factory=list)
    late_s: list[float] = field(default_factory=list)
    failures: dict[str, int] = field(default_factory=dict)
    retries: dict[str, int] = field(default_factory=dict)
    hedges: int = 0
    calls: int = 0
    cpu_s: float = 0.0
    """Of the client processes in the time measured."""

    def add(self, other: "Outcome") -> None:
        """Puts another process's outcome, of the same time, to this one."""
        self.duration_s = other.duration_s
        self.tokens += other.tokens
        self.latencies_s += other.latencies_s
        self.waits_s += other.waits_s
        self.bursts_s += other.bursts_s
        self.late_s += other.late_s
        for mine, others in ((self.failures, other.failures), (self.retries, other.retries)):
            for reason, count in others.items():
                mine[reason] = mine.get(reason, 0) + count
        self.hedges += other.hedges
        self.calls += other.calls
        self.cpu_s += other.cpu_s

    def summary(self) -> dict[str, Any]:
        """Rates and quantiles; times in ms."""
        duration_s = self.duration_s or float("nan")
        return {
            "replies": len(self.latencies_s),
            "replies_per_s": len(self.latencies_s) / duration_s,
            "tokens_per_s": self.tokens / duration_s,
            "p50_ms": 1e3 * quantile(self.latencies_s, 0.5),
            "p99_ms": 1e3 * quantile(self.latencies_s, 0.99),
            "p999_ms": 1e3 * quantile(self.latencies_s, 0.999),
            "wait_p50_ms": 1e3 * quantile(self.waits_s, 0.5),
            "wait_p99_ms": 1e3 * quantile(self.waits_s, 0.99),
            "bursts": len(self.bursts_s),
            "burst_p50_ms": 1e3 * quantile(self.bursts_s, 0.5),
            "burst_p99_ms": 1e3 * quantile(self.bursts_s, 0.99),
            "failures": self.failures,
            "retries": self.retries,
            "hedges": self.hedges,
            "calls": self.calls,
        }


def quantile(values: Sequence[float], share: float) -> float:
    """The value that `share` of all are at most; NaN of none."""
    return float(np.quantile(values, share, method="inverted_cdf")) if len(values) else float("nan")
