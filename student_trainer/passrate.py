"""Pass rates: how often the student solves a prompt, what weight that gives the prompt, and how sure a figure is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray


class PassRates:
    """A running pass rate for every prompt: an exponential moving average over the steps that drew the prompt.

    Args:
        decay: the share of the old rate that an update keeps, in [0, 1); 0 keeps the last observation only. The
            default is proposed; PACED (arXiv 2603.11178) refreshes its rates but how was not found.

    Raises:
        ValueError: `decay` is outside [0, 1).
    """

    def __init__(self, decay: float = 0.5) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay: {decay} is outside [0, 1). Fix: 0 for the last observation only, 0.5 usually.")
        self.decay = decay
        self._rates: dict[str, float] = {}

    def update(self, key: str, passes: int, total: int) -> None:
        """Count `passes` correct answers among the `total` of one step; the first observation counts in full.

        `total` is of the verified answers: one whose verifier broke is in neither number. With none at all there is
        nothing to observe, so `total` must be positive.
        """
        assert 0 <= passes <= total and total > 0, (key, passes, total)
        observed = passes / total
        old = self._rates.get(key, observed)
        self._rates[key] = self.decay * old + (1 - self.decay) * observed

    def rate(self, key: str) -> float | None:
        """The pass rate in [0, 1], or None for a prompt that has not been drawn."""
        return self._rates.get(key)

    def state(self) -> dict[str, Any]:
        """Everything that a checkpoint has to keep, as JSON."""
        return {"decay": self.decay, "rates": dict(self._rates)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned.

        Raises:
            ValueError: the checkpoint was made with another decay.
        """
        if state["decay"] != self.decay:
            raise ValueError(
                f"decay: {self.decay}, but the checkpoint was made with {state['decay']}. "
                f"Fix: set it to {state['decay']}, or start a new run."
            )
        self._rates = dict(state["rates"])


def paced_weights(
    rates: ArrayLike,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    smoothing: float = 0.0,
    samples: int | None = None,
    normalise: Literal["mean", "max", "none"] = "mean",
) -> NDArray[np.float64]:
    """Weight of every prompt from its pass rate: w(p) = p^alpha (1 - p)^beta, PACED (arXiv 2603.11178, v1 Eq. 3).

    Prompts that are always or never solved get weight zero, those in the middle the most.

    Args:
        rates: [N] pass rates p in [0, 1].
        alpha: exponent of the pass rate, >= 0; the paper's default is 1.
        beta: exponent of the failure rate, >= 0; the paper's default is 1.
        smoothing: *proposed*: a >= 0 in p = (c + a) / (K + 2a) with c = p K, which keeps some weight on prompts that
            are always or never solved; 0 is the paper's exact zero, 0.5 usual.
        samples: K, the answers behind each rate; needed for smoothing only.
        normalise: *proposed* (the paper's could not be found). "mean": mean one over the prompts with non-zero
            weight, which keeps the learning rate comparable to a uniform run. "max": the kernel's largest value is
            one (4 p (1 - p) for alpha = beta = 1). "none": the kernel itself.

    Returns:
        [N] float64 weights. If all are zero they stay zero: there is nothing to learn from these prompts.

    Raises:
        ValueError: `rates` is not one list of numbers in [0, 1], or an argument is out of range.
    """
    p = np.asarray(rates, dtype=np.float64)
    if p.ndim != 1 or not np.all((p >= 0) & (p <= 1)):
        raise ValueError(f"rates: {rates!r} is not a list of numbers in [0, 1]. Fix: leave out prompts without one.")
    if alpha < 0 or beta < 0 or smoothing < 0:
        raise ValueError(
            f"alpha, beta, smoothing: {alpha}, {beta}, {smoothing}; none may be negative. Fix: 0 or above."
        )
    if smoothing > 0:
        if samples is None or samples < 1:
            raise ValueError(
                f"samples: {samples}; smoothing needs the answers per prompt. Fix: set it, or smoothing to 0."
            )
        p = (p * samples + smoothing) / (samples + 2 * smoothing)
    weights = p**alpha * (1 - p) ** beta
    match normalise:
        case "none":
            return weights
        case "max":
            peak = alpha / (alpha + beta) if alpha + beta > 0 else 0.5  # where the kernel is largest
            return weights / (peak**alpha * (1 - peak) ** beta)
        case "mean":
            positive = weights[weights > 0]
            return weights / positive.mean() if positive.size else weights
    raise ValueError(f"normalise: {normalise!r}. Fix: mean, max or none.")


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Chance that at least one of `k` answers is correct: the unbiased estimate 1 - C(n - c, k) / C(n, k) from
    `num_correct` = c correct among `num_samples` = n (Chen et al. 2021, arXiv 2107.03374).

    Raises:
        ValueError: not 0 <= c <= n, or k is not in 1..n.
    """
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"num_correct: {num_correct} of {num_samples} samples. Fix: a number from 0 to {num_samples}.")
    if not 1 <= k <= num_samples:
        raise ValueError(f"k: {k} with {num_samples} samples. Fix: draw more samples, or k from 1 to {num_samples}.")
    if num_samples - num_correct < k:
        return 1.0
    # As a product, because the binomials of a thousand samples do not fit into a float.
    rest = np.arange(num_samples - num_correct + 1, num_samples + 1)
    return float(1.0 - np.prod(1.0 - k / rest))


def bootstrap_interval(
    values: Sequence[float] | NDArray[np.floating[Any]],
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean over prompts.

    Prompts are resampled, not answers: answers to one prompt are not independent of each other.

    Args:
        values: [N] one number per prompt, such as its pass rate.
        confidence: the share of resamples inside the interval.
        resamples: how many resamples.
        seed: the same seed gives the same interval.

    Returns:
        (low, high)

    Raises:
        ValueError: no values, one that is not finite, or a confidence outside (0, 1).
    """
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or data.size == 0 or not np.all(np.isfinite(data)):
        raise ValueError(f"values: {values!r} is not a list of finite numbers. Fix: one per prompt, without gaps.")
    if not 0 < confidence < 1 or resamples < 1:
        raise ValueError(
            f"confidence, resamples: {confidence}, {resamples}. Fix: a confidence such as 0.95, and 1000 or more."
        )
    rng = np.random.default_rng(seed)
    means = np.array([rng.choice(data, size=data.size).mean() for _ in range(resamples)])
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
