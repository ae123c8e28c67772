"""The objective: which pieces make the per-token loss of a batch, as the configuration picks them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from student_trainer import advantages, losses, surrogates
from student_trainer.batch import Batch
from student_trainer.logprobs import Support
from student_trainer.objective_config import Divergence, Importance, Mask, ObjectiveConfig, PolicyGradient
from student_trainer.schedules import value_at


@dataclass(frozen=True, slots=True)
class TokenLosses:
    """Per-token losses of a batch, [R] each, coefficients and masks included, not yet reduced."""

    terms: dict[str, Tensor]
    clipped: Tensor | None  # [R] bool: where the surrogate's clip took the gradient away
    importance: surrogates.ImportanceWeights | None = None  # [R] each; None: no correction


class NonFiniteLoss(ArithmeticError):
    """A loss or gradient is NaN or infinite; the update was not made."""


def token_losses(
    objective: ObjectiveConfig,
    step: int,
    batch: Batch,
    support: Support,
    policy_logprobs: Tensor,
    importance: Importance | None = None,
) -> TokenLosses:
    """Every term of the objective at `step` whose coefficient is not zero.

    support: the student at the batch's support, at the distillation temperature. policy_logprobs: [R], the
    student's log-probability of the sampled tokens at the rollout temperature. Nats. Both are of the student as it
    is now, whoever made the answers and when: so the signal of a reverse KL is never stale.
    """
    terms: dict[str, Tensor] = {}
    clipped = None
    weights = None
    if importance is not None and importance.kind != "none":
        weights = surrogates.importance_weights(
            policy_logprobs,
            batch.sampler_logprobs,
            mask=importance.kind == "mask",
            low=importance.low,
            high=importance.high,
        )
    prompt_weight = batch.prompt_weights[batch.sequence]
    for index, divergence in enumerate(objective.divergences):
        coefficient = value_at(divergence.coefficient, step)
        if coefficient == 0:
            continue
        name = divergence.kind if divergence.kind not in terms else f"{divergence.kind}_{index}"
        weight = coefficient * prompt_weight * _mask(divergence.mask, batch)[batch.sequence]
        if weights is not None:
            weight = weight * weights.bounded
        # Tokens without weight are dropped, not multiplied by zero: 0 * inf would be NaN, in the gradient too.
        rows = torch.nonzero(weight).squeeze(1)
        values = weight[rows] * _divergence(divergence, batch, support, rows)
        terms[name] = torch.zeros_like(weight).index_put((rows,), values)
    gradient = objective.policy_gradient
    if gradient is not None and (coefficient := value_at(gradient.coefficient, step)) != 0:
        surrogate = _surrogate(gradient, step, batch, support, policy_logprobs, prompt_weight)
        kept = surrogate.loss
        if weights is not None:
            # A masked token is left out, not multiplied by zero: its loss may be infinite.
            kept = torch.where(weights.relative != 0, kept, 0.0) * weights.relative
        terms["policy_gradient"] = coefficient * kept
        clipped = surrogate.clipped
    return TokenLosses(terms, clipped, weights)


def is_active(objective: ObjectiveConfig, step: int) -> bool:
    """Whether the objective has any term at `step`: otherwise there is nothing to back-propagate."""
    terms = (*objective.divergences, *([objective.policy_gradient] if objective.policy_gradient else []))
    return any(value_at(term.coefficient, step) != 0 for term in terms)


def reduce_loss(token: TokenLosses, batch: Batch) -> Tensor:
    """The batch's share of the loss: sum over tokens of weight * (sum of terms)."""
    total = batch.token_weights.new_zeros(())
    for values in token.terms.values():
        total = total + _weighted(values, batch).sum()
    return total


def refuse_non_finite(token: TokenLosses, batch: Batch, step: int) -> None:
    """Raises NonFiniteLoss naming step, term and sample if a token of the batch has a loss that is not a number."""
    for name, values in token.terms.items():
        bad = torch.nonzero(~torch.isfinite(_weighted(values.detach(), batch)))
        if len(bad):
            raise NonFiniteLoss(_describe(name, values, int(bad[0]), batch, step))


def _weighted(values: Tensor, batch: Batch) -> Tensor:
    return torch.where(batch.token_weights != 0, batch.token_weights * values, 0.0)


def _describe(name: str, values: Tensor, row: int, batch: Batch, step: int) -> str:
    index = int(batch.sequence[row])
    rollout = batch.samples[index].rollout
    position = row - int((batch.sequence < index).sum())
    return (
        f"step {step}: term {name} is {values[row].item()} at token {position} (id {int(batch.targets[row])}) of the "
        f"answer to {rollout.prompt.key}: {rollout.text[:80]!r}. The update was not made; the last checkpoint stands."
    )


def _mask(kind: Mask, batch: Batch) -> Tensor:
    """[B] of 0 and 1."""
    match kind:
        case "all":
            return torch.ones_like(batch.advantages)
        case "failed":
            return advantages.failed(batch.passed)
        case "group_failed":
            return batch.group_failed.float()
        case "passed":
            return batch.passed.float()


def _divergence(config: Divergence, batch: Batch, support: Support, rows: Tensor) -> Tensor:
    """Values at `rows` of the batch, in their order."""
    assert batch.teacher_logprobs is not None and batch.teacher_log_tail is not None
    arrays = (
        support.logprobs[rows],
        batch.teacher_logprobs[rows],
        support.log_tail[rows],
        batch.teacher_log_tail[rows],
    )
    match config.kind:
        case "forward_kl":
            return losses.forward_kl(*arrays)
        case "reverse_kl":
            return losses.reverse_kl(*arrays)
        case "js":
            return losses.js(*arrays, beta=config.beta)
        case "sinkhorn":
            ids, sequence = batch.support_ids[rows], batch.sequence[rows]
            lots = (
                [torch.ones_like(sequence, dtype=torch.bool)]
                if config.rows == "micro_batch"
                else [sequence == index for index in sequence.unique_consecutive()]
            )
            parts = [
                losses.sinkhorn(
                    *(array[lot] for array in arrays),
                    ids=ids[lot],
                    epsilon=config.epsilon,
                    iterations=config.iterations,
                )
                for lot in lots
            ]
            return torch.cat(parts) if parts else arrays[2]


def _surrogate(
    config: PolicyGradient,
    step: int,
    batch: Batch,
    support: Support,
    policy_logprobs: Tensor,
    prompt_weight: Tensor,
) -> surrogates.Surrogate:
    advantage = _advantages(config, step, batch, support, prompt_weight)
    low, high = config.clip_low, config.clip_high
    if config.surrogate == "ppo_clip":
        return surrogates.ppo_clip(policy_logprobs, batch.sampler_logprobs, advantage, clip_low=low, clip_high=high)
    assert batch.teacher_sampled is not None
    return surrogates.trrd(
        policy_logprobs,
        batch.sampler_logprobs,
        batch.teacher_sampled,
        advantage,
        alpha=config.alpha,
        log_ratio_clamp=config.log_ratio_clamp,
        straight_through=config.straight_through,
        clip_low=low,
        clip_high=high,
    )


def _advantages(config: PolicyGradient, step: int, batch: Batch, support: Support, prompt_weight: Tensor) -> Tensor:
    """[R]: reward part plus teacher part, or the one scaled by the other (RLSD). No gradient."""
    reward = value_at(config.reward, step) * _mask(config.reward_mask, batch) * batch.advantages
    coefficient = value_at(config.teacher, step)
    if coefficient == 0 and config.rlsd is None:
        return reward[batch.sequence]
    assert batch.teacher_sampled is not None
    student = support.logprobs.gather(1, batch.target_column[:, None]).squeeze(1)
    log_ratio = advantages.teacher_advantages(student, batch.teacher_sampled)
    if not config.teacher_at_eos:
        log_ratio = torch.where(batch.is_eos, 0.0, log_ratio)
    if config.rlsd is not None:
        scaled = {"mix": value_at(config.rlsd.mix, step), "epsilon": config.rlsd.epsilon}
        return advantages.rlsd(reward[batch.sequence], log_ratio, **scaled)
    return advantages.mix(
        reward,
        prompt_weight * log_ratio,
        batch.sequence,
        teacher_coef=coefficient,
        teacher_mask=_mask(config.teacher_mask, batch),
    )
