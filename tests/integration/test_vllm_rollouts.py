"""Whole runs whose answers come from vLLM: trainer and engine in vLLM's environment, the teacher a known one."""

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.fakes import FakeServer
from tests.servers import environment, interpreter
from tests.toy import ToyTeacher, save_student, write_config


@pytest.fixture(scope="module")
def teacher():
    with FakeServer(ToyTeacher()) as server:
        yield server


def _config(folder: Path, address: str, **changes: Any) -> Path:
    """A student with heads that vLLM's CPU attention can do, and a padded vocabulary."""
    folder.mkdir(exist_ok=True)
    rollout = {"prompts_per_step": 6, "answers_per_prompt": 4, "max_new_tokens": 8, "engine": "vllm"}
    path = write_config(folder, address, **({"steps": 6, "objective": {"recipe": "forward_kl"}} | changes))
    data = yaml.safe_load(path.read_text())
    data["rollout"] = rollout | {"vllm": {"kv_cache_bytes": 2**27}} | changes.get("rollout", {})
    path.write_text(yaml.safe_dump(data))
    save_student(folder / "student", hidden_size=64, num_key_value_heads=2, tie_word_embeddings=True)
    return path


def _start(config: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(interpreter("vllm")), "-m", "student_trainer.cli", "train", str(config), *arguments],
        env=environment() | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _finish(config: Path, *arguments: str) -> list[dict[str, Any]]:
    process = _start(config, *arguments)
    _, error = process.communicate(timeout=600)
    assert process.returncode == 0, error[-4000:]
    return _rows(config.parent / "run")


def _rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_on_policy_the_engine_follows_the_student_at_every_step(teacher, tmp_path):
    rows = _finish(_config(tmp_path, teacher.address, optimizer={"learning_rate": 1e-2}))
    assert [row["staleness"] for row in rows] == [0] * 6
    # The student moves a long way, the engine with it: what it reports stays the trainer's to rounding.
    assert rows[-1]["kl"] < 0.8 * rows[0]["kl"]
    assert max(row["handover_gap_max"] for row in rows) < 1e-3
    assert max(row["sampler_gap_max"] for row in rows) < 1e-3
    assert all(row["importance_ratio"] == pytest.approx(1.0, abs=1e-3) for row in rows)


def test_it_generates_while_the_student_trains_and_stops_and_resumes(teacher, tmp_path):
    config = _config(tmp_path, teacher.address, steps=1000, rollout={"batches_ahead": 1})
    process = _start(config)
    end_s = time.monotonic() + 300
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < 3:
        assert process.poll() is None and time.monotonic() < end_s
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0 and "stopped by SIGTERM: saved" in error, error[-4000:]
    made = len(_rows(tmp_path / "run"))
    assert made < 1000
    rows = _finish(config, "--resume", f"steps={made + 3}")
    assert [row["step"] for row in rows] == list(range(1, made + 4))
    assert [row["staleness"] for row in rows[:2]] == [0, 1] and rows[made]["staleness"] == 1
    assert max(row["handover_gap_max"] for row in rows) < 1e-3


def test_adapters_are_merged_into_what_the_engine_gets(teacher, tmp_path):
    student = {"model": str(tmp_path / "student"), "device": "cpu", "lora": {"rank": 4}}
    config = _config(tmp_path, teacher.address, steps=3, student=student, optimizer={"learning_rate": 2e-2})
    rows = _finish(config)
    assert max(row["handover_gap_max"] for row in rows) < 1e-3
    assert rows[2]["kl"] != rows[0]["kl"]


def test_without_vllm_the_engine_is_refused_by_name(teacher, tmp_path):
    import sys

    config = _config(tmp_path, teacher.address)
    done = subprocess.run(
        [sys.executable, "-m", "student_trainer.cli", "train", str(config)],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "rollout.engine: vllm cannot be imported here" in done.stderr
    assert not (tmp_path / "run").exists()
