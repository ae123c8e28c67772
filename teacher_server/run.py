"""Assembles the program: options -> model -> engine -> server. Everything heavy is imported from here."""

import asyncio
from dataclasses import asdict

import transformers

from teacher_server.loading import load_model
from teacher_server.metrics import Metrics
from teacher_server.options import Options
from teacher_server.server import serve
from teacher_server.torch_engine import TorchEngine


def run(options: Options) -> None:
    """Loads the model and serves it until a signal. Raises what `load_model` raises."""
    transformers.utils.logging.disable_progress_bar()
    metrics = Metrics()
    model = load_model(options)
    engine = TorchEngine(
        model,
        max_batch_tokens=options.max_batch_tokens,
        max_queue_tokens=options.max_queue_tokens,
        logits_slice_bytes=options.logits_slice_bytes,
        on_batch=lambda report: metrics.observe_batch(**asdict(report)),
    )
    asyncio.run(
        serve(
            engine,
            metrics,
            listen=options.listen,
            metrics_host=options.host,
            metrics_port=options.metrics_port,
            drain_s=options.drain_s,
        )
    )
