"""Whole runs of the trainer against a real gRPC server with a known teacher."""

import json
import math
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
import transformers

from stillhouse.errors import TokenIdOutOfRange
from student_trainer.config import ConfigError
from student_trainer.objective import NonFiniteLoss
from student_trainer.train import evaluate_only, train
from student_trainer.verifiers import VerifierError
from tests.fakes import FakeServer
from tests.toy import VOCABULARY_SIZE, ToyTeacher, toy_config

GOLDEN = Path(__file__).parent.parent / "assets" / "golden_run.json"


@pytest.fixture
def teacher():
    with FakeServer(ToyTeacher()) as server:
        yield server


def _metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def _weights(directory: Path) -> dict[str, torch.Tensor]:
    return transformers.AutoModelForCausalLM.from_pretrained(directory).state_dict()


def _run(folder: Path, server: FakeServer | None, *overrides: str, **changes) -> Path:
    folder.mkdir(exist_ok=True)
    config = toy_config(folder, server.address if server else None, overrides, **changes)
    train(config, folder)
    return config.run_dir


def _assert_same_weights(a: Path, b: Path, steps: int) -> None:
    ours, theirs = (_weights(run / "checkpoints" / f"step-{steps}") for run in (a, b))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_ten_steps_give_the_golden_figures(teacher, tmp_path):
    """Loss, gradient norm, KL and reward of every step; made by running this test with the file removed."""
    rows = _metrics(_run(tmp_path, teacher))
    figures = [{name: row[name] for name in ("loss", "grad_norm", "kl", "reward", "entropy")} for row in rows]
    if not GOLDEN.exists():
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps(figures, indent=1) + "\n")
        pytest.fail(f"{GOLDEN} was missing and has been written; look at it and commit it")
    for row, golden in zip(figures, json.loads(GOLDEN.read_text()), strict=True):
        assert row == pytest.approx(golden, rel=1e-3, abs=1e-5)


def test_the_same_run_twice_gives_the_same_weights_bit_for_bit(teacher, tmp_path):
    _assert_same_weights(_run(tmp_path / "a", teacher), _run(tmp_path / "b", teacher), 10)


def test_a_run_with_faults_gives_the_weights_of_a_run_without(tmp_path):
    with FakeServer(ToyTeacher()) as healthy:
        calm = _run(tmp_path / "calm", healthy, "steps=3")
    with FakeServer(ToyTeacher()) as faulty:
        for call in range(1, 90, 4):
            faulty.faults.fail_at(call=call, code=grpc.StatusCode.UNAVAILABLE)
        stormy = _run(tmp_path / "stormy", faulty, "steps=3")
    _assert_same_weights(calm, stormy, 3)
    assert sum(row["teacher_retries"] for row in _metrics(stormy)) > 10


@pytest.mark.parametrize("recipe", ["reverse_kl", "opd", "grpo", "trrd", "sinkd", "paced"])
def test_micro_batches_change_nothing(teacher, tmp_path, recipe):
    """One batch is as good as many: the loss and the gradients are the same to rounding."""
    runs = [
        _run(tmp_path / name, teacher, f"optimizer.micro_batch_tokens={limit}", "steps=2", f"objective.recipe={recipe}")
        for name, limit in (("whole", 100000), ("parts", 30))
    ]
    whole, parts = (_metrics(run) for run in runs)
    for name in ("loss", "grad_norm", "entropy"):
        assert whole[0][name] == pytest.approx(parts[0][name], rel=1e-4, abs=1e-7)


def _distance(teacher: ToyTeacher, student: Path) -> float:
    """Mean exact KL(S || T) in nats over every last token, in float64."""
    model = transformers.AutoModelForCausalLM.from_pretrained(student, dtype=torch.float64).eval()
    last = torch.arange(3, VOCABULARY_SIZE)
    with torch.no_grad():
        prompt = torch.stack([torch.full_like(last, 5), last], dim=1)
        logits = model(input_ids=prompt).logits[:, -1, :VOCABULARY_SIZE]
    own = torch.log_softmax(logits, dim=-1).numpy()
    taught = teacher.logits[last.numpy()]
    taught = taught - np.log(np.exp(taught).sum(axis=1, keepdims=True))
    return float((np.exp(own) * (own - taught)).sum(axis=1).mean())


@pytest.mark.parametrize("recipe", ["forward_kl", "gkd", "opd"])
def test_distillation_brings_the_student_to_its_teacher(tmp_path, recipe):
    teacher = ToyTeacher()
    with FakeServer(teacher) as server:
        run = _run(tmp_path, server, "steps=60", f"objective.recipe={recipe}", "optimizer.learning_rate=0.01")
    before, after = _distance(teacher, tmp_path / "student"), _distance(teacher, run / "checkpoints" / "step-60")
    assert after < 0.5 * before


def test_rewards_alone_raise_the_reward_without_a_teacher(tmp_path):
    rows = _metrics(_run(tmp_path, None, "steps=30", "objective.recipe=grpo", "optimizer.learning_rate=0.01"))
    assert np.mean([row["reward"] for row in rows[-5:]]) > np.mean([row["reward"] for row in rows[:5]]) + 0.15
    assert "kl" not in rows[0]


def test_the_run_directory_holds_what_the_docs_promise(teacher, tmp_path):
    run = _run(tmp_path, teacher, "steps=4", "checkpoints.every_steps=1", "checkpoints.keep=2")
    assert {path.name for path in run.iterdir()} == {
        "config.yaml", "metrics.jsonl", "samples.jsonl", "summary.json", "checkpoints", "lock",
    }  # fmt: skip
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", "step-3", "step-4"]
    rows = _metrics(run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))
    # On policy and in float32, sampler and trainer must agree to rounding.
    assert max(row["sampler_gap_max"] for row in rows) < 1e-4
    shares = rows[0]["rollout_s"] + rows[0]["reward_s"] + rows[0]["scoring_s"] + rows[0]["training_s"]
    assert shares <= rows[0]["step_s"] * 1.001
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 4 * 3
    for sample in samples:
        n = len(sample["token_ids"])
        assert len(sample["student_logprobs"]) == len(sample["teacher_logprobs"]) == n
        # Written before the update, the student is the sampler.
        np.testing.assert_allclose(sample["student_logprobs"], sample["sampler_logprobs"], atol=1e-4)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 4 and summary["rollouts"] == 4 * 24
    assert summary["teacher"] == {"model": "bigram", "revision": "r1"}
    model = transformers.AutoModelForCausalLM.from_pretrained(summary["checkpoint"])
    assert model.config.vocab_size == 32 and model.generation_config.eos_token_id == 2


def test_the_teachers_logprobs_in_samples_are_the_teachers(teacher, tmp_path):
    run = _run(tmp_path, teacher, "steps=1")
    logits = teacher.teacher.logits
    normalised = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    for line in (run / "samples.jsonl").read_text().splitlines():
        sample = json.loads(line)
        last = [int(sample["prompt"].split()[-1][1:]), *sample["token_ids"][:-1]]
        expected = normalised[last, sample["token_ids"]]
        np.testing.assert_allclose(sample["teacher_logprobs"], expected, atol=2e-5)


def test_evaluation_before_during_and_after(teacher, tmp_path):
    folder = tmp_path
    config = toy_config(folder, teacher.address)
    evaluation = {
        "prompts": config.prompts.model_dump(mode="json"),
        "num_prompts": 10,
        "answers_per_prompt": 4,
        "k": [1, 4],
        "every_steps": 2,
    }
    config = toy_config(folder, teacher.address, ("steps=4",), evaluation=evaluation)
    summary = train(config, folder)
    for when in ("before", "after"):
        result = summary[when]
        low, high = result["pass@1_interval"]
        assert low <= result["pass@1"] <= high and result["pass@1"] <= result["pass@4"]
    assert [row["step"] for row in _metrics(config.run_dir) if "evaluation" in row] == [2]
    again = evaluate_only(config, folder)
    assert again == summary["before"]


@pytest.mark.parametrize(
    "overrides",
    [
        ("student.dtype=bfloat16",),
        ("student.gradient_checkpointing=true",),
        ("teacher.wire_dtype=float16",),
        ("teacher.top_k=0",),
        ("teacher.candidates=0",),
        ("rollout.temperature=0.7", "objective.temperature=2.0"),
        ("rollout.stop=[w5]", "rollout.top_p=0.9", "rollout.batch_size=5"),
        ("prompts.chat_template=never", "optimizer.warmup_steps=3", "optimizer.weight_decay=0.1"),
    ],
)
def test_every_way_to_run_trains(teacher, tmp_path, overrides):
    rows = _metrics(_run(tmp_path, teacher, "steps=2", *overrides))
    assert len(rows) == 2 and all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)


def test_gradient_checkpointing_changes_nothing(teacher, tmp_path):
    plain, saved = (
        _metrics(_run(tmp_path / name, teacher, "steps=1", f"student.gradient_checkpointing={value}"))[0]
        for name, value in (("plain", "false"), ("saved", "true"))
    )
    assert plain["grad_norm"] == pytest.approx(saved["grad_norm"], rel=1e-5)


def test_a_step_whose_prompts_all_weigh_nothing_changes_nothing(teacher, tmp_path):
    """Every answer passes, so PACED gives every prompt weight zero."""
    objective = {"divergences": [{"kind": "reverse_kl"}, {"kind": "sinkhorn"}], "prompt_weights": {}}
    run = _run(tmp_path, teacher, "steps=1", "prompts.verifier.pass_threshold=0.0", objective=objective)
    assert _metrics(run)[0]["weightless_share"] == 1.0 and _metrics(run)[0]["loss"] == 0.0
    before, after = _weights(tmp_path / "student"), _weights(run / "checkpoints" / "step-1")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_several_updates_a_step_each_see_whole_groups(teacher, tmp_path):
    rows = _metrics(_run(tmp_path, teacher, "steps=2", "optimizer.updates_per_step=3"))
    # Later updates of a step are off policy: the student has moved away from the sampler. The first is not.
    assert rows[0]["off_policy_gap_max"] > 1e-3 > 1e-4 > rows[0]["sampler_gap_max"]


def test_a_used_run_directory_is_refused_and_left_alone(teacher, tmp_path):
    run = _run(tmp_path, teacher, "steps=1")
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"run_dir: .* is not empty; go on with it by --resume, or choose"):
        _run(tmp_path, teacher, "steps=1")
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("student.model=/nowhere",), "student.model: /nowhere is not a directory"),
        (("rollout.prompts_per_step=13",), "rollout.prompts_per_step: 13, but there are 12"),
        (("student.device=abacus",), "student.device: 'abacus'"),
        (("prompts.path=nowhere.jsonl",), "nowhere.jsonl"),
        (("teacher.top_k=20",), "teacher.top_k: 20"),
        (("rollout.max_new_tokens=5000",), "rollout.max_new_tokens: 5000 .* more than the teacher's 4096"),
        (
            ("rollout.max_new_tokens=63",),
            "rollout.max_new_tokens: 63 after a prompt of 2 .* student's 64; lower it to 62",
        ),
        (("run_dir=/proc/nowhere/run",), "run_dir: /proc/nowhere/run cannot be made"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(teacher, tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        _run(tmp_path, teacher, *overrides)
    assert not (tmp_path / "run").exists()
    assert teacher.calls["Score"] == 0


def test_held_out_prompts_that_are_trained_on_are_pointed_out(teacher, tmp_path, capsys):
    prompts = toy_config(tmp_path, teacher.address).prompts.model_dump(mode="json")
    evaluation = {"prompts": prompts, "num_prompts": 5, "answers_per_prompt": 1, "k": [1]}
    _run(tmp_path, teacher, "steps=1", evaluation=evaluation)
    assert "warning: 5 of the 5 held-out prompts are also trained on" in capsys.readouterr().err


def test_a_verifier_that_raises_names_the_sample_and_stops_the_run(teacher, tmp_path):
    with pytest.raises(VerifierError, match=r"prompts\.jsonl:\d+"):
        _run(tmp_path, teacher, "prompts.verifier.function=tests.toy:broken_verifier")


def test_a_verifier_that_raises_can_be_counted_instead(teacher, tmp_path):
    run = _run(
        tmp_path, teacher, "steps=2", "prompts.verifier.function=tests.toy:broken_verifier",
        "prompts.verifier.on_error=drop",
    )  # fmt: skip
    rows = _metrics(run)
    assert sum(row["dropped"] for row in rows) > 0
    assert rows[-1]["rollouts"] == 48 - sum(row["dropped"] for row in rows)


def test_an_infinite_loss_stops_before_the_update_and_the_last_checkpoint_stands(tmp_path):
    teacher = ToyTeacher()
    with FakeServer(teacher) as server:

        def impossible(response):
            values = np.frombuffer(response.candidate_logprobs.data, "<f4").copy()
            values[:] = -np.inf
            response.candidate_logprobs.data = values.tobytes()
            return response

        server.faults.answer_at(impossible, call=60)  # in the third step
        with pytest.raises(NonFiniteLoss, match="step 3: term reverse_kl is inf at token"):
            _run(tmp_path, server, "checkpoints.every_steps=1", "objective.recipe=reverse_kl")
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["latest", "step-1", "step-2"]
    assert len(_metrics(tmp_path / "run")) == 2


def test_an_error_of_the_teacher_that_is_final_ends_the_run_with_its_name(teacher, tmp_path):
    teacher.faults.fail_at(error=TokenIdOutOfRange("id 99"))
    with pytest.raises(TokenIdOutOfRange, match="id 99"):
        _run(tmp_path, teacher)
