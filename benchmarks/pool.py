"""The pool as a whole: transport, scaling, fairness, slow servers, hedging; and by simulation, pools of thousands.

    python -m benchmarks.pool [--quick] [--only PART,...] [--out FILE] [--markdown docs/pool-performance.md]

Real runs are processes of this machine: synthetic servers (`benchmarks.synthetic_server`, the real server around an
engine with a cost model) and clients (`benchmarks.pool_client`). Floors and peers run in the same run: bare grpc.aio,
gRPC's own balancing, first come first served. The simulation (`benchmarks.pool_simulation`) runs the real queue and the
real balancing; it is set beside the real runs first, and then extrapolates.

Writes benchmarks/results/pool.json; with --quick only what --out names. --markdown puts the tables into a document;
with --from FILE from results measured before, without a run.
"""

import argparse
import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc

from benchmarks import pool_limits, pool_real, pool_report, pool_scale
from benchmarks.pool_simulation import Costs

RESULTS = Path(__file__).parent / "results" / "pool.json"
REAL = ("transport", "scaling", "fairness", "slow_server", "sharing", "hedging", "idle_connections")
PARTS = (*REAL, "simulation")

Row = dict[str, Any]


def main() -> None:
    options = _parse()
    if options.source:
        result = json.loads(options.source.read_text())
    else:
        result = _measure(options)
        out = options.out or (None if options.quick or options.only != list(PARTS) else RESULTS)
        if out:
            out.write_text(json.dumps(_plain(result), indent=1) + "\n")
            print(f"written: {out}", file=sys.stderr)
    result = _numbers(_plain(result))
    result["limits"] = pool_limits.limits(result)
    found = pool_report.tables(result)
    for name, table in found.items():
        print(f"\n{name}\n\n{table}")
    if options.markdown:
        options.markdown.write_text(pool_report.put(options.markdown.read_text(), found))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pool", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two minutes, too short for more than a look")
    parser.add_argument(
        "--only", type=lambda text: text.split(","), default=list(PARTS), help=f"some of {', '.join(PARTS)}"
    )
    parser.add_argument("--out", type=Path, help="where to write the results as JSON")
    parser.add_argument("--from", dest="source", type=Path, help="report these results, without a run")
    parser.add_argument("--markdown", type=Path, help="a document with markers, whose tables are replaced")
    options = parser.parse_args()
    if unknown := set(options.only) - set(PARTS):
        parser.error(f"--only: unknown {', '.join(sorted(unknown))}; give some of {', '.join(PARTS)}")
    return options


def _measure(options: argparse.Namespace) -> Row:
    started_s = time.monotonic()
    load_before = os.getloadavg()[0]
    seconds = pool_real.QUICK if options.quick else pool_real.Seconds()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started_s:4.0f} s] {text} ...", file=sys.stderr, flush=True)

    result: Row = {}
    with tempfile.TemporaryDirectory() as folder:
        parts: dict[str, Callable[[], Any]] = {
            "transport": lambda: pool_real.transport(seconds, say),
            "scaling": lambda: pool_real.scaling(seconds, say),
            "fairness": lambda: pool_real.fairness(seconds, Path(folder), say),
            "slow_server": lambda: pool_real.slow_server(seconds, say),
            "sharing": lambda: pool_real.sharing(seconds, say),
            "hedging": lambda: pool_real.hedging(seconds, say),
            "idle_connections": lambda: pool_real.idle_connections(seconds, say),
        }
        for name in REAL:
            if name in options.only:
                result[name] = parts[name]()
    if "simulation" in options.only:
        result |= _simulate(result, quick=options.quick, say=say)
    result["run"] = {
        "date": time.strftime("%Y-%m-%d"),
        "quick": options.quick,
        "cores": os.cpu_count(),
        "cpu": _cpu(),
        "python": platform.python_version(),
        "grpcio": grpc.__version__,
        "load_before": load_before,
        "took_s": time.monotonic() - started_s,
    }
    return result


def _simulate(real: Row, *, quick: bool, say: Callable[[str], None]) -> Row:
    costs = _costs(real)
    locals_ = pool_scale.locals_of(real)
    fair = [
        pool_scale.FairCell(burst, window, 20.0 if quick else 100.0)
        for burst in (1, 8, 32, 128)
        for window in (1.0, 1.5, 2.0, 4.0)
    ]
    cells = pool_scale.cells(quick)
    queue, policies = pool_scale.queue_costs(quick, say), pool_scale.policy_costs()
    # Clients of the extrapolation have hosts of their own, with time enough.
    far = pool_scale.run_all(cells, replace(costs, client_cpu_s=0.0), say)
    near = pool_scale.run_all([*locals_, *fair], costs, say)
    return {
        "costs": vars(costs),
        "queue": queue,
        "policies": policies,
        "checked": near[: len(locals_)],
        "fair_cells": near[len(locals_) :],
        "cells": far,
    }


def _costs(real: Row) -> Costs:
    """The network and the event loops as measured in this run with small replies."""
    if "transport" not in real:
        return Costs()
    small = next(
        row for row in real["transport"]["rows"] if (row["replies"], row["contender"]) == ("small", "stillhouse")
    )
    server_s, client_s = small["server_cpu_ms"] / 1e3, small["client_cpu_ms"] / 1e3
    rtt_s = real["transport"]["idle"]["rtt_p50_ms"] / 1e3
    return Costs(delay_s=max(1e-4, (rtt_s - server_s - client_s) / 2), server_cpu_s=server_s, client_cpu_s=client_s)


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown CPU"


def _plain(value: Any) -> Any:
    """For JSON, which has no NaN."""
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(value: Any) -> Any:
    """The other way: a figure that is missing is no number."""
    if isinstance(value, dict):
        return {key: _numbers(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_numbers(part) for part in value]
    return math.nan if value is None else value


if __name__ == "__main__":
    main()
