"""All that depends on vLLM and its version: the only file that imports it.

The teacher is served as a *pooling model*. vLLM's documented seam for models of one's own, its registry, takes a
subclass of the served architecture with a pooler of ours; the pooler gets the last hidden states of each step on
the worker, on every model runner, device and number of processes, and what it returns travels to the front end as
one tensor a sequence. So the head product, the top k and all else happen beside the weights, for the response rows
only, and vLLM's own memory profile sees it, since it runs the pooler on a full batch before it sizes its cache.

What is taken from vLLM, and from which of its parts:

- `AsyncLLM.encode`, `AsyncEngineArgs`, `PoolingParams.extra_kwargs`: the engine (documented);
- `ModelRegistry.register_model`, `Pooler`, `PoolingMetadata`: the scoring model (documented);
- `LogitsProcessor.forward`: replaced in the served model, so that every family's `compute_logits` gives float32
  logits of the process's own columns, unrounded and ungathered;
- `Scheduler` and its `KVCacheManager.get_computed_blocks`: a reused prefix must end before the first row to score;
- `MultiprocExecutor` with `nnodes`: a node of several that is not the first, as `vllm serve --headless` runs it.
"""

# vLLM is not installed where types are checked: it has an environment of its own. And its version is looked at, and its
# environment set, before anything is imported from it.
# pyright: reportMissingImports=false
# ruff: noqa: E402

import contextlib
import gc
import importlib.metadata
import json
import logging
import multiprocessing
import os
import tempfile
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Before vllm is imported, which reads them then. Children are spawned: a fork of a process with threads may hang.
os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # standard output is ours
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch takes large memory on a CPU in huge pages
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait leave their cores to the other processes

import numpy as np
import psutil
import torch
import vllm
from torch import Tensor

from teacher_server.vllm_versions import UnsupportedVllm, check_version

check_version(vllm.__version__)  # before anything of it that another version may not have

from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size, get_tp_group
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs import tokens_input
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.pooler import Pooler
from vllm.model_executor.models import ModelRegistry
from vllm.platforms import current_platform
from vllm.pooling_params import PoolingParams
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from lm_head import linear
from teacher_server.packing import RowRequest
from teacher_server.row_scores import Shard
from teacher_server.step_scores import Part, StepScorer
from teacher_server.vllm_plugin import FAILURES_VARIABLE, SERVER_VARIABLE

logger = logging.getLogger(__name__)

VERSION: str = vllm.__version__
"""Of vLLM."""
CPU_KV_CACHE_BYTES = 2 * 2**30

_ARCHITECTURES_VARIABLE = "STILLHOUSE_VLLM_ARCHITECTURES"
_SETTINGS_VARIABLE = "STILLHOUSE_VLLM_SCORING"
_TASK = "token_classify"  # the task of per-token poolers that both model runners know
_WITHOUT_A_WORD = "one of its processes was killed, or ended without a word"
_MASKED = -1e30  # logit of a column that is no token: probability 0, and unlike -inf it can be multiplied by 0


class ProcessFailed(RuntimeError):
    """The engine did not come up; the text is what the first of its processes that failed said of it."""


class EngineDied(RuntimeError):
    """The engine's processes are gone; nothing more can be scored."""


# The front end: what `vllm_engine` uses


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where the processes of several nodes find each other."""

    address: str  # of the leader
    port: int
    own_address: str  # of this node, on the same network


@dataclass(frozen=True, slots=True)
class Settings:
    """What the engine is started with."""

    model: Path
    architectures: Sequence[str]
    dtype: str
    max_sequence_tokens: int
    max_batch_tokens: int
    vocabulary_size: int
    max_top_k: int
    max_candidates: int
    logits_slice_bytes: int
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    quantization: str | None = None
    gpu_memory_utilization: float | None = None
    kv_cache_bytes: int | None = None
    prefix_caching: bool = True
    log_level: str = "info"
    further: dict[str, Any] = field(default_factory=dict)  # any other field of AsyncEngineArgs
    nodes: int = 1
    node_rank: int = 0
    meeting: Meeting | None = None  # with several nodes


class Vllm:
    """A running engine: sequences and what to score of them in, answers out."""

    def __init__(
        self, llm: AsyncLLM, directory: "tempfile.TemporaryDirectory[str]", lost: Callable[[], str | None]
    ) -> None:
        self._llm: AsyncLLM | None = llm
        self._directory = directory  # of the failures that the children report
        self._lost = lost

    @classmethod
    def start(cls, settings: Settings, lost: Callable[[], str | None] = lambda: None) -> "Vllm":
        """Starts the engine's processes and waits until they have the model.

        Call it from the main thread: the children die with the thread that started them. lost: what is known of the
        loss of another node, for which the processes of this one were killed. Raises UnsupportedVllm, or
        ProcessFailed or vLLM's own error if the engine does not come up; no process is left then.
        """
        directory = _set_environment(settings)
        try:
            return cls(AsyncLLM.from_engine_args(engine_arguments(settings)), directory, lost)
        except Exception as error:
            cause = _cause(directory)
            if cause is None:  # it failed in this process, and says so itself
                raise
            raise ProcessFailed(cause) from error

    async def encode(
        self, request_id: str, token_ids: list[int], request: RowRequest, *, read_cache: bool
    ) -> np.ndarray:
        """The worker's answer (see `packing`). Cancelling it withdraws the sequence. Raises EngineDied."""
        if self._llm is None:
            raise EngineDied("it was shut down")
        params = PoolingParams(
            task=_TASK,
            use_activation=False,
            skip_reading_prefix_cache=not read_cache,
            extra_kwargs={"rows": request.pack(), "first_row": request.first_row},
        )
        outputs = self._llm.encode(tokens_input(token_ids), params, request_id)
        try:
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    return output.outputs.data.numpy()
        except EngineDeadError as error:
            raise EngineDied(self.cause_of_death) from error
        raise EngineDied("the engine ended the sequence without an answer")

    @property
    def dead(self) -> bool:
        """Whether the engine's processes are gone. Being busy is not being dead."""
        return self._llm is None or bool(self._llm.errored)

    @property
    def cause_of_death(self) -> str:
        """The loss of a node, or what the first process that failed said of it."""
        return self._lost() or _first_failure(self._directory) or _WITHOUT_A_WORD

    def shutdown(self) -> None:
        """Stops the engine's processes; they are killed if they take more than 10 s."""
        if self._llm is None:
            return
        handler = getattr(self._llm, "output_handler", None)
        if handler is not None and not handler.get_loop().is_closed():
            # Left to itself it takes the end of the processes for their death, and says so with a traceback.
            handler.get_loop().call_soon_threadsafe(handler.cancel)
        self._llm.shutdown(timeout=10)
        # Its destructor must not run when the interpreter has already taken down what it calls.
        self._llm = None
        gc.collect()
        self._directory.cleanup()


class NodeWorkers:
    """The workers of a node other than the leader's: the leader's engine uses them over the network."""

    def __init__(self, executor: MultiprocExecutor, directory: "tempfile.TemporaryDirectory[str]") -> None:
        self._executor = executor
        self._directory = directory

    @classmethod
    def start(cls, settings: Settings) -> "NodeWorkers":
        """Starts the workers and waits until they have their part of the model, as those of all nodes do together.

        As `Vllm.start`, call it from a thread that stays.
        """
        directory = _set_environment(settings)
        # They wait for a leader that is gone: the end of the connection to it says so, and they need not be asked.
        os.environ.setdefault("VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS", "0")
        try:
            config = engine_arguments(settings).create_engine_config(headless=True)
            return cls(MultiprocExecutor(config), directory)
        except Exception as error:
            cause = _cause(directory)
            if cause is None:  # it failed in this process, and says so itself
                raise
            raise ProcessFailed(cause) from error

    @property
    def dead(self) -> bool:
        """Whether one of them is gone."""
        return self._executor.is_failed

    @property
    def cause_of_death(self) -> str:
        """What the first process that failed said of it."""
        return _first_failure(self._directory) or _WITHOUT_A_WORD

    def shutdown(self) -> None:
        """Stops them."""
        self._executor.shutdown()
        self._directory.cleanup()


def kill_processes() -> None:
    """Kills what the engine consists of, also while it starts: its processes die with the one that this one started."""
    for process in multiprocessing.active_children():
        process.kill()


def _set_environment(settings: Settings) -> "tempfile.TemporaryDirectory[str]":
    """What the engine's processes read when they begin; returns the directory of the failures that they report."""
    _check_entry_point()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", settings.log_level.upper())
    os.environ[_ARCHITECTURES_VARIABLE] = ",".join(settings.architectures)
    os.environ[_SETTINGS_VARIABLE] = json.dumps(
        {
            "vocabulary_size": settings.vocabulary_size,
            "max_top_k": settings.max_top_k,
            "max_candidates": settings.max_candidates,
            "logits_slice_bytes": settings.logits_slice_bytes,
        }
    )
    directory = tempfile.TemporaryDirectory(prefix="stillhouse-")
    os.environ[FAILURES_VARIABLE] = str(_failures(directory))
    os.environ[SERVER_VARIABLE] = str(os.getpid())
    # What a killed process leaves in shared memory is cleaned up; that need not be the last thing anybody reads.
    silence = "ignore:resource_tracker:UserWarning"
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [os.environ.get("PYTHONWARNINGS"), silence]))
    if settings.meeting is not None:
        # Left to themselves, vLLM takes the address of the default route and gloo that of the machine's name.
        own = settings.meeting.own_address
        os.environ.setdefault("VLLM_HOST_IP", own)
        for interface, addresses in psutil.net_if_addrs().items():
            if own in (address.address for address in addresses):
                os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    return directory


def _cause(directory: "tempfile.TemporaryDirectory[str]") -> str | None:
    """What made the first of the engine's processes fail that failed while it started."""
    with directory:
        cause = _first_failure(directory)
    if cause is not None and "memory" in cause.lower():
        cause += (
            " (teacher-server's options: --gpu-memory-utilization, --kv-cache-bytes, --max-sequence-tokens, "
            "--max-batch-tokens, --logits-slice-bytes)"
        )
    return cause


def _failures(directory: "tempfile.TemporaryDirectory[str]") -> Path:
    return Path(directory.name) / "failures"


def _first_failure(directory: "tempfile.TemporaryDirectory[str]") -> str | None:
    try:
        lines = _failures(directory).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return None
    return lines[0] if lines else None


def check_architectures(architectures: Sequence[str]) -> None:
    """Raises UnsupportedVllm unless vLLM itself has a causal LM of this architecture."""
    if not any(name in ModelRegistry.models for name in architectures):
        raise UnsupportedVllm(
            f"vllm {vllm.__version__} has no model of architecture {', '.join(architectures) or '(none)'}; "
            "use --engine torch, or a version of vllm that has"
        )


def device_type() -> str:
    """What vLLM was built for: "cpu", "cuda" and so on."""
    return current_platform.device_type


def engine_arguments(settings: Settings) -> AsyncEngineArgs:
    """The arguments of the engine. Raises ValueError for what vLLM does not take."""
    arguments: dict[str, Any] = {
        "model": str(settings.model),
        "runner": "pooling",
        "dtype": settings.dtype,
        "max_model_len": settings.max_sequence_tokens,
        "max_num_batched_tokens": settings.max_batch_tokens,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "pipeline_parallel_size": settings.pipeline_parallel_size,
        "nnodes": settings.nodes,
        "node_rank": settings.node_rank,
        "quantization": settings.quantization,
        "enable_prefix_caching": settings.prefix_caching,
        "enable_chunked_prefill": True,
        "skip_tokenizer_init": True,
        "scheduler_cls": f"{__name__}.{PrefixScheduler.__name__}",
        "async_scheduling": False,
        "disable_log_stats": False,
    }
    if settings.gpu_memory_utilization is not None:
        arguments["gpu_memory_utilization"] = settings.gpu_memory_utilization
    if settings.kv_cache_bytes is not None:
        arguments["kv_cache_memory_bytes"] = settings.kv_cache_bytes
    if settings.meeting is not None:
        arguments["distributed_executor_backend"] = "mp"
        arguments["master_addr"], arguments["master_port"] = settings.meeting.address, settings.meeting.port
        # By how many devices it sees vLLM counts which ranks are on one node: it must see those that it uses.
        devices = settings.tensor_parallel_size * settings.pipeline_parallel_size // settings.nodes
        arguments["device_ids"] = list(range(devices))
    if device_type() == "cpu":
        arguments |= _cpu_arguments(settings)
    ours = sorted(arguments.keys() & settings.further.keys() - {"enforce_eager", "device_ids"})
    if ours:
        raise ValueError(f"--vllm-options: {', '.join(ours)} is set by teacher-server itself; use its own option")
    unknown = sorted(settings.further.keys() - AsyncEngineArgs.__dataclass_fields__.keys())
    if unknown:
        raise ValueError(f"--vllm-options: vllm {vllm.__version__} has no engine argument {', '.join(unknown)}")
    return AsyncEngineArgs(**{**arguments, **settings.further})


def _cpu_arguments(settings: Settings) -> dict[str, Any]:
    """By default vLLM takes nine tenths of the machine for its cache, and compiles for a minute."""
    arguments: dict[str, Any] = {}
    if settings.kv_cache_bytes is None and settings.gpu_memory_utilization is None:
        arguments["kv_cache_memory_bytes"] = CPU_KV_CACHE_BYTES
    # What stages exchange is prepared in the step that compiles; without it the first sequence ends the engine.
    arguments["enforce_eager"] = settings.pipeline_parallel_size == 1
    return arguments


def _check_entry_point() -> None:
    found = importlib.metadata.entry_points(group="vllm.general_plugins")
    if not any(point.value == "teacher_server.vllm_plugin:register" for point in found):
        raise UnsupportedVllm(
            "the package's vLLM plugin is not installed: pip install 'stillhouse[vllm]', or in a checkout "
            "pip install -e ."
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "stillhouse" not in allowed.split(","):
        raise UnsupportedVllm(f"VLLM_PLUGINS is {allowed!r}, which keeps our plugin out; add stillhouse to it")


# The engine's process: reuse of prefixes


class PrefixScheduler(Scheduler):
    """vLLM's scheduler, with one more rule: a reused prefix ends before the first row that is to be scored.

    Rows of a reused prefix are not computed, so they have no scores; stock vLLM switches reuse off for that reason,
    and where it is switched on answers with the rows that are left.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Up to 0.31 a place is kept for a token that a pooling model never samples: the last token of a sequence of
        # full length would wait for it for ever.
        self.max_model_len += self.num_sampled_tokens_per_step
        manager: Any = self.kv_cache_manager
        coordinator = manager.coordinator
        computed_blocks, longest_hit = manager.get_computed_blocks, coordinator.find_longest_cache_hit
        last_row: int | None = None

        def get_computed_blocks(request: Any, *rest: Any, **more: Any) -> Any:
            nonlocal last_row
            extra = request.pooling_params.extra_kwargs if request.pooling_params is not None else None
            last_row = extra["first_row"] if extra else None
            if extra:
                extra.setdefault("scheduled_s", time.monotonic())
            try:
                return computed_blocks(request, *rest, **more)
            finally:
                last_row = None

        def find_longest_cache_hit(block_hashes: Any, max_cache_hit_length: int, *rest: Any, **more: Any) -> Any:
            if last_row is not None:
                max_cache_hit_length = min(max_cache_hit_length, last_row)
            return longest_hit(block_hashes, max_cache_hit_length, *rest, **more)

        manager.get_computed_blocks = get_computed_blocks
        coordinator.find_longest_cache_hit = find_longest_cache_hit


# The worker's process: the scoring model


def register_models() -> None:
    """Makes the architectures of this engine scoring models, under their own names.

    A name of our own would miss what vLLM decides by name: block sizes, kernels, configuration overrides.
    """
    for name in os.environ[_ARCHITECTURES_VARIABLE].split(","):
        if name in ModelRegistry.models and name not in _originals:
            _originals[name] = ModelRegistry.models[name]
            # vLLM caches what it learns of a class by this name, for every version the same file.
            version = "".join(character if character.isalnum() else "_" for character in vllm.__version__)
            ModelRegistry.register_model(name, f"{__name__}:{_PREFIX}{name}__{version}")


_PREFIX = "Scoring_"
_originals: dict[str, Any] = {}


def __getattr__(name: str) -> Any:
    """The scoring model of an architecture, when vLLM asks for the class that was registered."""
    if not name.startswith(_PREFIX):
        raise AttributeError(name)
    register_models()  # a process that only inspects the class may not have loaded plugins
    architecture = name.removeprefix(_PREFIX).rpartition("__")[0]
    found = scoring_class(_originals[architecture].load_model_cls())
    globals()[name] = found
    return found


def scoring_class(base: type) -> type:
    """A subclass of a vLLM causal LM that scores."""

    class Scoring(base):
        is_pooling_model = True
        default_seq_pooling_type = "LAST"
        default_tok_pooling_type = "ALL"

        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            self.pooler = ScoringPooler(self)

    Scoring.__name__ = Scoring.__qualname__ = f"Scoring{base.__name__}"
    return Scoring


class ScoringPooler(Pooler):
    """Hidden states of a step in; for each sequence that it finishes the packed scores of its rows out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        settings = json.loads(os.environ[_SETTINGS_VARIABLE])
        head = _ShardedHead(model, settings.pop("vocabulary_size"))
        self._scorer = StepScorer(head, **settings)

    def get_supported_tasks(self) -> set[Any]:
        return {_TASK}

    def forward(self, hidden_states: Tensor, pooling_metadata: Any) -> list[Tensor | None]:
        params: list[PoolingParams] = pooling_metadata.pooling_params
        if any(param.extra_kwargs is None for param in params):  # the step of vLLM's memory profile
            return list(self._scorer.rehearse(hidden_states)[: len(params), None].unbind())
        cursor = pooling_metadata.get_pooling_cursor()
        now_s = time.monotonic()
        parts = [
            Part(
                state=state,
                request=param.extra_kwargs["rows"],  # pyright: ignore[reportOptionalSubscript]
                scheduled_s=param.extra_kwargs.get("scheduled_s", now_s),  # pyright: ignore[reportOptionalMemberAccess]
                begin=end - count,
                end=end,
                length=length,
            )
            for param, state, count, end, length in zip(
                params,
                pooling_metadata.pooling_states,
                cursor.num_scheduled_tokens_cpu.tolist(),
                cursor.seq_lens_cpu.tolist(),
                cursor.prompt_lens_cpu.tolist(),
                strict=True,
            )
        ]
        return self._scorer.step(hidden_states, parts)


class _ShardedHead:
    """float32 logits of this process's columns, whatever family the model is of.

    The model's own `compute_logits` is what is called; only the layer that it hands its head and hidden states to
    is ours. So scales, caps and biases are the family's.
    """

    def __init__(self, model: Any, vocabulary_size: int) -> None:
        processors = [module for module in model.modules() if isinstance(module, LogitsProcessor)]
        if len(processors) > 1:
            raise UnsupportedVllm(f"{type(model).__name__} has {len(processors)} logits processors; one is supported")
        self._model: Callable[[], Any] = weakref.ref(model)  # a module that holds its parent has no end
        self._vocabulary_size = vocabulary_size
        self._weight: Tensor | None = None
        self.shard: Shard | None = None
        self.columns = vocabulary_size
        self._whole = False
        if not processors:  # a process that has no head, of a model in several stages
            return
        self._processor = processors[0]
        self._own_forward: Callable[..., Any] = self._processor.forward
        self._processor.forward = self._forward
        heads = get_tensor_model_parallel_world_size()
        if heads > 1:
            rank = get_tensor_model_parallel_rank()
            padded = getattr(self._processor, "org_vocab_size", vocabulary_size)
            self.columns = _columns_per_process(model, padded, heads)
            self.shard = Shard(rank, heads, rank * self.columns, _all_gather)

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [r, columns] in fresh memory."""
        return self._model().compute_logits(hidden)

    def whole_logits(self, hidden: Tensor) -> Tensor | None:
        """Logits [r, V] as vLLM itself makes them; None in a process that does not get them."""
        self._whole = True
        try:
            logits = self._model().compute_logits(hidden)
        finally:
            self._whole = False
        return None if logits is None else logits[..., : self._vocabulary_size]

    def _forward(
        self, lm_head: Any, hidden_states: Tensor, embedding_bias: Tensor | None = None, *rest: Any, **more: Any
    ) -> Any:
        if self._whole:
            return self._own_forward(lm_head, hidden_states, embedding_bias, *rest, **more)
        processor = self._processor
        columns = self.columns
        if processor.logits_as_input:
            z = hidden_states[..., :columns].float()
        else:
            z = self._product(lm_head, hidden_states, embedding_bias)
        if processor.soft_cap is not None:
            z.div_(processor.soft_cap).tanh_().mul_(processor.soft_cap)
        if processor.scale != 1.0:
            z *= processor.scale
        if self.shard is not None:
            tokens = max(0, min(columns, self._vocabulary_size - self.shard.first_id))
            z[:, tokens:] = _MASKED
        return z

    def _product(self, lm_head: Any, hidden: Tensor, bias: Tensor | None) -> Tensor:
        if not type(lm_head.quant_method).__name__.startswith("Unquantized"):
            # The product of a quantised head is the quantisation's; it rounds to the model's dtype.
            z = lm_head.quant_method.apply(lm_head, hidden, bias=bias)
            return z[..., : self.columns].float()
        weight = lm_head.weight[: self.columns]
        bias = None if bias is None else bias[: self.columns].float()
        if weight.dtype == torch.float32:
            return linear(hidden.float(), weight, bias)
        if hidden.is_cuda:
            # Products of half-precision numbers are exact in float32; only rounding the sums would lose digits.
            z = torch.mm(hidden.to(weight.dtype), weight.t(), out_dtype=torch.float32)
            return z if bias is None else z.add_(bias)
        widened = self._weight = weight.float() if self._weight is None else self._weight
        return linear(hidden.float(), widened, bias)


def _columns_per_process(model: Any, vocabulary_rows: int, heads: int) -> int:
    for module in model.modules():
        indices = getattr(module, "shard_indices", None)
        if indices is not None and getattr(module, "org_vocab_size", None) == vocabulary_rows:
            return int(module.num_embeddings_per_partition)
    raise UnsupportedVllm(f"{type(model).__name__} has no head that is sharded over the vocabulary")


def _all_gather(own: Tensor) -> Tensor:
    group = get_tp_group()
    return group.all_gather(own.contiguous(), dim=0).unflatten(0, (group.world_size, len(own)))
