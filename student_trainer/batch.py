"""From answers to tensors. `pack` is the only place that shifts tokens to targets.

Ragged shapes: B sequences of L padded tokens hold R response tokens in all; per-token tensors are flat [R], in
the order of the sequences. The hidden state at place t - 1 predicts the token at place t, so response token t of
a sequence reads row `sequence * L + t - 1`. A packed batch has its sequences behind each other in one row of L
tokens instead, and says with `position_ids` where each of them begins.
"""

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stillhouse.codec import Scores
from student_trainer.prompts import Prompt


@dataclass(frozen=True, slots=True)
class Rollout:
    """One answer of the student, as its sampler gave it."""

    prompt: Prompt
    response_ids: NDArray[np.int32]  # [N], N >= 1, with the end-of-sequence token if it was reached
    sampler_logprobs: NDArray[np.float32]  # [N], nats, whole distribution at the rollout temperature
    candidate_ids: NDArray[np.int32]  # [N, M], the student's own most likely tokens
    text: str
    finished: bool  # False: cut at max_new_tokens

    @property
    def token_ids(self) -> NDArray[np.int32]:
        """Prompt and response."""
        return np.concatenate([np.asarray(self.prompt.token_ids, np.int32), self.response_ids])


@dataclass(frozen=True, slots=True)
class Sample:
    """A rollout with everything that is known about it."""

    rollout: Rollout
    group: int  # answers to one prompt of the step share it
    reward: float
    passed: bool
    group_failed: bool  # no answer of the group passed
    advantage: float  # of the reward within the group
    prompt_weight: float
    scores: Scores | None  # None without a teacher


@dataclass(frozen=True, slots=True)
class Batch:
    """A micro-batch of B sequences with R response tokens; K places of support. Packed: input_ids is [1, L]."""

    samples: list[Sample]
    input_ids: Tensor  # [B, L], right-padded; packed: [1, L]
    rows: Tensor  # [R], which hidden state predicts each response token
    sequence: Tensor  # [R], which sequence it belongs to
    targets: Tensor  # [R]
    token_weights: Tensor  # [R], of the reduction
    sampler_logprobs: Tensor  # [R]
    is_eos: Tensor  # [R] bool
    advantages: Tensor  # [B]
    passed: Tensor  # [B] bool
    group_failed: Tensor  # [B] bool
    prompt_weights: Tensor  # [B]
    support_ids: Tensor  # [R, K]: teacher top-k, then candidates; without a teacher the target alone
    support_present: Tensor  # [R, K] bool: False marks a token that already stands further left
    target_column: Tensor  # [R], where in the support the target stands
    teacher_logprobs: Tensor | None  # [R, K], -inf where not present
    teacher_log_tail: Tensor | None  # [R], log mass outside the support
    teacher_sampled: Tensor | None  # [R], of the target
    teacher_entropy: Tensor | None  # [R]
    overlap: Tensor | None  # [R, K] bool: of the teacher's top k, and a candidate of the student
    positions: Tensor  # [R], which token of its answer it is, from 0
    position_ids: Tensor | None = None  # [1, L], packed batches only: place within the own sequence

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`."""
        moved = {
            field.name: value.to(device)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **moved)


def candidates_for_teacher(rollout: Rollout) -> NDArray[np.int32]:
    """Ids [N, M + 1] to score next to the top k: the student's own and the token that is really there.

    With the sampled token among them it is always part of the support, so one pass over the student's
    vocabulary serves divergences and policy gradient alike.
    """
    return np.concatenate([rollout.candidate_ids, rollout.response_ids[:, None]], axis=1)


def micro_batches(samples: list[Sample], max_tokens: int, *, packed: bool = False) -> list[list[Sample]]:
    """Samples in lots of at most `max_tokens` tokens each, padding included (a longer sequence goes alone).

    Sequences of like length go together, which saves padding; the order is deterministic.
    """
    lots: list[list[Sample]] = []
    filled = 0
    for sample in sorted(samples, key=lambda sample: len(sample.rollout.token_ids), reverse=True):
        own = len(sample.rollout.token_ids)
        # The first of a padded lot is its longest.
        after = filled + (own if packed or not lots else len(lots[-1][0].rollout.token_ids))
        if lots and after <= max_tokens:
            lots[-1].append(sample)
            filled = after
        else:
            lots.append([sample])
            filled = own
    return lots


def pack(
    samples: list[Sample],
    token_weights: list[NDArray[np.float64]],
    *,
    eos_ids: set[int],
    pad_id: int,
    packed: bool = False,
) -> Batch:
    """Tensors of one micro-batch on the CPU. `token_weights` has one array [N] for each sample.

    packed: the sequences behind each other instead of padded to the longest.
    """
    rollouts = [sample.rollout for sample in samples]
    lengths = [len(rollout.response_ids) for rollout in rollouts]
    sequences = [rollout.token_ids for rollout in rollouts]
    sizes = np.array([len(tokens) for tokens in sequences])
    width = int(sizes.sum() if packed else sizes.max())
    # Where in the flattened [B * L] each sequence begins.
    starts = np.cumsum(sizes) - sizes if packed else width * np.arange(len(samples))
    flat = np.full(width if packed else width * len(samples), pad_id, np.int64)
    rows = []
    for tokens, length, start in zip(sequences, lengths, starts, strict=True):
        flat[start : start + len(tokens)] = tokens
        rows.append(start + np.arange(len(tokens) - length - 1, len(tokens) - 1))
    input_ids = flat.reshape(-1, width)
    position_ids = np.concatenate([np.arange(size) for size in sizes])[None] if packed else None
    targets = np.concatenate([rollout.response_ids for rollout in rollouts]).astype(np.int64)
    support_ids, present, teacher = _support(samples, targets)
    matches = (support_ids == targets[:, None]) & present
    if not matches.any(axis=1).all():
        raise AssertionError("a sampled token is missing from its support")
    return Batch(
        samples=samples,
        input_ids=torch.from_numpy(input_ids),
        rows=torch.from_numpy(np.concatenate(rows)),
        sequence=torch.from_numpy(np.repeat(np.arange(len(samples)), lengths)),
        targets=torch.from_numpy(targets),
        token_weights=torch.from_numpy(np.concatenate(token_weights)).float(),
        sampler_logprobs=torch.from_numpy(np.concatenate([rollout.sampler_logprobs for rollout in rollouts])),
        is_eos=torch.from_numpy(np.isin(targets, sorted(eos_ids))),
        advantages=torch.tensor([sample.advantage for sample in samples], dtype=torch.float32),
        passed=torch.tensor([sample.passed for sample in samples]),
        group_failed=torch.tensor([sample.group_failed for sample in samples]),
        prompt_weights=torch.tensor([sample.prompt_weight for sample in samples], dtype=torch.float32),
        support_ids=torch.from_numpy(support_ids),
        support_present=torch.from_numpy(present),
        target_column=torch.from_numpy(matches.argmax(axis=1)),
        positions=torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])),
        position_ids=None if position_ids is None else torch.from_numpy(position_ids),
        **teacher,
    )


def _support(
    samples: list[Sample], targets: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_], dict[str, Tensor | None]]:
    """Ids [R, K], which of them are present, and the teacher's tensors at them."""
    scores = [sample.scores for sample in samples if sample.scores is not None]
    if len(scores) != len(samples):
        assert not scores, "some samples of a batch have scores and some have not"
        nothing: dict[str, Tensor | None] = dict.fromkeys(
            ("teacher_logprobs", "teacher_log_tail", "teacher_sampled", "teacher_entropy", "overlap")
        )
        return targets[:, None], np.ones((len(targets), 1), bool), nothing
    ids = np.concatenate(
        [
            np.concatenate([score.top_ids, candidates_for_teacher(sample.rollout)], axis=1)
            for score, sample in zip(scores, samples, strict=True)
        ]
    ).astype(np.int64)
    asked = [score.candidate_logprobs for score in scores if score.candidate_logprobs is not None]
    logprobs = np.concatenate(
        [np.concatenate([score.top_logprobs, there], axis=1) for score, there in zip(scores, asked, strict=True)]
    )
    present, repeated = _first_occurrences(ids[:, :-1])
    # The last column is the sampled token, which is always asked for and says nothing of what the student prefers.
    sampled_is_new = ~(ids[:, :-1] == ids[:, -1:]).any(axis=1, keepdims=True)
    present = np.concatenate([present, sampled_is_new], axis=1)
    overlap = np.concatenate([repeated & present[:, :-1], np.zeros_like(sampled_is_new)], axis=1)
    teacher: dict[str, Tensor | None] = {
        "teacher_logprobs": torch.from_numpy(np.where(present, logprobs, np.float32(-np.inf))),
        "teacher_log_tail": torch.from_numpy(np.concatenate([score.log_support_tail for score in scores])),
        "teacher_sampled": torch.from_numpy(np.concatenate([score.sampled_logprobs for score in scores])),
        "teacher_entropy": torch.from_numpy(np.concatenate([score.entropy for score in scores])),
        "overlap": torch.from_numpy(overlap),
    }
    return ids, present, teacher


def _first_occurrences(ids: NDArray[np.int64]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Two bool [R, K]: where an id stands for the first time in its row, and where it comes again further right."""
    order = np.argsort(ids, axis=1, kind="stable")
    in_order = np.take_along_axis(ids, order, axis=1)
    first = np.ones_like(in_order, dtype=bool)
    first[:, 1:] = in_order[:, 1:] != in_order[:, :-1]
    again = np.zeros_like(first)
    again[:, :-1] = ~first[:, 1:]
    found = np.empty_like(first), np.empty_like(first)
    for there, sorted_there in zip(found, (first, again), strict=True):
        np.put_along_axis(there, order, sorted_there, axis=1)
    return found
