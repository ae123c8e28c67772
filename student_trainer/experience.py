"""One step's experience in two halves: answers that are judged and on their way to the teacher, then their samples.

`begin` generates. Each answer goes to the teacher as soon as it ends (the client's own thread sends it) and is then
verified, while others still generate. `finish` waits for the scores, and the processes of the run tell each other
what their groups of answers came to: pass rates and prompt weights are those of the whole step.

Each process has the prompts of its rank, with all answers to them.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from stillhouse.codec import Scores
from stillhouse.errors import StillhouseError
from student_trainer.advantages import group_advantages, group_failed
from student_trainer.batch import Rollout, Sample
from student_trainer.objective_config import Paced
from student_trainer.passrate import PassRates, paced_weights
from student_trainer.processes import Processes
from student_trainer.progress import Heartbeat
from student_trainer.prompts import Prompt
from student_trainer.sampler import Sampler
from student_trainer.scoring import Scorer
from student_trainer.stopping import Stopped, Stopping, never

Judge = Callable[[Prompt, str], float | None]
"""A prompt and an answer to its reward, or None for a sample to drop."""


@dataclass(frozen=True, slots=True)
class Judged:
    """An answer with its reward, and the group of the step it belongs to."""

    rollout: Rollout
    group: int
    reward: float


@dataclass(slots=True)
class InFlight:
    """The answers to one step's prompts (of this process) while their scores are still to come."""

    step: int  # whose turn it is for, from 0
    student_step: int  # steps that the student had made when it answered
    answers: list[Judged]
    dropped: int = 0  # answers that could not be judged
    rollout_s: float = 0.0
    reward_s: float = 0.0
    futures: list[Future[Scores]] = field(default_factory=list)  # along `answers`; empty without a teacher


@dataclass(frozen=True, slots=True)
class Experience:
    """The samples of a step (of this process) and where the time went."""

    samples: list[Sample]
    staleness: int  # steps the student made between answering and learning from it
    dropped: int  # answers that could not be judged, in all processes
    unscored: int  # answers that the teacher could not score, in all processes
    rollout_s: float
    reward_s: float
    scoring_s: float  # waiting for scores when it was their turn


def begin(
    prompts: Sequence[Prompt],
    groups: Sequence[int],
    answers: int,
    *,
    step: int,
    student_step: int,
    sampler: Sampler,
    judge: Judge,
    scorer: Scorer | None,
    seed: int,
    stop: Stopping = never,
) -> InFlight:
    """Answers to `prompts`, judged, their scores asked for. `groups` says which group of the step each prompt is.

    Raises Stopped once `stop()` is true; what was asked for is withdrawn.
    """
    group_of = {prompt.key: group for prompt, group in zip(prompts, groups, strict=True)}
    found: list[tuple[Judged, Future[Scores] | None]] = []
    batch = InFlight(step, student_step, [])
    heartbeat = Heartbeat("rollouts", len(prompts) * answers)
    mark_s = time.monotonic()
    try:
        for lot in sampler.sample(prompts, answers, seed=seed, stop=stop):
            batch.rollout_s += time.monotonic() - mark_s
            mark_s = time.monotonic()
            futures = [scorer.submit(rollout) if scorer else None for rollout in lot]
            for rollout, future in zip(lot, futures, strict=True):
                reward = judge(rollout.prompt, rollout.text)
                if reward is None:
                    batch.dropped += 1
                    if future is not None:
                        future.cancel()  # nobody will read its scores
                else:
                    found.append((Judged(rollout, group_of[rollout.prompt.key], reward), future))
            batch.reward_s += time.monotonic() - mark_s
            mark_s = time.monotonic()
            heartbeat.advance(len(lot))
        if stop():
            raise Stopped("asked to stop while generating")
    except BaseException:
        for _, future in found:
            if future is not None:
                future.cancel()
        raise
    batch.rollout_s += time.monotonic() - mark_s
    # Answers come as they end; what is learnt must not depend on that.
    found.sort(key=lambda pair: (pair[0].group, pair[0].rollout.response_ids.tolist()))
    batch.answers = [judged for judged, _ in found]
    batch.futures = [future for _, future in found if future is not None]
    return batch


def finish(
    batch: InFlight,
    *,
    processes: Processes,
    scorer: Scorer | None,
    max_unscored_share: float,
    pass_threshold: float,
    normalise_std: bool,
    pass_rates: PassRates,
    paced: Paced | None,
    at_step: int,
    stop: Stopping = never,
    commit: Callable[[], bool] = lambda: True,
) -> Experience:
    """Samples with rewards, group advantages, prompt weights and (if there is a teacher) scores. A meeting.

    `pass_rates` is updated with the groups of the whole step first, so the weights are of the student as it is now.
    Raises Stopped on every process if one was asked to stop, before anything was updated. commit: asked once the
    scores are there; if it says False anywhere, that is a stop too.
    """
    mark_s = time.monotonic()
    scored: list[tuple[Judged, Scores | None]] = [(judged, None) for judged in batch.answers]
    reasons: list[StillhouseError] = []
    stopped = False
    with processes.together():
        if scorer is not None:
            try:
                results = scorer.collect([judged.rollout for judged in batch.answers], batch.futures, stop=stop)
            except Stopped:
                stopped = True
                results = []
            reasons = [result for result in results if isinstance(result, StillhouseError)]
            pairs = zip(batch.answers, results, strict=True) if not stopped else []
            scored = [(judged, result) for judged, result in pairs if isinstance(result, Scores)]
    if processes.any(stopped or not commit()):
        raise Stopped("asked to stop while waiting for scores")
    scoring_s = time.monotonic() - mark_s
    with processes.together():
        counts = processes.gather((len(reasons), len(batch.answers)))
        unscored, answers = sum(count[0] for count in counts), sum(count[1] for count in counts)
        if unscored > max_unscored_share * answers and reasons:
            raise reasons[0]
    groups: dict[int, list[tuple[Judged, Scores | None]]] = defaultdict(list)
    for judged, scores in scored:
        groups[judged.group].append((judged, scores))
    weights = _learnt_of_groups(groups, processes, pass_threshold, pass_rates, paced)
    samples = []
    for index, group in sorted(groups.items()):
        rewards = torch.tensor([[judged.reward for judged, _ in group]], dtype=torch.float64)
        advantages = group_advantages(rewards, normalise_std=normalise_std)[0].tolist()
        failed = bool(group_failed(rewards >= pass_threshold)[0, 0])
        for (judged, scores), advantage in zip(group, advantages, strict=True):
            samples.append(
                Sample(
                    rollout=judged.rollout,
                    group=index,
                    reward=judged.reward,
                    passed=judged.reward >= pass_threshold,
                    group_failed=failed,
                    advantage=advantage,
                    prompt_weight=weights[index],
                    scores=scores,
                )
            )
    return Experience(
        samples=samples,
        staleness=at_step - batch.student_step,
        dropped=sum(processes.gather(batch.dropped)),
        unscored=unscored,
        rollout_s=batch.rollout_s,
        reward_s=batch.reward_s,
        scoring_s=scoring_s,
    )


def _learnt_of_groups(
    groups: dict[int, list[tuple[Judged, Scores | None]]],
    processes: Processes,
    pass_threshold: float,
    pass_rates: PassRates,
    paced: Paced | None,
) -> dict[int, float]:
    """Updates `pass_rates` by all groups of the step, and gives the weight of each of them. A meeting."""
    own = []
    for index, group in groups.items():
        # An archived answer has a reward of NaN: nobody judged it, so it neither passed nor failed.
        passed = [judged.reward >= pass_threshold for judged, _ in group if not math.isnan(judged.reward)]
        own.append((index, group[0][0].rollout.prompt.key, sum(passed), len(passed)))
    everyone = sorted(entry for entries in processes.gather(own) for entry in entries)
    for _, key, passes, total in everyone:
        if total:
            pass_rates.update(key, passes, total)
    if paced is None:
        return {index: 1.0 for index, *_ in everyone}
    rates = [rate for _, key, *_ in everyone if (rate := pass_rates.rate(key)) is not None]  # all: just updated
    weights = paced_weights(
        rates,
        alpha=paced.alpha,
        beta=paced.beta,
        smoothing=paced.smoothing,
        samples=max((total for *_, total in everyone), default=None),
        normalise=paced.normalise,
    )
    return {index: weight for (index, *_), weight in zip(everyone, weights.tolist(), strict=True)}
