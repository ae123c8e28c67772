"""A teacher whose distribution is known, behind a real gRPC server whose faults are objects.

`FakeServer` runs in this process on a thread of its own and shares no code with `teacher_server`, so the two
can be checked against each other. `python -m tests.fakes` serves it from a process that a test can stop.
"""

import asyncio
import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
import numpy as np

from stillhouse.codec import Scores, ScoreTask, Teacher, decode_request, encode_response, encode_teacher
from stillhouse.errors import StillhouseError, to_grpc_status
from stillhouse.v1 import teacher_pb2 as pb

ROOT = Path(__file__).parent.parent
SERVICE = "stillhouse.v1.TeacherService"

SERVER_OPTIONS = (
    ("grpc.so_reuseport", 0),  # two servers on one port are an error
    ("grpc.http2.min_ping_interval_without_data_ms", 100),  # docs/contract.md: keepalive
)


class BigramTeacher:
    """The next token depends on the last one only: `logits[last]`, float64 [V, V]. Token 0 never follows."""

    def __init__(self, vocabulary_size: int = 19, seed: int = 0) -> None:
        self.logits = np.random.default_rng(seed).normal(0.0, 3.0, (vocabulary_size, vocabulary_size))
        self.logits[:, 0] = -np.inf

    def scaled(self, task: ScoreTask) -> np.ndarray:
        """Logits over the temperature at the response positions: float64 [N, V]."""
        return self.logits[task.token_ids[task.score_start - 1 : -1]] / task.temperature

    def score(self, task: ScoreTask) -> Scores:
        """The exact scores, rounded once, to float32."""
        logits = self.scaled(task)
        log_normalizer = _log_sum_exp(logits)
        logprobs = logits - log_normalizer[:, None]
        top_ids = np.argsort(-logprobs, axis=1, kind="stable")[:, : task.top_k]
        inside = np.zeros(logprobs.shape, bool)
        np.put_along_axis(inside, top_ids, True, axis=1)
        log_tail = _log_sum_exp(np.where(inside, -np.inf, logprobs))
        candidate_logprobs = None
        if task.candidate_ids is not None:
            candidate_logprobs = np.take_along_axis(logprobs, task.candidate_ids, axis=1).astype(np.float32)
            np.put_along_axis(inside, task.candidate_ids, True, axis=1)
        finite = np.where(np.isfinite(logprobs), logprobs, 0.0)
        sampled = task.token_ids[task.score_start :, None]
        return Scores(
            top_ids=top_ids.astype(np.int32),
            top_logprobs=np.take_along_axis(logprobs, top_ids, axis=1).astype(np.float32),
            sampled_logprobs=np.take_along_axis(logprobs, sampled, axis=1)[:, 0].astype(np.float32),
            candidate_logprobs=candidate_logprobs,
            log_tail=log_tail.astype(np.float32),
            log_support_tail=_log_sum_exp(np.where(inside, -np.inf, logprobs)).astype(np.float32),
            entropy=-(np.exp(logprobs) * finite).sum(axis=1).astype(np.float32),
            log_normalizer=log_normalizer.astype(np.float32),
            model="bigram",
            model_revision="r1",
            temperature=task.temperature,
            queue_wait_ms=0.5,
            engine_ms=1.5,
            batch_sequences=1,
            compute_dtype="float64",
        )

    def describe(self) -> Teacher:
        return Teacher(
            model="bigram",
            model_revision="r1",
            vocabulary_size=len(self.logits),
            vocabulary_digest="digest of the bigram vocabulary",
            max_sequence_tokens=4096,
            max_top_k=len(self.logits),
            max_candidates=8,
            min_temperature=0.1,
            max_temperature=10.0,
            max_response_bytes=2**26,
            compute_dtype="float64",
            engine="torch",
            server_version="fake",
        )


def _log_sum_exp(x: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.logaddexp.reduce(x, axis=1)


Answer = Callable[[pb.ScoreResponse], pb.ScoreResponse | bytes]


@dataclass
class Fault:
    """What happens instead of the right answer to call number `call` (1, 2, ...; None: every call)."""

    call: int | None
    method: str
    code: grpc.StatusCode | None = None
    error: StillhouseError | None = None
    hang: bool = False
    answer: Answer | None = None


@dataclass
class Faults:
    """The faults of one server; the first that fits a call is used."""

    planned: list[Fault] = field(default_factory=list)

    def fail_at(
        self,
        *,
        call: int | None = None,
        code: grpc.StatusCode | None = None,
        error: StillhouseError | None = None,
        method: str = "Score",
    ) -> None:
        """Fails with a bare status, or with an error of the table."""
        self.planned.append(Fault(call, method, code=code, error=error))

    def hang_at(self, *, call: int | None = None, method: str = "Score") -> None:
        """Waits until the server is released, then answers right."""
        self.planned.append(Fault(call, method, hang=True))

    def answer_at(self, change: Answer, *, call: int | None = None, method: str = "Score") -> None:
        """Answers with `change(right answer)`, which may be bytes that are no message."""
        self.planned.append(Fault(call, method, answer=change))

    def at(self, method: str, call: int) -> Fault | None:
        fits = [fault for fault in self.planned if fault.method == method and fault.call in (None, call)]
        return fits[0] if fits else None


def wrong_digest(response: pb.ScoreResponse) -> pb.ScoreResponse:
    response.echo.request_digest = bytes(32)
    return response


def wrong_shape(response: pb.ScoreResponse) -> pb.ScoreResponse:
    response.entropy.shape[:] = [response.entropy.shape[0] + 1]
    response.entropy.data += bytes(4)
    return response


def one_nan(response: pb.ScoreResponse) -> pb.ScoreResponse:
    values = np.frombuffer(response.entropy.data, "<f4").copy()
    values[-1] = np.nan
    response.entropy.data = values.tobytes()
    return response


def garbage(response: pb.ScoreResponse) -> bytes:
    return b"\xff" * 40


class FakeServer:
    """TeacherService at `host`, on its own thread and event loop, from construction to `stop`.

    `requests` holds every ScoreRequest seen, as it came, and `metadata` what came with it. `in_flight` and
    `most_in_flight` count Score calls that are being handled, `cancelled` those that the caller gave up.
    `delay_s`: what every Score takes at least. `credentials`: None for plaintext.
    """

    def __init__(
        self,
        teacher: BigramTeacher | None = None,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        credentials: grpc.ServerCredentials | None = None,
    ) -> None:
        self.teacher = teacher or BigramTeacher()
        self.delay_s = 0.0
        self.faults = Faults()
        self.requests: list[pb.ScoreRequest] = []
        self.metadata: list[dict[str, str | bytes]] = []
        self.calls = {"Score": 0, "GetTeacher": 0}
        self.in_flight = 0
        self.most_in_flight = 0
        self.cancelled = 0
        self._changed = threading.Condition()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fake-server", daemon=True)
        self._thread.start()
        self.port: int = self._run(self._start(host, port, credentials))
        self.address = f"{host}:{self.port}"

    def release(self) -> None:
        """Lets the calls that hang now, and those that would later, go on."""
        self._loop.call_soon_threadsafe(self._released.set)

    def wait_for(self, condition: Callable[[Self], bool]) -> None:
        """Returns once `condition(self)` holds; fails the test after 100 s."""
        with self._changed:
            assert self._changed.wait_for(lambda: condition(self), timeout=100.0), "the condition never held"

    def stop(self) -> None:
        """Ends the server at once: calls in flight are dropped, the port is closed. Twice does nothing."""
        if not self._thread.is_alive():
            return
        self._run(self._server.stop(None))
        self._run(_end_tasks())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=20.0)

    async def _start(self, host: str, port: int, credentials: grpc.ServerCredentials | None) -> int:
        self._released = asyncio.Event()
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        handlers = {
            "Score": grpc.unary_unary_rpc_method_handler(self._score, pb.ScoreRequest.FromString, _serialize),
            "GetTeacher": grpc.unary_unary_rpc_method_handler(
                self._get_teacher, pb.GetTeacherRequest.FromString, _serialize
            ),
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        if credentials is None:
            bound = self._server.add_insecure_port(f"{host}:{port}")
        else:
            bound = self._server.add_secure_port(f"{host}:{port}", credentials)
        await self._server.start()
        return bound

    async def _score(self, request: pb.ScoreRequest, context: Any) -> pb.ScoreResponse | bytes:
        with self._changed:
            self.requests.append(request)
            self.metadata.append(dict(context.invocation_metadata()))
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            self._changed.notify_all()
        cancelled = True
        try:
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            answer = await self._answer("Score", lambda: self._scores(request), context)
            cancelled = False
            return answer
        except (StillhouseError, grpc.aio.AbortError):
            cancelled = False
            raise
        finally:
            with self._changed:
                self.in_flight -= 1
                self.cancelled += cancelled
                self._changed.notify_all()

    async def _get_teacher(self, request: pb.GetTeacherRequest, context: Any) -> Any:
        return await self._answer("GetTeacher", lambda: encode_teacher(self.teacher.describe()), context)

    def _scores(self, request: pb.ScoreRequest) -> pb.ScoreResponse:
        task = decode_request(request)
        return encode_response(task, self.teacher.score(task))

    async def _answer(self, method: str, right: Callable[[], Any], context: Any) -> Any:
        self.calls[method] += 1
        fault = self.faults.at(method, self.calls[method])
        if fault is not None and fault.code is not None:
            await context.abort(fault.code, "a planned fault")
        if fault is not None and fault.hang:
            await self._released.wait()
        try:
            if fault is not None and fault.error is not None:
                raise fault.error
            answer = right()
        except StillhouseError as error:
            status = to_grpc_status(error)
            await context.abort(status.code, status.details, status.trailing_metadata)
        return answer if fault is None or fault.answer is None else fault.answer(answer)


def _serialize(message: Any) -> bytes:
    return message if isinstance(message, bytes) else message.SerializeToString()


async def _end_tasks() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def child_environment() -> dict[str, str]:
    """The environment of a Python process that imports this repository, wherever it runs."""
    return os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "proto")))}


@contextlib.contextmanager
def served_by_a_process(*arguments: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A FakeServer in a process of its own: (address, process). --hang-first: call 1 hangs for ever."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.fakes", *arguments],
        cwd=ROOT,
        env=child_environment(),
        stdin=subprocess.PIPE,  # the server ends when this closes, with the test run at the latest
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip(), process
    finally:
        process.kill()
        process.communicate()


if __name__ == "__main__":
    with FakeServer() as running:
        if "--hang-first" in sys.argv:
            running.faults.hang_at(call=1)
        print(running.address, flush=True)
        sys.stdin.read()
