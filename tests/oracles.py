"""The mathematics of the trainer once more: float64 NumPy, the whole vocabulary, probabilities instead of logarithms.

Written to be checked by eye and without looking at the code under test. Slow on purpose; shapes are small.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def logits(hidden, weight, bias=None, scale=1.0, softcap=None, temperature=1.0) -> Array:
    """[T, V]."""
    raw = np.asarray(hidden, np.float64) @ np.asarray(weight, np.float64).T
    raw = scale * (raw if bias is None else raw + np.asarray(bias, np.float64))
    if softcap is not None:
        raw = softcap * np.tanh(raw / softcap)
    return raw / temperature


def softmax(z: Array) -> Array:
    """Over the last dimension."""
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def scores(z: Array, ids, present=None) -> tuple[Array, Array, Array]:
    """Log-probabilities [T, K] (-inf where absent), entropy [T] and log tail [T] of logits [T, V]."""
    rows, width = np.shape(ids)
    logprobs, entropy, log_tail = np.full((rows, width), -np.inf), np.zeros(rows), np.full(rows, -np.inf)
    for t in range(rows):
        shifted = z[t] - z[t].max()
        log_sum = np.log(sum(np.exp(v) for v in shifted))
        support = set()
        for k in range(width):
            if present is None or present[t][k]:
                logprobs[t, k] = shifted[ids[t][k]] - log_sum
                support.add(int(ids[t][k]))
        entropy[t] = -sum(np.exp(v - log_sum) * (v - log_sum) for v in shifted)
        rest = np.array([v - log_sum for token, v in enumerate(shifted) if token not in support])
        if len(rest):  # factor the largest out: the mass may be far below the smallest float
            log_tail[t] = rest.max() + np.log(np.exp(rest - rest.max()).sum())
    return logprobs, entropy, log_tail


def scores_gradient(z: Array, ids, present, grad_logprobs, grad_entropy, grad_tail) -> Array:
    """d/dz [T, V] of sum(grad_logprobs * logprobs) + sum(grad_entropy * entropy) + sum(grad_tail * log_tail)."""
    out = np.zeros_like(z)
    for t in range(len(z)):
        p = softmax(z[t])
        log_p = scores(z[t : t + 1], np.arange(z.shape[1])[None])[0][0]
        support = {int(i) for i, there in zip(ids[t], present[t], strict=True) if there}
        for k, there in enumerate(present[t]):
            if there:
                one_hot = np.eye(z.shape[1])[ids[t][k]]
                out[t] += grad_logprobs[t][k] * (one_hot - p)
        out[t] += grad_entropy[t] * -p * (log_p - (p * log_p).sum())
        rest = np.array([token not in support for token in range(z.shape[1])])
        if rest.any():
            out[t] += grad_tail[t] * (np.where(rest, softmax(np.where(rest, z[t], -np.inf)), 0.0) - p)
    return out


def head_gradients(dz: Array, hidden, weight, bias=None, scale=1.0, softcap=None, temperature=1.0):
    """dL/dz [T, V] back through the head: gradients of hidden, weight and bias."""
    hidden, weight = np.asarray(hidden, np.float64), np.asarray(weight, np.float64)
    raw = scale * (hidden @ weight.T + (0.0 if bias is None else np.asarray(bias, np.float64)))
    slope = 1.0 if softcap is None else 1.0 / np.cosh(raw / softcap) ** 2
    d_raw = dz * slope * scale / temperature
    return d_raw @ weight, d_raw.T @ hidden, d_raw.sum(0)


def buckets(p: Array, ids) -> Array:
    """[T, V] -> [T, K + 1]: the probabilities at ids, then the mass of all other tokens."""
    out = []
    for row, support in zip(p, ids, strict=True):
        inside = [row[i] for i in support]
        outside = sum(mass for token, mass in enumerate(row) if token not in set(map(int, support)))
        out.append([*inside, outside])
    return np.array(out)


def kl(p: Array, q: Array) -> Array:
    """KL(p || q) of each row."""
    out = np.zeros(len(p))
    for t, (p_row, q_row) in enumerate(zip(p, q, strict=True)):
        for a, b in zip(p_row, q_row, strict=True):
            if a > 0:
                out[t] += a * np.log(a / b) if b > 0 else np.inf
    return out


def divergence(name: str, student: Array, teacher: Array, beta: float = 0.5) -> Array:
    """Of the rows of two matrices of probabilities."""
    if name == "forward_kl":
        return kl(teacher, student)
    if name == "reverse_kl":
        return kl(student, teacher)
    middle = beta * teacher + (1 - beta) * student
    return beta * kl(teacher, middle) + (1 - beta) * kl(student, middle)


def divergence_gradient(name: str, student: Array, teacher: Array, beta: float = 0.5) -> Array:
    """d divergence / d log(student), row by row, the student's probabilities not tied to a sum of 1."""
    if name == "forward_kl":
        return -teacher
    if name == "reverse_kl":
        return student * (np.log(student / teacher) + 1)
    middle = beta * teacher + (1 - beta) * student
    # per token: -beta (1-beta) T/M + (1-beta) (log(S/M) + 1 - (1-beta) S/M), whose last terms cancel
    return (1 - beta) * student * np.log(student / middle)


def sinkhorn(student: Array, teacher: Array, epsilon: float, iterations: int) -> tuple[Array, Array]:
    """Per-row loss [R] and plan [R, R] of two matrices of probabilities [R, C], without logarithms."""
    rows = len(student)
    cost = np.array([[np.abs(student[i] - teacher[j]).sum() for j in range(rows)] for i in range(rows)])
    plan = np.exp(-cost / epsilon)
    for _ in range(iterations):
        for i in range(rows):
            plan[i] /= plan[i].sum()
        for j in range(rows):
            plan[:, j] /= plan[:, j].sum()
    return (plan * cost).sum(1), plan


def clipped_surrogate(log_ratio: Array, advantages: Array, low: float, high: float) -> Array:
    """-min(r A, clip(r) A), one token at a time."""
    out = np.empty(len(log_ratio))
    for t, (x, a) in enumerate(zip(log_ratio, advantages, strict=True)):
        ratio = np.exp(x)
        out[t] = -min(ratio * a, min(max(ratio, 1 - low), 1 + high) * a)
    return out


def group_advantages(rewards: Array, valid, normalise_std: bool, eps: float) -> Array:
    out = np.zeros(np.shape(rewards))
    for p, row in enumerate(rewards):
        kept = [g for g in range(len(row)) if valid[p][g]]
        values = [row[g] for g in kept]
        if len(set(values)) < 2:
            continue
        spread = np.std(values, ddof=1) + eps if normalise_std else 1.0
        for g in kept:
            out[p, g] = (row[g] - np.mean(values)) / spread
    return out
