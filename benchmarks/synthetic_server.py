"""A teacher server without a model: the real server around an engine that sleeps as long as its cost model says.

    python -m benchmarks.synthetic_server --listen 127.0.0.1:0 --tokens-per-s 200000

Everything but the engine is the program that users run: identity, gate, metrics, health, drain. The engine takes
whatever waits, up to `--max-batch-tokens`, and answers after

    (overhead_s + tokens / tokens_per_s) * slow_factor

(`--pause-share` of the batches take `--pause-ms` longer), with scores that are a function of the request alone, cheap
to make and different for every request: an answer that was lost, doubled, swapped or changed on its way is found by
comparing bits.
"""

import argparse
import asyncio
import random
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from stillhouse.codec import Scores, ScoreTask, Teacher
from stillhouse.errors import Unavailable
from teacher_server.engine import EngineLost
from teacher_server.fair_queue import Bounds
from teacher_server.logs import set_up
from teacher_server.options import OptionError
from teacher_server.pages import Pages
from teacher_server.security import load_security
from teacher_server.server import serve

VOCABULARY = 151_936
MAX_K = 256
_TABLE_ROWS = 16_384
_rng = np.random.default_rng(0)
_LOGPROBS = -np.sort(_rng.exponential(3.0, (_TABLE_ROWS, MAX_K)).astype(np.float32), axis=1)
_IDS = _rng.integers(0, VOCABULARY, (_TABLE_ROWS, MAX_K)).astype(np.int32)


def synthetic_scores(task: ScoreTask, teacher: Teacher) -> Scores:
    """The one right answer to `task`; no distribution stands behind it."""
    rows = task.num_scored
    digest = task.digest()
    first = int.from_bytes(digest[:4], "little") % (_TABLE_ROWS - rows)
    place = slice(first, first + rows)
    own = np.frombuffer(digest, np.uint8)[:8].astype(np.float32)
    sampled = -(task.token_ids[task.score_start :] % 97).astype(np.float32) / 8 - own[0] / 256
    return Scores(
        top_ids=_IDS[place, : task.top_k],
        top_logprobs=_LOGPROBS[place, : task.top_k],
        sampled_logprobs=sampled,
        candidate_logprobs=None
        if task.candidate_ids is None
        else -(task.candidate_ids % 89).astype(np.float32) / 8 - own[1] / 256,
        log_tail=_LOGPROBS[place, 0] - own[2],
        log_support_tail=_LOGPROBS[place, 0] - own[2] - 1,
        entropy=_LOGPROBS[place, 1] + own[3],
        log_normalizer=_LOGPROBS[place, 2] + own[4],
        model=teacher.model,
        model_revision=teacher.model_revision,
        temperature=task.temperature,
        compute_dtype=teacher.compute_dtype,
    )


class SyntheticEngine:
    """See the module's text. tokens_per_s, overhead_s: of a batch; slow_factor multiplies both. pause_share: of
    batches, which take pause_s longer."""

    def __init__(
        self,
        teacher: Teacher,
        *,
        tokens_per_s: float,
        overhead_s: float,
        max_batch_tokens: int,
        slow_factor: float = 1.0,
        pause_share: float = 0.0,
        pause_s: float = 0.0,
    ) -> None:
        self._teacher = teacher
        self._tokens_per_s = tokens_per_s
        self._overhead_s = overhead_s
        self._max_batch_tokens = max_batch_tokens
        self.slow_factor = slow_factor
        self._pause_share = pause_share
        self._pause_s = pause_s
        self._waiting: dict[asyncio.Future[Scores], tuple[ScoreTask, float]] = {}
        self._arrived = asyncio.Event()
        self._closed = False
        self._worker = asyncio.create_task(self._work())
        self.scored = 0

    def describe(self) -> Teacher:
        """What is served."""
        return self._teacher

    async def check(self) -> float:
        """Nothing can be wrong."""
        return 0.0

    async def died(self) -> str:
        """Never."""
        await asyncio.Event().wait()
        raise AssertionError

    async def close(self) -> None:
        """Fails what is left."""
        self._closed = True
        self._worker.cancel()
        for future in self._waiting:
            if not future.done():
                future.set_exception(Unavailable("the server is stopping"))

    async def score(self, task: ScoreTask) -> Scores:
        """The scores, after the batch's time."""
        if self._closed:
            raise Unavailable("the server is stopping")
        future: asyncio.Future[Scores] = asyncio.get_running_loop().create_future()
        self._waiting[future] = task, time.monotonic()
        self._arrived.set()
        try:
            return await future
        finally:
            self._waiting.pop(future, None)

    async def _work(self) -> None:
        while True:
            while not self._waiting:
                self._arrived.clear()
                await self._arrived.wait()
            batch, tokens = [], 0
            for future, (task, arrived_s) in self._waiting.items():
                if batch and tokens + len(task.token_ids) > self._max_batch_tokens:
                    break
                batch.append((future, task, arrived_s))
                tokens += len(task.token_ids)
            for future, _, _ in batch:
                del self._waiting[future]
            started_s = time.monotonic()
            pause_s = self._pause_s if random.random() < self._pause_share else 0.0
            await asyncio.sleep((self._overhead_s + tokens / self._tokens_per_s) * self.slow_factor + pause_s)
            engine_ms = 1e3 * (time.monotonic() - started_s)
            for future, task, arrived_s in batch:
                if future.done():  # its caller has gone
                    continue
                self.scored += 1
                future.set_result(
                    replace(
                        synthetic_scores(task, self._teacher),
                        queue_wait_ms=1e3 * (started_s - arrived_s),
                        engine_ms=engine_ms,
                        batch_sequences=len(batch),
                    )
                )


def describe(model: str, revision: str, compute_dtype: str = "float32") -> Teacher:
    """What a synthetic server says of itself."""
    return Teacher(
        model=model,
        model_revision=revision,
        vocabulary_size=VOCABULARY,
        vocabulary_digest="synthetic",
        max_sequence_tokens=8192,
        max_top_k=MAX_K,
        max_candidates=64,
        min_temperature=0.01,
        max_temperature=100.0,
        max_response_bytes=128 * 2**20,
        compute_dtype=compute_dtype,
        engine="synthetic",
        server_version="benchmark",
    )


def parser() -> argparse.ArgumentParser:
    """The options: those of the cost model, and some of teacher-server's under their own names."""
    parser = argparse.ArgumentParser(prog="benchmarks.synthetic_server", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--listen", default="127.0.0.1:0")
    add("--metrics-port", type=int, default=0)
    add("--health-listen", default="")
    add("--name", default="synthetic")
    add("--revision", default="r1")
    add("--dtype", default="float32", help="only what the server says it is")
    add("--tokens-per-s", type=float, default=200_000.0)
    add("--overhead-ms", type=float, default=2.0)
    add("--slow-factor", type=float, default=1.0)
    add("--pause-share", type=float, default=0.0, help="share of the batches, 0 .. 1, that take --pause-ms longer")
    add("--pause-ms", type=float, default=0.0)
    add("--max-batch-tokens", type=int, default=8192)
    add("--max-queue-tokens", type=int, default=2**20)
    add("--max-queue-bytes", type=int, default=2**31)
    add("--burst-tokens", type=int, default=2**17)
    add("--window-batches", type=float, default=2.0, help="batches' worth of tokens with the engine")
    add("--drain-s", type=float, default=30.0)
    add("--stall-s", type=float, default=300.0)
    add("--load-s", type=float, default=0.0, help="pretend to load for so long")
    for name in ("--access", "--tls-certificate", "--tls-key", "--tls-client-ca"):
        add(name, type=Path)
    add("--log-level", default="warning")
    add("--log-format", default="text")
    return parser


async def _run(options: argparse.Namespace) -> None:
    pages = Pages(
        metrics_host=options.listen.rpartition(":")[0].strip("[]"),
        metrics_port=options.metrics_port,
        health_listen=options.health_listen,
        stall_s=options.stall_s,
    )
    security = load_security(
        pages.metrics,
        access=options.access,
        tls_certificate=options.tls_certificate,
        tls_key=options.tls_key,
        tls_client_ca=options.tls_client_ca,
        token_review=False,
        token_audience="",
        token_review_url="",
        token_review_credentials=Path(),
    )
    if pages.health:
        print(f"health_port={pages.health.port}", flush=True)
    await asyncio.sleep(options.load_s)
    engine = SyntheticEngine(
        describe(options.name, options.revision, options.dtype),
        tokens_per_s=options.tokens_per_s,
        overhead_s=options.overhead_ms / 1e3,
        max_batch_tokens=options.max_batch_tokens,
        slow_factor=options.slow_factor,
        pause_share=options.pause_share,
        pause_s=options.pause_ms / 1e3,
    )
    await serve(
        engine,
        pages,
        listen=options.listen,
        drain_s=options.drain_s,
        bounds=Bounds(
            max_tokens=options.max_queue_tokens,
            max_bytes=options.max_queue_bytes,
            window_tokens=int(options.window_batches * options.max_batch_tokens),
            burst_tokens=options.burst_tokens,
        ),
        security=security,
        stall_s=options.stall_s,
    )


def main() -> int:
    """Serves until SIGTERM."""
    options = parser().parse_args()
    set_up(options.log_level, options.log_format)
    try:
        asyncio.run(_run(options))
    except OptionError as error:
        print(f"synthetic_server: error: {error}", file=sys.stderr)
        return 2
    except EngineLost:
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
