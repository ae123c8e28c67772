"""The training loop: on-policy distillation mixed with verifiable rewards.

A step, top to bottom: hand the weights to the sampler -> answers, this step's or those of a later one, judged and
sent to the teacher as they end -> scores -> pack -> log-probabilities at the support -> loss -> update -> look ->
log -> evaluate -> checkpoint. Which batch is made when: `student_trainer.pipeline`; how two halves of a step's
experience fit together: `student_trainer.experience`; what is learnt from it: `student_trainer.update`.

With several processes each has its own prompts and trains on its own answers; gradients meet in the update, figures
at the end of a step. Every process takes every decision (to stop, to halt, to save) from the same numbers.
"""

import contextlib
import time
from typing import Any

import numpy as np

from stillhouse.archive import ArchiveStats
from student_trainer.experience import InFlight, begin, finish
from student_trainer.guards import Runaway
from student_trainer.in_flight import random_state, write_process
from student_trainer.metrics import progress_line
from student_trainer.offline import BEFORE_THE_RUN, judged
from student_trainer.parts import Parts, RunState
from student_trainer.pipeline import Pipeline
from student_trainer.processes import Processes
from student_trainer.resuming import describe
from student_trainer.stopping import Stopped, Stopping
from student_trainer.update import train_step


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
                parts.checkpoints.wait()
                raise
            _publish(parts, row)
            runaway = state.guards.runaway(row, config.guards)
            if runaway is not None:
                raise Runaway(runaway)
            last = state.step == config.steps or ended is not None
            if last or best or _due(state.step, config.checkpoints.every_steps):
                _save(parts, state, pipeline.whole(), random_state(parts.accelerator.device))
                saved = state.step
        parts.checkpoints.wait()
        return ended
    finally:
        pipeline.close()
        parts.checkpoints.join()  # after an error of this process alone the others do not come to a meeting


def _step(parts: Parts, state: RunState, pipeline: Pipeline) -> None:
    """One step; its figures are in `state.row`. Raises Stopped as long as nothing of it has been learnt."""
    config, step = parts.config, state.step
    gradient, teacher = config.objective.policy_gradient, config.teacher
    start_s = time.monotonic()
    outage_s = parts.scorer.total_outage_s if parts.scorer else 0.0
    retries = parts.scorer.retries if parts.scorer else 0
    archived = parts.scorer.archive_stats if parts.scorer else None
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
    if parts.scorer and archived is not None:
        row |= _archive_figures(parts.processes, archived, parts.scorer.archive_stats)
    state.step += 1
    if parts.exporter:
        parts.exporter.set("step", state.step)
        parts.exporter.happened("last_step")
    state.rollouts += sum(parts.processes.gather(len(experience.samples)))
    state.response_tokens += int(row["response_tokens"])
    state.row = (row if config.offline is None else judged(row)) | {"rollouts": state.rollouts}


def _archive_figures(processes: Processes, before: ArchiveStats, now: ArchiveStats | None) -> dict[str, int]:
    """What the archive did for this step, or meanwhile for later ones, in all processes."""
    assert now is not None
    own = (
        now.hits + now.shared - before.hits - before.shared,
        now.misses - before.misses,
        now.corrupt - before.corrupt,
        now.write_failures - before.write_failures,
    )
    names = ("archive_hits", "archive_misses", "archive_corrupt", "archive_write_failures")
    return {name: sum(counts) for name, counts in zip(names, zip(*processes.gather(own), strict=True), strict=True)}


def _begin(parts: Parts, step: int, student_step: int, stop: Stopping) -> InFlight:
    config, processes = parts.config, parts.processes
    prompts = parts.order.batch(step, config.rollout.prompts_per_step)
    mine = range(processes.rank, len(prompts), processes.count)
    return begin(
        [prompts[index] for index in mine],
        mine,
        config.rollout.answers_per_prompt,
        step=step,
        student_step=student_step if config.offline is None else BEFORE_THE_RUN,
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
        # Rewards are missing where nobody judged the answers.
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
        trainer=describe(parts, state),
        write_process=lambda path: write_process(path, batches, randomness),
        best=state.best.step == state.step,
    )


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0


def _seed(seed: int, step: int) -> int:
    return int(np.random.SeedSequence([seed, step]).generate_state(1)[0])
