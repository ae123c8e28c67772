"""The sampled-token losses: values against loops, and their expected gradients by enumeration of a vocabulary."""

import math

import numpy as np
import pytest
import torch

from student_trainer.advantages import teacher_advantages
from student_trainer.surrogates import k2, k3, ppo_clip, trrd
from tests import oracles

VOCAB = 6


def policies(seed=0):
    """Logits of a student over six tokens (with gradient) and the teacher's log-probabilities."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(VOCAB, generator=g, dtype=torch.float64, requires_grad=True)
    teacher = torch.log_softmax(1.5 * torch.randn(VOCAB, generator=g, dtype=torch.float64), 0)
    return logits, teacher


def expected_gradient(loss_of_token, logits):
    """Gradient of the loss, averaged exactly over tokens drawn from the student: the draw has no gradient."""
    logprobs = torch.log_softmax(logits, 0)
    mean = (logprobs.detach().exp() * loss_of_token(logprobs)).sum()
    return torch.autograd.grad(mean, logits)[0]


def kl_gradient(logits, teacher, *, forward):
    p, q = torch.softmax(logits, 0), teacher.exp()
    kl = (q * (q / p).log()).sum() if forward else (p * (p / q).log()).sum()
    return torch.autograd.grad(kl, logits)[0]


@pytest.mark.parametrize("seed", range(5))
def test_k2_descends_the_reverse_kl_and_k3_the_forward_kl(seed):
    logits, teacher = policies(seed)
    reverse, forward = (kl_gradient(logits, teacher, forward=f) for f in (False, True))
    assert float((reverse - forward).abs().max()) > 0.05
    torch.testing.assert_close(expected_gradient(lambda s: k2(s, teacher), logits), reverse)
    torch.testing.assert_close(expected_gradient(lambda s: k3(s, teacher), logits), forward)


@pytest.mark.parametrize("seed", range(5))
def test_the_log_ratio_itself_teaches_nothing_but_as_an_advantage_it_descends_the_reverse_kl(seed):
    logits, teacher = policies(seed)
    nothing = expected_gradient(lambda s: s - teacher, logits)
    torch.testing.assert_close(nothing, torch.zeros_like(nothing))

    def opd(s):
        return ppo_clip(s, s.detach(), teacher_advantages(s, teacher)).loss

    torch.testing.assert_close(expected_gradient(opd, logits), kl_gradient(logits, teacher, forward=False))


@pytest.mark.parametrize("seed", range(5))
def test_k3_has_the_value_of_the_reverse_kl_and_is_never_negative(seed):
    logits, teacher = policies(seed)
    s = torch.log_softmax(logits, 0).detach()
    torch.testing.assert_close((s.exp() * k3(s, teacher)).sum(), (s.exp() * (s - teacher)).sum())
    assert bool((k3(s, teacher) >= 0).all())


def test_k2_and_k3_values_are_their_formulas():
    s, t = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-2.0, -1.5, -0.5])
    torch.testing.assert_close(k2(s, t), torch.tensor([0.5, 0.125, 0.0]))
    torch.testing.assert_close(k3(s, t), torch.tensor([math.exp(-1.0), math.exp(0.5) - 1.5, 0.0]))


def random_tokens(n=200, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(n, generator=g, dtype=dtype)
    logprobs = (old + 0.6 * torch.randn(n, generator=g, dtype=dtype)).requires_grad_()
    teacher = -3 * torch.rand(n, generator=g, dtype=dtype)
    advantages = torch.randn(n, generator=g, dtype=dtype)
    advantages[::10] = 0.0
    return logprobs, old, teacher, advantages


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("low", "high"), [(0.2, 0.28), (0.2, 0.2), (1.0, 9.0), (0.0, 0.0)])
def test_ppo_clip_is_the_minimum_of_the_two_products(low, high, dtype):
    logprobs, old, _, advantages = random_tokens(dtype=dtype)
    loss, clipped = ppo_clip(logprobs, old, advantages, clip_low=low, clip_high=high)
    x, a = (logprobs.detach() - old).double().numpy(), advantages.double().numpy()
    expected = oracles.clipped_surrogate(x, a, low, high)
    np.testing.assert_allclose(loss.detach(), expected, rtol=1e-5 if dtype == torch.float32 else 1e-12)

    (grad,) = torch.autograd.grad(loss.sum(), logprobs)
    outside = ((a > 0) & (np.exp(x) > 1 + high)) | ((a < 0) & (np.exp(x) < 1 - low))
    np.testing.assert_array_equal(clipped.numpy(), outside)
    assert clipped.dtype == torch.bool and (outside.any() or low == 1.0)
    wanted = np.where(outside, 0.0, -np.exp(x) * a)
    np.testing.assert_allclose(grad, wanted, rtol=1e-5 if dtype == torch.float32 else 1e-12)


def test_trrd_is_ppo_clip_of_the_mixed_ratio():
    logprobs, old, teacher, advantages = random_tokens()
    for alpha in (0.0, 0.3, 0.5, 1.0):
        for clamp in (0.5, 1.0, math.inf):
            loss, clipped = trrd(logprobs, old, teacher, advantages, alpha=alpha, log_ratio_clamp=clamp)
            s, o, t = logprobs.detach().numpy(), old.numpy(), teacher.numpy()
            mixed = alpha * (s - o) + (1 - alpha) * np.clip(s - t, -clamp, clamp)
            expected = oracles.clipped_surrogate(mixed, advantages.numpy(), 0.2, 0.28)
            np.testing.assert_allclose(loss.detach(), expected, rtol=1e-12)
            a = advantages.numpy()
            free = ~(((a > 0) & (mixed > np.log(1.28))) | ((a < 0) & (mixed < np.log(0.8))))
            np.testing.assert_array_equal(clipped.numpy(), ~free)
            (grad,) = torch.autograd.grad(loss.sum(), logprobs)
            flow = alpha + (1 - alpha) * (np.abs(s - t) <= clamp)
            np.testing.assert_allclose(grad, np.where(free, -flow * np.exp(mixed) * a, 0.0), rtol=1e-12, atol=1e-15)


def test_trrd_with_alpha_one_is_ppo_clip():
    logprobs, old, teacher, advantages = random_tokens()
    mixed, plain = trrd(logprobs, old, teacher, advantages, alpha=1.0), ppo_clip(logprobs, old, advantages)
    torch.testing.assert_close(mixed, plain, rtol=0, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(mixed.loss.sum(), logprobs), torch.autograd.grad(plain.loss.sum(), logprobs)
    )


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "held"),
    [
        (0.493, 1.0, False),
        (0.495, 1.0, True),
        (-0.445, -1.0, False),
        (-0.447, -1.0, True),
        (5.0, -1.0, False),
        (-5.0, 1.0, False),
    ],
)
def test_trrd_clips_at_the_first_on_policy_step_where_the_teacher_disagrees(log_ratio, advantage, held):
    s = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    loss, clipped = trrd(s, s.detach(), s.detach() - log_ratio, torch.tensor([advantage], dtype=torch.float64))
    assert clipped.item() is held
    assert (torch.autograd.grad(loss.sum(), s)[0].item() == 0.0) is held


def test_the_clamp_of_trrd_holds_the_gradient_unless_it_is_straight_through():
    s = torch.tensor([-0.5], dtype=torch.float64, requires_grad=True)
    inputs = (s, s.detach(), s.detach() - 3.0, torch.tensor([-1.0], dtype=torch.float64))  # log ratio 3, held at 1
    held, through = trrd(*inputs), trrd(*inputs, straight_through=True)
    torch.testing.assert_close(held.loss, through.loss)
    assert held.loss.item() == pytest.approx(math.exp(0.5))
    assert torch.autograd.grad(held.loss, s)[0].item() == pytest.approx(0.5 * math.exp(0.5))
    assert torch.autograd.grad(through.loss, s)[0].item() == pytest.approx(math.exp(0.5))


def test_only_the_student_receives_a_gradient():
    logprobs, old, teacher, advantages = random_tokens()
    constants = [x.requires_grad_() for x in (old, teacher, advantages)]
    total = ppo_clip(logprobs, old, advantages).loss + trrd(logprobs, old, teacher, advantages).loss
    (total + k2(logprobs, teacher) + k3(logprobs, teacher)).sum().backward()
    assert all(x.grad is None for x in constants) and bool(logprobs.grad.isfinite().all())


def test_a_ratio_that_overflows_is_clipped_without_a_nan():
    s = torch.tensor([0.0, 0.0], requires_grad=True)
    loss, clipped = ppo_clip(s, torch.tensor([-200.0, 200.0]), torch.tensor([2.0, -2.0]))
    torch.testing.assert_close(loss.detach(), torch.tensor([-2.56, 1.6]))
    assert clipped.tolist() == [True, True]
    assert torch.autograd.grad(loss.sum(), s)[0].tolist() == [0.0, 0.0]


def test_a_nan_is_not_hidden():
    s, nan = torch.zeros(1), torch.full((1,), math.nan)
    one = torch.ones(1)
    assert ppo_clip(s, nan, one).loss.isnan().all() and trrd(s, s, nan, one).loss.isnan().all()
    assert k2(s, nan).isnan().all() and k3(s, nan).isnan().all()


def test_wrong_arguments_are_named():
    s, row = torch.zeros(3), torch.zeros(3, 1)
    with pytest.raises(ValueError, match=r"old_logprobs must be \(3,\) to match logprobs, got \(3, 1\)"):
        ppo_clip(s, row, s)
    with pytest.raises(ValueError, match=r"advantages must be \(3,\)"):
        ppo_clip(s, s, torch.zeros(1))
    with pytest.raises(ValueError, match=r"teacher_logprobs must be \(3,\)"):
        trrd(s, s, row, s)
    for function in (k2, k3):
        with pytest.raises(ValueError, match=r"teacher_logprobs must be \(3,\)"):
            function(s, row)
    with pytest.raises(ValueError, match="logprobs must be of a floating-point dtype"):
        k2(torch.zeros(3).long(), s)
    with pytest.raises(ValueError, match=r"alpha must be in 0\.\.1"):
        trrd(s, s, s, s, alpha=1.5)
    with pytest.raises(ValueError, match="log_ratio_clamp must be positive"):
        trrd(s, s, s, s, log_ratio_clamp=0.0)
    with pytest.raises(ValueError, match=r"clip_low must be in 0\.\.1"):
        ppo_clip(s, s, s, clip_low=1.2)
