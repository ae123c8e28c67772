"""Why a server could not start: one line that names what, its value and the fix, and a reason for Prometheus.

Imports nothing heavy: a wrong option answers at once.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REASONS = ("options", "access", "tls", "model", "revision", "memory", "engine")
"""What `stillhouse_teacher_start_failed` is labelled with."""

MEMORY_FIX = (
    "give it more memory, several GPUs (--engine vllm --tensor-parallel-size N), a smaller --dtype or a quantised model"
)

# Libraries say it in a text or by the name of a class that is not imported here: torch, its CPU allocator, vLLM.
_OUT_OF_MEMORY = re.compile(
    r"out of memory|OutOfMemory|^MemoryError|Cannot allocate memory|DefaultCPUAllocator"
    r"|No available memory for the cache blocks|larger than the available KV cache memory"
    r"|Free memory on device|Available memory on node",
    re.IGNORECASE,
)


class StartError(Exception):
    """The server cannot start; the message names field, value and fix."""

    reason = "model"
    exit_code = 1


@dataclass(frozen=True, slots=True)
class StartFailure:
    """What operator, metrics and supervisor are told. `reason` is one of REASONS."""

    reason: str
    exit_code: int
    text: str


def explain(error: Exception, model: Path) -> StartFailure:
    """What stopped the start, whatever library raised it. What no class of ours says better lies with the model."""
    if isinstance(error, StartError) and error.exit_code != 1:
        return StartFailure(error.reason, error.exit_code, _one_line(str(error)))
    cause = _one_line(str(error) if isinstance(error, StartError) else f"{type(error).__name__}: {error}")
    reason = error.reason if isinstance(error, StartError) else StartError.reason
    if any(_OUT_OF_MEMORY.search(f"{type(each).__name__}: {each}") for each in _chain(error)):
        reason = "memory"
        if " --" not in cause and "(--" not in cause:
            cause += f"; {MEMORY_FIX}"
    return StartFailure(reason, 1, f"cannot serve {model}: {cause}")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _one_line(text: str) -> str:
    return " ".join(text.split())
