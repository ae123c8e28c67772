"""What a step does to the student: log-probabilities -> losses -> gradients -> optimiser, and its figures.

The loss of an update is a sum over tokens whose weights are those of the whole update, so micro-batches and processes
only split the sum. Nothing makes the host wait for the device until an update's losses are all there; then they are
looked at together, before the optimiser makes its step.
"""

import contextlib
import time
from collections.abc import Generator
from typing import Any

import numpy as np
import torch

from student_trainer.batch import Batch, Sample, micro_batches, pack
from student_trainer.config import RunConfig
from student_trainer.experience import Experience
from student_trainer.memory import DoesNotFit, is_out_of_memory
from student_trainer.metrics import TokenMeter, merged, observe, observe_samples
from student_trainer.objective import (
    NonFiniteLoss,
    TokenLosses,
    is_active,
    reduce_loss,
    refuse_non_finite,
    token_losses,
)
from student_trainer.parallel import sharded_modules
from student_trainer.parts import Parts
from student_trainer.reduction import token_weights
from student_trainer.sampler import eos_ids


def train_step(parts: Parts, experience: Experience, step: int) -> dict[str, Any]:
    """One or more optimiser updates on a step's samples; returns its figures and writes samples.jsonl. A meeting."""
    config, samples = parts.config, experience.samples
    meter = TokenMeter()
    observe_samples(meter, samples)
    noted: dict[int, list[float]] = {}  # by identity of the sample: the student's log-probabilities of its tokens
    loss = grad_norm = 0.0
    start_s = time.monotonic()
    learning_rate = parts.learning_rate.get_last_lr()[0]
    lots = _split_by_group(samples, config.rollout.prompts_per_step, config.optimizer.updates_per_step)
    sizes = [[(len(lot), _tokens(lot)) for lot in lots]]
    counts = np.array(parts.processes.gather(sizes)).sum(axis=(0, 1))  # [updates, 2] over all processes
    if not counts[:, 0].any():
        raise ValueError(
            f"step {step + 1}: no sample is left, the verifier broke on every answer; see the log for why, "
            "and fix the verifier"
        )
    made = 0
    for lot, (sequences, tokens) in zip(lots, counts.tolist(), strict=True):
        if not sequences:  # all answers of these groups were dropped, everywhere
            continue
        on_policy = made == 0 and experience.staleness == 0
        loss += _update(parts, lot, step, meter, noted, sequences, tokens, on_policy=on_policy)
        grad_norm = max(grad_norm, _apply(parts, step))
        made += 1
    parts.run_dir.samples(step + 1, samples, [noted[id(sample)] for sample in samples])
    return {
        "loss": loss / made,
        "grad_norm": grad_norm,
        "learning_rate": learning_rate,
        "training_s": time.monotonic() - start_s,
        **merged(parts.processes.gather(meter.state())),
        "response_tokens": int(counts[:, 1].sum()),
    }


def _update(
    parts: Parts,
    samples: list[Sample],
    step: int,
    meter: TokenMeter,
    noted: dict[int, list[float]],
    sequences: int,
    tokens: int,
    *,
    on_policy: bool,
) -> float:
    """Gradients of one update, micro-batch by micro-batch; returns the loss over all processes.

    The weights of all tokens are those of the whole update, so how it is split over micro-batches and processes
    changes nothing: losses add up. (Gradients are averaged over processes, so each loss counts that many times.)
    Raises NonFiniteLoss on every process if a loss is not a number on any.
    """
    config, processes = parts.config, parts.processes
    weights = _reduction_weights(samples, config, sequences, tokens)
    lots = micro_batches(samples, config.optimizer.micro_batch_tokens, packed=config.optimizer.packing)
    rounds = max(processes.gather(len(lots)))
    # A sharded model meets in every pass, so a process that has fewer makes empty ones; otherwise one pass is
    # enough to take part in the exchange of gradients.
    sharded = bool(sharded_modules(parts.policy))
    active = is_active(config.objective, step)
    lots += [[] for _ in range((rounds if sharded else max(1, len(lots))) - len(lots))]
    total = torch.zeros((), dtype=torch.float64, device=parts.accelerator.device)
    passed: list[tuple[TokenLosses, Batch, torch.Tensor]] = []
    for index, lot in enumerate(lots):
        last = index == len(lots) - 1
        syncing = contextlib.nullcontext() if last or sharded else parts.accelerator.no_sync(parts.policy)
        with syncing, _fitting(parts, lot, step):
            if not lot:
                empty = _empty_pass(parts)
                if active:
                    parts.accelerator.backward(empty)
                continue
            token, batch, logprobs = _pass(parts, lot, [weights[id(s)] for s in lot], step, meter, on_policy)
            loss = reduce_loss(token, batch)
            if active:
                parts.accelerator.backward(loss * processes.count)
        total += loss.detach()
        passed.append((_detached(token), batch, logprobs.detach()))
    everywhere = processes.gather(total.item())
    if not np.isfinite(everywhere).all():
        with processes.together():
            for token, batch, _ in passed:
                refuse_non_finite(token, batch, step + 1)
        raise NonFiniteLoss(f"step {step + 1}: the loss is {sum(everywhere)}: too large. The update was not made.")
    for _, batch, logprobs in passed:
        _note_logprobs(batch, logprobs, noted)
    return sum(everywhere)


@contextlib.contextmanager
def _fitting(parts: Parts, lot: list[Sample], step: int) -> Generator[None]:
    """Turns want of memory into DoesNotFit."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        limit = parts.config.optimizer.micro_batch_tokens
        longest = max((len(sample.rollout.token_ids) for sample in lot), default=0)
        advice = (
            f"lower optimizer.micro_batch_tokens (now {limit})"
            if len(lot) > 1
            else "one sequence is the least there is: lower rollout.max_new_tokens, or set "
            "student.gradient_checkpointing: true, or shard the model (student.sharding: fsdp2)"
        )
        raise DoesNotFit(
            f"step {step + 1}: a pass over {len(lot)} sequences of up to {longest} tokens did not fit into memory; "
            f"{advice}. The update was not made; resume with the change. ({str(error).splitlines()[0]})"
        ) from error


def _pass(
    parts: Parts, lot: list[Sample], weights: list[np.ndarray], step: int, meter: TokenMeter, on_policy: bool
) -> tuple[TokenLosses, Batch, torch.Tensor]:
    """The forward pass of one micro-batch."""
    config = parts.config
    batch = pack(
        lot,
        weights,
        eos_ids=eos_ids(parts.model, parts.tokenizer),
        pad_id=parts.tokenizer.pad_token_id or 0,
        packed=config.optimizer.packing,
    ).to(parts.accelerator.device)
    support, policy_logprobs = parts.policy(
        batch.input_ids,
        batch.rows,
        batch.support_ids,
        batch.support_present,
        batch.target_column,
        config.distil_temperature,
        config.rollout.temperature,
        batch.position_ids,
    )
    token = token_losses(config.objective, step, batch, support, policy_logprobs, config.importance)
    observe(meter, batch, support, policy_logprobs, token, on_policy=on_policy)
    return token, batch, policy_logprobs


def _empty_pass(parts: Parts) -> torch.Tensor:
    """A pass over one token that counts for nothing: zero, with a gradient of zero everywhere."""
    one = torch.zeros((1, 1), dtype=torch.int64, device=parts.accelerator.device)
    support, logprobs = parts.policy(one, one[0], one, one == 0, one[0], 1.0, 1.0)
    return 0.0 * (logprobs.sum() + support.log_tail.sum())


def _apply(parts: Parts, step: int) -> float:
    """The optimiser's update with the gathered gradients; returns their norm before clipping."""
    config = parts.config.optimizer
    grad_norm = parts.accelerator.clip_grad_norm_(parts.policy.parameters(), config.max_grad_norm)
    norm = 0.0 if grad_norm is None else float(getattr(grad_norm, "full_tensor", lambda: grad_norm)())
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


def _reduction_weights(samples: list[Sample], config: RunConfig, sequences: int, tokens: int) -> dict[int, np.ndarray]:
    """For each sample (by identity) the weight [N] of its tokens in the loss of the whole update, which has
    `sequences` sequences of `tokens` tokens in all processes."""
    lengths = [len(sample.rollout.response_ids) for sample in samples]
    flat = token_weights(
        torch.tensor(lengths, dtype=torch.int64),
        config.objective.reduction,
        max_tokens=config.rollout.max_new_tokens,
        global_tokens=tokens,
        global_sequences=sequences,
    ).numpy()
    parts = np.split(flat, np.cumsum(lengths)[:-1])
    return {id(sample): part for sample, part in zip(samples, parts, strict=False)}


def _note_logprobs(batch: Batch, logprobs: torch.Tensor, noted: dict[int, list[float]]) -> None:
    values = logprobs.detach().float().cpu().split([len(s.rollout.response_ids) for s in batch.samples])
    noted.update({id(sample): part.tolist() for sample, part in zip(batch.samples, values, strict=True)})


def _detached(token: TokenLosses) -> TokenLosses:
    """What is needed to say which token was bad, without the graph behind it."""
    return TokenLosses({name: values.detach() for name, values in token.terms.items()}, None)


def _tokens(samples: list[Sample]) -> int:
    return sum(len(sample.rollout.response_ids) for sample in samples)


def _split_by_group(samples: list[Sample], groups: int, parts: int) -> list[list[Sample]]:
    """Samples in `parts` lots of about as many of the step's `groups` each; a group is never torn apart."""
    lots = [set(lot.tolist()) for lot in np.array_split(np.arange(groups), parts)]
    return [[sample for sample in samples if sample.group in lot] for lot in lots]
