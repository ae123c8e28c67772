"""The measurements on real processes: transport, scaling, fairness, a slow server, hedging, idle connections.

Each function is one table; what it is compared with is measured in the same run.
"""

import contextlib
import hashlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.pool_processes import HEALTH, PING, Measured, Running, processes, ready, run, servers, start
from benchmarks.pool_workload import Server, Work
from benchmarks.synthetic_server import describe, synthetic_scores
from stillhouse.codec import ScoreTask, decode_request, decode_response, encode_request, encode_response
from stillhouse.v1 import teacher_pb2 as pb

Row = dict[str, Any]
Say = Callable[[str], None]

INSTANT = Server(tokens_per_s=1e9, overhead_ms=0.0)
LARGE = Work(clients=64, in_flight=8, tokens=2049, top_k=64)
SMALL = Work(clients=64, in_flight=8, tokens=500, top_k=8)

BATCH_TOKENS = 8192
FAIR = Server(tokens_per_s=100_000.0, max_batch_tokens=BATCH_TOKENS)
"""A batch takes 84 ms. Sequences of 1,000 tokens: 100 a second."""
QUIET = Work(clients=1, in_flight=128, burst=32, period_s=32 / 30, tokens=1000, tenant="quiet")
"""A trainer's step: a burst, then a pause; 30% of the server."""
FLOOD = Work(clients=1, in_flight=960, tokens=1000, tenant="flood")
"""30 times the quiet tenant's sequences, all the time."""
FLOOD_S = FLOOD.in_flight * FLOOD.tokens / FAIR.tokens_per_s
"""What the flooder has waiting, in the server's time."""
QUOTA_TOKENS_PER_S = 50_000.0
"""Of the flooder: half of the server."""


@dataclass(frozen=True)
class Seconds:
    """How long things are measured. quick: of every table only some rows."""

    transport: float = 8.0
    scaling: float = 2.5
    fairness: float = 6.5
    slow: float = 8.0
    sharing: float = 12.0
    hedging: float = 30.0
    idle: float = 15.0
    connections: int = 1000
    quick: bool = False


QUICK = Seconds(
    transport=2.0,
    scaling=1.0,
    fairness=3.5,
    slow=3.0,
    sharing=4.0,
    hedging=6.0,
    idle=4.0,
    connections=200,
    quick=True,
)


def transport(seconds: Seconds, say: Say) -> Row:
    """Replies of 768 KiB and small ones: ours beside a bare grpc.aio pair with as many bytes, the floor, and that pair
    with our message instead of bytes (made once, written and parsed each time)."""
    rows = []
    for name, work in (("768 KiB", LARGE), ("small", SMALL)):
        response = _response(work)
        for contender, serve, ask in (
            ("bare grpc.aio", "bytes", "benchmarks.pool_floor"),
            ("the same, our message", "message", "benchmarks.pool_floor_message"),
            ("stillhouse", "", "benchmarks.pool_client"),
        ):
            if seconds.quick and work is SMALL and serve:
                continue
            say(f"transport, {name}: {contender}")
            with _bare_servers(serve, response) if serve else servers([INSTANT] * 3) as running:
                measured = run(
                    running,
                    [work],
                    warm_s=2.0,
                    duration_s=seconds.transport,
                    client_processes=2,
                    probe=PING if serve else HEALTH,
                    module=ask,
                )
            rows.append({"replies": name, "contender": contender} | _transport_row(measured, len(response)))
    return {"rows": rows, "parts": _codec_parts(LARGE), "idle": _idle_rtt(say)}


@contextlib.contextmanager
def _bare_servers(kind: str, response: bytes) -> Iterator[list[Running]]:
    with processes() as started, tempfile.NamedTemporaryFile() as file:
        file.write(response)
        file.flush()
        for _ in range(3):
            started.append(start("benchmarks.pool_floor", "serve", kind, file.name))
        yield [ready(process) for process in started]


def _transport_row(measured: Measured, size_bytes: int) -> Row:
    found = measured.outcomes[0].summary()
    count = max(1, found["replies"])
    return {
        "reply_bytes": size_bytes,
        "replies_per_s": found["replies_per_s"],
        "mib_per_s": found["replies_per_s"] * size_bytes / 2**20,
        "server_cpu_ms": 1e3 * measured.server_cpu_s / count,
        "client_cpu_ms": 1e3 * measured.outcomes[0].cpu_s / count,
        "p50_ms": found["p50_ms"],
        "p99_ms": found["p99_ms"],
        "failures": found["failures"],
        "probe": measured.probe,
    }


def _response(work: Work) -> bytes:
    task = _task(work)
    return encode_response(task, synthetic_scores(task, describe("synthetic", "r1"))).SerializeToString()


def _task(work: Work) -> ScoreTask:
    ids = np.random.default_rng(0).integers(0, 1000, work.tokens, np.int32)
    return ScoreTask(model="", token_ids=ids, score_start=1, top_k=work.top_k, half_precision=True)


def _codec_parts(work: Work) -> dict[str, float]:
    """CPU ms of what is ours around one reply, each part alone, best of 5 rounds of 20."""
    task, teacher = _task(work), describe("synthetic", "r1")
    request = encode_request(task)
    request_bytes = request.SerializeToString()
    scores = synthetic_scores(task, teacher)
    response = encode_response(task, scores)
    response_bytes = response.SerializeToString()
    parts: dict[str, Callable[[], object]] = {
        "client: encode request": lambda: encode_request(task).SerializeToString(),
        "server: parse request": lambda: decode_request(pb.ScoreRequest.FromString(request_bytes)),
        "server: request's digest": task.digest,
        "server: arrays to message": lambda: encode_response(task, scores),
        "server: message to bytes": response.SerializeToString,
        "client: bytes to message": lambda: pb.ScoreResponse.FromString(response_bytes),
        "client: message to arrays, checked": lambda: decode_response(task, response),
        "synthetic engine: its numbers": lambda: synthetic_scores(task, teacher),
    }
    return {name: 1e3 * best_s(part, rounds=5, times=20) for name, part in parts.items()}


def best_s(do: Callable[[], object], *, rounds: int, times: int) -> float:
    """CPU seconds of one call: the best round's mean."""
    found = []
    for _ in range(rounds):
        started_s = time.process_time()
        for _ in range(times):
            do()
        found.append((time.process_time() - started_s) / times)
    return min(found)


def _idle_rtt(say: Say) -> Row:
    """One call at a time, of 500 tokens, to a server that computes nothing: the network and both event loops."""
    say("transport: one call at a time")
    with servers([INSTANT]) as running:
        found = run(running, [replace(SMALL, clients=1, in_flight=1)], warm_s=0.5, duration_s=2.0)
        return {"rtt_p50_ms": found.outcomes[0].summary()["p50_ms"]}


def scaling(seconds: Seconds, say: Say) -> list[Row]:
    """Throughput against the engines' own, for servers x clients; 4 calls in flight each."""
    rows = []
    for count in (1, 4) if seconds.quick else (1, 2, 4):
        spec = Server()
        with servers([spec] * count) as running:
            for clients in (1, 16) if seconds.quick else (1, 4, 16, 64):
                say(f"scaling: {count} servers, {clients} clients")
                work = Work(clients=clients, in_flight=4)
                bound = count * spec.tokens_per_s
                pending_s = clients * work.in_flight * work.tokens / bound
                measured = run(running, [work], warm_s=0.5 + pending_s, duration_s=seconds.scaling + pending_s)
                row = {"servers": count, "clients": clients, "bound_tokens_per_s": bound}
                rows.append(row | measured.outcomes[0].summary())
    return rows


def fairness_cells() -> list[Row]:
    """Which variations of queue and burst are measured: the first is the default one."""
    default = {"window_batches": 2.0, "burst": 32, "burst_tokens": 2**17, "flood": "fair queueing"}
    changes: list[Row] = [
        {},
        {"flood": "same tenant (FIFO)"},
        {"burst_tokens": 0},
        {"flood": "fair queueing + quota"},
        {"burst": 1},
        {"burst": 8},
        {"burst": 128},
        {"window_batches": 1.0},
        {"window_batches": 4.0},
        {"window_batches": 1.0, "burst": 128},
    ]
    return [default | change for change in changes]


def fairness_works(cell: Row) -> tuple[Server, Work, Work]:
    """Server, quiet tenant and flooder of a cell. In the FIFO cells both are one tenant."""
    spec = replace(FAIR, window_batches=cell["window_batches"], burst_tokens=cell["burst_tokens"])
    quiet = replace(QUIET, burst=cell["burst"], period_s=QUIET.period_s * cell["burst"] / QUIET.burst)
    tenants = {"same tenant (FIFO)": "quiet", "fair queueing": "flood", "fair queueing + quota": "limited"}
    return spec, quiet, replace(FLOOD, tenant=tenants[cell["flood"]])


def fairness(seconds: Seconds, folder: Path, say: Say) -> list[Row]:
    """A quiet tenant alone, and beside a flooder."""
    tokens = {name: f"token-of-{name}-{index:032x}" for index, name in enumerate(("quiet", "flood", "limited"))}
    limits = {"limited": {"tokens_per_s": QUOTA_TOKENS_PER_S, "burst_tokens": BATCH_TOKENS}}
    access = {
        name: {"models": ["*"], "tokens_sha256": [hashlib.sha256(token.encode()).hexdigest()]} | limits.get(name, {})
        for name, token in tokens.items()
    }
    path = folder / "access.yaml"
    path.write_text(yaml.safe_dump({"tenants": access}))
    rows: list[Row] = []
    alone: dict[int, Row] = {}
    for cell in fairness_cells()[:4:3] if seconds.quick else fairness_cells():
        spec, quiet, flood = fairness_works(cell)
        say(f"fairness: {', '.join(f'{name} {value}' for name, value in cell.items())}")
        # Bursts are rarer the larger they are, and first come, first served takes the flooder's 10 s.
        duration_s = max(seconds.fairness, 3.5 * quiet.period_s)
        if flood.tenant == quiet.tenant:
            duration_s = max(duration_s, 3 * FLOOD_S)
        with servers([spec], "--access", str(path)) as running:
            if quiet.burst not in alone:  # without others the window and turns change nothing
                found = run(running, [quiet], warm_s=0.5, duration_s=max(duration_s, 6.5), tokens=tokens)
                alone[quiet.burst] = found.outcomes[0].summary()
            # Counted once the flooder's queue stands.
            both = run(running, [quiet, flood], warm_s=2.0, duration_s=duration_s, tokens=tokens)
            quiet_row, flood_row = (outcome.summary() for outcome in both.outcomes)
        rows.append(cell | {"alone": alone[quiet.burst], "flooded": quiet_row, "flooder": flood_row})
    return rows


SLOW = (Server(), Server(slow_factor=5.0))
POLICIES = (
    "round_robin",
    "least_outstanding_tokens",
    "least_expected_wait",
    "grpc_round_robin",
    "grpc_weighted_round_robin",
)
SLOW_SHAPES = (Work(clients=1, in_flight=32), Work(clients=16, in_flight=2))


def slow_server(seconds: Seconds, say: Say) -> list[Row]:
    """Two servers, one five times slower: our policies and gRPC's own, the latter at servers that report loads."""

    def cell(shape: Work, policy: str) -> Row:
        say(f"a slow server: {shape.clients} clients, {policy}")
        with _servers_for(policy, SLOW) as running:
            found = run(running, [replace(shape, balancing=policy)], warm_s=4.0, duration_s=seconds.slow)
        bound = sum(spec.tokens_per_s / spec.slow_factor for spec in SLOW)
        row = {"clients": shape.clients, "in_flight": shape.in_flight, "balancing": policy}
        return row | {"bound_tokens_per_s": bound} | found.outcomes[0].summary()

    return two_at_a_time(
        cell, [(shape, policy) for shape in (SLOW_SHAPES[:1] if seconds.quick else SLOW_SHAPES) for policy in POLICIES]
    )


SHARED = (Server(),) * 4
SHARING = Work(clients=40, in_flight=64, burst=8, period_s=2.5, spread=0.5)
"""Trainers whose steps come at different times: 80% of the four servers in sum, each a fiftieth of that."""


def sharing(seconds: Seconds, say: Say) -> list[Row]:
    """Many clients at equal servers: each knows only its own calls, and all have the same idea of who is free."""

    def cell(policy: str) -> Row:
        say(f"sharing: {policy}")
        with _servers_for(policy, SHARED) as running:
            work = replace(SHARING, balancing=policy)
            found = run(running, [work], warm_s=6.0, duration_s=seconds.sharing)
        return {"clients": SHARING.clients, "balancing": policy} | found.outcomes[0].summary()

    return two_at_a_time(cell, [(policy,) for policy in (POLICIES[:3] if seconds.quick else POLICIES)])


def _servers_for(policy: str, specs: Sequence[Server]) -> contextlib.AbstractContextManager[list[Running]]:
    reporting = policy.startswith("grpc_")
    return servers(specs, module="benchmarks.pool_orca" if reporting else "benchmarks.synthetic_server")


def two_at_a_time(do: Callable[..., Row], arguments: Sequence[tuple[Any, ...]]) -> list[Row]:
    """For cells that use little CPU: rows in the order of `arguments`."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(do, *zip(*arguments, strict=True)))


PAUSING = Server(pause_share=0.01, pause_ms=500.0)
HEDGED = Work(clients=2, in_flight=4, pinned=True)
HEDGE_SHARES = (0.0, 0.02, 0.05, 0.1)


def hedging(seconds: Seconds, say: Say) -> list[Row]:
    """Three servers of which one batch in a hundred takes half a second longer; calls to a pinned revision."""

    def cell(share: float) -> Row:
        say(f"hedging: share {share}")
        with servers([PAUSING] * 3) as running:
            work = replace(HEDGED, hedge_share=share)
            row = run(running, [work], warm_s=2.0, duration_s=seconds.hedging).outcomes[0].summary()
        return {"hedge_share": share} | row | {"extra_load": row["hedges"] / max(1, row["calls"])}

    return two_at_a_time(cell, [(share,) for share in (HEDGE_SHARES[::2] if seconds.quick else HEDGE_SHARES)])


PING_EVERY_S = 6.0
"""More often than real clients (10 s), and as seldom as servers take it (5 s), for a figure that can be seen."""


def idle_connections(seconds: Seconds, say: Say) -> Row:
    """What a server pays for clients that are connected: memory of each, and CPU of keepalive pings."""

    def cell(name: str, every_s: float) -> Row:
        say(f"{seconds.connections} connections, {name}")
        with servers([INSTANT]) as running, processes() as started:
            time.sleep(1.0)
            before = running[0].rss_bytes
            arguments = running[0].address, str(seconds.connections), str(int(1e3 * every_s))
            process = start("benchmarks.pool_idle", *arguments)
            started.append(process)
            assert process.stdout is not None
            if process.stdout.readline().strip() != "connected":
                raise RuntimeError("the idle clients could not connect")
            time.sleep(1.0)
            rss_bytes, cpu_s = running[0].rss_bytes, running[0].cpu_s
            time.sleep(seconds.idle)
            return {
                "kib_a_connection": (rss_bytes - before) / seconds.connections / 2**10,
                "cpu_s": running[0].cpu_s - cpu_s,
            }

    idle, pinging = two_at_a_time(cell, [("idle", 0.0), ("pinging", PING_EVERY_S)])
    pings = seconds.connections * seconds.idle / PING_EVERY_S
    # The system counts CPU in steps of 10 ms; what is below one step is one step at most.
    extra_s = max(0.01, pinging["cpu_s"] - idle["cpu_s"])
    return {
        "connections": seconds.connections,
        "ping_every_s": PING_EVERY_S,
        "seconds": seconds.idle,
        "idle": idle,
        "pinging": pinging,
        "cpu_us_a_ping": 1e6 * extra_s / pings,
    }
