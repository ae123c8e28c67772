"""What a run that lasts does by itself: works ahead, waits outages out, watches its figures, ends when it is done."""

import json
import math
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from stillhouse.errors import SequenceTooLong, Unavailable
from student_trainer import scoring
from student_trainer.config import ConfigError
from student_trainer.guards import Runaway
from student_trainer.memory import DoesNotFit
from student_trainer.policy import Policy
from student_trainer.train import train
from tests.fakes import FakeServer
from tests.toy import ToyTeacher, toy_config


@pytest.fixture
def teacher():
    with FakeServer(ToyTeacher()) as server:
        yield server


def _run(folder: Path, server: FakeServer | None, *overrides: str, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    config = toy_config(folder, server.address if server else None, overrides, **changes)
    train(config, folder)
    return config.run_dir


def _rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return transformers.AutoModelForCausalLM.from_pretrained(run / "checkpoints" / f"step-{step}").state_dict()


def _assert_same_weights(one: Path, other: Path, step: int) -> None:
    ours, theirs = _weights(one, step), _weights(other, step)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# Working ahead


def test_batches_made_ahead_are_as_stale_as_they_say_and_corrected(teacher, tmp_path):
    rows = _rows(_run(tmp_path, teacher, "steps=5", "rollout.batches_ahead=2", "optimizer.learning_rate=0.01"))
    assert [row["staleness"] for row in rows] == [0, 1, 2, 2, 2]
    assert rows[0]["sampler_gap_max"] < 1e-4  # on policy
    assert "sampler_gap" not in rows[2] and rows[2]["off_policy_gap"] > 1e-3
    assert rows[2]["importance_ratio_max"] > 1.01 and "importance_bounded_share" in rows[2]


def test_working_ahead_is_deterministic_and_differs_from_waiting(teacher, tmp_path):
    one, two = (_run(tmp_path / name, teacher, "steps=4", "rollout.batches_ahead=1") for name in ("one", "two"))
    _assert_same_weights(one, two, 4)
    waiting = _run(tmp_path / "waiting", teacher, "steps=4")
    ours, theirs = _weights(one, 4), _weights(waiting, 4)
    assert not all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert _rows(one)[0]["kl"] == _rows(waiting)[0]["kl"]


@pytest.mark.parametrize("recipe", ["reverse_kl", "opd"])
def test_distillation_works_on_answers_that_are_two_steps_old(tmp_path, recipe):
    with FakeServer(ToyTeacher()) as server:
        overrides = ("steps=60", f"objective.recipe={recipe}", "optimizer.learning_rate=0.01")
        rows = _rows(_run(tmp_path, server, *overrides, "rollout.batches_ahead=2"))
    assert sum(row["kl"] for row in rows[-5:]) < 0.5 * sum(row["kl"] for row in rows[:5])


def test_the_teacher_scores_the_next_batch_while_this_one_trains(teacher, tmp_path):
    """Every call hangs until the trainer has asked for the second batch: only a run that works ahead gets there."""
    teacher.faults.hang_at()
    answers = 6 * 4
    released = threading.Thread(
        target=lambda: (teacher.wait_for(lambda s: s.calls["Score"] > answers), teacher.release())
    )
    released.start()
    rows = _rows(_run(tmp_path, teacher, "steps=2", "rollout.batches_ahead=1", "teacher.outage_s=200"))
    released.join()
    assert len(rows) == 2


# Teachers that go away


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_run_through_an_outage_ends_in_the_weights_of_a_calm_one(tmp_path, ahead, monkeypatch):
    overrides = ("steps=4", f"rollout.batches_ahead={ahead}", "teacher.deadline_s=0.5", "checkpoints.every_steps=1")
    overrides += ("teacher.outage_s=200",)
    monkeypatch.setattr(scoring, "_TRIES_TOO_LATE", 1000)  # a slow machine is no reason to drop a sequence here
    long_enough, note = threading.Event(), scoring.Scorer._note_outage

    def noted(scorer: scoring.Scorer, seconds: float, error: Any) -> None:
        note(scorer, seconds, error)
        if seconds > 1.5:
            long_enough.set()

    monkeypatch.setattr(scoring.Scorer, "_note_outage", noted)
    with FakeServer(ToyTeacher()) as server:
        calm = _run(tmp_path / "calm", server, *overrides)
    away = FakeServer(ToyTeacher())
    servers = [away]

    def go_away_and_come_back() -> None:
        away.wait_for(lambda s: s.calls["Score"] > 30)  # in the second step
        away.stop()
        long_enough.wait(100)
        servers.append(FakeServer(ToyTeacher(), port=away.port))

    thread = threading.Thread(target=go_away_and_come_back)
    thread.start()
    disturbed = _run(tmp_path / "disturbed", away, *overrides)
    thread.join()
    servers[-1].stop()
    _assert_same_weights(calm, disturbed, 4)
    rows = _rows(disturbed)
    assert max(row["teacher_outage_s"] for row in rows) > 1.0 and sum(row["teacher_retries"] for row in rows) > 0
    assert [row["unscored"] for row in rows] == [0, 0, 0, 0]


def test_an_outage_without_end_ends_the_run_after_its_limit(tmp_path):
    server = FakeServer(ToyTeacher())
    thread = threading.Thread(target=lambda: (server.wait_for(lambda s: s.calls["Score"] > 30), server.stop()))
    thread.start()
    with pytest.raises(Unavailable, match=r"no teacher has answered for \d+ s \(teacher.outage_s is 2\)"):
        _run(tmp_path, server, "teacher.deadline_s=0.5", "teacher.outage_s=2", "checkpoints.every_steps=1")
    thread.join()
    assert (tmp_path / "run" / "checkpoints" / "step-1").is_dir()


def test_a_sample_that_cannot_be_scored_is_dropped_and_counted(teacher, tmp_path):
    teacher.faults.fail_at(call=5, error=SequenceTooLong("7 tokens"))
    run = _run(tmp_path, teacher, "steps=2")
    assert [row["unscored"] for row in _rows(run)] == [1, 0]
    assert json.loads((run / "summary.json").read_text())["rollouts"] == 47


def test_more_of_them_than_allowed_end_the_run_with_their_reason(teacher, tmp_path):
    for call in (5, 6):
        teacher.faults.fail_at(call=call, error=SequenceTooLong("7 tokens"))
    with pytest.raises(SequenceTooLong, match="7 tokens"):
        _run(tmp_path, teacher, "steps=2")


# What does not fit


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("forward", r"step 1: a pass over \d+ sequences of up to 10 tokens did not fit .* lower optimizer.micro_batch"),
        ("generate", r"24 answers of up to 8 tokens to prompts of up to 2 did not fit .*; lower rollout.batch_size"),
    ],
)
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_a_batch_that_does_not_fit_names_the_limit_to_lower(teacher, tmp_path, monkeypatch, where, message, error):
    def full(*arguments: Any, **options: Any) -> None:
        raise error

    target = Policy if where == "forward" else transformers.LlamaForCausalLM
    monkeypatch.setattr(target, where, full)
    with pytest.raises(DoesNotFit, match=message):
        _run(tmp_path, teacher)


# Guards, evaluation, trackers


def test_a_runaway_halts_the_run_and_leaves_the_older_checkpoints(teacher, tmp_path):
    with pytest.raises(Runaway, match=r"step 3: kl is .* above 0.010 for 3 steps \(guards.max_kl\)"):
        _run(tmp_path, teacher, "guards.max_kl=0.01", "guards.kl_steps=3", "checkpoints.every_steps=2")
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["latest", "step-2"]
    assert len(_rows(tmp_path / "run")) == 3  # the figures that show it are kept


def _evaluation(folder: Path, server: FakeServer, **more: Any) -> dict[str, Any]:
    prompts = toy_config(folder, server.address).prompts.model_dump(mode="json")
    return {"prompts": prompts, "num_prompts": 6, "answers_per_prompt": 4, "k": [1], "every_steps": 1} | more


def test_a_run_ends_when_its_evaluations_get_no_better_and_the_best_checkpoint_is_kept(teacher, tmp_path):
    evaluation = _evaluation(tmp_path, teacher, patience=3)
    # A learning rate at which nothing changes: the first evaluation stays the best.
    overrides = ("optimizer.learning_rate=1e-12", "checkpoints.every_steps=1", "checkpoints.keep=1")
    run = _run(tmp_path, teacher, *overrides, evaluation=evaluation)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 4 and summary["best"]["step"] == 1
    assert summary["ended"].startswith("no better pass@1 in 3 evaluations; the best, 0.")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["best", "latest", "step-1", "step-4"]
    assert os.readlink(run / "checkpoints" / "best") == "step-1"


def test_every_step_is_logged_to_tensorboard(teacher, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = _run(tmp_path, teacher, "steps=3", "trackers=[tensorboard]")
    (folder,) = {path.parent for path in run.rglob("events.out.tfevents.*") if path.parent.name == "stillhouse"}
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [event.step for event in events.Scalars("kl")] == [1, 2, 3]
    assert [event.value for event in events.Scalars("kl")] == pytest.approx([row["kl"] for row in _rows(run)])


def test_a_tracker_whose_package_is_missing_is_refused_before_anything_is_written(teacher, tmp_path):
    with pytest.raises(ConfigError, match="trackers: trackio is not installed; pip install trackio"):
        _run(tmp_path, teacher, "trackers=[trackio]")
    assert not (tmp_path / "run").exists()


def test_always_on_diagnostics_are_in_every_row(teacher, tmp_path):
    row = _rows(_run(tmp_path, teacher, "steps=1"))[0]
    for name in (
        "reverse_kl", "forward_kl", "reverse_kl_from_0", "forward_kl_from_0", "entropy_gap", "top_k_overlap",
        "overlap_student_mass",
        "overlap_teacher_mass", "overlap_advantage", "teacher_mass_on_support_min", "student_mass_on_support_min",
        "advantage_p05", "advantage_p50", "advantage_p95", "teacher_advantage_p50", "repetition", "staleness",
        "waiting_share", "unscored", "clipped_share", "prompt_weight",
    ):  # fmt: skip
        assert math.isfinite(row[name]), name
