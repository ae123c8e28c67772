"""The torch engine's scores are the teacher's, alone or in any batch, and its failures stay where they belong."""

import asyncio
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from stillhouse.codec import Scores, ScoreTask
from stillhouse.errors import EngineFailed, NonFiniteScores, OutOfMemory, Unavailable
from teacher_server.batching import pick_batch
from teacher_server.loading import ServedModel, compute_dtype, digest_model, load_model
from teacher_server.options import OptionError, parse
from teacher_server.scoring import score_tasks
from teacher_server.torch_engine import BatchReport, TorchEngine
from teacher_server.weights import DamagedWeights
from tests.models import (
    FAMILIES,
    MAX_POSITIONS,
    VOCABULARY_SIZE,
    reference_scores,
    save_model,
    scores_of_logits,
)

TOLERANCE = 1e-4  # nats, float32 against float64
SLICE_BYTES = 2**20


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def load(directory: Path, *options: str) -> ServedModel:
    return load_model(
        parse(
            ["--model", str(directory), "--device", "cpu", "--listen", "127.0.0.1:0", "--metrics-port", "0", *options]
        )
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, ServedModel]]:
    """family -> its directory and its model, made once."""

    @functools.cache
    def make(family: str) -> tuple[Path, ServedModel]:
        directory = save_model(tmp_path_factory.mktemp(family), family)
        return directory, load(directory)

    return make


@pytest.fixture
def llama(models: Callable[[str], tuple[Path, ServedModel]]) -> ServedModel:
    return models("llama")[1]


def make_task(
    seed: int, length: int = 24, *, start: int | None = None, k: int = 5, m: int = 0, temperature: float = 1.0
) -> ScoreTask:
    rng = np.random.default_rng(seed)
    start = int(rng.integers(1, length)) if start is None else start
    return ScoreTask(
        model="",
        token_ids=rng.integers(0, VOCABULARY_SIZE, length).astype(np.int32),
        score_start=start,
        top_k=k,
        candidate_ids=rng.integers(0, VOCABULARY_SIZE, (length - start, m)).astype(np.int32) if m else None,
        temperature=temperature,
    )


def max_error(scores: Scores, expected: dict[str, np.ndarray], *, check_ids: bool = True) -> float:
    """Largest absolute difference over all fields; infinities must be equal."""
    worst = 0.0
    for name, want in expected.items():
        got = getattr(scores, name)
        if name == "candidate_logprobs" and got is None:
            assert want.shape[1] == 0
            continue
        assert got.shape == want.shape, name
        if name == "top_ids":
            assert not check_ids or np.array_equal(got, want)
            continue
        assert got.dtype == np.float32, name
        assert np.array_equal(np.isneginf(got), np.isneginf(want)), name
        finite = np.isfinite(want)
        worst = max(worst, float(np.abs(got[finite] - want[finite]).max(initial=0.0)))
    return worst


def expected_of(directory: Path, task: ScoreTask, vocabulary_size: int = VOCABULARY_SIZE) -> dict[str, np.ndarray]:
    return reference_scores(
        directory,
        task.token_ids,
        score_start=task.score_start,
        top_k=task.top_k,
        candidate_ids=task.candidate_ids,
        temperature=task.temperature,
        vocabulary_size=vocabulary_size,
    )


def scored(model: ServedModel, *tasks: ScoreTask, slice_bytes: int = SLICE_BYTES) -> list[Scores]:
    results = score_tasks(model, tasks, slice_bytes)
    assert all(isinstance(result, Scores) for result in results)
    return results  # pyright: ignore[reportReturnType]


# Scores


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_matches_the_float64_reference(
    family: str, temperature: float, models: Any, record_property: Any
) -> None:
    directory, model = models(family)
    task = make_task(1, 40, start=9, k=8, m=6, temperature=temperature)
    error = max_error(scored(model, task)[0], expected_of(directory, task))
    record_property("max_abs_error", error)
    print(f"{family} temperature={temperature} max_abs_error={error:.2e}")
    assert error <= TOLERANCE


@pytest.mark.parametrize("k", [0, 1, VOCABULARY_SIZE - 1, VOCABULARY_SIZE])
@pytest.mark.parametrize("m", [0, 1, 9])
def test_every_size_of_top_k_and_candidates_matches_the_reference(models: Any, k: int, m: int) -> None:
    directory, model = models("llama")
    task = make_task(2, 20, start=7, k=k, m=m, temperature=0.7)
    scores = scored(model, task)[0]
    # Near-equal logits deep in the tail may swap places; their log-probabilities may not differ.
    assert max_error(scores, expected_of(directory, task), check_ids=k <= 1) <= TOLERANCE
    if k == 0:
        assert np.array_equal(scores.log_tail, np.zeros(13))
    if k == VOCABULARY_SIZE:
        assert np.isneginf(scores.log_tail).all()
    if m == 0:
        assert np.array_equal(scores.log_support_tail, scores.log_tail)


@pytest.mark.parametrize(("length", "start"), [(2, 1), (30, 29), (30, 1), (MAX_POSITIONS, 1)])
def test_the_shortest_and_longest_responses_match_the_reference(models: Any, length: int, start: int) -> None:
    directory, model = models("gpt2")
    task = make_task(3, length, start=start, k=4)
    scores = scored(model, task)[0]
    assert len(scores.sampled_logprobs) == length - start
    assert max_error(scores, expected_of(directory, task)) <= TOLERANCE


@pytest.mark.parametrize("head_rows", [97, 104, 160])
def test_padding_rows_of_a_head_take_no_part(tmp_path: Path, head_rows: int) -> None:
    directory = save_model(tmp_path, "qwen3", head_rows=head_rows)
    model = load(directory)
    assert model.teacher.vocabulary_size == VOCABULARY_SIZE
    task = make_task(4, 20, start=5, k=VOCABULARY_SIZE)
    scores = scored(model, task)[0]
    assert scores.top_ids.max() == VOCABULARY_SIZE - 1
    assert max_error(scores, expected_of(directory, task), check_ids=False) <= TOLERANCE
    np.testing.assert_allclose(np.exp(scores.top_logprobs).sum(axis=1), 1.0, atol=1e-5)


def test_without_a_tokenizer_every_row_of_the_head_counts_and_no_digest_is_claimed(tmp_path: Path) -> None:
    directory = save_model(tmp_path, vocabulary_size=None)
    model = load(directory)
    assert (model.teacher.vocabulary_size, model.teacher.vocabulary_digest) == (128, "")
    task = make_task(5, 20, k=3)
    assert max_error(scored(model, task)[0], expected_of(directory, task, 128)) <= TOLERANCE


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi"])
def test_half_precision_scores_are_exact_for_the_models_own_hidden_states(
    models: Any, family: str, dtype: str, record_property: Any
) -> None:
    directory, _ = models(family)
    model = load(directory, "--dtype", dtype)
    assert model.teacher.compute_dtype == dtype
    assert model.head.weight.dtype == torch.float32
    task = make_task(6, 40, start=9, k=8, m=6, temperature=0.5)
    with torch.inference_mode():
        hidden = model.backbone(input_ids=torch.as_tensor(task.token_ids)[None].long()).last_hidden_state[0]
    assert str(hidden.dtype) == f"torch.{dtype}"
    z = hidden[8:-1].double().numpy() @ model.head.weight.double().numpy().T
    if model.head.bias is not None:
        z += model.head.bias.double().numpy()
    if model.head.softcap is not None:
        z = model.head.softcap * np.tanh(z / model.head.softcap)
    expected = scores_of_logits(
        z, task.token_ids[9:], top_k=8, candidate_ids=task.candidate_ids, temperature=task.temperature
    )
    error = max_error(scored(model, task)[0], expected)
    record_property("max_abs_error", error)
    print(f"{family} {dtype} max_abs_error={error:.2e}")
    assert error <= TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sequence_scores_the_same_alone_and_in_any_batch(family: str, models: Any, record_property: Any) -> None:
    _, model = models(family)
    lengths = [2, 3, 9, 17, 30, 31, 64, MAX_POSITIONS]
    tasks = [
        make_task(seed, length, k=6, m=3, temperature=[0.5, 1.0, 2.0][seed % 3]) for seed, length in enumerate(lengths)
    ]
    worst = 0.0
    for chosen in (tasks, tasks[::-1], tasks[1:3], tasks[4:7]):
        for task, together in zip(chosen, scored(model, *chosen), strict=True):
            alone = dataclasses.asdict(scored(model, task)[0])
            fields = {name: value for name, value in alone.items() if isinstance(value, np.ndarray)}
            assert len(fields) == 8
            worst = max(worst, max_error(together, fields))
    record_property("max_abs_difference", worst)
    print(f"{family} max_abs_difference={worst:.2e}")
    assert worst <= 2e-5


@pytest.mark.parametrize("rows_a_slice", [1, 3, 12, 13, 14, 1000])
def test_slices_of_rows_change_nothing(llama: ServedModel, rows_a_slice: int) -> None:
    task = make_task(7, 20, start=7, k=5, m=2)
    whole = scored(llama, task)[0]
    sliced = scored(llama, task, slice_bytes=rows_a_slice * VOCABULARY_SIZE * 4 + 3)[0]
    fields = {name: value for name, value in dataclasses.asdict(whole).items() if isinstance(value, np.ndarray)}
    assert max_error(sliced, fields) <= 1e-5


# Models


def test_the_revision_follows_weights_and_configuration_but_not_other_files(tmp_path: Path) -> None:
    first = save_model(tmp_path / "a")
    assert digest_model(first) == digest_model(save_model(tmp_path / "b"))
    assert digest_model(first) != digest_model(save_model(tmp_path / "c", seed=1))
    before = digest_model(first)
    (first / "README.md").write_text("notes")
    assert digest_model(first) == before
    (first / "config.json").write_text((first / "config.json").read_text().replace("1e-06", "1e-05"))
    assert digest_model(first) != before
    assert load(first, "--revision", "mine").teacher.model_revision == "mine"


def test_limits_come_from_the_model_and_the_options(tmp_path: Path) -> None:
    directory = save_model(tmp_path)
    teacher = load(directory).teacher
    assert (teacher.max_sequence_tokens, teacher.max_top_k) == (MAX_POSITIONS, VOCABULARY_SIZE)
    teacher = load(directory, "--max-sequence-tokens", "64", "--max-top-k", "9", "--vocabulary-size", "90").teacher
    assert (teacher.max_sequence_tokens, teacher.max_top_k, teacher.vocabulary_size) == (64, 9, 90)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_auto_precision_is_the_stored_one_on_a_gpu_and_float32_on_a_cpu(tmp_path: Path, stored: torch.dtype) -> None:
    config = transformers.AutoConfig.from_pretrained(save_model(tmp_path, dtype=stored))
    assert compute_dtype("auto", config, torch.device("cuda")) is stored
    assert compute_dtype("auto", config, torch.device("cpu")) is torch.float32
    assert compute_dtype("bfloat16", config, torch.device("cpu")) is torch.bfloat16


@pytest.mark.parametrize("bytes_kept", [0, 4, 20_000])
def test_damaged_weights_are_refused(tmp_path: Path, bytes_kept: int) -> None:
    weights = save_model(tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:bytes_kept])
    with pytest.raises(DamagedWeights, match=r"model\.safetensors is missing or damaged"):
        load(tmp_path)


def test_options_that_do_not_fit_the_model_or_the_machine_are_named(tmp_path: Path) -> None:
    directory = save_model(tmp_path)
    with pytest.raises(OptionError, match="--max-sequence-tokens 129: the model's positions end at 128"):
        load(directory, "--max-sequence-tokens", "129")
    with pytest.raises(ValueError, match="vocabulary_size is 129, but the head has 128 rows"):
        load(directory, "--vocabulary-size", "129")
    with pytest.raises(OptionError, match="--device 'abacus'"):
        load(directory, "--device", "abacus")
    with pytest.raises(OptionError, match="--device cuda:99: torch sees"):
        load(directory, "--device", "cuda:99")


def test_weights_that_lack_a_tensor_are_refused_not_filled_with_random_numbers(tmp_path: Path) -> None:
    directory = save_model(tmp_path)
    config = directory / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    with pytest.raises(ValueError, match=r"the weights lack \d+ of the model's tensors"):
        load(directory)


# The queue and the batches


class Gate:
    """A backbone that waits for `opened` before each pass, and remembers the shape of each."""

    def __init__(self, backbone: Any) -> None:
        self.backbone = backbone
        self.opened = threading.Event()
        self.entered = threading.Event()
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, *, input_ids: torch.Tensor, use_cache: bool) -> Any:
        self.shapes.append(tuple(input_ids.shape))
        self.entered.set()
        assert self.opened.wait(30)
        return self.backbone(input_ids=input_ids, use_cache=use_cache)


def engine_of(model: ServedModel, **options: Any) -> TorchEngine:
    settings = {"max_batch_tokens": 256, "logits_slice_bytes": SLICE_BYTES}
    return TorchEngine(model, **{**settings, "on_batch": lambda report: None, **options})


async def wait_for(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end_s, "waited 20 s"
        await asyncio.sleep(0.005)


async def closed_gate(model: ServedModel, **options: Any) -> tuple[Gate, TorchEngine, asyncio.Task[Scores]]:
    """An engine whose worker stands at the gate with a first task."""
    gate = Gate(model.backbone)
    engine = engine_of(dataclasses.replace(model, backbone=gate), **options)
    first = asyncio.create_task(engine.score(make_task(0, 10)))
    await asyncio.to_thread(gate.entered.wait, 20)
    return gate, engine, first


async def test_a_crowd_of_different_tasks_is_batched_and_scored_as_alone(llama: ServedModel) -> None:
    reports: list[BatchReport] = []
    gate, engine, first = await closed_gate(llama, on_batch=reports.append)
    tasks = [
        make_task(seed, 5 + seed * 3 % 50, k=[0, 4][seed % 2], m=[0, 3][seed // 2 % 2], temperature=1 + seed % 3)
        for seed in range(24)
    ]
    work = [asyncio.create_task(engine.score(task)) for task in tasks]
    await wait_for(lambda: engine.pending_tokens == 10 + sum(len(task.token_ids) for task in tasks))
    gate.opened.set()
    for task, scores in zip(tasks, await asyncio.gather(*work), strict=True):
        alone = dataclasses.asdict(scored(llama, task)[0])
        fields = {name: value for name, value in alone.items() if isinstance(value, np.ndarray)}
        assert max_error(scores, fields) <= 2e-5
        assert scores.temperature == task.temperature
        assert scores.queue_wait_ms > 0
        assert scores.engine_ms > 0
        assert scores.batch_sequences >= 1
    await first
    assert engine.pending_tokens == 0
    assert len(gate.shapes) < 1 + len(tasks) / 2
    assert all(rows * columns <= 256 for rows, columns in gate.shapes)
    assert sum(report.sequences for report in reports) == 25
    assert sum(report.tokens for report in reports) == 10 + sum(len(task.token_ids) for task in tasks)
    await engine.close()


def test_a_batch_takes_the_oldest_and_the_nearest_in_length_within_the_budget() -> None:
    tasks = [make_task(0, length) for length in (30, 100, 29, 28, 30, 5)]
    assert pick_batch(tasks, 90) == [0, 4, 2]
    assert pick_batch(tasks, 10) == [0]  # longer than the budget: alone
    assert sorted(pick_batch(tasks, 10_000)) == [0, 1, 2, 3, 4, 5]
    assert pick_batch([tasks[5], tasks[1], tasks[0]], 100) == [0, 2]


def test_a_batch_never_mixes_numbers_of_top_k_or_candidates() -> None:
    tasks = [make_task(0, 9, k=k, m=m) for k, m in ((4, 2), (4, 3), (5, 2), (4, 2), (4, 0))]
    assert pick_batch(tasks, 1000) == [0, 3]


async def test_cancelled_work_leaves_the_queue_and_never_reaches_the_model(llama: ServedModel) -> None:
    gate, engine, first = await closed_gate(llama)
    doomed = asyncio.create_task(engine.score(make_task(1, 40)))
    kept = asyncio.create_task(engine.score(make_task(2, 20)))
    await wait_for(lambda: engine.pending_tokens == 70)
    doomed.cancel()
    await wait_for(lambda: engine.pending_tokens == 30)
    assert len(engine._queue) == 1  # a withdrawn request must not keep its arrays until the model is free
    gate.opened.set()
    await asyncio.gather(first, kept)
    assert doomed.cancelled()
    assert gate.shapes == [(1, 10), (1, 20)]
    await engine.close()


async def test_work_cancelled_while_it_is_scored_harms_nobody(llama: ServedModel) -> None:
    gate, engine, first = await closed_gate(llama)
    first.cancel()
    gate.opened.set()
    assert (await engine.score(make_task(3, 12))).batch_sequences == 1
    await wait_for(lambda: engine.pending_tokens == 0)
    await engine.close()


def out_of_memory_above(backbone: Any, sequences: int, error: Exception) -> Any:
    def run(*, input_ids: torch.Tensor, use_cache: bool) -> Any:
        if len(input_ids) > sequences:
            raise error
        return backbone(input_ids=input_ids, use_cache=use_cache)

    return run


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
async def test_a_batch_that_does_not_fit_is_halved_until_it_does(llama: ServedModel, error: Exception) -> None:
    small = dataclasses.replace(llama, backbone=out_of_memory_above(llama.backbone, 2, error))
    gate, engine, first = await closed_gate(small)
    work = [asyncio.create_task(engine.score(make_task(seed, 20))) for seed in range(7)]
    await wait_for(lambda: engine.pending_tokens == 150)
    gate.opened.set()
    results = await asyncio.gather(*work)
    assert gate.shapes[1:] == [(7, 20), (3, 20), (1, 20), (2, 20), (4, 20), (2, 20), (2, 20)]
    assert [scores.batch_sequences for scores in results] == [1, 2, 2, 2, 2, 2, 2]
    for seed, scores in enumerate(results):
        np.testing.assert_allclose(
            scores.sampled_logprobs, scored(llama, make_task(seed, 20))[0].sampled_logprobs, atol=2e-5
        )
    await first
    await engine.close()


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
async def test_a_sequence_that_does_not_fit_alone_is_refused_and_the_engine_lives(
    llama: ServedModel, error: Exception
) -> None:
    def too_long(*, input_ids: torch.Tensor, use_cache: bool) -> Any:
        if input_ids.shape[1] > 50:
            raise error
        return llama.backbone(input_ids=input_ids, use_cache=use_cache)

    engine = engine_of(dataclasses.replace(llama, backbone=too_long))
    with pytest.raises(OutOfMemory) as raised:
        await engine.score(make_task(0, 51))
    assert raised.value.fields == {"field": "token_ids", "value": "51"}
    await engine.score(make_task(0, 50))
    await engine.close()


async def test_an_unexpected_failure_stays_in_its_batch_and_its_text_in_the_log(
    llama: ServedModel, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*, input_ids: torch.Tensor, use_cache: bool) -> Any:
        if input_ids[0, 0] == 96:
            raise KeyError("secret path /etc/x")
        return llama.backbone(input_ids=input_ids, use_cache=use_cache)

    engine = engine_of(dataclasses.replace(llama, backbone=broken))
    bad = dataclasses.replace(make_task(0, 20), token_ids=np.full(20, 96, np.int32))
    with pytest.raises(EngineFailed) as raised:
        await engine.score(bad)
    assert "secret" not in raised.value.message
    reference = raised.value.fields["reference"]
    assert reference in raised.value.message
    assert f"reference={reference}" in caplog.text
    assert "secret path /etc/x" in caplog.text
    await engine.score(make_task(0, 20))
    await engine.close()


async def test_an_error_of_the_device_itself_is_the_end(llama: ServedModel) -> None:
    def lost(*, input_ids: torch.Tensor, use_cache: bool) -> Any:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    engine = engine_of(dataclasses.replace(llama, backbone=lost))
    death = asyncio.create_task(engine.died())
    await asyncio.sleep(0)
    assert not death.done()
    with pytest.raises(Unavailable):
        await engine.score(make_task(0, 20))
    assert "an illegal memory access" in await asyncio.wait_for(death, 5)
    with pytest.raises(Unavailable):
        await engine.score(make_task(1, 20))
    assert engine.pending_tokens == 0
    await engine.close()


async def test_a_metrics_observer_that_fails_does_not_stop_the_engine(llama: ServedModel) -> None:
    def broken(report: BatchReport) -> None:
        raise ZeroDivisionError

    engine = engine_of(llama, on_batch=broken)
    for seed in range(2):
        with pytest.raises(EngineFailed):
            await engine.score(make_task(seed, 20))
    await engine.close()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
async def test_a_sequence_with_non_finite_logits_fails_alone_in_its_batch(llama: ServedModel, value: float) -> None:
    def poisoned(*, input_ids: torch.Tensor, use_cache: bool) -> Any:
        output = llama.backbone(input_ids=input_ids, use_cache=use_cache)
        output.last_hidden_state[(input_ids == 96).cumsum(1) > 0] = value
        return output

    tasks = [make_task(seed, 20, start=5) for seed in range(3)]
    for index, task in enumerate(tasks):
        ids = np.where(task.token_ids == 96, 0, task.token_ids)
        tasks[index] = dataclasses.replace(task, token_ids=ids.astype(np.int32))
    tasks[1].token_ids[12] = 96
    good, bad, also_good = score_tasks(dataclasses.replace(llama, backbone=poisoned), tasks, SLICE_BYTES)
    assert isinstance(good, Scores)
    assert isinstance(also_good, Scores)
    assert isinstance(bad, NonFiniteScores)
    assert bad.fields["position"] == "8"  # token 12 poisons the prediction of token 13, response token 8
    # The last token predicts nothing, so it cannot harm.
    tasks[1].token_ids[12] = 0
    tasks[1].token_ids[-1] = 96
    assert all(isinstance(result, Scores) for result in score_tasks(llama, tasks, SLICE_BYTES))


async def test_closing_fails_what_is_left_and_refuses_what_comes(llama: ServedModel) -> None:
    gate, engine, first = await closed_gate(llama)
    second = asyncio.create_task(engine.score(make_task(1, 40)))
    await wait_for(lambda: engine.pending_tokens == 50)
    closing = asyncio.create_task(engine.close())
    for work in (first, second):
        with pytest.raises(Unavailable):
            await work
    with pytest.raises(Unavailable):
        await engine.score(make_task(2, 5))
    gate.opened.set()
    await closing
    assert engine.pending_tokens == 0
    assert gate.shapes == [(1, 10)]
