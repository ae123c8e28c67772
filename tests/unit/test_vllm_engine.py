"""The vLLM engine's own part: handing over, taking back, refusing, checking, noticing deaths. No vLLM here."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from stillhouse.codec import Scores, ScoreTask, Teacher
from stillhouse.errors import (
    EngineFailed,
    NonFiniteScores,
    OutOfMemory,
    StillhouseError,
    Unavailable,
)
from teacher_server import vllm_engine
from teacher_server.engine import SelfCheckFailed
from teacher_server.packing import (
    Counters,
    RowRequest,
    failure_of,
    join_answer,
    pack_failure,
    pack_rows,
    row_request,
    unpack_answer,
)
from teacher_server.row_scores import score_logits
from teacher_server.vllm_engine import VllmEngine
from teacher_server.vllm_versions import UnsupportedVllm, check_version
from tests.models import scores_of_logits

V = 40
TEACHER = Teacher(
    model="oak",
    model_revision="r1",
    vocabulary_size=V,
    vocabulary_digest="",
    max_sequence_tokens=128,
    max_top_k=V,
    max_candidates=8,
    min_temperature=0.01,
    max_temperature=100.0,
    max_response_bytes=2**20,
    compute_dtype="float32",
    engine="vllm",
    server_version="0",
)


class WorkerGone(Exception):
    pass


class BigramWorker:
    """A worker whose model is a table: the logits after a token depend on that token and its position."""

    def __init__(self) -> None:
        self.table = torch.randn(V, V, generator=torch.Generator().manual_seed(0)) * 3
        self.dead = False
        self.cause_of_death = "it was told to"
        self.calls: list[bool] = []  # read_cache of each
        self.withdrawn = 0
        self.gate: asyncio.Event | None = None
        self.shut_down = False
        self.answer: Callable[[torch.Tensor], torch.Tensor] = lambda answer: answer
        self.logits: Callable[[torch.Tensor, RowRequest], torch.Tensor] = lambda z, request: z

    async def encode(
        self, request_id: str, token_ids: list[int], request: RowRequest, *, read_cache: bool
    ) -> np.ndarray:
        self.calls.append(read_cache)
        if self.gate is not None:
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                self.withdrawn += 1
                raise
        if self.dead:
            raise WorkerGone("gone")
        rows = torch.arange(request.first_row, request.first_row + len(request.target_ids))
        z = self.table[torch.tensor(token_ids)[rows]] + 0.01 * rows[:, None] * torch.linspace(-1, 1, V)
        z = self.logits(z, request) / request.temperature
        scores = score_logits(
            z.float().contiguous().clone(),
            torch.from_numpy(request.target_ids.astype(np.int64)),
            request.top_k,
            torch.from_numpy(request.candidate_ids.astype(np.int64)),
        )
        return self.answer(join_answer(Counters(1500, 3, 16), [pack_rows(scores)])).numpy()

    def shutdown(self) -> None:
        self.shut_down = True


def engine_of(worker: BigramWorker, **options: object) -> VllmEngine:
    settings = {"died_error": WorkerGone, **options}
    return VllmEngine(worker, TEACHER, **settings)  # pyright: ignore[reportArgumentType]


def make_task(seed: int = 0, length: int = 20, start: int = 5, *, k: int = 4, m: int = 2) -> ScoreTask:
    rng = np.random.default_rng(seed)
    return ScoreTask(
        model="",
        token_ids=rng.integers(0, V, length).astype(np.int32),
        score_start=start,
        top_k=k,
        candidate_ids=rng.integers(0, V, (length - start, m)).astype(np.int32) if m else None,
        temperature=0.5,
    )


def assert_right(worker: BigramWorker, task: ScoreTask, scores: Scores) -> None:
    rows = np.arange(task.score_start - 1, len(task.token_ids) - 1)
    z = worker.table.double().numpy()[task.token_ids[rows]] + 0.01 * rows[:, None] * np.linspace(-1, 1, V)
    expected = scores_of_logits(
        z,
        task.token_ids[task.score_start :],
        top_k=task.top_k,
        candidate_ids=task.candidate_ids,
        temperature=task.temperature,
    )
    for name, want in expected.items():
        got = getattr(scores, name)
        if got is not None:
            np.testing.assert_allclose(got, want, atol=2e-5, err_msg=name)


# What travels


@pytest.mark.parametrize(("k", "m"), [(0, 0), (3, 0), (0, 2), (V, 5)])
def test_requests_and_answers_survive_the_way(k: int, m: int) -> None:
    task = make_task(1, k=k, m=m)
    request = row_request(task)
    there = RowRequest.unpack(request.pack())
    assert (there.first_row, there.top_k, there.temperature, there.plain) == (4, k, 0.5, False)
    assert np.array_equal(there.target_ids, task.token_ids[5:])
    assert there.candidate_ids.shape == (15, m)
    assert task.candidate_ids is None or np.array_equal(there.candidate_ids, task.candidate_ids)
    z = torch.randn(15, V)
    scores = score_logits(
        z, torch.tensor(there.target_ids).long(), k, torch.from_numpy(there.candidate_ids.astype(np.int64))
    )
    packed = pack_rows(scores)
    answer = join_answer(Counters(7, 8, 9), [packed[:4], packed[4:]])
    counters, fields = unpack_answer(answer.numpy(), there)
    assert counters == Counters(7, 8, 9)
    for name, want in scores.numpy().items():
        assert np.array_equal(fields[name], want), name


def test_a_reason_travels_as_one_and_scores_do_not() -> None:
    assert failure_of(pack_failure("memory: löst").numpy()) == "memory: löst"
    assert failure_of(np.zeros((2, 5), np.int32)) is None


# Work


async def test_many_sequences_get_each_their_own_scores() -> None:
    worker = BigramWorker()
    cached: list[int] = []
    engine = engine_of(worker, on_cached=cached.append)
    tasks = [make_task(seed, 10 + seed, 1 + seed % 8, k=seed % 5, m=seed % 3) for seed in range(20)]
    for task, scores in zip(tasks, await asyncio.gather(*map(engine.score, tasks)), strict=True):
        assert_right(worker, task, scores)
        assert (scores.model, scores.model_revision, scores.temperature) == ("oak", "r1", 0.5)
        assert (scores.batch_sequences, scores.engine_ms > 0, scores.queue_wait_ms >= 0) == (3, True, True)
    assert engine.pending_tokens == 0
    assert cached == [16] * 20
    assert worker.calls == [True] * 20


async def test_rows_hidden_by_a_reused_prefix_are_asked_for_again_without_reuse() -> None:
    worker = BigramWorker()
    resent: list[int] = []
    engine = engine_of(worker, on_resent=lambda: resent.append(1))
    worker.answer = lambda answer: answer[:1] if worker.calls[-1] else answer
    task = make_task()
    assert_right(worker, task, await engine.score(task))
    assert (worker.calls, resent) == ([True, False], [1])
    worker.answer = lambda answer: answer[:-1]
    with pytest.raises(EngineFailed, match="without the scores of some response tokens"):
        await engine.score(task)
    assert engine.pending_tokens == 0


@pytest.mark.parametrize(
    ("reason", "error"), [("memory: CUDA out of memory", OutOfMemory), ("failed: KeyError: /secret", EngineFailed)]
)
async def test_a_failure_on_the_worker_belongs_to_its_sequence(
    reason: str, error: type[StillhouseError], caplog: pytest.LogCaptureFixture
) -> None:
    worker = BigramWorker()
    engine = engine_of(worker)
    worker.answer = lambda answer: pack_failure(reason)
    with pytest.raises(error) as raised:
        await engine.score(make_task())
    assert reason.partition(": ")[2] not in raised.value.message
    assert reason.partition(": ")[2] in caplog.text
    worker.answer = lambda answer: answer
    assert_right(worker, make_task(), await engine.score(make_task()))


async def test_logits_that_are_not_finite_are_named_with_their_position() -> None:
    worker = BigramWorker()

    def broken(z: torch.Tensor, request: RowRequest) -> torch.Tensor:
        z[7, 3] = torch.nan
        return z

    worker.logits = broken
    with pytest.raises(NonFiniteScores) as raised:
        await engine_of(worker).score(make_task())
    assert raised.value.fields["position"] == "7"


async def test_a_withdrawn_sequence_reaches_the_worker_as_such() -> None:
    worker = BigramWorker()
    worker.gate = asyncio.Event()
    engine = engine_of(worker)
    first = asyncio.create_task(engine.score(make_task(length=60)))
    second = asyncio.create_task(engine.score(make_task(length=40)))
    await asyncio.sleep(0.01)
    assert engine.pending_tokens == 100
    second.cancel()
    await asyncio.gather(second, return_exceptions=True)
    assert second.cancelled()
    assert (engine.pending_tokens, worker.withdrawn) == (60, 1)
    third = asyncio.create_task(engine.score(make_task(length=40)))
    await asyncio.sleep(0.01)
    worker.gate.set()
    await asyncio.gather(first, third)
    assert engine.pending_tokens == 0


async def test_an_error_of_vllm_that_nobody_expected_is_engine_failed() -> None:
    worker = BigramWorker()

    def broken(answer: torch.Tensor) -> torch.Tensor:
        raise KeyError("block 7")

    worker.answer = broken
    with pytest.raises(EngineFailed) as raised:
        await engine_of(worker).score(make_task())
    assert "block 7" not in raised.value.message


# The end


async def test_a_death_fails_what_is_in_flight_as_unavailable_and_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_engine, "_WATCH_S", 0.01)
    worker = BigramWorker()
    worker.gate = asyncio.Event()
    engine = engine_of(worker)
    work = asyncio.create_task(engine.score(make_task()))
    death = asyncio.create_task(engine.died())
    await asyncio.sleep(0.1)
    assert not death.done()
    worker.dead = True
    worker.gate.set()
    with pytest.raises(Unavailable):
        await work
    assert await asyncio.wait_for(death, 5) == "the vLLM engine died: it was told to"
    assert engine.pending_tokens == 0


async def test_closing_fails_what_is_left_and_is_no_death(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_engine, "_WATCH_S", 0.01)
    worker = BigramWorker()
    worker.gate = asyncio.Event()
    engine = engine_of(worker)
    work = asyncio.create_task(engine.score(make_task()))
    death = asyncio.create_task(engine.died())
    await asyncio.sleep(0.01)
    await engine.close()
    with pytest.raises(Unavailable):
        await work
    with pytest.raises(Unavailable):
        await engine.score(make_task())
    worker.dead = True  # its processes are gone now, as they should be
    await asyncio.sleep(0.05)
    assert worker.shut_down
    assert not death.done()
    death.cancel()


# The check at start


async def test_a_right_engine_passes_its_check() -> None:
    worker = BigramWorker()
    assert await engine_of(worker).check() <= 1e-5
    assert len(worker.calls) == 5


def only_ours(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor, RowRequest], torch.Tensor]:
    return lambda z, request: z if request.plain else change(z)


@pytest.mark.parametrize(
    ("logits", "says"),
    [
        (only_ours(lambda z: z.roll(1, dims=0)), "scores and those of vLLM's own logits"),
        (only_ours(lambda z: z * 1.01), "scores and those of vLLM's own logits"),
        (only_ours(lambda z: torch.cat([z[:, :-1], z[:, -1:] + 9], 1)), "scores and those of vLLM's own logits"),
        (lambda z, request: torch.zeros_like(z), "do not depend on the token before"),
        (lambda z, request: z.roll(1, dims=0), "do not depend on the token before"),
        # Both ways wrong alike: each row sees the token that it should predict.
        (
            lambda z, request: z.scatter_add(
                1, torch.from_numpy(request.target_ids).long()[:, None], torch.full((len(z), 1), 5.0)
            ),
            "changed last token",
        ),
        (lambda z, request: z * torch.nan, "nan"),
    ],
)
async def test_a_wrong_engine_fails_its_check(
    logits: Callable[[torch.Tensor, RowRequest], torch.Tensor], says: str
) -> None:
    worker = BigramWorker()
    worker.logits = logits
    with pytest.raises(SelfCheckFailed, match=says):
        await engine_of(worker).check()


async def test_a_prefix_that_is_reused_wrongly_fails_the_check() -> None:
    worker = BigramWorker()
    worker.logits = lambda z, request: z + (torch.arange(V) if len(worker.calls) == 3 else 0)
    with pytest.raises(SelfCheckFailed, match="reused prefix"):
        await engine_of(worker).check()


async def test_a_check_that_gets_no_answer_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_engine, "SELF_CHECK_TIMEOUT_S", 0.05)
    worker = BigramWorker()
    worker.gate = asyncio.Event()
    started_s = time.monotonic()
    with pytest.raises(SelfCheckFailed, match="no answer within"):
        await engine_of(worker).check()
    assert time.monotonic() - started_s < 5
    worker.gate.set()
    worker.dead = True
    with pytest.raises(SelfCheckFailed, match="gone"):
        await engine_of(worker).check()


async def test_tiny_models_can_be_checked_too() -> None:
    worker = BigramWorker()
    small = VllmEngine(
        worker,
        replace(TEACHER, max_sequence_tokens=2, max_top_k=0),
        died_error=WorkerGone,
    )
    assert await small.check() <= 1e-5


# Versions


@pytest.mark.parametrize("version", ["0.25.0", "0.25.1", "0.32.0+cpu", "0.33.0", "0.33.0rc1"])
def test_versions_in_the_range_are_served_with(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize("version", ["0.24.9", "0.34.0", "1.0", "0.9.2", "dev", "0.dev1", "0"])
def test_versions_out_of_the_range_are_refused(version: str) -> None:
    with pytest.raises(UnsupportedVllm, match=rf"vllm {version} is installed.*0\.25 to 0\.33"):
        check_version(version)
