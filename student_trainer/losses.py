"""Divergences between a student and a teacher that are known on a support of K tokens and its tail.

Every function takes log-probabilities normalised over the full vocabulary and the log of the mass outside the
support, and compares distributions over K + 1 buckets: the K tokens and the tail. By the data processing
inequality that is a lower bound of the divergence over the vocabulary, and equal to it at K = V. (Renormalising
over the support breaks the bound; dropping the tail lets the student hide mass outside the support.)

An entry that is -inf on *both* sides is absent and adds nothing to value or gradient. A bucket that only the
distribution in front of the logarithm gives no mass adds 0 with zero gradient; one that only the other side
gives no mass makes the divergence +inf, which is left to be seen. The teacher never receives a gradient.

Shapes: student_logprobs, teacher_logprobs [..., K]; student_log_tail, teacher_log_tail [...]; result [...], nats.
Nothing is masked and nothing is reduced: see `student_trainer.reduction`.
"""

import math

import torch
from torch import Tensor


def forward_kl(
    student_logprobs: Tensor, teacher_logprobs: Tensor, student_log_tail: Tensor, teacher_log_tail: Tensor
) -> Tensor:
    """KL(teacher || student): the student must cover whatever the teacher may say (Hinton et al., 1503.02531)."""
    student, teacher = _buckets(student_logprobs, teacher_logprobs, student_log_tail, teacher_log_tail)
    return _kl(teacher, student).sum(-1)


def reverse_kl(
    student_logprobs: Tensor, teacher_logprobs: Tensor, student_log_tail: Tensor, teacher_log_tail: Tensor
) -> Tensor:
    """KL(student || teacher): the student must not say what the teacher would not (MiniLLM, 2306.08543).

    On a support of the teacher's top tokens alone this is a poor guide; use the union with the student's own.
    """
    student, teacher = _buckets(student_logprobs, teacher_logprobs, student_log_tail, teacher_log_tail)
    return _kl(student, teacher).sum(-1)


def js(
    student_logprobs: Tensor,
    teacher_logprobs: Tensor,
    student_log_tail: Tensor,
    teacher_log_tail: Tensor,
    beta: float = 0.5,
) -> Tensor:
    """beta KL(T || M) + (1 - beta) KL(S || M) with M = beta T + (1 - beta) S (GKD, 2306.13649, eq. 1).

    The divergence itself goes to 0 at both ends of beta; there, as GKD and TRL have it, beta=0 is the forward KL
    and beta=1 the reverse KL. Finite for every pair of distributions when beta lies between.

    Raises:
        ValueError: beta outside 0..1.
    """
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta must be in 0..1 (0 forward KL, 1 reverse KL), got {beta}")
    student, teacher = _buckets(student_logprobs, teacher_logprobs, student_log_tail, teacher_log_tail)
    if beta == 0.0:
        return _kl(teacher, student).sum(-1)
    if beta == 1.0:
        return _kl(student, teacher).sum(-1)
    # log(T / M) = -log(beta + (1 - beta) S / T) and likewise for S: of the ratio alone, so that nothing is lost
    # by subtracting two large logarithms, and a ratio of 0 or infinity is a number like any other.
    log_beta, log_rest = math.log(beta), math.log1p(-beta)

    def to_mixture(mine: Tensor, other: Tensor, log_own: float, log_other: float) -> Tensor:
        counts = mine != -math.inf
        mine, other = torch.where(counts, mine, 0.0), torch.where(counts, other, 0.0)
        ratio = other - mine
        mixture = torch.logaddexp(torch.full_like(ratio, log_own), ratio + log_other)
        return torch.where(counts, -mine.exp() * mixture, 0.0)

    from_teacher = to_mixture(teacher, student, log_beta, log_rest)
    from_student = to_mixture(student, teacher, log_rest, log_beta)
    return (beta * from_teacher + (1.0 - beta) * from_student).sum(-1)


def sinkhorn(
    student_logprobs: Tensor,
    teacher_logprobs: Tensor,
    student_log_tail: Tensor,
    teacher_log_tail: Tensor,
    *,
    ids: Tensor | None = None,
    epsilon: float = 0.1,
    iterations: int = 20,
) -> Tensor:
    """SinKD (2402.17110): entropic transport between the student's rows and the teacher's, not within a row.

    All leading dimensions are rows, R of them. The cost between student row i and teacher row j is
    W_ij = ||P_i - Q_j||_1; the plan starts as exp(-W / epsilon) and its rows, then its columns, are normalised to 1,
    ``iterations`` times (so the columns sum to 1, the rows nearly). The loss of row i is sum_j plan_ij W_ij. The
    gradient flows through W and through the iterations. Time and memory grow with R^2: give it the rows of a
    sequence or of a micro-batch, up to about two thousand.

    Args:
        ids: [..., K] int64, the token of each entry. None: entry k is the same token in every row. With ids, a row
            is spread over the union of all ids of the batch; what it has on a token that it did not report lies in
            its tail, which is one more coordinate. So W is the L1 distance of the distributions where the support is
            the whole vocabulary, and otherwise that of the tail-bucketed rows, whose tails may cover different tokens.
        epsilon: strength of the entropic term, in units of W (which lies in 0..2). The paper uses 0.1.
        iterations: the paper uses 20.

    SinKD takes P and Q at temperature 2 and adds 0.001 times the *sum* over rows to its loss.

    Raises:
        ValueError: epsilon is not positive, iterations is below 1, ids has another shape or dtype.
    """
    if not epsilon > 0:
        raise ValueError(f"epsilon must be positive, got {epsilon}")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    if ids is not None and (ids.shape != student_logprobs.shape or ids.dtype != torch.int64):
        raise ValueError(f"ids must be int64 {tuple(student_logprobs.shape)}, got {ids.dtype} {tuple(ids.shape)}")
    student, teacher = _buckets(student_logprobs, teacher_logprobs, student_log_tail, teacher_log_tail)
    p, q = student.exp().view(-1, student.shape[-1]), teacher.exp().view(-1, student.shape[-1])
    if ids is not None and ids.numel():
        union, columns = torch.unique(ids.reshape(p.shape[0], -1), return_inverse=True)
        tail = torch.full_like(columns[:, :1], union.numel())
        columns = torch.cat([columns, tail], 1)
        empty = p.new_zeros(p.shape[0], union.numel() + 1)
        p, q = empty.scatter_add(1, columns, p), empty.scatter_add(1, columns, q)
    cost = torch.cdist(p, q, p=1.0)
    return (_log_plan(cost, epsilon, iterations).exp() * cost).sum(1).view(student_log_tail.shape)


def _log_plan(cost: Tensor, epsilon: float, iterations: int) -> Tensor:
    """[R, R]: in logarithms, because exp(-2 / epsilon) is nothing in half precision and little in float32."""
    log_plan = -cost / epsilon
    for _ in range(iterations):
        log_plan = log_plan - log_plan.logsumexp(1, keepdim=True)
        log_plan = log_plan - log_plan.logsumexp(0, keepdim=True)
    return log_plan


def _buckets(
    student_logprobs: Tensor, teacher_logprobs: Tensor, student_log_tail: Tensor, teacher_log_tail: Tensor
) -> tuple[Tensor, Tensor]:
    """Both sides as [..., K + 1] log-probabilities, the teacher's detached."""
    shape = student_logprobs.shape
    if not shape:
        raise ValueError("student_logprobs must be [..., K], got a scalar")
    for name, tensor, wanted in (
        ("teacher_logprobs", teacher_logprobs, shape),
        ("student_log_tail", student_log_tail, shape[:-1]),
        ("teacher_log_tail", teacher_log_tail, shape[:-1]),
    ):
        if tensor.shape != wanted:
            raise ValueError(f"{name} must be {tuple(wanted)} to match student_logprobs, got {tuple(tensor.shape)}")
    dtype = student_logprobs.dtype
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"student_logprobs must be float32 or float64, got {dtype}: half precision loses the tail")
    student = torch.cat([student_logprobs, student_log_tail.unsqueeze(-1).to(dtype)], -1)
    teacher = torch.cat([teacher_logprobs, teacher_log_tail.unsqueeze(-1)], -1).detach().to(dtype)
    return student, teacher


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """p log(p / q) of each bucket; where p is 0 (-inf) the constant 1 log(1 / 1), which has no gradient."""
    counts = p != -math.inf
    p, q = torch.where(counts, p, 0.0), torch.where(counts, q, 0.0)
    return p.exp() * (p - q)
