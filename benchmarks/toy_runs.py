"""Whole runs of the trainer on a small student, for the benchmarks of the loop.

The teacher is a real gRPC server in a process of its own. It knows its scores without a model, so that what it costs
is the transport, and on top of that it takes as long as it is told to: one sequence after the other, like one
accelerator. It sleeps meanwhile, as a teacher on another machine would as far as this one is concerned.
"""

import contextlib
import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import transformers
import yaml

from tests.fakes import FakeServer, child_environment
from tests.toy import EOS, ToyTeacher, save_student

ROOT = Path(__file__).parent.parent


class PacedTeacher(ToyTeacher):
    """The known teacher, which takes `seconds_per_token` for each scored token."""

    def __init__(self, seconds_per_token: Any) -> None:
        super().__init__()
        self._seconds_per_token = seconds_per_token

    def score(self, task: Any) -> Any:
        time.sleep(self._seconds_per_token.value * (len(task.token_ids) - task.score_start))
        return super().score(task)


def _serve(pipe: Connection, seconds_per_token: Any) -> None:
    with FakeServer(PacedTeacher(seconds_per_token)) as server:
        pipe.send(server.address)
        pipe.recv()


class Teacher:
    """The address of a running teacher, and its pace."""

    def __init__(self, address: str, seconds_per_token: Any) -> None:
        self.address = address
        self._seconds_per_token = seconds_per_token

    def pace(self, seconds_per_token: float) -> None:
        """From the next sequence on."""
        self._seconds_per_token.value = seconds_per_token


@contextlib.contextmanager
def teacher() -> Iterator[Teacher]:
    """A teacher that takes no time."""
    context = multiprocessing.get_context("spawn")
    seconds_per_token = context.Value("d", 0.0)
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, seconds_per_token), daemon=True)
    process.start()
    try:
        yield Teacher(ours.recv(), seconds_per_token)
    finally:
        ours.send(None)
        process.join(timeout=10)


def student(folder: Path, *, hidden_size: int, layers: int) -> Path:
    """A llama that hardly ever ends an answer, so that all have full length."""
    heads = hidden_size // 32
    save_student(
        folder,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=8192,
        initializer_range=0.02,
    )
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    # The hidden state has a large constant part, and the end token's row is its opposite.
    model.model.norm.weight.data.fill_(0.1)
    model.model.embed_tokens.weight.data[:, 0] = 1.0
    model.lm_head.weight.data[EOS, 0] = -1000.0
    model.save_pretrained(folder)
    return folder


def configure(folder: Path, student: Path, address: str | None, **changes: Any) -> Path:
    """The YAML of a run below `folder`; `changes` replace top-level keys or merge into them."""
    folder.mkdir(parents=True, exist_ok=True)
    prompts = [{"prompt": f"w{3 + index % 20} w{4 + index % 17}", "answer": ""} for index in range(64)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    config: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "steps": 8,
        "student": {"model": str(student), "device": "cpu"},
        "prompts": {
            "source": "jsonl",
            "path": str(folder / "prompts.jsonl"),
            "verifier": {"kind": "python", "function": "tests.toy:share_of_small_words", "pass_threshold": 0.6},
        },
        "objective": {"recipe": "reverse_kl"},
        "rollout": {"prompts_per_step": 8, "answers_per_prompt": 4, "max_new_tokens": 64},
        "optimizer": {"learning_rate": 1e-6, "micro_batch_tokens": 4096},
        "checkpoints": {"background": True},
    }
    if address is not None:
        config["teacher"] = {"addresses": [address], "top_k": 16, "candidates": 7}
    for key, value in changes.items():
        config[key] = config[key] | value if isinstance(value, dict) and key in config else value
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def run(config: Path, *, processes: int = 1, threads: int = 1) -> list[dict[str, Any]]:
    """Trains; the rows of metrics.jsonl."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "student_trainer.cli", "train", str(config)],
        cwd=ROOT,
        env=child_environment() | {"OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{config}: ended with {done.returncode}:\n{done.stderr[-3000:]}")
    path = Path(yaml.safe_load(config.read_text())["run_dir"]) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(name: str, result: dict[str, Any]) -> None:
    """benchmarks/results/<name>.json"""
    path = Path(__file__).parent / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {path}", file=sys.stderr)
