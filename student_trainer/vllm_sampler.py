"""Rollouts from vLLM, which runs in processes of its own with a copy of the weights: the only file that imports it.

Who waits for whom: the engine generates in its processes. A thread with an event loop talks to it and does nothing
else. `sample` runs in its caller's thread, which may be a background one: it waits for the loop's answers without
holding the interpreter's lock, and turns them into rollouts. `load` waits until the engine has the new weights.

What the engine's environment must be is set for its processes only, unless the user's environment says otherwise:
VLLM_CPU_OMP_THREADS_BIND=nobind (its threads share the cores with the trainer's instead of being pinned to them;
their number is OMP_NUM_THREADS), OMP_WAIT_POLICY=passive and VLLM_LOGGING_LEVEL=WARNING. On a CPU the key-value cache
has 2 GiB unless `VllmOptions.kv_cache_bytes` or VLLM_CPU_KVCACHE_SPACE (GiB) says otherwise. vLLM changes further
variables when it starts; the trainer's own come back afterwards.

What is taken from vLLM: `AsyncLLM` with `SamplingParams`; a worker extension (`vllm_worker`) around
`Worker.reload_weights`; `LogitsProcessor` of both model runners; `additional_config`, an object of ours that all
processes of the engine are sent.
"""

# vLLM is not installed where types are checked, and its environment is set before it is imported.
# pyright: reportMissingImports=false

import asyncio
import atexit
import contextlib
import fcntl
import gc
import itertools
import multiprocessing
import os
import queue
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Coroutine, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

# vLLM reads these when it is imported.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # standard output is ours
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoConfig
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs import tokens_input
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.sample.logits_processor import LogitsProcessor

try:  # vLLM's second model runner takes logits processors from 0.31 on, and has an interface of its own for them
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2
except ImportError:
    LogitsProcessorV2 = object

from student_trainer.batch import Rollout
from student_trainer.config import ConfigError, RolloutConfig
from student_trainer.prompts import Prompt
from student_trainer.sampler import SamplerLost, stream_seed
from student_trainer.stopping import Stopping, never
from student_trainer.vllm_worker import EngineSettings, WorkerExtension

CPU_KV_CACHE_BYTES = 2 * 2**30

_POLL_S = 0.1
_RESET_S = 60.0
_SHARD_BYTES = 2**30
_LOWEST_TEMPERATURE = 0.01  # vLLM raises lower ones to this
_STOP_INTERVAL = 8  # tokens between two looks for a stop string; what is generated beyond one is cut away

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class VllmOptions:
    """What the engine may use."""

    gpu_memory_utilization: float | None = None
    """Share of the device's memory, 0 .. 1; None: vLLM's default, which leaves a trainer on the same GPU no room."""
    kv_cache_bytes: int | None = None
    """Size of the key-value cache; None: what `gpu_memory_utilization` leaves; on a CPU 2 GiB."""
    max_num_seqs: int | None = None
    """Most answers generated at once; None: the rollout configuration's batch_size."""
    enforce_eager: bool = False
    """No compilation and no CUDA graphs: starts faster, runs slower. Always so on a CPU."""
    stall_s: float = 3600.0
    """The engine is taken for lost when no answer has ended for so long."""


@dataclass(frozen=True, slots=True)
class _Answer:
    """What vLLM gave for one request; only the first `length` tokens of it count."""

    prompt: Prompt
    completion: Any  # vllm.outputs.CompletionOutput
    length: int
    finished: bool


class VllmSampler:
    """Samples with vLLM.

    directory: of a Hugging Face model, whose weights the engine starts with. eos_ids: tokens that end an answer.
    vocabulary_size: ids from there on, which a padded head has, are never drawn and take no part in the softmax.
    candidates: M, how many of the student's own most likely tokens to note at each position. dtype: of the engine's
    weights and products, such as "bfloat16". max_sequence_tokens: of prompt and answer together.

    Takes half a minute to start. Raises ConfigError for what vLLM cannot do, and vLLM's own error if the engine does
    not come up. The engine's processes end with this one, even if it is killed.
    """

    owns_weights = True

    def __init__(
        self,
        directory: Path,
        tokenizer: Any,
        config: RolloutConfig,
        *,
        eos_ids: set[int],
        vocabulary_size: int,
        candidates: int,
        dtype: str,
        max_sequence_tokens: int,
        options: VllmOptions,
    ) -> None:
        _check(config)
        self._tokenizer = tokenizer
        self._config = config
        self._eos_ids = sorted(eos_ids)
        self._candidates = min(candidates, vocabulary_size)
        self._stall_s = options.stall_s
        self._request_ids = itertools.count()
        self._sampling = 0  # how many `sample` are under way
        arguments = {
            "model": str(directory),
            "skip_tokenizer_init": True,
            "generation_config": "vllm",  # not the model's own, which may sample otherwise
            "dtype": dtype,
            "max_model_len": max_sequence_tokens,
            "max_num_seqs": options.max_num_seqs or config.batch_size,
            "enforce_eager": options.enforce_eager or current_platform.is_cpu(),
            "enable_prefix_caching": True,  # the answers to a prompt share it
            "logprobs_mode": "processed_logprobs",  # at the temperature, without the ids that are no tokens
            "max_logprobs": max(1, self._candidates),
            "stream_interval": _STOP_INTERVAL if config.stop else 1,
            "worker_extension_cls": f"{WorkerExtension.__module__}.{WorkerExtension.__name__}",
            "use_tqdm_on_load": False,
            "disable_log_stats": True,  # they would go into the trainer's own metrics
            **_memory(options),
        }
        if vocabulary_size < AutoConfig.from_pretrained(directory).get_text_config().vocab_size:
            arguments["logits_processors"] = [f"{__name__}:{VocabularyMask.__name__}"]
        self._home = _Home()
        arguments["additional_config"] = EngineSettings(vocabulary_size, self._home.lock)
        others = set(multiprocessing.active_children())
        try:
            with _environment():
                self._llm: AsyncLLM | None = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        except BaseException:
            self._home.remove()
            raise
        self._processes = sorted(set(multiprocessing.active_children()) - others, key=lambda process: process.name)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="VllmSampler", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # before vLLM and multiprocessing end it in their ways, which are loud

    def sample(
        self, prompts: Sequence[Prompt], answers: int, *, seed: int, stop: Stopping = never
    ) -> Iterator[list[Rollout]]:
        """`answers` rollouts for each prompt, handed over as they end. May run in any thread.

        The same seed, prompts and weights give the same rollouts, whatever else the engine does, but for the
        rounding of logits: that depends on what is computed together and moves a token once in a great while. Once
        `stop()` is true, looked at ten times a second, what is left is aborted and no further lot comes.

        Raises SamplerLost.
        """
        ended: queue.SimpleQueue[_Answer | BaseException] = queue.SimpleQueue()
        self._sampling += 1
        try:
            tasks = self._call(self._start(prompts, answers, seed, ended))
            try:
                left, ended_s = len(tasks), time.monotonic()
                while left:
                    lot = _drain(ended)
                    if stop():
                        return
                    if lot:
                        ended_s = time.monotonic()
                    elif time.monotonic() - ended_s > self._stall_s:
                        raise SamplerLost(
                            f"the rollout engine has ended no answer for {self._stall_s:.0f} s (rollout.vllm.stall_s), "
                            f"{left} are missing; its log may say why"
                        )
                    for answer in lot:
                        if isinstance(answer, BaseException):
                            raise answer
                    if lot:
                        left -= len(lot)
                        yield [self._rollout(answer) for answer in lot if isinstance(answer, _Answer)]
                    elif self._dead:
                        raise EngineDeadError
            finally:
                with contextlib.suppress(EngineDeadError):
                    self._call(_cancel(tasks))
        except EngineDeadError as error:
            raise SamplerLost(self._cause_of_death()) from error
        finally:
            self._sampling -= 1

    def probe(self, prompt: Prompt, max_tokens: int) -> Rollout:
        """One answer of at most `max_tokens`, always drawn with the same numbers. Raises SamplerLost."""
        try:
            return self._rollout(self._call(self._answer(prompt, [0], max_tokens)))
        except EngineDeadError as error:
            raise SamplerLost(self._cause_of_death()) from error

    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Takes over `weights`: every parameter of the model under its Hugging Face name, of tied ones one.

        Nothing may be sampling. They travel through files in shared memory where it has room, else in the temporary
        directory, in pieces of 1 GiB. Raises ValueError if some of the model's parameters are not among them (the
        others are taken over), SamplerLost, or RuntimeError with what vLLM said.
        """
        if self._dead:
            raise SamplerLost(self._cause_of_death())
        if self._sampling:
            raise RuntimeError("new weights while answers are being sampled would give answers of both; end them first")
        try:
            with _checkpoint(weights, self._home.path) as directory:
                missing = self._call(self._reload(directory))
        except EngineDeadError as error:
            raise SamplerLost(self._cause_of_death()) from error
        if missing:
            raise ValueError(f"the engine still has old weights of {', '.join(missing)}; give those too")

    def close(self) -> None:
        """Stops the engine's processes. May be called again."""
        if self._llm is None:
            return
        llm, self._llm = self._llm, None
        atexit.unregister(self.close)
        handler = getattr(llm, "output_handler", None)
        if handler is not None:
            # Left to itself it takes the end of the processes for their death, and says so with a traceback.
            self._loop.call_soon_threadsafe(handler.cancel)
        llm.shutdown(timeout=5)
        for process in self._processes:
            process.kill()
        with contextlib.suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(_cancel_others(), self._loop).result(timeout=5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        # Its destructor must not run when the interpreter has already taken down what it calls.
        del llm, handler
        gc.collect()
        self._home.remove()

    # In the caller's thread

    def _call(self, work: Coroutine[Any, Any, _T]) -> _T:
        """What `work` gives in the loop's thread. Raises EngineDeadError instead of waiting for a dead engine."""
        if self._llm is None:
            work.close()
            raise EngineDeadError
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        while True:
            try:
                return future.result(timeout=_POLL_S)
            except TimeoutError:
                if future.done():  # what timed out was the work itself
                    return future.result()
                if self._dead:
                    future.cancel()
                    raise EngineDeadError from None

    @property
    def _dead(self) -> bool:
        return self._llm is None or bool(self._llm.errored)

    def _cause_of_death(self) -> str:
        if self._llm is None:
            return "the rollout engine was closed"
        endings = [_ending(process) for process in self._processes]
        said = ", ".join(ending for ending in endings if ending) or "a process of it failed; its log says why"
        return f"the rollout engine is lost: {said}"

    def _rollout(self, answer: _Answer) -> Rollout:
        completion, length = answer.completion, answer.length
        # Of each token: its own id and log-probability, then those of the most likely ones.
        shape = (-1, 1 + self._candidates)
        ids = np.array(completion.logprobs.token_ids, np.int32).reshape(shape)[:length]
        logprobs = np.array(completion.logprobs.logprobs, np.float32).reshape(shape)[:length]
        assert len(ids) == length > 0
        return Rollout(
            prompt=answer.prompt,
            response_ids=ids[:, 0].copy(),
            sampler_logprobs=logprobs[:, 0].copy(),
            candidate_ids=ids[:, 1:].copy(),
            text=self._tokenizer.decode(ids[:, 0], skip_special_tokens=True),
            finished=answer.finished,
        )

    # In the loop's thread

    async def _start(
        self, prompts: Sequence[Prompt], answers: int, seed: int, ended: "queue.SimpleQueue[_Answer | BaseException]"
    ) -> list["asyncio.Task[None]"]:
        async def put(prompt: Prompt, answer: int) -> None:
            try:
                ended.put(await self._answer(prompt, stream_seed(seed, prompt, answer)))
            except Exception as error:
                ended.put(error)

        return [asyncio.create_task(put(prompt, answer)) for prompt in prompts for answer in range(answers)]

    async def _answer(self, prompt: Prompt, entropy: list[int], max_tokens: int | None = None) -> _Answer:
        config, llm = self._config, self._llm
        if llm is None:
            raise EngineDeadError
        params = SamplingParams(
            temperature=config.temperature,
            seed=int(np.random.SeedSequence(entropy).generate_state(1)[0]),
            max_tokens=min(max_tokens or config.max_new_tokens, config.max_new_tokens),
            stop_token_ids=self._eos_ids,
            ignore_eos=True,  # those of the model's configuration; ours are above
            logprobs=self._candidates,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.CUMULATIVE if config.stop else RequestOutputKind.FINAL_ONLY,
        )
        request_id = f"{os.getpid()}-{next(self._request_ids)}"
        seen = 0
        async with contextlib.aclosing(
            llm.generate(tokens_input(list(prompt.token_ids)), params, request_id)
        ) as outputs:
            async for output in outputs:
                completion = output.outputs[0]
                tokens = completion.token_ids
                stopped = self._find_stop(tokens, seen) if config.stop else None
                if stopped is not None:  # leaving aborts the request
                    return _Answer(prompt, completion, stopped, True)
                if output.finished:
                    assert completion.finish_reason in ("stop", "length"), completion.finish_reason
                    return _Answer(prompt, completion, len(tokens), completion.finish_reason == "stop")
                seen = len(tokens)
        raise EngineDeadError

    def _find_stop(self, tokens: Sequence[int], seen: int) -> int | None:
        """Tokens up to and with the one, after the first `seen`, that completes a stop string.

        A token adds at least one byte, so the last tokens, as many as the longest string has bytes, hold any string
        that has just been completed.
        """
        stop = self._config.stop
        window = max(len(text.encode()) for text in stop) + 1

        def found(begin: int, end: int) -> bool:
            text = self._tokenizer.decode(tokens[max(0, begin) : end])
            return any(string in text for string in stop)

        if not found(seen + 1 - window, len(tokens)):
            return None
        return next((end for end in range(seen + 1, len(tokens) + 1) if found(end - window, end)), None)

    async def _reload(self, directory: Path) -> list[str]:
        llm = self._llm
        if llm is None:
            raise EngineDeadError
        try:
            missing = await llm.collective_rpc("load_student", kwargs={"directory": str(directory)})
        except EngineDeadError:
            raise
        except Exception as error:  # of no class of its own
            raise RuntimeError(f"the engine could not take over the weights: {error}") from error
        # What is cached of prefixes is of the old weights. Blocks of aborted requests may be in use for another step.
        deadline_s = time.monotonic() + _RESET_S
        while not await llm.reset_prefix_cache():
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"the engine's prefix cache was still in use {_RESET_S} s after the last answer")
            await asyncio.sleep(0.05)
        return sorted(set().union(*missing))


class VocabularyMask(LogitsProcessor, LogitsProcessorV2):  # pyright: ignore[reportGeneralTypeIssues]
    """In the engine: ids that are no tokens get probability 0 before anything else is made of the logits."""

    def __init__(self, vllm_config: Any, *_: Any) -> None:
        self._size: int = vllm_config.additional_config.vocabulary_size

    def apply(self, logits: torch.Tensor, *_: Any) -> torch.Tensor:
        """logits: [B, head rows], changed in place."""
        logits[:, self._size :] = -torch.inf
        return logits

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        pass


class _Home:
    """A directory in memory where there is such, and in it a file that stays locked as long as this process lives.

    The engine's processes watch the lock (see `vllm_worker`): they end, and remove the directory, once it is free.
    """

    def __init__(self) -> None:
        memory = "/dev/shm"
        self._directory = tempfile.TemporaryDirectory(
            prefix="stillhouse-", dir=memory if os.access(memory, os.W_OK) else None
        )
        self.path = Path(self._directory.name)
        self.lock = self.path / str(os.getpid())
        self._file = self.lock.open("w")
        fcntl.lockf(self._file, fcntl.LOCK_EX)

    def remove(self) -> None:
        self._file.close()
        self._directory.cleanup()


def _check(config: RolloutConfig) -> None:
    if config.top_p < 1:
        raise ConfigError(
            f"rollout.top_p: {config.top_p}, but vLLM's log-probabilities would be those of the nucleus, not of the "
            "whole distribution; set it to 1, or sample with transformers"
        )
    if config.temperature < _LOWEST_TEMPERATURE:
        raise ConfigError(
            f"rollout.temperature: {config.temperature}, but vLLM's lowest is {_LOWEST_TEMPERATURE}; raise it, or "
            "sample with transformers"
        )


def _memory(options: VllmOptions) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    if options.gpu_memory_utilization is not None:
        arguments["gpu_memory_utilization"] = options.gpu_memory_utilization
    if options.kv_cache_bytes is not None:
        arguments["kv_cache_memory_bytes"] = options.kv_cache_bytes
    if current_platform.is_cpu() and not arguments:  # else vLLM takes nine tenths of the machine
        arguments["kv_cache_memory_bytes"] = CPU_KV_CACHE_BYTES
    return arguments


@contextlib.contextmanager
def _environment() -> Generator[None]:
    """The environment that the engine's processes get; afterwards it is the trainer's again."""
    before = dict(os.environ)
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait leave their cores to the trainer
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"  # a fork of a process with threads may hang
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    if torch.cuda.is_available():
        # One engine a trainer process, on the GPU of that process; vLLM would take the first.
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[torch.cuda.current_device()]
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


@contextlib.contextmanager
def _checkpoint(weights: Iterable[tuple[str, torch.Tensor]], memory: Path) -> Generator[Path]:
    """A directory with `weights` in safetensors files, below `memory` or linked to where there is room."""
    with (
        tempfile.TemporaryDirectory(prefix="stillhouse-weights-") as on_disk,
        tempfile.TemporaryDirectory(prefix="weights-", dir=memory) as in_memory,
    ):
        for index, shard in enumerate(_shards(weights)):
            size = sum(tensor.nbytes for tensor in shard.values())
            name = f"{index:05}.safetensors"
            if size + 2**20 < shutil.disk_usage(in_memory).free:
                save_file(shard, Path(in_memory) / name)
            else:
                save_file(shard, Path(on_disk) / name)
                (Path(in_memory) / name).symlink_to(Path(on_disk) / name)
        yield Path(in_memory)


def _shards(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    """The same on the CPU, in pieces of `_SHARD_BYTES` or one tensor."""
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in weights:
        if shard and size + tensor.nbytes > _SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor.detach().cpu().contiguous()
        size += tensor.nbytes
    yield shard


def _drain(ended: "queue.SimpleQueue[_T]") -> list[_T]:
    """What has arrived; waits a moment for the first."""
    found: list[_T] = []
    with contextlib.suppress(queue.Empty):
        found.append(ended.get(timeout=_POLL_S))
        while True:
            found.append(ended.get_nowait())
    return found


async def _cancel(tasks: "list[asyncio.Task[Any]]") -> None:
    """Ends `tasks`. Those that wait for an answer abort their requests first."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _cancel_others() -> None:
    """Ends whatever else runs in this loop."""
    await _cancel([task for task in asyncio.all_tasks() if task is not asyncio.current_task()])


def _ending(process: Any) -> str:
    """How a process of the engine ended; empty while it lives."""
    deadline_s = time.monotonic() + 1.0
    while process.exitcode is None and time.monotonic() < deadline_s:
        time.sleep(0.01)
    code = process.exitcode
    if code is None:
        return ""
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}; its log says why"
    return f"{process.name} (process {process.pid}) {how}"
