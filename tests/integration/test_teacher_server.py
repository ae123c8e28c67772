"""`teacher-server` as its users meet it: a process, a channel, a signal; and in this process where a fault is
needed at one exact moment."""

import asyncio
import contextlib
import dataclasses
import json
import re
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from stillhouse.client import AsyncTeacherClient, TeacherClient
from stillhouse.codec import Scores, ScoreTask, Teacher, decode_response, encode_request
from stillhouse.errors import (
    BY_REASON,
    DeadlineExceeded,
    EngineFailed,
    InvalidRequest,
    MalformedArray,
    Overloaded,
    StillhouseError,
    Unavailable,
    from_rpc_error,
)
from stillhouse.v1 import teacher_pb2 as pb
from stillhouse.v1 import teacher_pb2_grpc as pb_grpc
from teacher_server import logs
from teacher_server.cli import main
from teacher_server.metrics import Metrics
from teacher_server.server import RunningServer, start, stop
from tests.models import MAX_POSITIONS, VOCABULARY_SIZE, reference_scores, save_model
from tests.servers import ENGINES, VLLM_SHAPE, ServerProcess, arguments, serving
from tests.unit.test_validation import GOOD, REFUSED
from tests.unit.test_validation import TEACHER as LIMITED

SERVICE = "stillhouse.v1.TeacherService"


# The process


@pytest.fixture(scope="module", params=ENGINES)
def oak(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Whatever is asserted of it, both engines must pass."""
    directory = save_model(tmp_path_factory.mktemp("models") / "oak", "llama", **VLLM_SHAPE)
    with serving(directory, "--max-top-k", "64", "--max-candidates", "16", engine=request.param) as server:
        yield server


@pytest.fixture
def client(oak: ServerProcess) -> Iterator[TeacherClient]:
    with TeacherClient([oak.said["listen"]]) as teacher:
        yield teacher


@pytest.fixture
def channel(oak: ServerProcess) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(oak.said["listen"]) as opened:
        yield opened


def make_task(seed: int, length: int, start: int, *, k: int = 8, m: int = 0) -> ScoreTask:
    rng = np.random.default_rng(seed)
    return ScoreTask(
        model="",
        token_ids=rng.integers(0, VOCABULARY_SIZE, length).astype(np.int32),
        score_start=start,
        top_k=k,
        candidate_ids=rng.integers(0, VOCABULARY_SIZE, (length - start, m)).astype(np.int32) if m else None,
    )


def test_the_ready_line_says_what_get_teacher_says(oak: ServerProcess, client: TeacherClient) -> None:
    teacher = client.get_teacher()
    assert sorted(oak.said) == ["listen", "metrics", "model", "revision"]
    assert (oak.said["model"], oak.said["revision"]) == (teacher.model, teacher.model_revision)
    assert teacher.model == "oak"
    assert re.fullmatch("[0-9a-f]{64}", teacher.model_revision)
    assert re.fullmatch("[0-9a-f]{64}", teacher.vocabulary_digest)
    assert (teacher.vocabulary_size, teacher.max_sequence_tokens) == (VOCABULARY_SIZE, MAX_POSITIONS)
    assert (teacher.max_top_k, teacher.max_candidates) == (64, 16)
    assert (teacher.engine, teacher.compute_dtype) == (oak.engine, "float32")


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("half_precision", [False, True])
def test_scores_over_the_wire_match_the_float64_reference(
    oak: ServerProcess, client: TeacherClient, half_precision: bool, temperature: float, record_property: Any
) -> None:
    teacher = client.get_teacher()
    task = make_task(1, 60, 20, k=10, m=7)
    scores = client.score(
        task.token_ids,
        score_start=task.score_start,
        top_k=task.top_k,
        candidate_ids=task.candidate_ids,
        temperature=temperature,
        half_precision=half_precision,
        expected_model_revision=teacher.model_revision,
        expected_vocabulary_digest=teacher.vocabulary_digest,
    )
    expected = reference_scores(
        oak.directory,
        task.token_ids,
        score_start=task.score_start,
        top_k=task.top_k,
        candidate_ids=task.candidate_ids,
        temperature=temperature,
    )
    worst = {"float32": 0.0, "float16": 0.0}
    for name, want in expected.items():
        got = getattr(scores, name)
        assert got.shape == want.shape, name
        if name == "top_ids":
            assert np.array_equal(got, want)
            continue
        halved = half_precision and name in ("top_logprobs", "candidate_logprobs")
        allowed = 1e-4 + (np.abs(want) * 2**-11 if halved else 0.0)
        assert (np.abs(got - want) <= allowed).all(), name
        kind = "float16" if halved else "float32"
        worst[kind] = max(worst[kind], float(np.abs(got - want).max()))
    record_property("max_abs_error", worst)
    print(f"half_precision={half_precision} temperature={temperature} max_abs_error={worst}")


def test_a_hundred_different_requests_at_once_get_each_their_own_answer(
    oak: ServerProcess, client: TeacherClient
) -> None:
    tasks = [
        make_task(seed, 10 + seed % 40, 1 + seed % 9, k=[0, 3, 8][seed % 3], m=[0, 5][seed % 2]) for seed in range(100)
    ]

    def submit(task: ScoreTask) -> Any:
        return client.submit_score(
            task.token_ids, score_start=task.score_start, top_k=task.top_k, candidate_ids=task.candidate_ids
        )

    together = [future.result() for future in [submit(task) for task in tasks]]
    alone = [submit(task).result() for task in tasks]
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_allclose(one.sampled_logprobs, other.sampled_logprobs, atol=2e-5)
        np.testing.assert_allclose(one.log_support_tail, other.log_support_tail, atol=2e-5)
        np.testing.assert_allclose(one.top_logprobs, other.top_logprobs, atol=2e-5)
        if one.candidate_logprobs is not None:
            np.testing.assert_allclose(one.candidate_logprobs, other.candidate_logprobs, atol=2e-5)


def refusal_of(channel: grpc.Channel, data: bytes, method: str = f"/{SERVICE}/Score") -> StillhouseError:
    """The error of a call with these request bytes."""
    with pytest.raises(grpc.RpcError) as raised:
        channel.unary_unary(method)(data, timeout=20)
    return from_rpc_error(raised.value)


@pytest.mark.parametrize(("change", "error", "field", "value"), REFUSED)
def test_every_refusal_of_the_validation_arrives_as_its_exception(
    change: dict[str, Any],
    error: type[StillhouseError],
    field: str,
    value: str,
) -> None:
    """In this process, for the limits that the table was written for."""

    async def run() -> StillhouseError:
        async with in_process(FakeEngine(teacher=LIMITED)) as running, channel_to(running) as channel:
            request = encode_request(dataclasses.replace(GOOD, **change))
            with pytest.raises(grpc.RpcError) as raised:
                await pb_grpc.TeacherServiceStub(channel).Score(request, timeout=20)
            return from_rpc_error(raised.value)

    refused = asyncio.run(run())
    assert type(refused) is error
    assert refused.fields["field"] == field
    assert refused.fields["value"] == value


def changed(**fields: Any) -> bytes:
    request = encode_request(make_task(0, 20, 5, m=3))
    for name, value in fields.items():
        if isinstance(value, pb.Array):
            getattr(request, name).CopyFrom(value)
        else:
            setattr(request, name, value)
    return request.SerializeToString()


def array(dtype: Any, shape: tuple[int, ...], data: bytes) -> pb.Array:
    return pb.Array(dtype=dtype, shape=shape, data=data)


INT32, FLOAT32 = pb.ELEMENT_TYPE_INT32, pb.ELEMENT_TYPE_FLOAT32


@pytest.mark.parametrize(
    ("data", "error", "field"),
    [
        (b"\xff\xff\xff\xff", InvalidRequest, "request"),
        (b"GET / HTTP/1.1\r\n\r\n", InvalidRequest, "request"),
        (b"", MalformedArray, "token_ids"),
        (changed(logprob_dtype=INT32), MalformedArray, "logprob_dtype"),
        (changed(logprob_dtype=77), MalformedArray, "logprob_dtype"),
        (changed(token_ids=array(0, (2,), b"\0" * 8)), MalformedArray, "token_ids"),
        (changed(token_ids=array(99, (2,), b"\0" * 8)), MalformedArray, "token_ids"),
        (changed(token_ids=array(FLOAT32, (2,), b"\0" * 8)), MalformedArray, "token_ids"),
        (changed(token_ids=array(INT32, (2,), b"\0" * 7)), MalformedArray, "token_ids"),
        (changed(token_ids=array(INT32, (2**32 - 1,), b"\0" * 8)), MalformedArray, "token_ids"),
        (changed(token_ids=array(INT32, (), b"\0" * 4)), MalformedArray, "token_ids"),
        (changed(token_ids=array(INT32, (2, 1), b"\0" * 8)), MalformedArray, "token_ids"),
        (changed(token_ids=array(INT32, (1,) * 10_000, b"\0" * 4)), MalformedArray, "token_ids"),
        (changed(token_ids=array(INT32, (0,), b"")), InvalidRequest, "token_ids"),
        (changed(candidate_ids=array(INT32, (15,), b"\0" * 60)), MalformedArray, "candidate_ids"),
        (changed(candidate_ids=array(INT32, (2**31, 0), b"")), MalformedArray, "candidate_ids"),
        (changed(score_start=2**32 - 1), InvalidRequest, "score_start"),
        (changed(top_k=2**32 - 1), BY_REASON["TOP_K_OUT_OF_RANGE"], "top_k"),
        (changed(model="x" * 1_000_000), BY_REASON["UNKNOWN_MODEL"], "model"),
        (
            changed(expected_model_revision="y" * 100_000),
            BY_REASON["MODEL_REVISION_MISMATCH"],
            "expected_model_revision",
        ),
        (changed(temperature=float("nan")), BY_REASON["TEMPERATURE_OUT_OF_RANGE"], "temperature"),
        (changed(temperature=1e-300), BY_REASON["TEMPERATURE_OUT_OF_RANGE"], "temperature"),
    ],
)
def test_bytes_that_are_no_good_request_get_a_named_refusal_and_the_server_lives(
    channel: grpc.Channel, data: bytes, error: type[StillhouseError], field: str
) -> None:
    refused = refusal_of(channel, data)
    assert type(refused) is error, refused
    assert refused.fields["field"] == field
    task = make_task(0, 20, 5)
    answer = pb_grpc.TeacherServiceStub(channel).Score(encode_request(task), timeout=20)
    assert len(decode_response(task, answer).sampled_logprobs) == 15


def test_unknown_fields_of_a_newer_client_are_ignored(channel: grpc.Channel) -> None:
    data = changed() + b"\xfa\x01\x03abc"  # field 31, three bytes
    assert pb.ScoreResponse.FromString(channel.unary_unary(f"/{SERVICE}/Score")(data, timeout=20)).echo.model == "oak"


def test_garbage_for_get_teacher_is_refused_by_name(channel: grpc.Channel) -> None:
    assert type(refusal_of(channel, b"\xff\xff", f"/{SERVICE}/GetTeacher")) is InvalidRequest
    unknown = pb.GetTeacherRequest(model="elm").SerializeToString()
    assert type(refusal_of(channel, unknown, f"/{SERVICE}/GetTeacher")) is BY_REASON["UNKNOWN_MODEL"]


@pytest.mark.parametrize("method", [f"/{SERVICE}/Train", "/stillhouse.v1.Other/Score", "/", "/x"])
def test_unknown_services_and_methods_are_unimplemented(channel: grpc.Channel, method: str) -> None:
    assert refusal_of(channel, b"", method).fields["grpc_code"] == "UNIMPLEMENTED"


def test_health_and_reflection_answer(channel: grpc.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    for service in ("", SERVICE):
        answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=20)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.RpcError) as raised:
        health.Check(health_pb2.HealthCheckRequest(service="other"), timeout=20)
    assert raised.value.code() is grpc.StatusCode.NOT_FOUND  # pyright: ignore[reportAttributeAccessIssue]
    asked = reflection_pb2.ServerReflectionRequest(list_services="")
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    (answer,) = stub.ServerReflectionInfo(iter([asked]), timeout=20)
    assert {entry.name for entry in answer.list_services_response.service} == {
        SERVICE,
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }


def labels(code: str, reason: str, model: str = "oak") -> str:
    return f'code="{code}",method="Score",model="{model}",reason="{reason}",tenant="anonymous"'


def test_the_metrics_count_what_was_scored_and_refused(oak: ServerProcess, channel: grpc.Channel) -> None:
    prefix = "stillhouse_teacher"
    names = [
        f"{prefix}_requests_total{{{labels('OK', '')}}}",
        f"{prefix}_requests_total{{{labels('INVALID_ARGUMENT', 'TOP_K_OUT_OF_RANGE')}}}",
        f'{prefix}_scored_tokens_total{{model="oak",tenant="anonymous"}}',
        f'{prefix}_prompt_tokens_total{{model="oak",tenant="anonymous"}}',
        f'{prefix}_queue_wait_seconds_count{{model="oak",tenant="anonymous"}}',
        f"{prefix}_engine_seconds_count",
        f"{prefix}_response_bytes_count",
        f'{prefix}_request_seconds_count{{method="Score"}}',
    ]
    steps = [1, 1, 15, 5, 1, 1, 1, 2]
    if oak.engine == "torch":  # vLLM counts its batches itself
        names += [f"{prefix}_batch_seconds_count", f"{prefix}_batch_sequences_sum", f"{prefix}_batch_tokens_sum"]
        steps += [1, 1, 20]
    before = [oak.metric(name) or 0.0 for name in names]
    pb_grpc.TeacherServiceStub(channel).Score(encode_request(make_task(0, 20, 5)), timeout=20)
    refusal_of(channel, changed(top_k=65))
    after = [oak.metric(name) or 0.0 for name in names]
    assert [late - early for early, late in zip(before, after, strict=True)] == steps
    for empty in ("pending_tokens", "pending_bytes", "running_tokens", 'tenant_pending_tokens{tenant="anonymous"}'):
        assert oak.metric(f"{prefix}_{empty}") == 0
    assert oak.metric(f"{prefix}_requests_in_flight") == 0
    info = f'{prefix}_model_info{{dtype="float32",engine="{oak.engine}",model="oak",revision="{oak.said["revision"]}"'
    assert info in oak.metrics


def test_every_series_is_on_the_page_once_and_those_of_the_process_are_too(oak: ServerProcess) -> None:
    families = list(text_string_to_metric_families(oak.metrics))
    names = Counter(family.name for family in families)
    assert [name for name, times in names.items() if times > 1] == []
    series = Counter((one.name, *sorted(one.labels.items())) for family in families for one in family.samples)
    assert [key for key, times in series.items() if times > 1] == []
    assert {"process_start_time_seconds", "process_resident_memory_bytes", "process_open_fds"} <= names.keys()
    process = psutil.Process(oak.process.pid)
    assert oak.metric("process_start_time_seconds") == pytest.approx(process.create_time(), abs=2)
    assert oak.metric("stillhouse_teacher_ready") == 1
    assert oak.metric('stillhouse_teacher_start_failed{reason="model"}') == 0
    assert (oak.metric('stillhouse_teacher_memory_used_bytes{device="host"}') or 0) > 0


@pytest.mark.parametrize(
    ("engine", "one_at_a_time"),
    [
        ("torch", ("--max-batch-tokens", "1")),
        ("vllm", ("--max-batch-tokens", "128", "--vllm-options", '{"max_num_seqs": 1}')),
    ],
)
def test_sigterm_finishes_all_admitted_work_and_exits_with_zero(
    tmp_path: Path, engine: str, one_at_a_time: tuple[str, ...]
) -> None:
    wide = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 1024, "num_hidden_layers": 6}
    directory = save_model(tmp_path, "llama", **wide)
    # One sequence a batch, so that the last of 64 waits long enough for the signal to come first. Should this process
    # be the one that is paused meanwhile, nothing was shown, and it is done again.
    in_flight = (stopped_in_the_middle(directory, one_at_a_time, engine) for _ in range(3))
    assert any(number > 0 for number in in_flight), "the signal came after the work"


def stopped_in_the_middle(directory: Path, options: tuple[str, ...], engine: str) -> int:
    """Checks that a server with 64 calls ends well on SIGTERM; how many of them it still had then."""
    with (
        serving(directory, *options, engine=engine) as server,
        TeacherClient([server.said["listen"]]) as client,
    ):
        futures = [
            client.submit_score(make_task(seed, MAX_POSITIONS, 1).token_ids, score_start=1, top_k=8, deadline_s=250)
            for seed in range(64)
        ]
        end_s = time.monotonic() + 60
        answered = f"stillhouse_teacher_requests_total{{{labels('OK', '', server.said['model'])}}}"
        while (server.metric(answered) or 0) + (server.metric("stillhouse_teacher_requests_in_flight") or 0) < 64:
            assert time.monotonic() < end_s
        server.process.send_signal(signal.SIGTERM)
        server.process.send_signal(signal.SIGTERM)  # launchers pass it on twice
        assert all(len(future.result().sampled_logprobs) == MAX_POSITIONS - 1 for future in futures)
        assert client.stats.retries == {}
        assert server.process.wait(60) == 0
        assert server.process.stdout is not None
        assert server.process.stdout.read() == ""
        err = server.log
        stopping = re.search(r"stopping: in_flight=(\d+)", err)
        assert stopping is not None
        assert "drain time is over" not in err
        return int(stopping[1])


def test_a_model_that_cannot_be_served_ends_the_program_with_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = save_model(tmp_path)
    (directory / "config.json").write_text('{"model_type": "llama", "vocab_size": 128, "hidden_size": 31}')
    assert main(arguments(directory)) == 1
    output = capsys.readouterr()
    assert output.out == ""
    message = output.err.splitlines()[-1]
    assert message.startswith(f"teacher-server: error: cannot serve {directory}: ")
    assert "not a multiple of the number of attention heads" in message
    assert "Traceback" not in output.err
    assert main(arguments(save_model(tmp_path), "--max-sequence-tokens", "4096")) == 2
    assert "--max-sequence-tokens 4096: the model's positions end at 128" in capsys.readouterr().err


# In this process: faults at one exact moment

TEACHER = Teacher(
    model="fake",
    model_revision="r1",
    vocabulary_size=VOCABULARY_SIZE,
    vocabulary_digest="",
    max_sequence_tokens=MAX_POSITIONS,
    max_top_k=64,
    max_candidates=16,
    min_temperature=0.01,
    max_temperature=100.0,
    max_response_bytes=2**20,
    compute_dtype="float32",
    engine="torch",
    server_version="0",
)


def flat_scores(task: ScoreTask) -> Scores:
    """The scores of a uniform teacher, without candidates."""
    shape = (task.num_scored, task.top_k)
    logprob = -np.log(VOCABULARY_SIZE)
    row = np.full(task.num_scored, logprob, np.float32)
    return Scores(
        top_ids=np.broadcast_to(np.arange(task.top_k, dtype=np.int32), shape),
        top_logprobs=np.full(shape, logprob, np.float32),
        sampled_logprobs=row,
        candidate_logprobs=None,
        log_tail=row,
        log_support_tail=row,
        entropy=-row,
        log_normalizer=-row,
        model="fake",
        model_revision="r1",
        temperature=task.temperature,
    )


class FakeEngine:
    """Answers at once, or does what `behave` does; close() cancels what is running with Unavailable."""

    def __init__(
        self, behave: Callable[[ScoreTask], Awaitable[None]] | None = None, teacher: Teacher = TEACHER
    ) -> None:
        self.behave = behave
        self.teacher = teacher
        self.started = asyncio.Event()
        self.closing = asyncio.Event()
        self.cancelled = 0

    def describe(self) -> Teacher:
        return self.teacher

    async def score(self, task: ScoreTask) -> Scores:
        self.started.set()
        if self.behave is not None:
            work = asyncio.ensure_future(self.behave(task))
            closed = asyncio.create_task(self.closing.wait())
            try:
                await asyncio.wait({work, closed}, return_when=asyncio.FIRST_COMPLETED)
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
            finally:
                closed.cancel()
            if not work.done():
                work.cancel()
                raise Unavailable("closed")
            await work
        return flat_scores(task)

    async def check(self) -> float:
        return 0.0

    async def died(self) -> str:
        await asyncio.Event().wait()
        raise AssertionError

    async def close(self) -> None:
        self.closing.set()


@contextlib.asynccontextmanager
async def in_process(engine: FakeEngine, metrics: Metrics | None = None) -> AsyncIterator[RunningServer]:
    running = await start(engine, metrics or Metrics(), "127.0.0.1:0")
    try:
        yield running
    finally:
        await running.server.stop(None)


def client_of(running: RunningServer) -> AsyncTeacherClient:
    return AsyncTeacherClient([f"127.0.0.1:{running.port}"])


def channel_to(running: RunningServer) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(f"127.0.0.1:{running.port}")


async def score(client: AsyncTeacherClient, **options: Any) -> Scores:
    return await client.score(make_task(0, 20, 5).token_ids, score_start=5, top_k=2, **options)


async def never(task: ScoreTask) -> None:
    await asyncio.Event().wait()


def requests(metrics: Metrics, code: str, reason: str) -> float | None:
    found = {"tenant": "anonymous", "model": "fake", "method": "Score", "code": code, "reason": reason}
    return metrics.registry.get_sample_value("stillhouse_teacher_requests_total", found)


async def wait_for(condition: Callable[[], Any]) -> None:
    end_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end_s, "waited 20 s"
        await asyncio.sleep(0.005)


async def test_a_passed_deadline_withdraws_the_work_and_is_counted() -> None:
    engine, metrics = FakeEngine(never), Metrics()
    async with in_process(engine, metrics) as running, client_of(running) as client:
        async with asyncio.timeout(60):
            while not engine.started.is_set():  # on a busy machine it may pass before the engine has the work
                with pytest.raises(DeadlineExceeded):
                    await score(client, deadline_s=0.2)
        await wait_for(lambda: engine.cancelled)
        await wait_for(lambda: requests(metrics, "DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED"))
        await wait_for(lambda: running.calls.in_flight == 0)


async def test_a_cancelled_call_withdraws_the_work_and_is_counted() -> None:
    engine, metrics = FakeEngine(never), Metrics()
    async with in_process(engine, metrics) as running, client_of(running) as client:
        work = asyncio.create_task(score(client))
        await engine.started.wait()
        work.cancel()
        await wait_for(lambda: engine.cancelled)
        await wait_for(lambda: requests(metrics, "CANCELLED", "CANCELLED") == 1)
        assert running.calls.in_flight == 0


@pytest.mark.parametrize("text", ["secret path /etc/x", "ünïcode\nnewline"])
async def test_an_unexpected_exception_is_engine_failed_and_its_text_stays_in_the_log(
    text: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(task: ScoreTask) -> None:
        raise ValueError(text)

    async with in_process(FakeEngine(broken)) as running, client_of(running) as client:
        with pytest.raises(EngineFailed) as raised:
            await score(client)
        assert text not in str(raised.value)
        assert text not in str(raised.value.fields)
        assert f"reference={raised.value.fields['reference']}" in caplog.text
        assert text in caplog.text


ERRORS: list[StillhouseError] = [
    kind("something", field="f", value="v") for kind in BY_REASON.values() if not kind.retryable
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.reason)
async def test_every_error_of_the_table_leaves_the_engine_as_what_it_is(error: StillhouseError) -> None:
    async def fail(task: ScoreTask) -> None:
        raise error

    metrics = Metrics()
    async with in_process(FakeEngine(fail), metrics) as running, client_of(running) as client:
        with pytest.raises(StillhouseError) as raised:
            await score(client)
        assert type(raised.value) is type(error)
        assert raised.value.fields == error.fields
        assert requests(metrics, error.code.name, error.reason) == 1


async def test_an_overloaded_server_names_a_delay_and_the_client_comes_again() -> None:
    async def full_once(task: ScoreTask) -> None:
        refused.append(time.monotonic())
        if len(refused) == 1:
            raise Overloaded("full", retry_delay_s=0.3)

    refused: list[float] = []
    async with in_process(FakeEngine(full_once)) as running, client_of(running) as client:
        await score(client)
        assert client.stats.retries == {"OVERLOADED": 1}
        assert refused[1] - refused[0] >= 0.3


async def test_a_stopping_server_says_so_refuses_new_work_and_finishes_the_old() -> None:
    opened = asyncio.Event()

    async def gated(task: ScoreTask) -> None:
        await opened.wait()

    engine = FakeEngine(gated)
    async with in_process(engine) as running, client_of(running) as client, channel_to(running) as channel:
        stub, health = pb_grpc.TeacherServiceStub(channel), health_pb2_grpc.HealthStub(channel)
        old = asyncio.create_task(score(client))
        await engine.started.wait()
        stopping = asyncio.create_task(stop(running, drain_s=20))
        await wait_for(lambda: running.calls.stopping)
        for method, request in (
            (stub.Score, encode_request(make_task(0, 20, 5))),
            (stub.GetTeacher, pb.GetTeacherRequest()),
        ):
            with pytest.raises(grpc.RpcError) as raised:
                await method(request, timeout=20)
            assert type(from_rpc_error(raised.value)) is Unavailable
        for service in ("", SERVICE):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=service), timeout=20)
            assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert not stopping.done()
        opened.set()
        assert len((await old).sampled_logprobs) == 15
        await stopping
        assert engine.closing.is_set()


async def test_work_left_when_the_drain_time_is_over_fails_as_unavailable() -> None:
    engine = FakeEngine(never)
    async with in_process(engine) as running, channel_to(running) as channel:
        request = encode_request(make_task(0, 20, 5))
        call = asyncio.ensure_future(pb_grpc.TeacherServiceStub(channel).Score(request, timeout=20))
        await engine.started.wait()
        await stop(running, drain_s=0.1)
        with pytest.raises(grpc.RpcError) as raised:
            await call
        assert type(from_rpc_error(raised.value)) is Unavailable


async def test_two_servers_never_share_a_port() -> None:
    async with in_process(FakeEngine()) as running:
        with pytest.raises(RuntimeError, match="address"):
            await start(FakeEngine(), Metrics(), f"127.0.0.1:{running.port}")


async def test_each_request_writes_one_line_that_no_request_can_forge(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "teacher_server.requests")
    async with in_process(FakeEngine()) as running, client_of(running) as client:
        await score(client)
        async with AsyncTeacherClient([f"127.0.0.1:{running.port}"], model="x\nmethod=Score code=OK") as forger:
            with pytest.raises(BY_REASON["UNKNOWN_MODEL"]):
                await score(forger)
    records = [record for record in caplog.records if record.name == "teacher_server.requests"]
    lines = [logs.TextFormatter("%(message)s").format(record) for record in records]
    who = r"answered method=Score code={} tenant=anonymous request_id=[\w-]+ attempt=1 peer=\S+ ms=\S+ "
    assert len(lines) == 2
    assert re.match(who.format("OK") + r"tokens=20 score_start=5 top_k=2 priority=0 revision=r1 ", lines[0])
    assert re.match(who.format("NOT_FOUND") + r"reason=UNKNOWN_MODEL error=", lines[1])
    assert "\n" not in lines[1]
    assert json.loads(logs.JsonFormatter().format(records[1]))["reason"] == "UNKNOWN_MODEL"
