"""The training loop: on-policy distillation mixed with verifiable rewards.

A step, top to bottom: hand the weights to the sampler -> answers, this step's or those of a later one, judged and
sent to the teacher as they end -> scores -> pack -> log-probabilities at the support -> loss -> update -> look ->
log -> evaluate -> checkpoint. Which batch is made when: `student_trainer.pipeline`; how two halves of a step's
experience fit together: `student_trainer.experience`.

With several processes each has its own prompts and trains on its own answers; gradients meet in the update, figures
at the end of a step. Every process takes every decision (to stop, to halt, to save) from the same numbers.
"""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from student_trainer.batch import Batch, Sample, micro_batches, pack
from student_trainer.checkpoint import Checkpoints
from student_trainer.config import RunConfig
from student_trainer.experience import Experience, InFlight, Judge, begin, finish
from student_trainer.guards import BestSoFar, Guards, Runaway
from student_trainer.in_flight import random_state, write_process
from student_trainer.metrics import Exporter, TokenMeter, merged, observe, observe_samples, progress_line
from student_trainer.objective import NonFiniteLoss, TokenLosses, reduce_loss, refuse_non_finite, token_losses
from student_trainer.parallel import sharded_modules
from student_trainer.passrate import PassRates
from student_trainer.pipeline import Pipeline
from student_trainer.processes import Processes
from student_trainer.prompts import PromptOrder
from student_trainer.reduction import token_weights
from student_trainer.run_dir import RunDir
from student_trainer.sampler import Sampler, eos_ids
from student_trainer.scoring import Scorer
from student_trainer.stopping import Stopped, Stopping, StopRequest


@dataclass(slots=True)
class RunState:
    """What changes from step to step besides weights and optimiser; all of it is part of a checkpoint."""

    pass_rates: PassRates
    step: int = 0  # steps made
    rollouts: int = 0
    response_tokens: int = 0
    guards: Guards = field(default_factory=Guards)
    best: BestSoFar = field(default_factory=BestSoFar)
    before: dict[str, Any] | None = None  # the evaluation before the first step
    row: dict[str, Any] | None = None  # figures of the last step while they are still to be looked at


@dataclass(frozen=True, slots=True)
class Parts:
    """Everything the loop works with."""

    config: RunConfig
    policy: Any  # a Policy, maybe wrapped for several processes
    model: Any  # the model inside it, as it is saved
    tokenizer: Any
    sampler: Sampler
    hand_over: Callable[[int], dict[str, float]]  # gives a sampler that owns weights those of now, after N steps
    scorer: Scorer | None
    judge: Judge
    pass_threshold: float
    order: PromptOrder
    optimizer: torch.optim.Optimizer
    learning_rate: torch.optim.lr_scheduler.LRScheduler
    accelerator: Accelerator
    processes: Processes
    run_dir: RunDir
    checkpoints: Checkpoints
    describe: Callable[[RunState], dict[str, Any]]  # what trainer.json holds
    exporter: Exporter | None
    evaluate: Callable[[int], dict[str, Any]] | None
    stop: StopRequest


def fit(parts: Parts, state: RunState, restored: list[InFlight]) -> str | None:
    """Runs the steps from `state.step` on. Returns why it ended early, or None if it did not.

    Raises Stopped (the run is saved), Runaway, NonFiniteLoss, VerifierError, an error of `stillhouse.errors`, or
    PeerFailed for one of another process.
    """
    config = parts.config
    pipeline = Pipeline(
        lambda step, student_step: _begin(parts, step, student_step, pipeline.stopping),
        ahead=config.rollout.batches_ahead,
        steps=config.steps,
        in_background=parts.sampler.owns_weights and config.rollout.batches_ahead > 0,
        processes=parts.processes,
        stop=parts.stop,
        restored=restored,
    )
    saved = state.step  # nothing to save before the first step, nor right after a resume
    ended = None
    try:
        while ended is None and (state.step < config.steps or state.row is not None):
            randomness = random_state(parts.accelerator.device)
            try:
                if state.row is None:
                    _step(parts, state, pipeline)
                row, best, ended = _look(parts, state, pipeline)
            except Stopped:
                if saved != state.step:
                    _save(parts, state, pipeline.whole(), randomness)
                raise
            _publish(parts, row)
            runaway = state.guards.runaway(row, config.guards)
            if runaway is not None:
                raise Runaway(runaway)
            last = state.step == config.steps or ended is not None
            if last or best or _due(state.step, config.checkpoints.every_steps):
                _save(parts, state, pipeline.whole(), random_state(parts.accelerator.device))
                saved = state.step
        return ended
    finally:
        pipeline.close()
        parts.checkpoints.wait()


def _step(parts: Parts, state: RunState, pipeline: Pipeline) -> None:
    """One step; its figures are in `state.row`. Raises Stopped as long as nothing of it has been learnt."""
    config, step = parts.config, state.step
    gradient, teacher = config.objective.policy_gradient, config.teacher
    start_s = time.monotonic()
    outage_s = parts.scorer.total_outage_s if parts.scorer else 0.0
    retries = parts.scorer.retries if parts.scorer else 0
    figures = parts.hand_over(step)
    pipeline.fill(step)
    experience = finish(
        pipeline.take(step),
        processes=parts.processes,
        scorer=parts.scorer,
        max_unscored_share=teacher.max_unscored_share if teacher else 0.0,
        pass_threshold=parts.pass_threshold,
        normalise_std=gradient.normalise_std if gradient else True,
        pass_rates=state.pass_rates,
        paced=config.objective.prompt_weights,
        at_step=step,
        stop=parts.stop,
        commit=pipeline.commit,
    )
    row = {"step": step + 1} | train_step(parts, experience, step) | figures
    # Now that something was learnt the step is made, whatever is asked: a stop is seen after it.
    with contextlib.suppress(Stopped):
        pipeline.settle()
    pipeline.drop(step)
    step_s = time.monotonic() - start_s
    made = pipeline.generated if not parts.sampler.owns_weights else [experience]
    waiting_s = experience.scoring_s + pipeline.waited_s
    row |= {
        "step_s": step_s,
        "rollout_s": sum(batch.rollout_s for batch in made),
        "reward_s": sum(batch.reward_s for batch in made),
        "scoring_s": experience.scoring_s,
        "waiting_s": waiting_s,
        "waiting_share": waiting_s / step_s,
        "tokens_per_s": row["response_tokens"] / step_s,
        "staleness": experience.staleness,
        "dropped": experience.dropped,
        "unscored": experience.unscored,
    }
    if parts.scorer:
        row["teacher_retries"] = sum(parts.processes.gather(parts.scorer.retries - retries))
        row["teacher_outage_s"] = max(parts.processes.gather(parts.scorer.total_outage_s - outage_s))
    state.step += 1
    state.rollouts += sum(parts.processes.gather(len(experience.samples)))
    state.response_tokens += int(row["response_tokens"])
    state.row = row | {"rollouts": state.rollouts}


def train_step(parts: Parts, experience: Experience, step: int) -> dict[str, Any]:
    """One or more optimiser updates on a step's samples; returns its figures and writes samples.jsonl. A meeting."""
    config, samples = parts.config, experience.samples
    meter = TokenMeter()
    observe_samples(meter, samples)
    student_logprobs: dict[int, list[float]] = {}
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
        loss += _update(parts, lot, step, meter, student_logprobs, sequences, tokens, on_policy=on_policy)
        grad_norm = max(grad_norm, _apply(parts, step))
        made += 1
    parts.run_dir.samples(step + 1, samples, [student_logprobs[id(sample)] for sample in samples])
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
    student_logprobs: dict[int, list[float]],
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
    lots += [[] for _ in range((rounds if sharded else max(1, len(lots))) - len(lots))]
    total = torch.zeros((), dtype=torch.float64, device=parts.accelerator.device)
    passed: list[tuple[TokenLosses, Batch]] = []
    for index, lot in enumerate(lots):
        last = index == len(lots) - 1
        with contextlib.nullcontext() if last or sharded else parts.accelerator.no_sync(parts.policy):
            if not lot:
                parts.accelerator.backward(_empty_pass(parts))
                continue
            token, batch, policy_logprobs = _pass(parts, lot, [weights[id(s)] for s in lot], step, meter, on_policy)
            loss = reduce_loss(token, batch)
            if loss.requires_grad:  # not so if every coefficient is zero at this step
                parts.accelerator.backward(loss * processes.count)
        total += loss.detach()
        passed.append((_detached(token), batch))
        _note_logprobs(batch, policy_logprobs, student_logprobs)
    everywhere = processes.gather(total.item())
    if not np.isfinite(everywhere).all():
        with processes.together():
            for token, batch in passed:
                refuse_non_finite(token, batch, step + 1)
        raise NonFiniteLoss(f"step {step + 1}: the loss is {sum(everywhere)}: too large. The update was not made.")
    return sum(everywhere)


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


def _begin(parts: Parts, step: int, student_step: int, stop: Stopping) -> InFlight:
    config, processes = parts.config, parts.processes
    prompts = parts.order.batch(step, config.rollout.prompts_per_step)
    mine = range(processes.rank, len(prompts), processes.count)
    return begin(
        [prompts[index] for index in mine],
        mine,
        config.rollout.answers_per_prompt,
        step=step,
        student_step=student_step,
        sampler=parts.sampler,
        judge=parts.judge,
        scorer=parts.scorer,
        seed=_seed(config.seed, step),
        stop=stop,
    )


def _look(parts: Parts, state: RunState, pipeline: Pipeline) -> tuple[dict[str, Any], bool, str | None]:
    """Alarms, and the evaluation if it is due: the row with both, whether this student is the best so far, and why
    to end, if so. Takes the row out of `state`; raises Stopped and leaves it there."""
    config, evaluation = parts.config, parts.config.evaluation
    assert state.row is not None
    row, best, ended = dict(state.row), False, None
    due = evaluation is not None and _due(state.step, evaluation.every_steps) and state.step < config.steps
    if parts.evaluate is not None and evaluation is not None and due:
        pipeline.settle()
        parts.hand_over(state.step)
        row["evaluation"] = parts.evaluate(state.step)
        best = state.best.note(state.step, row["evaluation"][f"pass@{evaluation.k[0]}"])
        if evaluation.patience is not None and state.best.without >= evaluation.patience:
            ended = (
                f"no better pass@{evaluation.k[0]} in {state.best.without} evaluations; the best, "
                f"{state.best.value:.3f}, was after step {state.best.step}"
            )
    row |= state.guards.alarms(row, config.guards)
    state.row = None
    if parts.processes.is_main:
        print(progress_line(row, config.steps), flush=True)
    return row, best, ended


def _publish(parts: Parts, row: dict[str, Any]) -> None:
    parts.run_dir.metrics(row)
    if parts.exporter:
        parts.exporter.show(row)
    if parts.config.trackers:
        numbers = {name: float(value) for name, value in row.items() if isinstance(value, int | float)}
        parts.accelerator.log(numbers, step=row["step"])


def _save(parts: Parts, state: RunState, batches: list[InFlight], randomness: dict[str, Any]) -> None:
    parts.checkpoints.save(
        state.step,
        policy=parts.policy,
        model=parts.model,
        tokenizer=parts.tokenizer,
        optimizer=getattr(parts.optimizer, "optimizer", parts.optimizer),
        trainer=parts.describe(state),
        write_process=lambda path: write_process(path, batches, randomness),
        best=state.best.step == state.step,
    )


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


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0


def _seed(seed: int, step: int) -> int:
    return int(np.random.SeedSequence([seed, step]).generate_state(1)[0])
