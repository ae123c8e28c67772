"""The importance ratio between student and sampler: its bounds, what they weigh, and that old answers teach no bias."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from student_trainer.config import RunConfig
from student_trainer.objective import reduce_loss, token_losses
from student_trainer.objective_config import Importance, ObjectiveConfig
from student_trainer.surrogates import importance_weights, ppo_clip
from tests.unit.test_objective import _batch, _student


def _reference(new: np.ndarray, old: np.ndarray, kind: str, low: float, high: float) -> np.ndarray:
    ratios = [math.exp(a - b) for a, b in zip(new.tolist(), old.tolist(), strict=True)]
    if kind == "mask":
        return np.array([r if low <= r <= high else 0.0 for r in ratios])
    return np.array([min(r, high) for r in ratios])


@pytest.mark.parametrize("kind", ["truncate", "mask"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bounded_and_relative_weights_against_a_loop(kind, dtype):
    generator = np.random.default_rng(0)
    new, old = -generator.exponential(2.0, 500), -generator.exponential(2.0, 500)
    given = torch.tensor(new, dtype=dtype), torch.tensor(old, dtype=dtype)
    weights = importance_weights(*given, mask=kind == "mask", low=0.5, high=2.0)
    wanted = _reference(given[0].double().numpy(), given[1].double().numpy(), kind, 0.5, 2.0)
    np.testing.assert_allclose(weights.bounded, wanted, rtol=3e-6 if dtype == torch.float32 else 1e-12)
    np.testing.assert_allclose(weights.relative * weights.ratio, wanted, rtol=1e-5, atol=1e-12)
    outside = np.exp(new - old) > 2.0
    if kind == "mask":
        outside |= np.exp(new - old) < 0.5
    np.testing.assert_array_equal(weights.affected, outside)


def test_a_ratio_beyond_float32_is_bounded_and_never_nan():
    weights = importance_weights(torch.tensor([0.0, -200.0]), torch.tensor([-200.0, 0.0]))
    assert weights.ratio.tolist() == [math.inf, 0.0]
    assert weights.bounded.tolist() == [2.0, 0.0] and weights.relative.tolist() == [0.0, 1.0]


def test_the_weights_are_constants():
    new = torch.zeros(3, requires_grad=True)
    assert not any(part.requires_grad for part in importance_weights(new, torch.zeros(3)))


def _terms(objective: dict, importance: Importance | None, sampler_shift: float):
    """Loss terms of a batch whose answers were drawn by a sampler that far from the student, in nats a token."""
    batch = _batch()
    support, policy, hidden = _student(batch)
    batch = dataclasses.replace(batch, sampler_logprobs=(policy.detach() - sampler_shift))
    token = token_losses(ObjectiveConfig.model_validate(objective), 0, batch, support, policy, importance)
    return token, batch, hidden


def test_on_policy_the_correction_changes_nothing():
    for objective in ({"divergences": [{"kind": "reverse_kl"}]}, {"recipe": "opd"}, {"recipe": "trrd"}):
        plain, *_ = _terms(objective, None, 0.0)
        corrected, *_ = _terms(objective, Importance(), 0.0)
        for name, values in plain.terms.items():
            assert torch.equal(values, corrected.terms[name])


@pytest.mark.parametrize(
    ("importance", "shift", "factor"),
    [
        (Importance(), math.log(1.5), 1.5),
        (Importance(), math.log(5.0), 2.0),
        (Importance(), math.log(0.1), 0.1),
        (Importance(kind="mask"), math.log(1.5), 1.5),
        (Importance(kind="mask"), math.log(5.0), 0.0),
        (Importance(kind="mask"), math.log(0.4), 0.0),
        (Importance(kind="none"), math.log(5.0), 1.0),
    ],
)
def test_a_divergence_is_weighted_with_the_bounded_ratio(importance, shift, factor):
    objective = {"divergences": [{"kind": "reverse_kl"}]}
    plain, *_ = _terms(objective, None, shift)
    corrected, *_ = _terms(objective, importance, shift)
    torch.testing.assert_close(corrected.terms["reverse_kl"], factor * plain.terms["reverse_kl"])


def test_the_policy_gradient_holds_the_ratio_already_so_it_is_only_bounded():
    """A negative advantage has no upper clip in PPO: there the bound is what keeps a stale token small."""
    generator = torch.Generator().manual_seed(1)
    new = torch.randn(50, generator=generator, requires_grad=True)
    advantages = -torch.rand(50, generator=generator)
    ratio = 5.0
    old = new.detach() - math.log(ratio)
    weights = importance_weights(new, old)
    bounded = ppo_clip(new, old, advantages).loss * weights.relative
    torch.testing.assert_close(bounded.detach(), -2.0 * advantages)
    (gradient,) = torch.autograd.grad(bounded.sum(), new)
    torch.testing.assert_close(gradient, -2.0 * advantages)


def test_a_masked_token_counts_for_nothing_even_if_its_loss_is_not_finite():
    objective = {"recipe": "opd"}
    batch = _batch()
    support, policy, hidden = _student(batch)
    far = policy.detach().clone()
    far[0] -= 300.0  # the ratio overflows, and with it the surrogate
    batch = dataclasses.replace(batch, sampler_logprobs=far)
    config = ObjectiveConfig.model_validate(objective)
    token = token_losses(config, 0, batch, support, policy, Importance(kind="mask"))
    loss = reduce_loss(token, batch)
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert loss.isfinite() and gradient.isfinite().all() and not gradient[0].any() and gradient[1:].any()


def test_truncated_importance_sampling_recovers_the_expectation_of_the_current_student():
    """By enumeration: E_old[min(S/O, c) f] = E_S[f] where no ratio is above c."""
    generator = torch.Generator().manual_seed(3)
    student = torch.log_softmax(torch.randn(40, generator=generator, dtype=torch.float64), 0)
    sampler = torch.log_softmax(student + 0.2 * torch.randn(40, generator=generator, dtype=torch.float64), 0)
    values = torch.randn(40, generator=generator, dtype=torch.float64)
    weights = importance_weights(student, sampler)
    assert not weights.affected.any()
    torch.testing.assert_close((sampler.exp() * weights.bounded * values).sum(), (student.exp() * values).sum())


def _config(**rollout) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run_dir": "x",
            "steps": 1,
            "student": {"model": "m"},
            "prompts": {"source": "reasoning_gym", "dataset": "chain_sum"},
            "objective": {"recipe": "grpo"},
            "rollout": rollout,
        }
    )


def test_the_correction_is_on_by_itself_where_answers_can_be_off_policy():
    assert _config().importance is None
    assert _config(batches_ahead=1).importance == Importance()
    assert _config(engine="vllm").importance == Importance()


def test_wrong_bounds_are_named():
    with pytest.raises(ValueError, match="low and high must be 0 <= low < high"):
        importance_weights(torch.zeros(1), torch.zeros(1), low=2.0, high=1.0)
    with pytest.raises(ValueError, match="old_logprobs must be"):
        importance_weights(torch.zeros(2), torch.zeros(1))
