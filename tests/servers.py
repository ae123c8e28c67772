"""Real `teacher-server` processes of either engine."""

import contextlib
import os
import re
import shlex
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[1]
ENGINES = ("torch", "vllm")
VLLM_SHAPE: dict[str, Any] = {
    # What vLLM's CPU attention can do: heads of 32 and more.
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "n_embd": 64,
    "n_head": 2,
}
"""Changes to a tiny model's configuration with which both engines can serve it."""


def interpreter(engine: str) -> str:
    """The Python that has the engine: vLLM lives in an environment of its own, or in that of VLLM_PYTHON."""
    if engine == "torch":
        return sys.executable
    python = Path(os.environ.get("VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))
    assert python.exists(), f"{python} is missing: run `make deps`"
    return str(python)


def environment(**variables: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "proto"), os.environ.get("PYTHONPATH")]))
    threads = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return {**os.environ, "PYTHONPATH": path, **threads, **variables}


def arguments(directory: Path, *options: str) -> list[str]:
    free = ("--device", "cpu", "--listen", "127.0.0.1:0", "--metrics-port", "0")
    return ["--model", str(directory), *free, *options]


def vllm_arguments(directory: Path, *options: str) -> list[str]:
    given = {"--gpu-memory-utilization", "--kv-cache-bytes"} & set(options)
    cache = () if given else ("--kv-cache-bytes", str(2**28))
    return arguments(directory, "--engine", "vllm", *cache, *options)


@dataclass(frozen=True)
class ServerProcess:
    """A running `teacher-server` and its one line on standard output, by key."""

    process: subprocess.Popen[str]
    said: dict[str, str]
    directory: Path
    engine: str
    log_file: IO[str]

    @property
    def log(self) -> str:
        """What it wrote to standard error so far."""
        return Path(self.log_file.name).read_text(encoding="utf-8", errors="replace")

    @property
    def metrics(self) -> str:
        """The page that Prometheus reads."""
        with urllib.request.urlopen(self.said["metrics"], timeout=10) as page:
            return page.read().decode()

    def metric(self, name: str) -> float | None:
        """Value of one series, for example `stillhouse_teacher_pending_tokens`."""
        found = re.search(rf"^{re.escape(name)} (\S+)$", self.metrics, re.MULTILINE)
        return float(found[1]) if found else None


@contextlib.contextmanager
def serving(
    directory: Path, *options: str, engine: str = "torch", variables: dict[str, str] | None = None
) -> Iterator[ServerProcess]:
    """A server of the model in `directory`, ready; killed with SIGKILL at the end."""
    given = arguments(directory, *options) if engine == "torch" else vllm_arguments(directory, *options)
    with tempfile.NamedTemporaryFile("w", suffix=".log") as log:
        process = subprocess.Popen(
            [interpreter(engine), "-m", "teacher_server.cli", *given],
            env=environment(**(variables or {})),
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if not line.startswith("teacher-server ready: "):
                raise AssertionError(f"not ready: {line!r}\n{Path(log.name).read_text(errors='replace')}")
            said = dict(part.split("=", 1) for part in shlex.split(line.removeprefix("teacher-server ready: ")))
            yield ServerProcess(process, said, directory, engine, log)
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
