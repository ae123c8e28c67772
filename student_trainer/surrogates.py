"""Per-token losses on sampled tokens, to be minimised. Pure; any shape, as long as all arguments share it.

``logprobs`` are the student's log-probabilities of the sampled tokens (nats, with gradient); ``old_logprobs`` those
of the policy that drew them, ``teacher_logprobs`` the teacher's, both constants here. Advantages are constants.
Nothing is masked and nothing is reduced: see `student_trainer.reduction`.

What each estimator is worth on the student's own samples (checked by enumeration in tests/unit/test_surrogates.py):

    loss                                    gradient in expectation
    l = s - tau, back-propagated            0: no signal, use it only as an advantage
    `k2`, l^2 / 2                           reverse KL, exactly
    `k3`, exp(-l) - 1 + l                   FORWARD KL, exactly
    `ppo_clip` with advantage tau - s       reverse KL, exactly (inside the clip range)
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Surrogate(NamedTuple):
    loss: Tensor  # per token, to minimise
    clipped: Tensor  # bool: the clip range holds this token, so it gives no gradient


def ppo_clip(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
) -> Surrogate:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), r = exp(logprobs - old_logprobs).

    PPO (1707.06347) with the two-sided range of DAPO (2503.14476).
    """
    _check(logprobs, old_logprobs=old_logprobs, advantages=advantages)
    return _clipped(logprobs - old_logprobs.detach(), advantages, clip_low, clip_high)


def trrd(
    logprobs: Tensor,
    old_logprobs: Tensor,
    teacher_logprobs: Tensor,
    advantages: Tensor,
    *,
    alpha: float = 0.5,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    log_ratio_clamp: float = 1.0,
    straight_through: bool = False,
) -> Surrogate:
    """Trust-region-ratio distillation (RLAD, 2602.22495, eq. 3): PPO's clip around a mixture of old policy and teacher.

    log ratio = alpha (s - o) + (1 - alpha) clamp(s - tau, -c, c), c = ``log_ratio_clamp`` (appendix B; math.inf: none).
    alpha=1 is `ppo_clip`. The advantage decides the direction, the teacher where movement is allowed: at the first
    on-policy step (s = o) with the defaults, a token with A > 0 is already clipped where s - tau > .494, one with
    A < 0 where s - tau < -.446.

    The paper does not say whether the gradient passes the clamp. By default it does not, which leaves the alpha part
    outside the band; ``straight_through=True`` lets it pass.
    """
    _check(logprobs, old_logprobs=old_logprobs, teacher_logprobs=teacher_logprobs, advantages=advantages)
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must be in 0..1 (1 is plain PPO), got {alpha}")
    if not log_ratio_clamp > 0:
        raise ValueError(f"log_ratio_clamp must be positive (math.inf for none), got {log_ratio_clamp}")
    to_teacher = logprobs - teacher_logprobs.detach()
    held = to_teacher.clamp(-log_ratio_clamp, log_ratio_clamp)
    if straight_through:
        held = to_teacher + (held - to_teacher).detach()
    return _clipped(alpha * (logprobs - old_logprobs.detach()) + (1.0 - alpha) * held, advantages, clip_low, clip_high)


def k2(logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """l^2 / 2 with l = logprobs - teacher_logprobs: KDRL's distillation term (2506.02208).

    Its value is not the KL, but its expected gradient on the student's samples is that of KL(student || teacher).
    """
    _check(logprobs, teacher_logprobs=teacher_logprobs)
    return 0.5 * (logprobs - teacher_logprobs.detach()).square()


def k3(logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """exp(-l) - 1 + l with l = logprobs - teacher_logprobs: an unbiased, non-negative *value* of the reverse KL.

    Trap: back-propagated on the student's samples its expected gradient is that of the FORWARD KL(teacher ||
    student), noisy where the teacher is far above the student. Log it; to descend the reverse KL use `k2`, or
    the teacher advantage in `ppo_clip`.
    """
    _check(logprobs, teacher_logprobs=teacher_logprobs)
    log_ratio = logprobs - teacher_logprobs.detach()
    return torch.expm1(-log_ratio) + log_ratio


class ImportanceWeights(NamedTuple):
    bounded: Tensor  # per token: what of the ratio counts
    relative: Tensor  # per token: bounded / ratio, for terms that hold the ratio already
    ratio: Tensor  # per token: student / sampler; may overflow to inf
    affected: Tensor  # bool: the bound changed this token


def importance_weights(
    logprobs: Tensor, old_logprobs: Tensor, *, mask: bool = False, low: float = 0.5, high: float = 2.0
) -> ImportanceWeights:
    """The importance ratio r = exp(logprobs - old_logprobs) within bounds, never differentiated.

    mask=False: min(r, high), truncated importance sampling. mask=True: r where low <= r <= high, otherwise 0, so
    that the token counts for nothing (IcePop; MiMo-V2-Flash 2601.02780 writes it so).
    """
    _check(logprobs, old_logprobs=old_logprobs)
    if not 0.0 <= low < high < math.inf:
        raise ValueError(f"low and high must be 0 <= low < high < inf, got {low} and {high}")
    log_ratio = logprobs.detach() - old_logprobs.detach()
    log_high = math.log(high)
    above = log_ratio > log_high
    if mask:
        below = log_ratio < (math.log(low) if low else -math.inf)
        affected = above | below
        bounded = torch.where(affected, 0.0, log_ratio.exp())
        relative = torch.where(affected, 0.0, torch.ones_like(log_ratio))
    else:
        affected = above
        bounded = log_ratio.clamp(max=log_high).exp()
        relative = (log_high - log_ratio).clamp(max=0.0).exp()
    return ImportanceWeights(bounded, relative, log_ratio.exp(), affected)


def _clipped(log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Surrogate:
    if not (0.0 <= clip_low <= 1.0 and 0.0 <= clip_high < math.inf):
        raise ValueError(f"clip_low must be in 0..1 and clip_high at least 0, got {clip_low} and {clip_high}")
    advantages = advantages.detach()
    low = math.log1p(-clip_low) if clip_low < 1.0 else -math.inf
    high = math.log1p(clip_high)
    clipped = ((advantages > 0) & (log_ratio > high)) | ((advantages < 0) & (log_ratio < low))
    # The bound takes the place of the log-ratio before exp(), so that a ratio which overflows has no NaN gradient.
    bound = torch.full_like(log_ratio, low).masked_fill(advantages > 0, high)
    return Surrogate(-torch.where(clipped, bound, log_ratio).exp() * advantages, clipped)


def _check(logprobs: Tensor, **others: Tensor) -> None:
    if not logprobs.is_floating_point():
        raise ValueError(f"logprobs must be of a floating-point dtype, got {logprobs.dtype}")
    for name, tensor in others.items():
        if tensor.shape != logprobs.shape:
            raise ValueError(f"{name} must be {tuple(logprobs.shape)} to match logprobs, got {tuple(tensor.shape)}")
