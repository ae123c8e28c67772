"""Asks servers for their health every 20 ms, each port from a schedule of its own, and says how long answers took.

A late answer does not delay the next question, so a server that hangs shows as many long answers and not as one.
Spoken to by `benchmarks.pool_processes.run`.
"""

import asyncio
import json
import sys
import time
from typing import Any

import grpc
from grpc_health.v1 import health_pb2

from benchmarks.pool_workload import quantile

EVERY_S = 0.02


async def _ask(address: str, method: str, warm_s: float, duration_s: float) -> list[float]:
    times_s: list[float] = []
    request = health_pb2.HealthCheckRequest().SerializeToString()
    async with grpc.aio.insecure_channel(address) as channel:
        call = channel.unary_unary(method)

        async def once(counted: bool) -> None:
            started_s = time.monotonic()
            try:
                await call(request, timeout=10.0)
            except grpc.RpcError:
                times_s.append(10.0)
                return
            if counted:
                times_s.append(time.monotonic() - started_s)

        start_s = time.monotonic()
        asked: set[asyncio.Task[None]] = set()
        for number in range(int((warm_s + duration_s) / EVERY_S)):
            due_s = start_s + number * EVERY_S
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            task = asyncio.create_task(once(due_s - start_s >= warm_s))
            asked.add(task)
            task.add_done_callback(asked.discard)
        await asyncio.gather(*asked)
    return times_s


async def _run(config: dict[str, Any]) -> dict[str, dict[str, float]]:
    ports = {name: address for name, address in config["ports"].items() if address}
    print("ready", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    method = config["method"]
    found = await asyncio.gather(
        *(_ask(address, method, config["warm_s"], config["duration_s"]) for address in ports.values())
    )
    return {
        name: {
            "asked": len(times_s),
            "p50_ms": 1e3 * quantile(times_s, 0.5),
            "p99_ms": 1e3 * quantile(times_s, 0.99),
            "max_ms": 1e3 * max(times_s),
        }
        for name, times_s in zip(ports, found, strict=True)
    }


def main() -> None:
    print(json.dumps(asyncio.run(_run(json.loads(sys.stdin.readline())))), flush=True)


if __name__ == "__main__":
    main()
