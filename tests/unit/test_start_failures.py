"""What an operator is told of a start that failed, and under which reason."""

import re
from pathlib import Path

import pytest
import torch

from stillhouse.errors import OutOfMemory
from teacher_server.engine import EngineNotStarted, SelfCheckFailed
from teacher_server.metrics import Metrics
from teacher_server.options import OptionError
from teacher_server.start_failures import REASONS, explain
from teacher_server.weights import DamagedWeights, DoesNotFit

MODEL = Path("/models/oak")


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "reason", "code", "text"),
    [
        (OptionError("--drain-s -1: give more"), "options", 2, "--drain-s -1: give more"),
        (OptionError("--tls-key x: no", "tls"), "tls", 2, "--tls-key x: no"),
        (DamagedWeights("a is damaged"), "model", 1, "cannot serve /models/oak: a is damaged"),
        (ValueError("two\n  lines"), "model", 1, "cannot serve /models/oak: ValueError: two lines"),
        (SelfCheckFailed("they differ"), "engine", 1, "cannot serve /models/oak: they differ"),
        (EngineNotStarted("ImportError: x"), "engine", 1, "cannot serve /models/oak: ImportError: x"),
        (DoesNotFit("too large; --dtype"), "memory", 1, "cannot serve /models/oak: too large; --dtype"),
    ],
)
def test_every_failure_has_a_reason_a_code_and_a_line(error: Exception, reason: str, code: int, text: str) -> None:
    failure = explain(error, MODEL)
    assert (failure.reason, failure.exit_code, failure.text) == (reason, code, text)
    assert reason in REASONS


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] data. DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
        RuntimeError("unable to mmap 40000000092 bytes from file </models/x.safetensors>: Cannot allocate memory (12)"),
        caused(EngineNotStarted("RuntimeError: it failed"), torch.OutOfMemoryError("CUDA ran out")),
        caused(SelfCheckFailed("64 tokens alone do not fit"), OutOfMemory("64 tokens alone do not fit")),
        EngineNotStarted("ValueError: No available memory for the cache blocks. Try increasing it."),
        EngineNotStarted("ValueError: 1.5 GiB KV cache is needed, which is larger than the available KV cache memory"),
        EngineNotStarted("ValueError: Free memory on device cuda:0 (3/80 GiB) on startup is less than desired"),
    ],
    ids=lambda error: str(error)[:40],
)
def test_memory_that_ran_out_is_told_from_other_failures_with_a_fix(error: Exception) -> None:
    failure = explain(error, MODEL)
    assert failure.reason == "memory"
    assert re.search(r"\S; give it more memory, several GPUs \(--engine vllm --tensor-parallel-size N\)", failure.text)


def test_a_fix_that_an_error_names_itself_is_enough() -> None:
    said = "ValueError: No available memory for the cache blocks (options: --kv-cache-bytes)"
    assert explain(EngineNotStarted(said), MODEL).text.endswith(said)


def test_each_reason_is_a_series_from_the_start_and_one_becomes_1() -> None:
    metrics = Metrics()

    def values() -> dict[str, float | None]:
        name = "stillhouse_teacher_start_failed"
        return {reason: metrics.registry.get_sample_value(name, {"reason": reason}) for reason in REASONS}

    assert values() == dict.fromkeys(REASONS, 0.0)
    metrics.start_failed("memory")
    assert values() == dict.fromkeys(REASONS, 0.0) | {"memory": 1.0}
