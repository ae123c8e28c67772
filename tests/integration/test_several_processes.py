"""The same run with one process and with two, padded and packed, whole and sharded: the same weights."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.fakes import FakeServer, child_environment
from tests.toy import ToyTeacher, write_config

ROOT = Path(__file__).parent.parent.parent

# float32 sums in another order; 6e-8 was seen. Two steps move the weights by 2e-3.
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def teacher():
    with FakeServer(ToyTeacher()) as server:
        yield server


def launch(config: Path, processes: int, *overrides: str, timeout_s: float = 200.0) -> subprocess.CompletedProcess[str]:
    """`student-trainer train` in so many processes, by torchrun if more than one."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    return subprocess.run(
        [sys.executable, *launcher, "-m", "student_trainer.cli", "train", str(config), *overrides],
        cwd=ROOT,
        env=child_environment() | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def trained(folder: Path, address: str | None, processes: int, *overrides: str, **changes: Any) -> Path:
    """A finished run of two steps; its directory."""
    folder.mkdir()
    defaults = {"steps": 2, "optimizer": {"learning_rate": 1e-3, "micro_batch_tokens": 10_000}}
    config = write_config(folder, address, **(defaults | changes))
    done = launch(config, processes, *overrides)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def weights(run: Path, step: int = 2) -> dict[str, torch.Tensor]:
    return transformers.AutoModelForCausalLM.from_pretrained(run / "checkpoints" / f"step-{step}").state_dict()


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def difference(one: Path, other: Path) -> float:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


@pytest.fixture(scope="module")
def reference(teacher, tmp_path_factory) -> Path:
    return trained(tmp_path_factory.mktemp("one") / "run1", teacher.address, 1)


@pytest.mark.parametrize(
    ("processes", "overrides"),
    [
        (1, ("optimizer.micro_batch_tokens=60",)),
        (1, ("optimizer.packing=true",)),
        (1, ("optimizer.packing=true", "optimizer.micro_batch_tokens=60")),
        (1, ("rollout.batch_size=5",)),
        (2, ()),
        (2, ("optimizer.micro_batch_tokens=60",)),
        (2, ("student.sharding=fsdp2",)),
        (2, ("student.sharding=fsdp2", "optimizer.micro_batch_tokens=60", "student.gradient_checkpointing=true")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else str(value),
)
def test_the_same_global_batch_gives_the_same_weights(reference, teacher, tmp_path, processes, overrides):
    run = trained(tmp_path / "other", teacher.address, processes, *overrides)
    moved = max(
        (a - b).abs().max().item() for a, b in zip(weights(run).values(), _first(tmp_path).values(), strict=True)
    )
    print(f"{processes} {overrides}: {difference(reference, run):.1e} of {moved:.1e}")
    assert difference(reference, run) < TOLERANCE < 0.01 * moved
    for ours, theirs in zip(rows(run), rows(reference), strict=True):
        for name in ("loss", "grad_norm", "kl", "reward", "pass_rate", "entropy", "top_k_overlap", "advantage_p95"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
        assert ours["response_tokens"] == theirs["response_tokens"] and ours["rollouts"] == theirs["rollouts"]


def _first(tmp_path: Path) -> dict[str, torch.Tensor]:
    return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "other" / "student").state_dict()
