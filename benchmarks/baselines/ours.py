"""teacher-server with the vLLM engine, asked by AsyncTeacherClient.

A plain event loop, not asyncio.Runner: with the latter, restoring the signal handler costs a repr() of the task's
result, here of every array, more than all else the client does (Python 3.11).
"""

import asyncio
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
from numpy.typing import NDArray

from benchmarks.baselines import contender
from benchmarks.baselines.contender import Answer, Contender, ContenderFailed, Sequences
from stillhouse.client import CHANNEL_OPTIONS, AsyncTeacherClient
from stillhouse.codec import Scores, encode_request
from stillhouse.request import make_task
from stillhouse.v1 import teacher_pb2 as pb
from tests.servers import serving

PLAIN, HALF_PRECISION, SECOND_HALF = "ours", "ours, float16 wire", "ours, second half only"


@contextlib.contextmanager
def started(model: Path, *, variables: dict[str, str], limit_s: float) -> Iterator["Ours"]:
    """A server of `model`."""
    options = ("--dtype", contender.DTYPE, "--max-batch-tokens", str(contender.MAX_BATCH_TOKENS))
    options += ("--kv-cache-bytes", str(contender.KV_CACHE_BYTES), "--log-level", "warning")
    try:
        server = contextlib.ExitStack()
        running = server.enter_context(serving(model, *options, engine="vllm", variables=variables))
    except AssertionError as error:
        raise ContenderFailed(str(error)[-500:]) from error
    with server, contextlib.closing(asyncio.new_event_loop()) as loop:
        ours = Ours(running.process.pid, running.said["listen"], loop, limit_s)
        try:
            yield ours
        finally:
            ours.close()
            ours.tree.end()


class Ours(Contender):
    def __init__(self, pid: int, address: str, loop: asyncio.AbstractEventLoop, limit_s: float) -> None:
        super().__init__(pid)
        self._address = address
        self._loop = loop
        self._limit_s = limit_s
        self._client: AsyncTeacherClient = loop.run_until_complete(_client(address))
        self._last: tuple[NDArray[np.int32], int, int, bool] | None = None

    def wave(self, variant: str, sequences: Sequences, k: int) -> float:
        start = len(sequences[0]) // 2 if variant == SECOND_HALF else 1
        self._last = sequences[0], start, k, variant == HALF_PRECISION
        began_s = time.perf_counter()
        self._loop.run_until_complete(self._scores(sequences, start, k, variant == HALF_PRECISION))
        return time.perf_counter() - began_s

    def answer(self, sequence: NDArray[np.int32], k: int) -> Answer:
        (scores,) = self._loop.run_until_complete(self._scores([sequence], 1, k, False))
        return Answer(
            np.asarray(scores.sampled_logprobs, np.float32),
            scores.top_ids,
            np.asarray(scores.top_logprobs, np.float32),
        )

    def payload_bytes(self) -> int | None:
        assert self._last is not None
        return self._loop.run_until_complete(self._response_bytes(*self._last))

    def close(self) -> None:
        self._loop.run_until_complete(self._client.close())

    async def _scores(self, sequences: Sequences, start: int, k: int, half_precision: bool) -> list[Scores]:
        return await asyncio.gather(
            *(
                self._client.score(
                    sequence, score_start=start, top_k=k, half_precision=half_precision, deadline_s=self._limit_s
                )
                for sequence in sequences
            )
        )

    async def _response_bytes(self, sequence: NDArray[np.int32], start: int, k: int, half_precision: bool) -> int:
        """The client does not tell the size of a message, so this asks once more, without it."""
        request = encode_request(make_task("", sequence, start, k, {"half_precision": half_precision}))
        async with grpc.aio.insecure_channel(self._address, options=CHANNEL_OPTIONS) as channel:
            method = channel.unary_unary(
                "/stillhouse.v1.TeacherService/Score",
                request_serializer=pb.ScoreRequest.SerializeToString,
                response_deserializer=len,
            )
            return await method(request, timeout=self._limit_s)


async def _client(address: str) -> AsyncTeacherClient:
    return AsyncTeacherClient([address])
