"""How many teachers for how many runs: the formula of docs/size-a-pool.md, checked.

    python -m benchmarks.pool_sizing [--quick] [--out FILE] [--markdown docs/size-a-pool.md]

A run is a client that has a step's answers to score, all at once, every `step_s` (give or take 20%). Working ahead
(`rollout.batches_ahead: 1`) its next step ends when it is over or when the answers have come, whichever is later; in
step (`batches_ahead: 0`) the student waits for the answers and then works `step_s`. The formula gives the number of
servers; the simulation of `benchmarks.pool` (its real queue and balancing) gives how long the runs wait with so many.
The same is done with real processes at a small scale, so that the simulation is not taken on trust.

Writes benchmarks/results/pool_sizing.json; with --quick only what --out names.
"""

import argparse
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import pool_processes, pool_report
from benchmarks.pool_simulation import Costs, Simulation
from benchmarks.pool_workload import Outcome, Server, Work

RESULTS = Path(__file__).parent / "results" / "pool_sizing.json"
SERVER = Server(tokens_per_s=20_000.0)
USES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
RUNS = (1, 4, 16, 64)
STEPS = 30
"""Of each run, in the simulation, after the first three."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A run of the worked example: what it asks at each step, and how long it works on one without waiting."""

    answers: int = 256
    tokens: int = 1000
    step_s: float = 30.0

    @property
    def tokens_per_s(self) -> float:
        """What it asks of the pool, when it never waits."""
        return self.answers * self.tokens / self.step_s


def servers_ahead(run: Run, runs: int, use: float) -> int:
    """Servers for runs that work ahead: their tokens per second over what a server should do."""
    return math.ceil(runs * run.tokens_per_s / (SERVER.tokens_per_s * use))


def servers_in_step(run: Run, runs: int, waiting_share: float, use: float) -> int:
    """Servers for runs that wait for their scores, for at most `waiting_share` of their time.

    One burst, spread over all servers, may take waiting_share / (1 - waiting_share) of a step; and all bursts together
    must find room.
    """
    burst_s = run.step_s * waiting_share / (1 - waiting_share)
    alone = run.answers * run.tokens / (SERVER.tokens_per_s * burst_s)
    together = runs * run.answers * run.tokens / ((run.step_s + burst_s) * SERVER.tokens_per_s * use)
    return math.ceil(max(alone, together))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pool_sizing", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small pools, few steps")
    parser.add_argument("--out", type=Path, help="where to write the results as JSON")
    parser.add_argument("--markdown", type=Path, help="a document with markers, whose tables are replaced")
    options = parser.parse_args()
    started_s = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started_s:4.0f} s] {text} ...", file=sys.stderr, flush=True)

    runs, steps = (RUNS[:3], 8) if options.quick else (RUNS, STEPS)
    result = {
        "run": Run().__dict__ | {"server_tokens_per_s": SERVER.tokens_per_s},
        "checked": checked(8.0 if options.quick else 45.0, say),
        "ahead": [ahead(Run(), count, use, steps, say) for count in runs for use in USES],
        "in_step": [in_step(Run(), count, share, steps, say) for count in runs for share in (0.05, 0.1, 0.2)],
    }
    out = options.out or (None if options.quick else RESULTS)
    if out:
        out.write_text(json.dumps(result, indent=1) + "\n")
        say(f"written: {out}")
    found = tables(result)
    for name, table in found.items():
        print(f"\n{name}\n\n{table}")
    if options.markdown:
        options.markdown.write_text(pool_report.put(options.markdown.read_text(), found))


def ahead(run: Run, runs: int, use: float, steps: int, say: Any) -> Row:
    """So many runs that work ahead, with the servers that the formula gives."""
    servers = servers_ahead(run, runs, use)
    say(f"{runs} runs ahead, {servers} servers")
    work = _work(run, runs, period_s=run.step_s)
    row = _simulated(run, servers, work, steps)
    return {"runs": runs, "use": use, "servers": servers} | row


def in_step(run: Run, runs: int, waiting_share: float, steps: int, say: Any) -> Row:
    """So many runs that wait, with the servers that the formula gives for that share."""
    servers = servers_in_step(run, runs, waiting_share, 0.8)
    say(f"{runs} runs in step, {servers} servers")
    work = _work(run, runs, rest_s=run.step_s)
    row = _simulated(run, servers, work, steps)
    return {"runs": runs, "aim": waiting_share, "servers": servers} | row


def _work(run: Run, runs: int, *, period_s: float = 0.0, rest_s: float = 0.0) -> Work:
    return Work(
        clients=runs,
        in_flight=256,
        tokens=run.tokens,
        spread=0.5,
        burst=run.answers,
        period_s=period_s,
        rest_s=rest_s,
        deadline_s=600.0,
    )


def _simulated(run: Run, servers: int, work: Work, steps: int) -> Row:
    simulation = Simulation([SERVER] * servers, [work], costs=Costs(), warm_s=3 * run.step_s)
    outcome = simulation.run(steps * run.step_s)[0]
    return _summary(outcome, work, servers)


def _summary(outcome: Outcome, work: Work, servers: int) -> Row:
    waited_s = sum(outcome.bursts_s) if work.rest_s else sum(outcome.late_s)
    worked_s = len(outcome.bursts_s) * (work.rest_s or work.period_s)
    return {
        "steps": len(outcome.bursts_s),
        "waiting_share": waited_s / (worked_s + waited_s) if outcome.bursts_s else math.nan,
        "used": outcome.tokens / (outcome.duration_s * servers * SERVER.tokens_per_s),
        "failures": sum(outcome.failures.values()),
    }


def checked(seconds: float, say: Any) -> list[Row]:
    """Real servers and clients beside the simulation, with steps of three seconds."""
    run, runs = Run(answers=32, tokens=1000, step_s=3.0), 6
    rows = []
    for use, rest in ((0.7, False), (1.0, False), (0.7, True)):
        servers = servers_ahead(run, runs, use)
        say(f"{runs} real runs, {servers} servers")
        work = _work(run, runs, period_s=0.0 if rest else run.step_s, rest_s=run.step_s if rest else 0.0)
        with pool_processes.servers([SERVER] * servers) as running:
            real = pool_processes.run(running, [work], warm_s=4.0, duration_s=seconds).outcomes[0]
        simulation = Simulation([SERVER] * servers, [work], costs=Costs(), warm_s=4.0, one_process=True)
        simulated = [_summary(outcome, work, servers) for outcome in simulation.run(max(seconds, 300.0))]
        rows.append(
            {"runs": runs, "ahead": not rest, "servers": servers, "real": _summary(real, work, servers)}
            | {"simulated": simulated[0]}
        )
    return rows


def tables(result: Row) -> dict[str, str]:
    """By the name of their marker."""

    def share(*names: str) -> pool_report.Column:
        def of(row: Row) -> object:
            for name in names:
                row = row[name]
            return pool_report.percent(row)  # pyright: ignore[reportArgumentType]

        return " ".join(names).replace("_share", "").replace("_", " "), of

    count = [(name, lambda row, name=name: row[name]) for name in ("runs", "servers")]
    found = [share("used"), share("waiting_share")]
    mode: pool_report.Column = ("mode", lambda row: "ahead" if row["ahead"] else "in step")
    both = [share(side, name) for name in ("waiting_share", "used") for side in ("real", "simulated")]
    return {
        "sizing-ahead": pool_report.table([count[0], share("use"), count[1], *found], result["ahead"]),
        "sizing-in-step": pool_report.table([count[0], share("aim"), count[1], *found], result["in_step"]),
        "sizing-checked": pool_report.table([*count, mode, *both], result["checked"]),
    }


if __name__ == "__main__":
    main()
