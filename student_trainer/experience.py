"""One step's experience: rollouts, judged and scored while others are still being generated.

Who waits for whom: the sampler hands over answers in lots. Each answer of a lot goes to the teacher at once
(the client's own thread sends it) and is then verified here, while the next lot is generated only after that;
scores are waited for at the very end.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from stillhouse.codec import Scores
from student_trainer.advantages import group_advantages, group_failed
from student_trainer.batch import Rollout, Sample
from student_trainer.objective_config import Paced
from student_trainer.passrate import PassRates, paced_weights
from student_trainer.progress import Heartbeat
from student_trainer.prompts import Prompt
from student_trainer.sampler import Sampler
from student_trainer.scoring import Scorer, gather

Judge = Callable[[Prompt, str], float | None]
"""A prompt and an answer to its reward, or None for a sample to drop."""


@dataclass(frozen=True, slots=True)
class Experience:
    """The samples of a step and where the time went."""

    samples: list[Sample]
    dropped: int  # answers that could not be judged
    rollout_s: float
    reward_s: float
    scoring_s: float  # waiting for scores after the last answer was there


def collect(
    prompts: Sequence[Prompt],
    answers: int,
    *,
    sampler: Sampler,
    judge: Judge,
    scorer: Scorer | None,
    pass_threshold: float,
    normalise_std: bool,
    pass_rates: PassRates,
    paced: Paced | None,
    seed: int,
) -> Experience:
    """Answers to `prompts`, with rewards, group advantages, prompt weights and (if any) scores.

    `pass_rates` is updated with this step's groups first, so the weights are of the student as it is now.
    """
    judged: list[tuple[Rollout, float, Future[Scores] | None]] = []
    dropped = 0
    rollout_s = reward_s = 0.0
    heartbeat = Heartbeat("rollouts", len(prompts) * answers)
    mark_s = time.monotonic()
    for lot in sampler.sample(prompts, answers, seed=seed):
        rollout_s += time.monotonic() - mark_s
        mark_s = time.monotonic()
        futures = [scorer.submit(rollout) if scorer else None for rollout in lot]
        for rollout, future in zip(lot, futures, strict=True):
            reward = judge(rollout.prompt, rollout.text)
            if reward is None:
                dropped += 1
                if future is not None:
                    future.cancel()  # nobody will read its scores
            else:
                judged.append((rollout, reward, future))
        reward_s += time.monotonic() - mark_s
        mark_s = time.monotonic()
        heartbeat.advance(len(lot))
    rollout_s += time.monotonic() - mark_s
    mark_s = time.monotonic()
    wanted = [future for _, _, future in judged if future is not None]
    scores: list[Scores | None] = [*gather(wanted)] if scorer else [None] * len(judged)
    scoring_s = time.monotonic() - mark_s
    samples = _judged_samples(
        [(rollout, reward, score) for (rollout, reward, _), score in zip(judged, scores, strict=True)],
        pass_threshold=pass_threshold,
        normalise_std=normalise_std,
        pass_rates=pass_rates,
        paced=paced,
    )
    return Experience(samples, dropped, rollout_s, reward_s, scoring_s)


def _judged_samples(
    judged: list[tuple[Rollout, float, Scores | None]],
    *,
    pass_threshold: float,
    normalise_std: bool,
    pass_rates: PassRates,
    paced: Paced | None,
) -> list[Sample]:
    groups: dict[str, list[tuple[Rollout, float, Scores | None]]] = defaultdict(list)
    for item in judged:
        groups[item[0].prompt.key].append(item)
    for key, group in groups.items():
        pass_rates.update(key, sum(reward >= pass_threshold for _, reward, _ in group), len(group))
    weights = _prompt_weights(groups, pass_rates, paced)
    samples = []
    for index, (key, group) in enumerate(groups.items()):
        rewards = torch.tensor([[reward for _, reward, _ in group]], dtype=torch.float64)
        advantages = group_advantages(rewards, normalise_std=normalise_std)[0].tolist()
        failed = bool(group_failed(rewards >= pass_threshold)[0, 0])
        for (rollout, reward, score), advantage in zip(group, advantages, strict=True):
            samples.append(
                Sample(
                    rollout=rollout,
                    group=index,
                    reward=reward,
                    passed=reward >= pass_threshold,
                    group_failed=failed,
                    advantage=advantage,
                    prompt_weight=weights[key],
                    scores=score,
                )
            )
    return samples


def _prompt_weights(
    groups: dict[str, list[tuple[Rollout, float, Scores | None]]], pass_rates: PassRates, paced: Paced | None
) -> dict[str, float]:
    if paced is None:
        return dict.fromkeys(groups, 1.0)
    rates = [rate for key in groups if (rate := pass_rates.rate(key)) is not None]  # all: just updated
    weights = paced_weights(
        rates,
        alpha=paced.alpha,
        beta=paced.beta,
        smoothing=paced.smoothing,
        samples=max(len(group) for group in groups.values()) if groups else None,
        normalise=paced.normalise,
    )
    return dict(zip(groups, weights.tolist(), strict=True))
