"""Assembles the program: options -> who may use it -> model -> engine -> server. Everything heavy is imported here."""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

# Before torch allocates anything: large memory on a CPU in huge pages, or a slice of logits costs 65,000 page faults.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait leave their cores to the other processes

import torch
import transformers

from teacher_server.engine import Engine, EngineLost, EngineNotStarted
from teacher_server.fair_queue import Bounds
from teacher_server.following import Follower
from teacher_server.loading import compute_dtype, describe_model, load_model, read_config
from teacher_server.metrics import Metrics
from teacher_server.options import OptionError, Options
from teacher_server.pages import Pages
from teacher_server.security import Security, load_security
from teacher_server.server import serve
from teacher_server.serving import Serving
from teacher_server.start_failures import StartError
from teacher_server.weights import check_weights

if TYPE_CHECKING:
    from stillhouse.codec import Teacher
    from teacher_server import vllm_adapter

logger = logging.getLogger(__name__)

_BATCHES_WITH_ENGINE = {"torch": 2, "vllm": 4}
"""Batches' worth of tokens that the engine has at once: one that runs and one that is ready; vLLM fills each step
from many sequences, so it wants more to choose from."""
_FOLLOW_EVERY_S = 2.0


def run(options: Options, pages: Pages) -> None:
    """Loads the model and serves it until a signal.

    Raises what `load_model` raises, SelfCheckFailed or EngineNotStarted, and EngineLost if the engine dies.
    """
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_default_handler()  # its lines go where ours go, in our format
    transformers.utils.logging.enable_propagation()
    metrics = pages.metrics
    if options.node_rank > 0:
        asyncio.run(_follow_leader(options, pages))
        return
    security = load_security(  # before minutes of loading
        metrics,
        access=options.access,
        tls_certificate=options.tls_certificate,
        tls_key=options.tls_key,
        tls_client_ca=options.tls_client_ca,
        token_review=options.token_review,
        token_audience=options.token_audience,
        token_review_url=options.token_review_url,
        token_review_credentials=options.token_review_credentials,
    )
    if options.engine == "vllm":
        metrics.include_default_registry()
        make_engine = _vllm_engine
    else:
        make_engine = _torch_engine
    asyncio.run(_load_and_serve(options, pages, security, make_engine))


async def _load_and_serve(
    options: Options,
    pages: Pages,
    security: Security,
    make_engine: Callable[[Options, Metrics], Awaitable[Engine]],
) -> None:
    metrics = pages.metrics

    async def checked(options: Options) -> Engine:
        started_s = time.monotonic()
        engine = await make_engine(options, metrics)
        try:
            difference = await engine.check()
        except BaseException:
            await engine.close()
            raise
        logger.info(
            "loaded seconds=%.1f self_check_max_difference=%.2g %s",
            time.monotonic() - started_s,
            difference,
            engine.describe(),
        )
        return engine

    engine = await checked(options)

    def follow(serving: Serving) -> tuple[Callable[[], None], Awaitable[None]]:
        follower = Follower(options, checked, serving, lambda ok: metrics.reloaded("model", ok))
        return follower.look_now, follower.watch(_FOLLOW_EVERY_S if options.follow else None)

    burst = 16 * options.max_batch_tokens if options.burst_tokens is None else options.burst_tokens
    try:
        await serve(
            engine,
            pages,
            listen=options.listen,
            drain_s=options.drain_s,
            bounds=Bounds(
                max_tokens=options.max_queue_tokens,
                max_bytes=options.max_queue_bytes,
                window_tokens=_BATCHES_WITH_ENGINE[options.engine] * options.max_batch_tokens,
                burst_tokens=burst,
            ),
            security=security,
            stall_s=options.stall_s,
            follow=follow,
        )
    finally:
        await engine.close()


async def _torch_engine(options: Options, metrics: Metrics) -> Engine:
    from teacher_server.torch_engine import TorchEngine

    model = await asyncio.to_thread(load_model, options)
    return TorchEngine(
        model,
        max_batch_tokens=options.max_batch_tokens,
        logits_slice_bytes=options.logits_slice_bytes,
        on_batch=lambda report: metrics.observe_batch(**asdict(report)),
    )


@contextlib.contextmanager
def _starting_vllm() -> Iterator[None]:
    """What vLLM raises here comes from any of its parts, or from the libraries that it needs."""
    try:
        yield
    except (StartError, EngineLost):
        raise
    except Exception as error:
        raise EngineNotStarted(f"{type(error).__name__}: {error}") from error


async def _vllm_engine(options: Options, metrics: Metrics) -> Engine:
    teacher, settings = await _vllm_settings(options)
    from teacher_server import vllm_adapter, vllm_multi_node
    from teacher_server.vllm_engine import VllmEngine

    with _starting_vllm():
        if options.nodes > 1:
            vllm = await vllm_multi_node.lead(options, teacher, settings)
        else:
            vllm = await asyncio.to_thread(vllm_adapter.Vllm.start, settings)
    return VllmEngine(
        vllm,
        teacher,
        died_error=vllm_adapter.EngineDied,
        on_cached=metrics.cached_tokens.inc,
        on_resent=metrics.resent_sequences.inc,
    )


async def _follow_leader(options: Options, pages: Pages) -> None:
    teacher, settings = await _vllm_settings(options)
    from teacher_server import vllm_multi_node

    with _starting_vllm():
        await vllm_multi_node.follow(options, pages, teacher, settings)


async def _vllm_settings(options: Options) -> "tuple[Teacher, vllm_adapter.Settings]":
    config = read_config(options)
    with _starting_vllm():
        from teacher_server import vllm_adapter

        device = vllm_adapter.device_type()
        if options.device not in ("auto", device):
            raise OptionError(f"--device {options.device}: the installed vllm computes on {device}; give auto")
        vllm_adapter.check_architectures(config.architectures or ())
    dtype = compute_dtype(options.dtype, config, torch.device(device))
    check_weights(
        options.model,
        config,
        dtype,
        torch.device(device),
        head_rows=options.vocabulary_size,
        # On a GPU vLLM itself knows what each device gets.
        fits=device == "cpu" and options.quantization is None and options.nodes == 1,
    )
    teacher = await asyncio.to_thread(describe_model, options, config, dtype)
    settings = vllm_adapter.Settings(
        model=options.model,
        architectures=config.architectures,
        dtype=teacher.compute_dtype,
        max_sequence_tokens=teacher.max_sequence_tokens,
        max_batch_tokens=options.max_batch_tokens,
        vocabulary_size=teacher.vocabulary_size,
        max_top_k=teacher.max_top_k,
        max_candidates=teacher.max_candidates,
        logits_slice_bytes=options.logits_slice_bytes,
        tensor_parallel_size=options.tensor_parallel_size,
        pipeline_parallel_size=options.pipeline_parallel_size,
        quantization=options.quantization,
        gpu_memory_utilization=options.gpu_memory_utilization,
        kv_cache_bytes=options.kv_cache_bytes,
        prefix_caching=options.prefix_caching,
        log_level=options.log_level,
        further=options.vllm_options,
        nodes=options.nodes,
        node_rank=options.node_rank,
    )
    return teacher, settings
