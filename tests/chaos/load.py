"""The callers' side of a chaos test, as a program of its own: many calls in flight, every answer checked.

    python -m tests.chaos.load '{"addresses": ["127.0.0.1:50051"], ...}'      (the fields of `Plan`)

Every sequence is unique and a function of its number, and so is its one right answer (`synthetic_scores`): an answer
that was lost, doubled, swapped or changed is found by comparing bits. Says on standard output, as JSON lines, how many
sequences were sent and answered so far; when standard input closes it sends no more, waits for what is in flight and
prints a `Report`.

Start `tests.chaos.pool_under_test.Load`, which speaks this with it.
"""

import asyncio
import contextlib
import dataclasses
import itertools
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.synthetic_server import VOCABULARY, describe, synthetic_scores
from stillhouse.archive import Archive, ArchivedClient
from stillhouse.client import AsyncTeacherClient, TeacherClient, Tls
from stillhouse.codec import Scores
from stillhouse.errors import StillhouseError
from stillhouse.request import make_task

_SAY_EVERY_S = 0.05
_MAX_TEXTS = 20


@dataclass(frozen=True)
class Plan:
    """What to send, how, and to whom."""

    addresses: tuple[str, ...]
    clients: int = 2
    in_flight: int = 12  # of each client
    seed: int = 0
    tokens: tuple[int, int] = (200, 500)  # least and most, of a sequence
    rows: tuple[int, int] = (20, 150)  # response positions
    top_k: int = 16
    deadline_s: float = 60.0
    burst: int = 0  # 0: always `in_flight`; else so many at once, again `every_s` after the last burst began
    every_s: float = 0.0
    per_s: float = 0.0  # > 0: so many a second, whatever is in flight
    variety: bool = True  # candidates, temperatures and float16 on the wire, now and then
    options: dict[str, Any] = field(default_factory=dict)  # further ones of the client
    tls: dict[str, str] | None = None
    archive: str = ""  # where scores are recorded; "" for nowhere


@dataclass
class Report:
    """How it went. Times are of the monotonic clock, which all processes of a machine share."""

    sent: int = 0
    answered: int = 0  # calls that returned scores
    unanswered: int = 0  # sequences that got neither scores nor an error
    doubled: int = 0  # sequences that got more than one of these
    wrong: list[str] = field(default_factory=list)  # answers that are not the one right answer
    errors: list[str] = field(default_factory=list)
    reasons: dict[str, int] = field(default_factory=dict)  # of all errors
    replies: list[tuple[float, float, int]] = field(default_factory=list)  # sent, answered, tokens
    retries: dict[str, int] = field(default_factory=dict)  # by reason
    servers: dict[str, bool] = field(default_factory=dict)  # by address: whether it has a connection
    archive: dict[str, int] = field(default_factory=dict)

    def check_exactly_once(self) -> None:
        """Fails unless every sequence was answered once, bit for bit, and no error reached the caller."""
        assert not self.errors, f"{self.reasons}: {self.errors[:3]}"
        assert not self.wrong, f"{len(self.wrong)} wrong answers: {self.wrong[:3]}"
        assert self.unanswered == self.doubled == 0, f"{self.unanswered} unanswered, {self.doubled} doubled"
        assert self.answered == self.sent == len(self.replies) > 0

    def longest_gap_s(self, from_s: float = 0.0) -> float:
        """The longest time without any reply, after `from_s`."""
        ends = [end_s for _, end_s, _ in self.replies if end_s >= from_s]
        return max((later - earlier for earlier, later in itertools.pairwise(ends)), default=0.0)

    def latencies_s(self, from_s: float = 0.0, to_s: float = float("inf")) -> np.ndarray:
        """Of the sequences sent in that time, with retries and waits."""
        return np.array([end_s - sent_s for sent_s, end_s, _ in self.replies if from_s <= sent_s < to_s])

    def p99_s(self, from_s: float = 0.0, to_s: float = float("inf")) -> float:
        """Of `latencies_s`."""
        return float(np.quantile(self.latencies_s(from_s, to_s), 0.99))

    def tokens_per_s(self, from_s: float, to_s: float) -> float:
        """Tokens of the sequences answered in that time, a second."""
        return sum(tokens for _, end_s, tokens in self.replies if from_s <= end_s < to_s) / (to_s - from_s)


@dataclass(frozen=True)
class Sequence:
    """One request."""

    token_ids: np.ndarray
    score_start: int
    top_k: int
    options: dict[str, Any]


def make_sequence(plan: Plan, number: int) -> Sequence:
    """Sequence `number` of the plan: the same in every run, and no two alike."""
    rng = np.random.default_rng((plan.seed, number))
    length = int(rng.integers(plan.tokens[0], plan.tokens[1], endpoint=True))
    rows = min(length - 1, int(rng.integers(plan.rows[0], plan.rows[1], endpoint=True)))
    token_ids = rng.integers(0, VOCABULARY, length).astype(np.int32)
    if not plan.variety:
        return Sequence(token_ids, length - rows, plan.top_k, {})
    options: dict[str, Any] = {"temperature": float(rng.choice([0.7, 1.0, 1.3])), "half_precision": number % 5 == 0}
    if number % 3 == 0:
        options["candidate_ids"] = rng.integers(0, VOCABULARY, (rows, 4)).astype(np.int32)
    return Sequence(token_ids, length - rows, plan.top_k if number % 7 else 0, options)


def difference(sequence: Sequence, scores: Scores) -> str:
    """Which arrays of the answer are not the right one's, bit for bit; "" if none."""
    task = make_task("", sequence.token_ids, sequence.score_start, sequence.top_k, sequence.options)  # type: ignore[arg-type]
    right = synthetic_scores(task, describe(scores.model, scores.model_revision))
    found = []
    for of in dataclasses.fields(Scores):
        is_one, should_be = getattr(scores, of.name), getattr(right, of.name)
        if isinstance(should_be, np.ndarray):
            if task.half_precision and of.name in ("top_logprobs", "candidate_logprobs"):
                should_be = should_be.astype(np.float16).astype(np.float32)
            # Not `array_equal`: that would call 0.0 and -0.0 the same.
            if is_one is None or not (
                is_one.dtype == should_be.dtype
                and is_one.shape == should_be.shape
                and is_one.tobytes() == should_be.tobytes()
            ):
                found.append(of.name)
        elif of.name == "candidate_logprobs" and is_one is not None:
            found.append(of.name)
    if scores.temperature != task.temperature:
        found.append("temperature")
    return ", ".join(found)


Send = Callable[[Sequence], Awaitable[Scores]]


class _Run:
    """Sends what the plan says until it is stopped."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.report = Report()
        self.stopping = asyncio.Event()
        self._numbers = itertools.count()
        self._ends: Counter[int] = Counter()
        self._reasons: Counter[str] = Counter()

    async def go(self, sends: list[Send]) -> None:
        if self.plan.burst or self.plan.per_s:
            await asyncio.gather(*(self._paced(send) for send in sends))
        else:
            await asyncio.gather(*(self._steadily(send) for send in sends for _ in range(self.plan.in_flight)))
        self.report.unanswered = sum(number not in self._ends for number in range(self.report.sent))
        self.report.doubled = sum(times > 1 for times in self._ends.values())
        self.report.reasons = dict(self._reasons)
        self.report.replies.sort(key=lambda reply: reply[1])

    async def _steadily(self, send: Send) -> None:
        while not self.stopping.is_set():
            await self._one(send)

    async def _paced(self, send: Send) -> None:
        """Bursts, or single sequences in the moments of a Poisson process."""
        gaps = random.Random(self.plan.seed)
        calls: set[asyncio.Task[None]] = set()
        next_s = time.monotonic()
        while not self.stopping.is_set():
            for _ in range(self.plan.burst or 1):
                call = asyncio.create_task(self._one(send))
                calls.add(call)
                call.add_done_callback(calls.discard)
            if self.plan.burst:
                next_s = max(next_s + self.plan.every_s, time.monotonic())
                await asyncio.wait(calls)  # a trainer has its batch before it makes the next
            else:
                next_s += gaps.expovariate(self.plan.per_s)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.stopping.wait(), max(0.0, next_s - time.monotonic()))
        await asyncio.gather(*calls)

    async def _one(self, send: Send) -> None:
        number = next(self._numbers)
        self.report.sent += 1
        sequence = make_sequence(self.plan, number)
        sent_s = time.monotonic()
        try:
            scores = await send(sequence)
        except StillhouseError as error:
            self._ends[number] += 1
            self._reasons[error.reason] += 1
            if len(self.report.errors) < _MAX_TEXTS:
                notes = "; ".join(getattr(error, "__notes__", ()))
                self.report.errors.append(f"{error.reason} after {time.monotonic() - sent_s:.2f} s: {error} [{notes}]")
            return
        ended_s = time.monotonic()
        self._ends[number] += 1
        self.report.answered += 1
        self.report.replies.append((sent_s, ended_s, len(sequence.token_ids)))
        if changed := difference(sequence, scores):
            self.report.wrong.append(f"sequence {number}: {changed}")


async def _say(run: _Run) -> None:
    while True:
        print(json.dumps({"sent": run.report.sent, "answered": run.report.answered}), flush=True)
        await asyncio.sleep(_SAY_EVERY_S)


async def _main(plan: Plan) -> Report:
    run = _Run(plan)
    loop = asyncio.get_running_loop()
    loop.run_in_executor(ThreadPoolExecutor(1), sys.stdin.read).add_done_callback(lambda _: run.stopping.set())
    options = dict(plan.options)
    if plan.tls is not None:
        options["tls"] = Tls(**{name: Path(file) for name, file in plan.tls.items()})
    if "token_file" in options:
        options["token_file"] = Path(options["token_file"])
    # A plan with its own pace says how much is in flight; the client must not hold it back.
    in_flight = 100_000 if plan.burst or plan.per_s else plan.in_flight
    saying = asyncio.create_task(_say(run))
    if plan.archive:
        await _archived(run, options, in_flight)
    else:
        clients = [AsyncTeacherClient(plan.addresses, max_in_flight=in_flight, **options) for _ in range(plan.clients)]
        await run.go([_sender(client, plan.deadline_s) for client in clients])
        for client in clients:
            run.report.retries = dict(Counter(run.report.retries) + client.stats.retries)
            for state in client.servers:
                run.report.servers[state.address] = run.report.servers.get(state.address, False) or state.connected
            await client.close()
    saying.cancel()
    return run.report


async def _archived(run: _Run, options: dict[str, Any], in_flight: int) -> None:
    """The same through the client that keeps every score, which is blocking."""
    archive = Archive.open(run.plan.archive)
    with ArchivedClient(TeacherClient(run.plan.addresses, max_in_flight=in_flight, **options), archive) as client:

        async def send(sequence: Sequence) -> Scores:
            return await asyncio.wrap_future(
                client.submit_score(
                    sequence.token_ids,
                    score_start=sequence.score_start,
                    top_k=sequence.top_k,
                    deadline_s=run.plan.deadline_s,
                    **sequence.options,
                )
            )

        await run.go([send])
    run.report.retries = dict(client.stats.retries)
    run.report.archive = dataclasses.asdict(archive.stats)


def _sender(client: AsyncTeacherClient, deadline_s: float) -> Send:
    async def send(sequence: Sequence) -> Scores:
        return await client.score(
            sequence.token_ids,
            score_start=sequence.score_start,
            top_k=sequence.top_k,
            deadline_s=deadline_s,
            **sequence.options,
        )

    return send


if __name__ == "__main__":
    print(json.dumps({"report": dataclasses.asdict(asyncio.run(_main(Plan(**json.loads(sys.argv[1])))))}), flush=True)
