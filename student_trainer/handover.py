"""New weights for a sampler that has a copy of its own, and the proof that it has them.

After every hand-over the sampler answers one fixed prompt, and what it says of its own tokens is compared with what
the trainer says of them: the gap between two implementations of one model. A gap that no rounding explains means that
the sampler runs other weights, which no importance correction repairs: the run ends.
"""

import time
from typing import Any

import numpy as np
import torch

from student_trainer.batch import Rollout, Sample, pack
from student_trainer.parallel import handed_over
from student_trainer.prompts import Prompt

LARGEST_MEAN_GAP = 0.5
"""Nats a token. Two right implementations differ by rounding: below 1e-3 in float32, more in bfloat16."""

_PROBE_TOKENS = 32


class WrongWeights(RuntimeError):
    """The rollout engine does not run the student's weights."""


class HandOver:
    """Gives `sampler` the weights of `policy`, once for every step that it is asked for."""

    def __init__(self, sampler: Any, policy: Any, model: Any, prompt: Prompt, temperature: float) -> None:
        self._sampler = sampler
        self._policy = policy
        self._model = model
        self._prompt = prompt
        self._temperature = temperature
        self._step: int | None = None

    def __call__(self, step: int) -> dict[str, float]:
        """Hands over the weights of now, after `step` steps; its figures. A meeting if the student is sharded.

        Nothing if the sampler has those already. Raises WrongWeights.
        """
        if self._step == step:
            return {}
        start_s = time.monotonic()
        self._sampler.load(handed_over(self._policy, self._model))
        self._step = step
        handed_s = time.monotonic() - start_s
        gap = np.abs(self._gap(self._sampler.probe(self._prompt, _PROBE_TOKENS)))
        if not gap.mean() <= LARGEST_MEAN_GAP:
            raise WrongWeights(
                f"after step {step} the rollout engine's log-probabilities differ from the trainer's by "
                f"{gap.mean():.3g} nats a token (at most {gap.max():.3g}): it does not run the student's weights"
            )
        return {"handover_s": handed_s, "handover_gap": float(gap.mean()), "handover_gap_max": float(gap.max())}

    @torch.no_grad()
    def _gap(self, rollout: Rollout) -> np.ndarray:
        """Trainer minus sampler at each token of an answer [N], nats."""
        sample = Sample(
            rollout=rollout,
            group=0,
            reward=0.0,
            passed=False,
            group_failed=False,
            advantage=0.0,
            prompt_weight=1.0,
            scores=None,
        )
        batch = pack([sample], [np.ones(len(rollout.response_ids))], eos_ids=set(), pad_id=0)
        batch = batch.to(next(self._policy.parameters()).device)
        training = self._policy.training
        self._policy.eval()
        try:
            _, logprobs = self._policy(
                batch.input_ids,
                batch.rows,
                batch.support_ids,
                batch.support_present,
                batch.target_column,
                self._temperature,
                self._temperature,
            )
        finally:
            self._policy.train(training)
        return (logprobs.float().cpu() - torch.from_numpy(rollout.sampler_logprobs)).numpy()
