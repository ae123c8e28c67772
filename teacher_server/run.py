"""Assembles the program: options -> model -> engine -> server. Everything heavy is imported from here."""

import asyncio
import logging
import os
import time
from dataclasses import asdict

# Before torch allocates anything: large memory on a CPU in huge pages, or a slice of logits costs 65,000 page faults.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait leave their cores to the other processes

import torch
import transformers

from teacher_server.engine import Engine
from teacher_server.loading import compute_dtype, describe_model, load_model, read_config
from teacher_server.metrics import Metrics
from teacher_server.options import OptionError, Options
from teacher_server.server import serve

logger = logging.getLogger(__name__)


def run(options: Options) -> None:
    """Loads the model and serves it until a signal.

    Raises what `load_model` raises or vLLM's own error, and EngineLost if the engine dies.
    """
    transformers.utils.logging.disable_progress_bar()
    metrics = Metrics()
    if options.engine == "vllm":
        _run_vllm(options, metrics)
    else:
        _run_torch(options, metrics)


async def _serve(engine: Engine, metrics: Metrics, options: Options) -> None:
    await serve(
        engine,
        metrics,
        listen=options.listen,
        metrics_host=options.host,
        metrics_port=options.metrics_port,
        drain_s=options.drain_s,
    )


def _run_torch(options: Options, metrics: Metrics) -> None:
    from teacher_server.torch_engine import TorchEngine

    engine = TorchEngine(
        load_model(options),
        max_batch_tokens=options.max_batch_tokens,
        max_queue_tokens=options.max_queue_tokens,
        logits_slice_bytes=options.logits_slice_bytes,
        on_batch=lambda report: metrics.observe_batch(**asdict(report)),
    )
    asyncio.run(_serve(engine, metrics, options))


def _run_vllm(options: Options, metrics: Metrics) -> None:
    started_s = time.monotonic()
    config = read_config(options)
    from teacher_server import vllm_adapter
    from teacher_server.vllm_engine import VllmEngine

    device = vllm_adapter.device_type()
    if options.device not in ("auto", device):
        raise OptionError(f"--device {options.device}: the installed vllm computes on {device}; give auto")
    vllm_adapter.check_architectures(config.architectures or ())
    dtype = compute_dtype(options.dtype, config, torch.device(device))
    teacher = describe_model(options, config, dtype)
    worker = vllm_adapter.Vllm.start(
        vllm_adapter.Settings(
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
        )
    )
    metrics.include_default_registry()
    engine = VllmEngine(
        worker,
        teacher,
        died_error=vllm_adapter.EngineDied,
        max_queue_tokens=options.max_queue_tokens,
        on_cached=metrics.cached_tokens.inc,
        on_resent=metrics.resent_sequences.inc,
    )

    async def check_and_serve() -> None:
        difference = await engine.check()
        logger.info(
            "loaded seconds=%.1f self_check_max_difference=%.2g %s", time.monotonic() - started_s, difference, teacher
        )
        await _serve(engine, metrics, options)

    try:
        asyncio.run(check_and_serve())
    finally:
        worker.shutdown()
