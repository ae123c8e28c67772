"""The vLLM engine for real: its scores in every layout of the model, its scheduler's tricks, and its deaths."""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from stillhouse.client import TeacherClient
from stillhouse.codec import Scores, ScoreTask, encode_request
from stillhouse.errors import DeadlineExceeded, StillhouseError, Unavailable, from_rpc_error
from stillhouse.v1 import teacher_pb2_grpc as pb_grpc
from tests.ahead import Ahead
from tests.models import FAMILIES, VOCABULARY_SIZE, reference_scores, save_model
from tests.servers import VLLM_SHAPE, ServerProcess, environment, interpreter, serving, vllm_arguments

TOLERANCE = 2e-4  # nats; vLLM's CPU attention approximates its exponentials


def make_task(
    seed: int,
    length: int,
    start: int,
    *,
    k: int = 5,
    m: int = 0,
    temperature: float = 1.0,
    prefix: np.ndarray | None = None,
) -> ScoreTask:
    rng = np.random.default_rng(seed)
    token_ids = rng.integers(0, VOCABULARY_SIZE, length).astype(np.int32)
    if prefix is not None:
        token_ids[: len(prefix)] = prefix
    return ScoreTask(
        model="",
        token_ids=token_ids,
        score_start=start,
        top_k=k,
        candidate_ids=rng.integers(0, VOCABULARY_SIZE, (length - start, m)).astype(np.int32) if m else None,
        temperature=temperature,
    )


def submit(client: TeacherClient, task: ScoreTask, **options: Any) -> Any:
    return client.submit_score(
        task.token_ids,
        score_start=task.score_start,
        top_k=task.top_k,
        candidate_ids=task.candidate_ids,
        temperature=task.temperature,
        **options,
    )


def error_of(directory: Path, task: ScoreTask, scores: Scores) -> float:
    """Largest difference from the float64 reference."""
    expected = reference_scores(
        directory,
        task.token_ids,
        score_start=task.score_start,
        top_k=task.top_k,
        candidate_ids=task.candidate_ids,
        temperature=task.temperature,
    )
    worst = 0.0
    for name, want in expected.items():
        got = getattr(scores, name)
        if got is None:
            assert want.shape[1] == 0
        elif name != "top_ids":  # near-equal logits may change places; their log-probabilities may not
            assert got.shape == want.shape, name
            assert np.array_equal(np.isneginf(got), np.isneginf(want)), name
            finite = np.isfinite(want)
            difference = np.abs(got[finite] - want[finite])
            assert not np.isnan(difference).any(), name
            worst = max(worst, float(difference.max(initial=0.0)))
    return worst


def descendants(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def worker_of(server: ServerProcess) -> psutil.Process:
    """The process that has the model: the one with the most memory below the server."""
    return max(descendants(server.process.pid), key=lambda process: process.memory_info().rss)


@contextlib.contextmanager
def standing_still(process: psutil.Process) -> Iterator[None]:
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


def wait_for(condition: Callable[[], Any], seconds: float) -> float:
    """Seconds until `condition()` held."""
    started_s = time.monotonic()
    while not condition():
        assert time.monotonic() - started_s < seconds, f"not within {seconds} s"
        time.sleep(0.02)
    return time.monotonic() - started_s


def gone(processes: list[psutil.Process]) -> bool:
    return not any(
        process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes if exists(process)
    )


def exists(process: psutil.Process) -> bool:
    try:
        process.status()
    except psutil.NoSuchProcess:
        return False
    return True


def health(channel: grpc.Channel) -> int:
    stub = health_pb2_grpc.HealthStub(channel)
    try:
        return stub.Check(health_pb2.HealthCheckRequest(), timeout=5).status
    except grpc.RpcError:
        return health_pb2.HealthCheckResponse.NOT_SERVING


# Scores


LAYOUTS = [
    *((family,) for family in FAMILIES),
    ("qwen3", "--tensor-parallel-size", "2"),
    ("phi", "--tensor-parallel-size", "2"),
    ("llama", "--pipeline-parallel-size", "2"),
]
"""Family of the model and options of the server."""


@dataclass(frozen=True)
class Answered:
    """What a server of the model in `directory` said."""

    directory: Path
    answers: list[tuple[ScoreTask, Scores]]


def answers_of_all_kinds(directory: Path, options: tuple[str, ...]) -> Answered:
    answers = []
    with serving(directory, *options, engine="vllm") as server, TeacherClient([server.said["listen"]]) as client:
        for seed, temperature in enumerate((1.0, 0.5, 2.0)):
            tasks = [
                make_task(seed, 40, 9, k=8, m=6, temperature=temperature),
                make_task(seed + 10, 128, 1, k=0, m=1, temperature=temperature),
                make_task(seed + 20, 2, 1, k=VOCABULARY_SIZE, temperature=temperature),
            ]
            answers += [(task, future.result()) for task, future in [(task, submit(client, task)) for task in tasks]]
    return Answered(directory, answers)


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ahead[tuple[str, ...], Answered]]:
    saved = {
        layout: save_model(tmp_path_factory.mktemp("layout"), layout[0], **VLLM_SHAPE)
        for layout in LAYOUTS  # here, since threads share what torch and transformers set meanwhile
    }
    with Ahead(lambda layout: answers_of_all_kinds(saved[layout], layout[1:]), LAYOUTS) as results:
        yield results


@pytest.mark.parametrize("layout", LAYOUTS, ids="".join)
def test_every_family_and_layout_matches_the_float64_reference(
    layout: tuple[str, ...], layouts: Ahead[tuple[str, ...], Answered], record_property: Any
) -> None:
    answered = layouts.result(layout)
    assert len(answered.answers) == 9
    worst = max(
        error_of(answered.directory, task, scores) * min(1.0, task.temperature) for task, scores in answered.answers
    )
    record_property("max_abs_error", worst)
    print(f"{' '.join(layout)} max_abs_error={worst:.2e}")
    assert worst <= TOLERANCE


def test_half_precision_scores_come_from_float32_logits(tmp_path: Path, record_property: Any) -> None:
    """bfloat16 weights and activations, but no rounding of what the head gives: neighbours differ in all digits."""
    directory = save_model(tmp_path, "llama", dtype=torch.bfloat16, **VLLM_SHAPE)
    options = ("--dtype", "bfloat16")
    with (
        serving(directory, *options, engine="vllm") as server,
        serving(directory, *options) as other,
        TeacherClient([server.said["listen"]]) as vllm,
        TeacherClient([other.said["listen"]]) as torch_engine,
    ):
        task = make_task(3, 60, 20, k=8, m=4)
        ours, theirs = submit(vllm, task).result(), submit(torch_engine, task).result()
        assert vllm.get_teacher().compute_dtype == "bfloat16"
    difference = float(np.abs(ours.sampled_logprobs - theirs.sampled_logprobs).max())
    print(f"two engines in bfloat16: max_abs_difference={difference:.2e}")
    # Hidden states of two bfloat16 implementations differ; what rounding of logits there was would show as a grid.
    assert difference <= 0.5
    logits = ours.top_logits.astype(np.float64)
    rounded = torch.as_tensor(logits).to(torch.bfloat16).double().numpy()
    assert (rounded != logits).mean() > 0.9


# The scheduler: chunks, prefixes, cancellations. One server, whose steps take 128 tokens at most.


@pytest.fixture(scope="module")
def elm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    directory = save_model(
        tmp_path_factory.mktemp("models") / "elm", "llama", **VLLM_SHAPE, max_position_embeddings=1024
    )
    options = ("--max-batch-tokens", "128", "--vllm-options", '{"block_size": 32}')
    with serving(directory, *options, engine="vllm") as server:
        yield server


@pytest.fixture
def client(elm: ServerProcess) -> Iterator[TeacherClient]:
    with TeacherClient([elm.said["listen"]]) as teacher:
        yield teacher


def assert_right(server: ServerProcess, client: TeacherClient, tasks: list[ScoreTask]) -> float:
    futures = [(task, submit(client, task)) for task in tasks]
    worst = max(error_of(server.directory, task, future.result()) for task, future in futures)
    assert worst <= TOLERANCE
    return worst


def test_sequences_longer_than_a_step_are_scored_in_chunks(elm: ServerProcess, client: TeacherClient) -> None:
    lengths = [(1000, 1), (700, 690), (129, 128), (128, 1), (256, 128), (257, 129), (40, 3), (385, 200)]
    tasks = [
        make_task(seed, length, start, k=[0, 3, 9][seed % 3], m=[0, 4][seed % 2], temperature=[1.0, 0.7][seed % 2])
        for seed, (length, start) in enumerate(lengths)
    ]
    print(f"max_abs_error={assert_right(elm, client, tasks):.2e}")


def test_scores_are_exact_however_prefixes_are_shared(elm: ServerProcess, client: TeacherClient) -> None:
    oak, ash = (make_task(seed, 330, 1).token_ids for seed in (50, 51))
    tasks: list[ScoreTask] = []
    for seed in range(6):  # six answers to each of two prompts, by turns
        tasks += [make_task(seed, 400, 330, m=2, prefix=prompt) for prompt in (oak, ash)]
    first = tasks[0].token_ids
    # Answers that begin alike, one that is repeated, and one whose response was another's prompt and the reverse.
    tasks += [make_task(90 + seed, 400, 330, prefix=first[: 330 + 32 * seed]) for seed in range(3)]
    tasks += [tasks[0], tasks[0]]
    for start in (1, 31, 32, 33, 64, 329, 399):
        tasks.append(make_task(0, 400, start, prefix=first))
    cached = "stillhouse_teacher_cached_tokens_total"
    before = elm.metric(cached) or 0.0
    for task in tasks:  # one after the other, so that each finds what the others left
        assert error_of(elm.directory, task, submit(client, task).result()) <= TOLERANCE
    one_by_one = (elm.metric(cached) or 0.0) - before
    # Prompts of 330 tokens have ten whole blocks of 32, reused by all but the first two of the answers.
    assert one_by_one >= 10 * 320
    assert_right(elm, client, tasks)  # and all at once
    assert (elm.metric(cached) or 0.0) > before + one_by_one
    assert elm.metric("stillhouse_teacher_resent_sequences_total") == 0


def test_cancelled_and_late_requests_leave_the_engine(elm: ServerProcess, client: TeacherClient) -> None:
    tasks = [make_task(200 + seed, 1000, 1, k=VOCABULARY_SIZE) for seed in range(40)]
    with standing_still(worker_of(elm)):
        futures = [submit(client, task) for task in tasks]
        wait_for(lambda: (elm.metric("stillhouse_teacher_requests_in_flight") or 0) == 40, 20)
        for future in futures[1:]:
            future.cancel()
        wait_for(lambda: elm.metric("stillhouse_teacher_requests_in_flight") == 1, 20)
    assert error_of(elm.directory, tasks[0], futures[0].result()) <= TOLERANCE
    with standing_still(worker_of(elm)):
        late = submit(client, make_task(300, 1000, 1), deadline_s=0.2)
        with pytest.raises(DeadlineExceeded):
            late.result()
    wait_for(lambda: elm.metric("stillhouse_teacher_pending_tokens") == 0, 20)
    page = elm.metrics
    for name in ("vllm:num_requests_running", "vllm:num_requests_waiting"):
        assert [line for line in page.splitlines() if line.startswith(name + "{") and line.endswith(" 0.0")], name
    assert_right(elm, client, tasks[1:3])


def test_sequences_that_lose_their_cache_half_way_are_scored_all_the_same(
    elm: ServerProcess, record_property: Any
) -> None:
    # A cache of 1,600 tokens, and steps that advance four sequences of 1,000 at once: some must start again.
    options = ("--max-batch-tokens", "1024", "--kv-cache-bytes", str(1600 * 1024))
    scheduler = ("--vllm-options", '{"block_size": 32, "long_prefill_token_threshold": 32}')
    with (
        serving(elm.directory, *options, *scheduler, engine="vllm") as server,
        TeacherClient([server.said["listen"]]) as client,
    ):
        assert_right(server, client, [make_task(600 + seed, 1000, 1 + 300 * (seed % 3), m=2) for seed in range(8)])
        preempted = sum(
            float(line.rpartition(" ")[2])
            for line in server.metrics.splitlines()
            if line.startswith("vllm:num_preemptions_total{")
        )
    record_property("preemptions", preempted)
    print(f"preemptions={preempted:g}")
    assert preempted > 0


def test_one_page_has_the_series_of_vllm_and_ours(elm: ServerProcess, client: TeacherClient) -> None:
    assert_right(elm, client, [make_task(400, 30, 5)])
    page = elm.metrics
    assert "vllm:prompt_tokens_total" in page
    assert "stillhouse_teacher_scored_tokens_total" in page
    helps = [line for line in page.splitlines() if line.startswith("# HELP ")]
    assert len({line.split()[2] for line in helps}) == len(helps)


def test_a_worker_that_stands_still_is_busy_not_dead(elm: ServerProcess, client: TeacherClient) -> None:
    with grpc.insecure_channel(elm.said["listen"]) as channel:
        with standing_still(worker_of(elm)):
            task = make_task(500, 60, 20)
            future = submit(client, task, deadline_s=250)
            for _ in range(20):
                assert health(channel) == health_pb2.HealthCheckResponse.SERVING
                time.sleep(0.25)
            assert not future.done()
        assert error_of(elm.directory, task, future.result()) <= TOLERANCE


def test_liveness_tells_a_worker_that_stands_still_for_long_from_one_that_is_busy(elm: ServerProcess) -> None:
    # Small batches, and a limit far above what one takes on a machine that does other things too.
    options = ("--stall-s", "15", "--max-batch-tokens", "1024", "--health-listen", "127.0.0.1:0")
    with (
        serving(elm.directory, *options, engine="vllm") as server,
        TeacherClient([server.said["listen"]]) as client,
        grpc.insecure_channel(f"127.0.0.1:{server.said['health_port']}") as channel,
    ):
        stub = health_pb2_grpc.HealthStub(channel)

        def says(service: str) -> int:
            return stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=60).status

        tasks = [make_task(700 + seed, 1000, 1) for seed in range(40)]
        futures = [submit(client, task, deadline_s=250) for task in tasks]
        while not all(future.done() for future in futures):
            assert says("liveness") == says("") == health_pb2.HealthCheckResponse.SERVING, "busy, and taken for stalled"
            time.sleep(0.1)
        with standing_still(worker_of(server)):
            time.sleep(16)
            assert says("liveness") == health_pb2.HealthCheckResponse.SERVING, "idle, and taken for stalled"
            future = submit(client, tasks[0], deadline_s=250)
            wait_for(lambda: says("liveness") == health_pb2.HealthCheckResponse.NOT_SERVING, 60)
            wait_for(lambda: says("") == health_pb2.HealthCheckResponse.NOT_SERVING, 60)
        assert error_of(elm.directory, tasks[0], future.result()) <= TOLERANCE
        wait_for(lambda: says("liveness") == says("") == health_pb2.HealthCheckResponse.SERVING, 60)


# Memory


def test_scoring_takes_a_constant_amount_of_memory_whatever_is_asked(tmp_path: Path, record_property: Any) -> None:
    columns, slice_bytes = 50_000, 32 * 2**20
    directory = save_model(tmp_path, "llama", head_rows=columns, vocabulary_size=None, **VLLM_SHAPE)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2048}))
    options = ("--max-batch-tokens", "2048", "--max-top-k", "1024", "--logits-slice-bytes", str(slice_bytes))
    # Memory that is given back is given back at once, so that what is resident is what is in use.
    allocator = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    with (
        serving(directory, *options, engine="vllm", variables=allocator) as server,
        TeacherClient([server.said["listen"]]) as client,
    ):
        worker = worker_of(server)
        rng = np.random.default_rng(0)

        def score(tokens: int, k: int, m: int, temperature: float) -> None:
            ids = rng.integers(0, columns, tokens).astype(np.int32)
            wanted = rng.integers(0, columns, (tokens - 1, m)).astype(np.int32) if m else None
            scores = client.score(
                ids, score_start=1, top_k=k, candidate_ids=wanted, temperature=temperature, deadline_s=250
            )
            assert scores.top_ids.shape == (tokens - 1, k)

        def peak_bytes(*request: Any) -> int:
            """Growth of the worker's resident memory while it answers, by the kernel's high-water mark."""
            Path(f"/proc/{worker.pid}/clear_refs").write_text("5")
            before = worker.memory_info().rss
            score(*request)
            status = Path(f"/proc/{worker.pid}/status").read_text()
            (peak,) = [int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")]
            return peak - before

        for request in ((2048, 8, 0, 1.0), (2048, 1024, 256, 0.5)):
            score(*request)  # what libraries keep once they were used does not count
        found = {
            request: peak_bytes(*request)
            for request in ((2048, 1, 0, 1.0), (2048, 64, 0, 0.5), (2048, 256, 64, 1.0), (2048, 1024, 256, 2.0))
        }
        answers = 2048 * (2 * 1024 + 256 + 5) * 4  # the answer itself, made, packed and sent
    record_property("peak_bytes", {str(request): peak for request, peak in found.items()})
    for request, peak in found.items():
        print(f"tokens, k, M, T = {request}: {peak / 2**20:.1f} MiB above rest")
        assert peak <= 3 * slice_bytes + 2 * answers
    # Whole logits of 2,047 rows would be 390 MiB, before any copy.
    assert max(found.values()) < 2047 * columns * 4


# Deaths


@contextlib.contextmanager
def birch(tmp_path: Path) -> Iterator[tuple[ServerProcess, list[psutil.Process]]]:
    """A server and the processes of its engine."""
    directory = save_model(tmp_path, "llama", **VLLM_SHAPE, num_hidden_layers=2, max_position_embeddings=4096)
    with serving(directory, "--max-batch-tokens", "128", engine="vllm") as server:
        yield server, descendants(server.process.pid)


@pytest.mark.parametrize("victim", ["worker", "engine core"])
def test_an_engine_that_dies_takes_the_server_with_it(tmp_path: Path, victim: str) -> None:
    with birch(tmp_path) as (server, processes), grpc.insecure_channel(server.said["listen"]) as channel:
        core = next(process for process in psutil.Process(server.process.pid).children() if process.children())
        doomed = worker_of(server) if victim == "worker" else core
        assert doomed.pid != server.process.pid
        assert health(channel) == health_pb2.HealthCheckResponse.SERVING
        doomed.send_signal(signal.SIGSTOP)  # so that calls are in flight when it dies
        stub_calls = [raw_call(channel, make_task(seed, 2000, 1, k=64)) for seed in range(8)]
        wait_for(lambda: server.metric("stillhouse_teacher_requests_in_flight") == 8, 60)
        doomed.kill()
        took_s = wait_for(lambda: health(channel) != health_pb2.HealthCheckResponse.SERVING, 60)
        for call in stub_calls:
            with pytest.raises(StillhouseError) as raised:
                raise_error_of(call)
            assert type(raised.value) is Unavailable
        assert server.process.wait(60) == 3
        wait_for(lambda: gone(processes), 60)
        last = server.log.splitlines()[-1]
    print(f"{victim}: NOT_SERVING after {took_s:.1f} s")
    assert last.startswith("teacher-server: error: the vLLM engine died: ")


def raw_call(channel: grpc.Channel, task: ScoreTask) -> Any:
    """A call without a client's patience."""
    return pb_grpc.TeacherServiceStub(channel).Score.future(encode_request(task), timeout=250)


def raise_error_of(call: Any) -> None:
    try:
        call.result()
    except grpc.RpcError as error:
        raise from_rpc_error(error) from error


def test_nothing_is_left_of_an_engine_whose_server_was_killed(tmp_path: Path) -> None:
    with birch(tmp_path) as (server, processes):
        assert len(processes) >= 2
        server.process.kill()
        server.process.wait(60)
        took_s = wait_for(lambda: gone(processes), 60)
    print(f"{len(processes)} processes gone after {took_s:.2f} s")


@pytest.mark.parametrize("seconds", [4.0, 12.0])
def test_nothing_is_left_of_a_server_that_was_killed_while_it_loaded(tmp_path: Path, seconds: float) -> None:
    directory = save_model(tmp_path, "llama", **VLLM_SHAPE)
    process = start(directory)
    try:
        time.sleep(seconds)
        processes = descendants(process.pid)
    finally:
        process.kill()
        process.wait(60)
    # A child that only looks at the model's class asks for its parent when it has imported vllm, and not before.
    wait_for(lambda: gone(processes), 200)


# What cannot be served


def start(directory: Path, *options: str, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [interpreter("vllm"), "-m", "teacher_server.cli", *vllm_arguments(directory, *options)],
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def refused(directory: Path, *options: str, **variables: str) -> tuple[int, str]:
    """Exit code and last line of a server that does not come up; nothing of it may be left."""
    process = start(directory, *options, **variables)
    seen: list[psutil.Process] = []
    out, err = "", ""
    while True:
        with contextlib.suppress(psutil.NoSuchProcess):
            seen += descendants(process.pid)
        try:
            out, err = process.communicate(timeout=0.5)
            break
        except subprocess.TimeoutExpired:
            continue
    assert out == ""
    wait_for(lambda: gone(seen), 60)
    return process.returncode, err.rstrip().splitlines()[-1]


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def cut_weights(directory: Path) -> None:
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:20_000])


@dataclass(frozen=True)
class Refused:
    """What a server is asked to serve and cannot, and what its last line must contain ({model}: the directory)."""

    says: tuple[str, ...]
    options: tuple[str, ...] = ()
    damage: Callable[[Path], None] = lambda directory: None
    variables: dict[str, str] = field(default_factory=dict)
    code: int = 1


CANNOT_BE_SERVED = {
    "an architecture that vLLM has not": Refused(
        ("no model of architecture OakForCausalLM; use --engine torch",),
        damage=lambda directory: edit_config(directory, architectures=["OakForCausalLM"]),
    ),
    "weights that lack a tensor": Refused(
        ("cannot serve {model}: ", "layers.2"), damage=lambda directory: edit_config(directory, num_hidden_layers=3)
    ),
    "damaged weights": Refused(("cannot serve {model}: ", "afetensor"), damage=cut_weights),
    "more columns than the head has": Refused(
        ("--vocabulary-size 129", "128 rows"), ("--vocabulary-size", "129"), code=2
    ),
    "a vocabulary that the weights have not": Refused(
        ("cannot serve {model}: ",), damage=lambda directory: edit_config(directory, vocab_size=160)
    ),
    "too little memory": Refused(("--kv-cache-bytes",), ("--kv-cache-bytes", str(2**15))),
    "an option that vLLM has not": Refused(("no engine argument colour",), ("--vllm-options", '{"colour": "red"}')),
    "an option that is ours": Refused(
        ("model is set by teacher-server itself",), ("--vllm-options", '{"model": "other"}')
    ),
    "a value that vLLM refuses": Refused(("max_num_seqs",), ("--vllm-options", '{"max_num_seqs": 0}')),
    "a quantization that vLLM has not": Refused(("abacus",), ("--quantization", "abacus")),
    "positions that the model has not": Refused(
        ("the model's positions end at 128",), ("--max-sequence-tokens", "4096"), code=2
    ),
    "a device that vLLM was not built for": Refused(("computes on cpu",), ("--device", "cuda"), code=2),
    "a plugin that is kept out": Refused(("add stillhouse to it",), variables={"VLLM_PLUGINS": "other"}),
}


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ahead[str, tuple[Path, int, str]]]:
    saved = {name: save_model(tmp_path_factory.mktemp("refused"), "llama", **VLLM_SHAPE) for name in CANNOT_BE_SERVED}
    for name, directory in saved.items():
        CANNOT_BE_SERVED[name].damage(directory)

    def asked(name: str) -> tuple[Path, int, str]:
        case = CANNOT_BE_SERVED[name]
        return saved[name], *refused(saved[name], *case.options, **case.variables)

    with Ahead(asked, list(CANNOT_BE_SERVED)) as results:
        yield results


@pytest.mark.parametrize("name", CANNOT_BE_SERVED)
def test_what_cannot_be_served_is_named_in_the_last_line(
    name: str, refusals: Ahead[str, tuple[Path, int, str]]
) -> None:
    case = CANNOT_BE_SERVED[name]
    model, code, line = refusals.result(name)
    assert line.startswith("teacher-server: error: ")
    assert not [part for part in case.says if part.replace("{model}", str(model)) not in line], line
    assert code == case.code


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_model(tmp_path, "llama", **VLLM_SHAPE)


def test_a_version_of_vllm_out_of_range_is_named_before_anything_of_it_is_used(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "vllm"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text('__version__ = "0.24.1"\n')
    code, line = refused(model, PYTHONPATH=f"{other.parent}:{environment()['PYTHONPATH']}")
    assert code == 1
    assert "vllm 0.24.1 is installed; this version of teacher-server serves with vllm 0.25 to 0.33" in line


def test_the_plugin_does_nothing_in_somebody_elses_vllm() -> None:
    program = (
        "import sys\n"
        "from teacher_server.vllm_plugin import register\n"
        "register()\n"
        "assert 'vllm' not in sys.modules and 'torch' not in sys.modules\n"
    )
    variables = {name: value for name, value in environment().items() if not name.startswith("STILLHOUSE_")}
    subprocess.run([interpreter("vllm"), "-c", program], env=variables, check=True)
    assert "STILLHOUSE_VLLM_FAILURES" not in os.environ
