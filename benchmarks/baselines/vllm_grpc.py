"""vLLM's own gRPC server, asked by a plain asyncio client.

It is an extra of vLLM, two packages that can be kept out of its environment:

    .venv-vllm/bin/pip install --no-deps --target DIR smg-grpc-servicer==0.14.1 smg-grpc-proto==0.4.28
    python -m benchmarks.teacher_throughput --grpc-packages DIR

Its answer has k entries a position, and the token that is there takes one of them if it is not among the k.
"""

import asyncio
import contextlib
import importlib.util
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from benchmarks.baselines import contender
from benchmarks.baselines.contender import Answer, Contender, Sequences

NAME = "vllm serve --grpc"
_MODULE = "vllm.entrypoints.launchers.grpc_server"
_METHOD = "/vllm.grpc.engine.VllmEngine/Generate"


def why_not(packages: Path | None) -> str | None:
    """Why this contender cannot run; None if it can."""
    if packages is not None and str(packages) not in sys.path:
        sys.path.append(str(packages))
    if importlib.util.find_spec("smg_grpc_proto") is None:
        return "smg-grpc-proto is not installed; see benchmarks/baselines/vllm_grpc.py"
    command = [str(contender.VLLM_PYTHON), "-c", "import smg_grpc_servicer.vllm"]
    done = subprocess.run(command, env=_environment(packages), capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else f"smg-grpc-servicer: {done.stderr.strip().splitlines()[-1]}"


def _environment(packages: Path | None) -> dict[str, str]:
    return {} if packages is None else {"PYTHONPATH": str(packages.resolve())}


@contextlib.contextmanager
def started(model: Path, *, variables: dict[str, str], limit_s: float, packages: Path | None) -> Iterator["VllmGrpc"]:
    """A server of `model`."""
    port = contender.free_port()

    def ready(_: object) -> bool:
        # It listens only once the engine has the model.
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            try:
                grpc.channel_ready_future(channel).result(timeout=2)
            except grpc.FutureTimeoutError:
                return False
            return True

    command = contender.serve_command(_MODULE, model, port)
    with (
        contender.process(command, ready, variables=variables, env=_environment(packages)) as running,
        contextlib.closing(asyncio.new_event_loop()) as loop,
    ):
        theirs = VllmGrpc(running.pid, port, loop, limit_s)
        try:
            yield theirs
        finally:
            theirs.close()


class VllmGrpc(Contender):
    def __init__(self, pid: int, port: int, loop: asyncio.AbstractEventLoop, limit_s: float) -> None:
        super().__init__(pid)
        self._channel: grpc.aio.Channel = loop.run_until_complete(_channel(port))
        self._loop = loop
        self._limit_s = limit_s
        self._bytes = 0

    def wave(self, variant: str, sequences: Sequences, k: int) -> float:
        began_s = time.perf_counter()
        self._loop.run_until_complete(self._scores(sequences, k))
        return time.perf_counter() - began_s

    def answer(self, sequence: NDArray[np.int32], k: int) -> Answer:
        (found,) = self._loop.run_until_complete(self._scores([sequence], k))
        order = np.argsort(-found.top_logprobs, axis=1, kind="stable")[:, : k - 1]
        return Answer(
            found.sampled_logprobs,
            np.take_along_axis(found.top_ids, order, 1),
            np.take_along_axis(found.top_logprobs, order, 1),
        )

    def payload_bytes(self) -> int | None:
        return self._bytes

    def close(self) -> None:
        self._loop.run_until_complete(self._channel.close())

    async def _scores(self, sequences: Sequences, k: int) -> list[Answer]:
        return await asyncio.gather(*(self._score(sequence, k) for sequence in sequences))

    async def _score(self, sequence: NDArray[np.int32], k: int) -> Answer:
        from smg_grpc_proto import vllm_engine_pb2 as theirs

        def decode(body: bytes) -> Any:
            self._bytes = len(body)
            return theirs.GenerateResponse.FromString(body)

        method = self._channel.unary_stream(
            _METHOD, request_serializer=theirs.GenerateRequest.SerializeToString, response_deserializer=decode
        )
        request = theirs.GenerateRequest(
            request_id=uuid.uuid4().hex,
            tokenized=theirs.TokenizedInput(input_ids=sequence.tolist()),
            sampling_params=theirs.SamplingParams(temperature=1.0, max_tokens=1, prompt_logprobs=k),
        )
        answers = [_answer(r.complete.input_logprobs) async for r in method(request, timeout=self._limit_s)]
        if len(answers) != 1:
            raise contender.ContenderFailed(f"the stream had {len(answers)} answers")
        return answers[0]


async def _channel(port: int) -> grpc.aio.Channel:
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    return grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options)


def _answer(logprobs: Any) -> Answer:
    """As arrays, which is what anybody would do next. The first token has no log-probability."""
    rows = logprobs.top_logprobs[1:]
    return Answer(
        np.array([token.value for token in logprobs.token_logprobs[1:]], np.float32),
        np.array([np.array(row.token_ids, np.int32) for row in rows]),
        np.array([np.array(row.values, np.float32) for row in rows]),
    )
