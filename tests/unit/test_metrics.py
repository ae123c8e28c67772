"""Figures of a step: the same from one process or several, one micro-batch or many, against plain numpy."""

import itertools
import json

import numpy as np
import pytest
import torch

from student_trainer.logprobs import support_logprobs
from student_trainer.metrics import (
    POSITION_EDGES,
    TokenMeter,
    merged,
    observe,
    observe_samples,
    progress_line,
    repetition,
)
from student_trainer.objective import TokenLosses
from tests.unit.test_objective import _batch, _samples, _student


def _meter(values: torch.Tensor, positions: torch.Tensor) -> TokenMeter:
    meter = TokenMeter()
    meter.add("mean", values)
    meter.add_by_position("at", values, positions)
    meter.lowest("least", values)
    meter.highest("most", values)
    meter.spread("spread", values)
    return meter


def test_several_meters_together_say_what_one_says():
    generator = torch.Generator().manual_seed(0)
    values, positions = torch.randn(999, generator=generator), torch.arange(999) * 7
    one = merged([_meter(values, positions).state()])
    parts = [_meter(v, p).state() for v, p in zip(values.split(400), positions.split(400), strict=True)]
    together = merged([*parts, TokenMeter().state()])  # and a process that had nothing
    assert together == pytest.approx(one)
    assert one["mean"] == pytest.approx(values.double().mean().item())
    assert one["least"] == values.min() and one["most"] == values.max()
    assert one["spread_p95"] == pytest.approx(np.quantile(values.numpy(), 0.95))
    edges = [*POSITION_EDGES, 10**9]
    for low, high in itertools.pairwise(edges):
        inside = (positions >= low) & (positions < high)
        assert one[f"at_from_{low}"] == pytest.approx(values[inside].double().mean().item())


def test_a_bucket_without_tokens_has_no_figure():
    figures = merged([_meter(torch.ones(3), torch.arange(3)).state()])
    assert figures["at_from_0"] == 1.0 and "at_from_16" not in figures


@pytest.mark.parametrize(
    ("tokens", "share"), [([1, 2, 3], 0.0), (list(range(10)), 0.0), ([5] * 10, 6 / 7), ([1, 2, 3, 4] * 3, 5 / 9)]
)
def test_repetition_is_the_share_of_four_grams_seen_before(tokens, share):
    assert repetition(np.array(tokens, np.int32)) == pytest.approx(share)


def test_diagnostics_of_a_batch_against_numpy():
    batch = _batch()
    support, policy, _ = _student(batch)
    meter = TokenMeter()
    observe(meter, batch, support, policy, TokenLosses({}, None), on_policy=True)
    observe_samples(meter, _samples())
    figures = merged([meter.state()])
    student, teacher = support.logprobs.detach().double().numpy(), batch.teacher_logprobs.double().numpy()
    present = batch.support_present.numpy()
    p, q = np.where(present, np.exp(student), 0), np.where(present, np.exp(teacher), 0)
    p = np.concatenate([p, support.log_tail.detach().double().exp().numpy()[:, None]], 1)
    q = np.concatenate([q, batch.teacher_log_tail.double().exp().numpy()[:, None]], 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        reverse = np.where(p > 0, p * np.log(p / q), 0).sum(1)
        forward = np.where(q > 0, q * np.log(q / p), 0).sum(1)
    assert figures["reverse_kl"] == pytest.approx(reverse.mean(), rel=1e-5)
    assert figures["forward_kl"] == pytest.approx(forward.mean(), rel=1e-5)
    assert figures["student_mass_on_support_min"] == pytest.approx(1 - p[:, -1].max(), rel=1e-5)
    assert figures["entropy_gap"] == pytest.approx(figures["entropy"] - figures["teacher_entropy"], abs=1e-6)
    gap = np.abs(policy.detach().numpy() - batch.sampler_logprobs.numpy())
    assert figures["sampler_gap"] == pytest.approx(gap.mean(), rel=1e-5)
    # Overlap, straight from the samples: which of the student's candidates are among the teacher's top k.
    shares, masses, weighted, weight = [], [], 0.0, 0.0
    row = 0
    for sample in batch.samples:
        for position in range(len(sample.rollout.response_ids)):
            top = sample.scores.top_ids[position].tolist()
            shared = [token for token in sample.rollout.candidate_ids[position].tolist() if token in top]
            shares.append(len(shared) / sample.rollout.candidate_ids.shape[1])
            columns = [top.index(token) for token in shared]
            masses.append(np.exp(student[row, columns]).sum())
            weighted += (np.exp(student[row, columns]) * (teacher[row, columns] - student[row, columns])).sum()
            weight += np.exp(student[row, columns]).sum()
            row += 1
    assert figures["top_k_overlap"] == pytest.approx(np.mean(shares))
    assert figures["overlap_student_mass"] == pytest.approx(np.mean(masses), rel=1e-5)
    if weight:
        assert figures["overlap_advantage"] == pytest.approx(weighted / weight, rel=1e-5)
    assert 0 < figures["top_k_overlap"] < 1  # or this test shows nothing
    advantages = [sample.advantage for sample in _samples()]
    assert figures["advantage_p50"] == pytest.approx(np.median(advantages))


def test_measuring_does_not_change_a_gradient():
    batch = _batch()
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(len(batch.targets), 8, generator=generator, requires_grad=True)
    weight = torch.randn(50, 8, generator=generator)
    support = support_logprobs(hidden, weight, batch.support_ids, present=batch.support_present)
    policy = support.logprobs.gather(1, batch.target_column[:, None]).squeeze(1)
    (before,) = torch.autograd.grad(policy.sum(), hidden, retain_graph=True)
    observe(TokenMeter(), batch, support, policy, TokenLosses({}, None), on_policy=True)
    (after,) = torch.autograd.grad(policy.sum(), hidden)
    assert torch.equal(before, after)


def test_the_line_of_a_step_names_alarms_and_waiting():
    row = json.loads(
        '{"step": 3, "reward": 0.5, "pass_rate": 0.25, "kl": 1.5, "entropy": 2.0, "loss": 0.1, "grad_norm": 1.0,'
        '"response_length": 12.0, "tokens_per_s": 100.0, "step_s": 2.0, "rollout_s": 1.0, "reward_s": 0.1,'
        '"waiting_share": 0.05, "training_s": 0.8, "alarm_length": true, "alarm_entropy": false}'
    )
    line = progress_line(row, 10)
    assert "waiting 5%" in line and line.endswith("ALARM length")
