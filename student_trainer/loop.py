"""The training loop: on-policy distillation mixed with verifiable rewards.

A step, top to bottom: draw prompts -> the student answers -> verifiers judge and the teacher scores, both while
answers are still being made -> pack -> log-probabilities at the support -> loss -> update -> log -> checkpoint.
The next step's answers come from the updated student, so every first update of a step is exactly on policy.

Left out on purpose, for now: more than one process, resuming, and generating the next step's answers while this
one trains.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from student_trainer.batch import Batch, Sample, micro_batches, pack
from student_trainer.config import RunConfig
from student_trainer.experience import Experience, Judge, collect
from student_trainer.metrics import Exporter, TokenMeter, describe_samples, observe, progress_line
from student_trainer.objective import NonFiniteLoss, reduce_loss, token_losses
from student_trainer.passrate import PassRates
from student_trainer.policy import Policy
from student_trainer.prompts import PromptOrder
from student_trainer.reduction import token_weights
from student_trainer.run_dir import RunDir
from student_trainer.sampler import Sampler, eos_ids
from student_trainer.scoring import Scorer


@dataclass(frozen=True, slots=True)
class Parts:
    """Everything the loop works with."""

    config: RunConfig
    policy: Policy
    tokenizer: Any
    sampler: Sampler
    scorer: Scorer | None
    judge: Judge
    pass_threshold: float
    order: PromptOrder
    optimizer: torch.optim.Optimizer
    learning_rate: torch.optim.lr_scheduler.LRScheduler
    accelerator: Accelerator
    run_dir: RunDir
    exporter: Exporter | None
    evaluate: Callable[[int], dict[str, Any]] | None


def fit(parts: Parts) -> dict[str, Any]:
    """Runs every step; returns totals. Raises NonFiniteLoss, VerifierError or an error of `stillhouse.errors`."""
    config, rollout = parts.config, parts.config.rollout
    paced = config.objective.prompt_weights
    gradient = config.objective.policy_gradient
    pass_rates = PassRates(paced.decay if paced else 0.0)
    answers = tokens = retries = 0
    for step in range(config.steps):
        start_s = time.monotonic()
        experience = collect(
            parts.order.batch(step, rollout.prompts_per_step),
            rollout.answers_per_prompt,
            sampler=parts.sampler,
            judge=parts.judge,
            scorer=parts.scorer,
            pass_threshold=parts.pass_threshold,
            normalise_std=gradient.normalise_std if gradient else True,
            pass_rates=pass_rates,
            paced=paced,
            seed=_seed(config.seed, step),
        )
        row = {"step": step + 1} | train_step(parts, experience.samples, step)
        row |= describe_samples(experience.samples) | _timings(experience, start_s)
        answers += len(experience.samples)
        tokens += row["response_tokens"]
        row |= {"rollouts": answers, "dropped": experience.dropped}
        if parts.scorer:
            row["teacher_retries"] = parts.scorer.retries - retries
            retries = parts.scorer.retries
        done = step + 1
        print(progress_line(row, config.steps), flush=True)
        if parts.evaluate and config.evaluation and _due(done, config.evaluation.every_steps, config.steps):
            row["evaluation"] = parts.evaluate(done)
        parts.run_dir.metrics(row)
        if parts.exporter:
            parts.exporter.show(row)
        if _due(done, config.checkpoints.every_steps, config.steps) or done == config.steps:
            parts.run_dir.checkpoint(done, parts.policy.model, parts.tokenizer)
    return {"steps": config.steps, "rollouts": answers, "response_tokens": tokens}


def train_step(parts: Parts, samples: list[Sample], step: int) -> dict[str, Any]:
    """One or more optimiser updates on a step's samples; returns its figures and writes samples.jsonl."""
    if not samples:
        raise ValueError(
            f"step {step + 1}: no sample is left, the verifier broke on every answer; see the log for why, "
            "and fix the verifier"
        )
    config = parts.config
    meter = TokenMeter()
    student_logprobs: dict[int, list[float]] = {}
    loss = grad_norm = 0.0
    start_s = time.monotonic()
    learning_rate = parts.learning_rate.get_last_lr()[0]
    updates = _split_by_group(samples, config.optimizer.updates_per_step)
    for index, chosen in enumerate(updates):
        loss += _update(parts, chosen, step, meter, student_logprobs, first=index == 0) / len(updates)
        grad_norm = max(grad_norm, _apply(parts, step))
    parts.run_dir.samples(step + 1, samples, [student_logprobs[id(sample)] for sample in samples])
    return {
        "loss": loss,
        "grad_norm": grad_norm,
        "learning_rate": learning_rate,
        "training_s": time.monotonic() - start_s,
        **meter.values(),
    }


def _update(
    parts: Parts,
    samples: list[Sample],
    step: int,
    meter: TokenMeter,
    student_logprobs: dict[int, list[float]],
    *,
    first: bool,
) -> float:
    """Gradients of one update, micro-batch by micro-batch; returns the loss.

    The weights of all tokens are those of the whole update, so how it is split changes nothing.
    """
    config = parts.config
    weights = _reduction_weights(samples, config)
    ends = eos_ids(parts.policy.model, parts.tokenizer)
    total = 0.0
    for lot in micro_batches(samples, config.optimizer.micro_batch_tokens):
        batch = pack(
            lot,
            [weights[id(sample)] for sample in lot],
            eos_ids=ends,
            pad_id=parts.tokenizer.pad_token_id or 0,
        ).to(parts.accelerator.device)
        support, policy_logprobs = parts.policy(
            batch.input_ids,
            batch.rows,
            batch.support_ids,
            batch.support_present,
            batch.target_column,
            config.distil_temperature,
            config.rollout.temperature,
        )
        token = token_losses(config.objective, step, batch, support, policy_logprobs)
        loss = reduce_loss(token, batch, step + 1)
        observe(meter, batch, support, policy_logprobs, token, first_update=first)
        _note_logprobs(batch, policy_logprobs, student_logprobs)
        if loss.requires_grad:  # not so if every coefficient is zero at this step
            parts.accelerator.backward(loss)
        total += loss.item()
    return total


def _apply(parts: Parts, step: int) -> float:
    """The optimiser's update with the gathered gradients; returns their norm before clipping."""
    config = parts.config.optimizer
    grad_norm = parts.accelerator.clip_grad_norm_(parts.policy.parameters(), config.max_grad_norm)
    norm = float(grad_norm) if grad_norm is not None else 0.0
    if not np.isfinite(norm):
        names = [
            name for name, p in parts.policy.named_parameters() if p.grad is not None and not p.grad.isfinite().all()
        ]
        raise NonFiniteLoss(
            f"step {step + 1}: the gradient norm is {norm} (first parameter: {names[0] if names else 'overflow'}). "
            "The update was not made; the last checkpoint stands."
        )
    parts.optimizer.step()
    parts.learning_rate.step()
    parts.optimizer.zero_grad()
    return norm


def _reduction_weights(samples: list[Sample], config: RunConfig) -> dict[int, np.ndarray]:
    """For each sample (by identity) the weight [N] of its tokens in the loss of the whole update."""
    lengths = [len(sample.rollout.response_ids) for sample in samples]
    flat = token_weights(
        torch.tensor(lengths),
        config.objective.reduction,
        max_tokens=config.rollout.max_new_tokens,
        global_tokens=sum(lengths),
        global_sequences=len(samples),
    ).numpy()
    parts = np.split(flat, np.cumsum(lengths)[:-1])
    return {id(sample): part for sample, part in zip(samples, parts, strict=True)}


def _note_logprobs(batch: Batch, logprobs: torch.Tensor, noted: dict[int, list[float]]) -> None:
    values = logprobs.detach().float().cpu().split([len(s.rollout.response_ids) for s in batch.samples])
    noted.update({id(sample): part.tolist() for sample, part in zip(batch.samples, values, strict=True)})


def _split_by_group(samples: list[Sample], parts: int) -> list[list[Sample]]:
    """Samples in `parts` lots of about as many groups each, in order; a group is never torn apart."""
    groups = sorted({sample.group for sample in samples})
    lots = [set(lot.tolist()) for lot in np.array_split(groups, parts) if len(lot)]
    return [[sample for sample in samples if sample.group in lot] for lot in lots]


def _timings(experience: Experience, start_s: float) -> dict[str, float]:
    step_s = time.monotonic() - start_s
    tokens = sum(len(sample.rollout.response_ids) for sample in experience.samples)
    return {
        "step_s": step_s,
        "rollout_s": experience.rollout_s,
        "reward_s": experience.reward_s,
        "scoring_s": experience.scoring_s,
        "tokens_per_s": tokens / step_s,
    }


def _due(done: int, every: int, steps: int) -> bool:
    return every > 0 and done % every == 0 and done < steps


def _seed(seed: int, step: int) -> int:
    return int(np.random.SeedSequence([seed, step]).generate_state(1)[0])
