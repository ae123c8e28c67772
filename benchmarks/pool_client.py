"""One client process: many logical clients of one group, as `benchmarks.pool_workload.Work` says.

    echo '{"addresses": [...], "work": {...}, ...}' | python -m benchmarks.pool_client

Prints `ready` when every client has reached a server, waits for a line on standard input, works for `warm_s` without
counting and for `duration_s` with, prints the outcome as JSON. Each client has connections of its own, as clients of
different hosts would: gRPC would let all in one process share one connection to a server.

Peers are gRPC's own policies over one channel for all servers: balancing "grpc_round_robin" and
"grpc_weighted_round_robin" (weights from the load reports in the answers' trailers).
"""

import asyncio
import contextlib
import json
import random
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import grpc
import numpy as np

import stillhouse.pool
from benchmarks.pool_workload import Outcome, Work
from stillhouse.client import AsyncTeacherClient
from stillhouse.codec import Scores, decode_response, encode_request
from stillhouse.errors import StillhouseError, from_rpc_error
from stillhouse.request import make_task
from stillhouse.v1 import teacher_pb2_grpc as pb_grpc

VOCABULARY = 151_936
PEERS = {
    "grpc_round_robin": {"round_robin": {}},
    "grpc_weighted_round_robin": {
        # The defaults (10 s, 1 s) would be most of a run; reports weigh as soon as they come.
        "weighted_round_robin": {"blackoutPeriod": "0.5s", "weightUpdatePeriod": "0.5s"}
    },
}
_OWN_CONNECTIONS = ("grpc.use_local_subchannel_pool", 1)


class PeerClient:
    """The same calls over one gRPC channel whose policy chooses the server."""

    def __init__(self, addresses: Sequence[str], policy: str) -> None:
        config = {"loadBalancingConfig": [PEERS[policy]]}
        options = (
            *stillhouse.pool.CHANNEL_OPTIONS,
            ("grpc.service_config", json.dumps(config)),
            ("grpc.service_config_disable_resolution", 1),
        )
        self._channel = grpc.aio.insecure_channel(f"ipv4:{','.join(addresses)}", options=options)
        self._stub: Any = pb_grpc.TeacherServiceStub(self._channel)

    async def score(self, token_ids: Any, *, score_start: int, top_k: int, deadline_s: float, **options: Any) -> Scores:
        """As AsyncTeacherClient's, without retries."""
        task = make_task("", token_ids, score_start, top_k, options)  # pyright: ignore[reportArgumentType]
        try:
            response = await self._stub.Score(encode_request(task), timeout=deadline_s)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        return decode_response(task, response)

    async def wait_until_ready(self, *, deadline_s: float) -> None:
        """Until a server is connected."""
        await asyncio.wait_for(self._channel.channel_ready(), deadline_s)

    async def close(self) -> None:
        """Closes the channel."""
        await self._channel.close()


class Clients:
    """The clients of one process, at work."""

    def __init__(self, work: Work, clients: Sequence[Any]) -> None:
        self._work = work
        self._clients = clients
        self._outcome = Outcome()
        self._counted_from_s = float("inf")

    async def run(self, warm_s: float, duration_s: float) -> Outcome:
        """Works and counts."""
        tasks = [
            asyncio.create_task(self._bursts(client) if self._work.burst else self._always(client))
            for client in self._clients
            for _ in range(1 if self._work.burst else self._work.in_flight)
        ]
        await asyncio.sleep(warm_s)
        self._counted_from_s, cpu_s = time.monotonic(), _cpu_s()
        await asyncio.sleep(duration_s)
        outcome, self._outcome = self._outcome, Outcome()
        outcome.duration_s = time.monotonic() - self._counted_from_s
        outcome.cpu_s = _cpu_s() - cpu_s
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        for error in ended:
            if isinstance(error, Exception):
                raise error
        for client in self._clients:
            if isinstance(client, AsyncTeacherClient):
                outcome.hedges += client.stats.hedges
                outcome.calls += client.stats.answered + sum(client.stats.failures.values())
                for reason, count in client.stats.retries.items():
                    outcome.retries[reason] = outcome.retries.get(reason, 0) + count
        return outcome

    async def _always(self, client: Any) -> None:
        while True:
            await self._call(client)

    async def _bursts(self, client: Any) -> None:
        work = self._work
        await asyncio.sleep(random.uniform(0, work.period_s))
        while True:
            started_s = time.monotonic()
            await asyncio.gather(*(self._call(client) for _ in range(work.burst)))
            ended_s = time.monotonic()
            wanted_s = started_s + work.period_s * random.uniform(0.8, 1.2) + work.rest_s
            next_s = max(ended_s + work.rest_s, wanted_s)
            if started_s >= self._counted_from_s:
                self._outcome.bursts_s.append(ended_s - started_s)
                self._outcome.late_s.append(next_s - wanted_s)
            await asyncio.sleep(next_s - ended_s)

    async def _call(self, client: Any) -> None:
        work = self._work
        ids = np.random.default_rng(random.getrandbits(32)).integers(0, VOCABULARY, work.length(), np.int32)
        started_s = time.monotonic()
        try:
            scores = await client.score(
                ids,
                score_start=1,
                top_k=work.top_k,
                half_precision=True,
                deadline_s=work.deadline_s,
                expected_model_revision="r1" if work.pinned else "",
                expected_compute_dtype="float32" if work.pinned else "",
            )
        except StillhouseError as error:
            if time.monotonic() >= self._counted_from_s:
                failures = self._outcome.failures
                failures[error.reason] = failures.get(error.reason, 0) + 1
            await asyncio.sleep(0.01)
            return
        ended_s = time.monotonic()
        # Of a burst, what was sent in the time measured: an answer's wait depends on where in the burst it was.
        if (started_s if work.burst else ended_s) >= self._counted_from_s:
            self._outcome.tokens += len(ids)
            self._outcome.latencies_s.append(ended_s - started_s)
            self._outcome.waits_s.append(scores.queue_wait_ms / 1e3)


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


async def _run(addresses: list[str], work: Work, token: str, warm_s: float, duration_s: float) -> Outcome:
    async with contextlib.AsyncExitStack() as stack:
        token_file = None
        if token:
            token_file = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "token"
            token_file.write_text(token)
        clients: list[Any] = []
        for _ in range(work.clients):
            if work.balancing in PEERS:
                client: Any = PeerClient(addresses, work.balancing)
            else:
                client = AsyncTeacherClient(
                    addresses,
                    max_in_flight=work.in_flight,
                    token_file=token_file,
                    plaintext_token=bool(token),
                    balancing=work.balancing,
                    hedge_share=work.hedge_share,
                )
            stack.push_async_callback(client.close)
            clients.append(client)
        await asyncio.gather(*(client.wait_until_ready(deadline_s=30.0) for client in clients))
        print("ready", flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
        return await Clients(work, clients).run(warm_s, duration_s)


def main() -> None:
    stillhouse.pool.CHANNEL_OPTIONS = (*stillhouse.pool.CHANNEL_OPTIONS, _OWN_CONNECTIONS)
    config = json.loads(sys.stdin.readline())
    random.seed(config["seed"])  # the same lengths and times for every contender
    outcome = asyncio.run(
        _run(config["addresses"], Work(**config["work"]), config["token"], config["warm_s"], config["duration_s"])
    )
    print(json.dumps(asdict(outcome)), flush=True)


if __name__ == "__main__":
    main()
