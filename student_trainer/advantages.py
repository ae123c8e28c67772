"""Advantages: how much to push the log-probability of a sampled token up. Pure, and never differentiated.

Rewards come in groups: P prompts with G responses each, [P, G]; flattened row after row they are the B responses.
Tokens are flat, [T], and ``sequence_of_token`` [T] int64 says which response a token belongs to.

With d_t = `teacher_advantages` and A = `group_advantages`, the published mixtures (2609.04108 writes them so):

    GRPO        A                                        mix(A, d, teacher_coef=0)
    OPD         d_t                                      mix(A, d, reward_coef=0, teacher_coef=1)
    KDRL        A + beta d_t                             mix(A, d, teacher_coef=beta)
    KDRL-mask   A + (1 - c) beta d_t                     ... teacher_mask=failed(correct)
    HDPO        A + [all wrong in the group] beta d_t    ... teacher_mask=group_failed(correct)
    SRPO        c A + (1 - c) d_t                        mix(A, d, teacher_coef=1, reward_mask=c, teacher_mask=1 - c)
    RLSD        `rlsd`
"""

import torch
from torch import Tensor


def group_advantages(
    rewards: Tensor, *, normalise_std: bool = True, eps: float = 1e-6, valid: Tensor | None = None
) -> Tensor:
    """(R - mean) / (std + eps) within each group; without the division for Dr.GRPO (2503.20783). [P, G] -> [P, G].

    The standard deviation is that of a sample (n - 1), as TRL and verl have it. A group of equal rewards, or with
    fewer than two valid responses, gets exactly 0.

    Args:
        rewards: [P, G] floating point.
        valid: [P, G] bool; an invalid response counts for nothing, whatever its reward, and gets 0.
    """
    if rewards.dim() != 2 or not rewards.is_floating_point():
        raise ValueError(f"rewards must be floating point [P, G], got {rewards.dtype} {tuple(rewards.shape)}")
    if valid is None:
        valid = torch.ones_like(rewards, dtype=torch.bool)
    if valid.shape != rewards.shape or valid.dtype != torch.bool:
        raise ValueError(f"valid must be bool {tuple(rewards.shape)}, got {valid.dtype} {tuple(valid.shape)}")
    if rewards.numel() == 0:
        return torch.zeros_like(rewards)
    rewards = rewards.detach()
    low = rewards.masked_fill(~valid, torch.inf).amin(1, keepdim=True)
    high = rewards.masked_fill(~valid, -torch.inf).amax(1, keepdim=True)
    # Asked of the rewards themselves: the mean of equal numbers is not always that number, and the division would
    # blow the rounding error up. Where lowest and highest differ there are two of them, so the std exists. (Written
    # so that a NaN reward stays a NaN.)
    unequal = valid & ~(low >= high)
    count = valid.sum(1, keepdim=True)
    mean = torch.where(valid, rewards, 0.0).sum(1, keepdim=True) / count
    centred = torch.where(unequal, rewards - mean, 0.0)
    if not normalise_std:
        return centred
    std = (centred.square().sum(1, keepdim=True) / (count - 1)).sqrt()
    return torch.where(unequal, centred / (std + eps), 0.0)


def teacher_advantages(logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """d_t = teacher_logprobs - logprobs of the sampled tokens, detached: the reward of on-policy distillation. [T]."""
    if logprobs.shape != teacher_logprobs.shape:
        raise ValueError(
            f"teacher_logprobs must be {tuple(logprobs.shape)} to match logprobs, got {tuple(teacher_logprobs.shape)}"
        )
    return teacher_logprobs.detach() - logprobs.detach()


def failed(correct: Tensor) -> Tensor:
    """1 - correct: the teacher speaks only where the response is wrong. Any shape; correct in 0..1 or bool."""
    return 1.0 - correct.to(torch.float32)


def group_failed(correct: Tensor) -> Tensor:
    """1 for every response of a group in which none is (even partly) correct, else 0. [P, G] -> [P, G]."""
    if correct.dim() != 2:
        raise ValueError(f"correct must be [P, G], got {tuple(correct.shape)}")
    return (correct == 0).all(1, keepdim=True).to(torch.float32).expand(correct.shape)


def mix(
    advantages: Tensor,
    teacher: Tensor,
    sequence_of_token: Tensor,
    *,
    reward_coef: float = 1.0,
    teacher_coef: float = 1.0,
    reward_mask: Tensor | None = None,
    teacher_mask: Tensor | None = None,
) -> Tensor:
    """A_t = reward_coef * reward_mask * A + teacher_coef * teacher_mask * d_t, [T].

    Args:
        advantages: [B], one a response.
        teacher: [T], d_t of `teacher_advantages`. To keep single tokens from the teacher (the end-of-sequence token
            of a base student, say) set them to 0 here.
        sequence_of_token: [T] int64 in 0..B-1.
        reward_mask, teacher_mask: [B]; None is all ones.
    """
    if advantages.dim() != 1:
        raise ValueError(f"advantages must be [B], one a response, got {tuple(advantages.shape)}")
    if teacher.dim() != 1:
        raise ValueError(f"teacher must be [T], one a token, got {tuple(teacher.shape)}")
    if sequence_of_token.shape != teacher.shape or sequence_of_token.dtype != torch.int64:
        raise ValueError(
            f"sequence_of_token must be int64 {tuple(teacher.shape)}, "
            f"got {sequence_of_token.dtype} {tuple(sequence_of_token.shape)}"
        )
    for name, mask in (("reward_mask", reward_mask), ("teacher_mask", teacher_mask)):
        if mask is not None and mask.shape != advantages.shape:
            raise ValueError(f"{name} must be {tuple(advantages.shape)}, got {tuple(mask.shape)}")
    from_reward = reward_coef * (advantages if reward_mask is None else reward_mask * advantages)
    from_teacher = teacher_coef * (teacher if teacher_mask is None else teacher_mask[sequence_of_token] * teacher)
    return (from_reward[sequence_of_token] + from_teacher).detach()


def rlsd(advantages: Tensor, teacher: Tensor, *, mix: float = 1.0, epsilon: float = 0.2) -> Tensor:
    """A_t = A ((1 - mix) + mix clip(exp(sign(A) d_t), 1 - epsilon, 1 + epsilon)), [T] (RLSD, 2604.03128).

    The reward keeps the sign; the teacher says which tokens earned it.

    Args:
        advantages: [T], A of the response that each token belongs to.
        teacher: [T], d_t of `teacher_advantages`.
    """
    if advantages.shape != teacher.shape:
        raise ValueError(f"teacher must be {tuple(advantages.shape)} to match advantages, got {tuple(teacher.shape)}")
    credit = (advantages.sign() * teacher).exp().clamp(1.0 - epsilon, 1.0 + epsilon)
    return (advantages * ((1.0 - mix) + mix * credit)).detach()
