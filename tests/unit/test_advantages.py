"""Advantages against loops, and the published mixtures."""

import math

import numpy as np
import pytest
import torch

from student_trainer.advantages import failed, group_advantages, group_failed, mix, rlsd, teacher_advantages
from tests import oracles


@pytest.mark.parametrize("normalise_std", [True, False])
@pytest.mark.parametrize(("prompts", "responses"), [(1, 2), (5, 8), (33, 3), (4, 1), (0, 8)])
def test_group_advantages_equal_the_loop(prompts, responses, normalise_std):
    rng = np.random.default_rng(0)
    rewards = rng.integers(0, 3, (prompts, responses)) * 0.5 + 0.1
    valid = rng.random((prompts, responses)) < 0.7
    for mask in (None, valid):
        got = group_advantages(
            torch.tensor(rewards), normalise_std=normalise_std, valid=None if mask is None else torch.tensor(mask)
        )
        kept = np.ones_like(valid) if mask is None else mask
        np.testing.assert_allclose(got, oracles.group_advantages(rewards, kept, normalise_std, 1e-6), atol=1e-12)


@pytest.mark.parametrize("normalise_std", [True, False])
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1 / 3, 1e6 + 0.1])
def test_a_group_of_equal_rewards_gives_exactly_zero(reward, normalise_std):
    got = group_advantages(torch.full((3, 7), reward), normalise_std=normalise_std)
    assert bool((got == 0).all())


def test_dr_grpo_only_centres_and_grpo_has_unit_spread():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(group_advantages(rewards, normalise_std=False), rewards - rewards.mean(1, keepdim=True))
    normal = group_advantages(rewards)
    torch.testing.assert_close(normal.std(1), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-5)
    torch.testing.assert_close(normal.sum(1), torch.zeros(2, dtype=torch.float64))


def test_an_invalid_response_counts_for_nothing():
    rewards = torch.tensor([[1.0, 0.0, math.nan, 0.5], [1.0, 77.0, 78.0, 79.0], [1.0, 2.0, 3.0, 4.0]])
    valid = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    got = group_advantages(rewards, valid=valid)
    torch.testing.assert_close(got[0, [0, 1, 3]], group_advantages(rewards[:1, [0, 1, 3]])[0])
    assert got[0, 2] == 0 and bool((got[1:] == 0).all())


def test_a_nan_among_the_valid_rewards_is_not_hidden():
    got = group_advantages(torch.tensor([[1.0, math.nan, 0.0], [1.0, 0.0, 0.0]]))
    assert bool(got[0].isnan().all()) and bool(got[1].isfinite().all())


def test_the_teacher_advantage_is_the_negative_log_ratio_without_gradient():
    s = torch.tensor([-1.0, -2.0], requires_grad=True)
    d = teacher_advantages(s, torch.tensor([-0.5, -4.0], requires_grad=True))
    assert d.tolist() == [0.5, -2.0] and not d.requires_grad


def test_masks_of_failure():
    correct = torch.tensor([[1, 0, 0], [0, 0, 0], [1, 1, 1]]).bool()
    assert failed(correct).tolist() == [[0, 1, 1], [1, 1, 1], [0, 0, 0]]
    assert failed(torch.tensor([0.25])).tolist() == [0.75]
    assert group_failed(correct).tolist() == [[0, 0, 0], [1, 1, 1], [0, 0, 0]]


def test_the_published_mixtures():
    """The table in the module docstring, token by token."""
    rng = np.random.default_rng(0)
    sequence = np.array([0, 0, 0, 1, 3, 3])  # response 2 has no token
    a, d = rng.standard_normal(4), rng.standard_normal(6)
    c = np.array([1.0, 0.0, 1.0, 0.0])
    t_a, t_d, t_seq, t_c = torch.tensor(a), torch.tensor(d), torch.tensor(sequence), torch.tensor(c)

    def loop(formula):
        return np.array([formula(a[b], d[t], c[b]) for t, b in enumerate(sequence)])

    for got, formula in [
        (mix(t_a, t_d, t_seq, teacher_coef=0.0), lambda A, d, c: A),
        (mix(t_a, t_d, t_seq, reward_coef=0.0), lambda A, d, c: d),
        (mix(t_a, t_d, t_seq, teacher_coef=0.2), lambda A, d, c: A + 0.2 * d),
        (
            mix(t_a, t_d, t_seq, teacher_coef=0.2, teacher_mask=failed(t_c)),
            lambda A, d, c: A + (1 - c) * 0.2 * d,
        ),
        (
            mix(t_a, t_d, t_seq, teacher_coef=0.01, teacher_mask=group_failed(t_c.view(2, 2)).flatten()),
            lambda A, d, c: A,  # each of the two groups has a correct response
        ),
        (mix(t_a, t_d, t_seq, reward_mask=t_c, teacher_mask=failed(t_c)), lambda A, d, c: c * A + (1 - c) * d),
    ]:
        np.testing.assert_allclose(got, loop(formula), rtol=1e-12)


@pytest.mark.parametrize(("weight", "epsilon"), [(1.0, 0.2), (0.3, 0.5), (0.0, 0.2)])
def test_rlsd_keeps_the_sign_of_the_reward(weight, epsilon):
    rng = np.random.default_rng(0)
    a, d = rng.standard_normal(50), rng.standard_normal(50)
    a[:5] = 0.0
    got = rlsd(torch.tensor(a), torch.tensor(d), mix=weight, epsilon=epsilon)
    for A, x, value in zip(a, d, got.tolist(), strict=True):
        credit = min(max(math.exp(x if A > 0 else -x), 1 - epsilon), 1 + epsilon)
        assert value == pytest.approx(A * ((1 - weight) + weight * credit))
    np.testing.assert_array_equal(np.sign(got.numpy()), np.sign(a))


def test_no_advantage_carries_a_gradient():
    a, d = torch.zeros(2, requires_grad=True), torch.zeros(3, requires_grad=True)
    sequence = torch.tensor([0, 1, 1])
    assert not mix(a, d, sequence).requires_grad
    assert not rlsd(a[sequence], d).requires_grad
    assert not group_advantages(torch.rand(2, 3, requires_grad=True)).requires_grad


def test_wrong_arguments_are_named():
    a, d, sequence = torch.zeros(2), torch.zeros(3), torch.tensor([0, 1, 1])
    with pytest.raises(ValueError, match=r"rewards must be floating point \[P, G\]"):
        group_advantages(torch.zeros(3))
    with pytest.raises(ValueError, match=r"rewards must be floating point \[P, G\], got torch.int64"):
        group_advantages(torch.zeros(3, 2).long())
    with pytest.raises(ValueError, match=r"valid must be bool \(3, 2\)"):
        group_advantages(torch.zeros(3, 2), valid=torch.ones(3, 1).bool())
    with pytest.raises(ValueError, match=r"teacher_logprobs must be \(3,\)"):
        teacher_advantages(d, torch.zeros(1))
    with pytest.raises(ValueError, match=r"correct must be \[P, G\]"):
        group_failed(a)
    with pytest.raises(ValueError, match=r"advantages must be \[B\]"):
        mix(torch.zeros(2, 1), d, sequence)
    with pytest.raises(ValueError, match=r"teacher must be \[T\]"):
        mix(a, torch.zeros(3, 1), sequence)
    with pytest.raises(ValueError, match=r"sequence_of_token must be int64 \(3,\)"):
        mix(a, d, sequence[:2])
    with pytest.raises(ValueError, match=r"teacher_mask must be \(2,\), got \(3,\)"):
        mix(a, d, sequence, teacher_mask=torch.ones(3))
    with pytest.raises(ValueError, match=r"teacher must be \(2,\) to match advantages, got \(3,\)"):
        rlsd(a, d)
