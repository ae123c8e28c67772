"""pass@k on held-out prompts, with confidence intervals."""

from typing import Any

import numpy as np

from student_trainer.config import EvaluationConfig
from student_trainer.experience import Judge
from student_trainer.passrate import bootstrap_interval, pass_at_k
from student_trainer.processes import Processes
from student_trainer.progress import Heartbeat
from student_trainer.prompts import Prompt
from student_trainer.sampler import Sampler
from student_trainer.stopping import Stopped, Stopping, never


def evaluate(
    config: EvaluationConfig,
    prompts: list[Prompt],
    *,
    sampler: Sampler,
    judge: Judge,
    pass_threshold: float,
    seed: int,
    processes: Processes | None = None,
    stop: Stopping = never,
) -> dict[str, Any]:
    """`pass@k` (unbiased, mean over prompts) and `pass@k_interval` (95%, bootstrap over prompts) for each k.

    Also `reward`, `response_length`, `prompts`, `answers` and `dropped` (answers that could not be judged; a
    prompt left with fewer than max(k) of them is refused, since its pass@k would not be one).

    With several processes each answers a share of the prompts, and all return the same: a meeting. Raises Stopped
    once `stop()` is true on any of them.
    """
    processes = processes or Processes()
    mine = prompts[processes.rank :: processes.count]
    found: list[tuple[str, float | None, int]] = []  # prompt, reward, tokens
    heartbeat = Heartbeat("evaluation", len(mine) * config.answers_per_prompt)
    with processes.together():
        for lot in sampler.sample(mine, config.answers_per_prompt, seed=seed, stop=stop):
            heartbeat.advance(len(lot))
            for rollout in lot:
                reward = judge(rollout.prompt, rollout.text)
                found.append((rollout.prompt.key, reward, len(rollout.response_ids)))
    if processes.any(stop()):
        raise Stopped("asked to stop while evaluating")
    everywhere = sorted((entry for part in processes.gather(found) for entry in part), key=str)
    rewards: dict[str, list[float]] = {prompt.key: [] for prompt in prompts}
    for key, reward, _ in everywhere:
        if reward is not None:
            rewards[key].append(reward)
    lengths = [tokens for *_, tokens in everywhere]
    dropped = sum(reward is None for _, reward, _ in everywhere)
    result: dict[str, Any] = {}
    for k in config.k:
        values = []
        for key, given in rewards.items():
            if len(given) < k:
                raise ValueError(
                    f"evaluation: {key} has {len(given)} judged answers, pass@{k} needs {k}; fix the verifier"
                )
            values.append(pass_at_k(len(given), sum(reward >= pass_threshold for reward in given), k))
        result[f"pass@{k}"] = float(np.mean(values))
        result[f"pass@{k}_interval"] = list(bootstrap_interval(values))
    result["reward"] = float(np.mean([np.mean(given) for given in rewards.values()]))
    result["response_length"] = float(np.mean(lengths))
    return result | {"prompts": len(prompts), "answers": config.answers_per_prompt, "dropped": dropped}


def describe(result: dict[str, Any]) -> str:
    """One line a person reads."""
    figures = []
    for name, value in result.items():
        if name.startswith("pass@") and not name.endswith("_interval"):
            low, high = result[f"{name}_interval"]
            figures.append(f"{name} {value:.3f} [{low:.3f}, {high:.3f}]")
    return "  ".join(figures) + f"  reward {result['reward']:.3f}  len {result['response_length']:.0f}"
