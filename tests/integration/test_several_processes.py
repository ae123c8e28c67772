"""The same run with one process and with two, padded and packed, whole and sharded: the same weights."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from stillhouse.errors import ModelRevisionMismatch
from tests.fakes import FakeServer, child_environment
from tests.toy import ToyTeacher, write_config

ROOT = Path(__file__).parent.parent.parent

# float32 sums in another order; 6e-8 was seen. Two steps move the weights by 2e-3.
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def teacher():
    with FakeServer(ToyTeacher()) as server:
        yield server


def launch(config: Path, processes: int, *overrides: str, timeout_s: float = 400.0) -> subprocess.CompletedProcess[str]:
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


def test_accelerate_launch_does_the_same(reference, teacher, tmp_path):
    config = write_config(
        tmp_path, teacher.address, steps=2, optimizer={"learning_rate": 1e-3, "micro_batch_tokens": 10_000}
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1"]
    # What the launcher says of precision is overruled by the configuration.
    command += ["--mixed_precision=bf16", "--dynamo_backend=no", "--main_process_port=0"]
    done = subprocess.run(
        [*command, "-m", "student_trainer.cli", "train", str(config)],
        cwd=ROOT,
        env=child_environment() | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 1/2") == 1  # one of them speaks
    assert difference(reference, tmp_path / "run") < TOLERANCE


def _first(tmp_path: Path) -> dict[str, torch.Tensor]:
    return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "other" / "student").state_dict()


LORA = {"student": {"model": "", "device": "cpu", "lora": {"rank": 4, "alpha": 8.0}}}


@pytest.mark.parametrize("sharding", ["none", "fsdp2"])
def test_adapters_train_the_same_and_are_saved_as_adapters(teacher, tmp_path, sharding):
    runs = []
    for name, processes in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        student = LORA["student"] | {"model": str(tmp_path / name / "student"), "sharding": sharding}
        config = write_config(tmp_path / name, teacher.address, steps=2, student=student)
        done = launch(config, processes)
        assert done.returncode == 0, done.stderr
        runs.append(tmp_path / name / "run")
    checkpoint = runs[0] / "checkpoints" / "step-2"
    assert (checkpoint / "adapter_config.json").is_file() and not (checkpoint / "model.safetensors").exists()
    ours, theirs = (load_file(run / "checkpoints" / "step-2" / "adapter_model.safetensors") for run in runs)
    assert ours.keys() == theirs.keys() and all(".lora_" in name for name in ours)
    assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) < TOLERANCE
    assert any(tensor.abs().max() > 1e-4 for name, tensor in ours.items() if "lora_B" in name)  # it has learnt


def test_a_run_can_go_on_with_another_number_of_processes_if_it_is_allowed(teacher, tmp_path):
    changes = {"steps": 4, "checkpoints": {"every_steps": 2}, "optimizer": {"learning_rate": 1e-3}}
    changes["rollout"] = {"prompts_per_step": 4, "answers_per_prompt": 3, "max_new_tokens": 8, "batches_ahead": 1}
    configs = {}
    for name in ("one", "several"):
        (tmp_path / name).mkdir()
        configs[name] = write_config(tmp_path / name, teacher.address, **changes)
    done = launch(configs["one"], 1)
    assert done.returncode == 0, done.stderr
    several = tmp_path / "several" / "run"
    done = launch(configs["several"], 2, "student.sharding=fsdp2")
    assert done.returncode == 0, done.stderr
    shutil.rmtree(several / "checkpoints" / "step-4")  # so it goes on from step 2, with answers in flight
    (several / "summary.json").unlink()
    done = launch(configs["several"], 1, "--resume", "student.sharding=fsdp2")
    assert done.returncode == 2 and "was saved by 2 processes, this run has 1" in done.stderr
    done = launch(configs["several"], 1, "--resume", "student.sharding=fsdp2", "checkpoints.other_world_size=true")
    assert done.returncode == 0, done.stderr
    ours, theirs = weights(several, 4), weights(tmp_path / "one" / "run", 4)
    assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) < TOLERANCE


@pytest.mark.parametrize(("processes", "sharding"), [(1, "none"), (2, "none"), (2, "fsdp2")])
def test_mixed_precision_keeps_float32_weights_and_comes_near_full_precision(
    reference, teacher, tmp_path, processes, sharding
):
    overrides = ("student.mixed_precision=bf16", f"student.sharding={sharding}")
    run = trained(tmp_path / "mixed", teacher.address, processes, *overrides)
    assert all(tensor.dtype == torch.float32 for tensor in weights(run).values())
    ours, theirs = rows(run)[0], rows(reference)[0]
    assert ours["kl"] == pytest.approx(theirs["kl"], rel=0.05) and ours["loss"] != theirs["loss"]
    assert ours["sampler_gap"] < 0.02  # bfloat16 has 8 bits


def test_what_fails_in_one_process_ends_all_of_them_with_its_reason(teacher, tmp_path):
    """The verifier breaks on an answer that only one of the two processes gets."""
    config = write_config(tmp_path, teacher.address, steps=50)
    override = "prompts.verifier.function=tests.toy:broken_verifier"
    done = launch(config, 2, override)
    assert done.returncode != 0
    assert "the sandbox is gone" in done.stderr
    assert "NCCL" not in done.stderr and "Connection closed by peer" not in done.stderr


def test_a_teacher_lost_for_good_ends_all_processes(tmp_path):
    with FakeServer(ToyTeacher()) as server:
        config = write_config(tmp_path, server.address, steps=50)
        server.faults.fail_at(call=40, error=ModelRevisionMismatch("it serves r2 now"))
        done = launch(config, 2)
    assert done.returncode != 0 and "MODEL_REVISION_MISMATCH: it serves r2 now" in done.stderr
    assert "of 2 failed: ModelRevisionMismatch" in done.stderr  # what the other one says


def test_more_processes_than_prompts_are_refused(teacher, tmp_path):
    config = write_config(tmp_path, teacher.address)
    done = launch(config, 2, "rollout.prompts_per_step=1")
    assert "rollout.prompts_per_step: 1 for 2 processes; each needs at least one prompt" in done.stderr
    assert not (tmp_path / "run").exists()
