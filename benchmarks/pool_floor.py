"""The floor of the transport: grpc.aio and bytes, without a line of ours.

    python -m benchmarks.pool_floor serve bytes FILE      a server whose every answer is the file's bytes
    python -m benchmarks.pool_floor serve message FILE    the same as a message, written anew for each answer
    python -m benchmarks.pool_floor                       clients; spoken to by benchmarks.pool_processes.run
    python -m benchmarks.pool_floor_message               clients that parse the answers

Requests are as long as ours. Each client has a connection of its own to every server and takes them in turn.
"""

import asyncio
import json
import resource
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import grpc

from benchmarks.pool_workload import Outcome, Work
from stillhouse.v1 import teacher_pb2 as pb

_OPTIONS = (
    ("grpc.max_receive_message_length", 2**28),
    ("grpc.max_send_message_length", 2**28),
    ("grpc.use_local_subchannel_pool", 1),
)


async def _serve(kind: str, content: bytes) -> None:
    message = pb.ScoreResponse.FromString(content)
    answer = message if kind == "message" else content

    async def echo(request: bytes, context: Any) -> Any:
        return answer

    async def ping(request: bytes, context: Any) -> bytes:
        return b""

    server = grpc.aio.server(options=_OPTIONS)
    write = pb.ScoreResponse.SerializeToString if kind == "message" else None
    handlers = {
        "Echo": grpc.unary_unary_rpc_method_handler(echo, None, write),
        "Ping": grpc.unary_unary_rpc_method_handler(ping),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("floor", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"ready listen=127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


async def _ask(addresses: list[str], work: Work, warm_s: float, duration_s: float, parse: Any) -> Outcome:
    request = bytes(4 * work.tokens + 64)
    channels = [[grpc.aio.insecure_channel(at, options=_OPTIONS) for at in addresses] for _ in range(work.clients)]
    calls = [[channel.unary_unary("/floor/Echo", None, parse) for channel in own] for own in channels]
    for own in calls:
        for call in own:
            await call(b"", timeout=30.0)
    print("ready", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    outcome = Outcome()
    counted_from_s = float("inf")

    async def always(own: list[Any], turn: int) -> None:
        while True:
            turn += 1
            started_s = time.monotonic()
            await own[turn % len(own)](request, timeout=60.0)
            ended_s = time.monotonic()
            if ended_s >= counted_from_s:
                outcome.latencies_s.append(ended_s - started_s)

    tasks = [asyncio.create_task(always(own, turn)) for own in calls for turn in range(work.in_flight)]
    await asyncio.sleep(warm_s)
    counted_from_s, cpu_s = time.monotonic(), _cpu_s()
    await asyncio.sleep(duration_s)
    outcome.duration_s, outcome.cpu_s = time.monotonic() - counted_from_s, _cpu_s() - cpu_s
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for own in channels:
        for channel in own:
            await channel.close()
    return outcome


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main(parse: Any = None) -> None:
    if sys.argv[1:2] == ["serve"]:
        asyncio.run(_serve(sys.argv[2], Path(sys.argv[3]).read_bytes()))
        return
    config = json.loads(sys.stdin.readline())
    work = Work(**config["work"])
    outcome = asyncio.run(_ask(config["addresses"], work, config["warm_s"], config["duration_s"], parse))
    print(json.dumps(asdict(outcome)), flush=True)


if __name__ == "__main__":
    main()
