"""Tasks in, scores out: the arithmetic of the torch engine, without queue, thread or message."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from lm_head import LMHead
from stillhouse.codec import Scores, ScoreTask, Teacher
from stillhouse.errors import NonFiniteScores
from teacher_server.loading import ServedModel


@dataclass(frozen=True, slots=True)
class RowScores:
    """Scores of R positions, in nats, normalised over the whole vocabulary at each row's temperature."""

    top_ids: Tensor  # int32 [R, k], most likely first
    top_logprobs: Tensor  # [R, k]
    sampled_logprobs: Tensor  # [R]
    candidate_logprobs: Tensor  # [R, M]
    log_tail: Tensor  # [R]
    log_support_tail: Tensor  # [R]
    entropy: Tensor  # [R]
    log_normalizer: Tensor  # [R]; NaN or infinite where the model produced no scores

    def numpy(self) -> dict[str, np.ndarray]:
        """The fields as arrays in main memory."""
        return {field.name: getattr(self, field.name).cpu().numpy() for field in fields(self)}


def score_rows(
    hidden: Tensor,
    head: LMHead,
    target_ids: Tensor,
    *,
    top_k: int,
    candidate_ids: Tensor,
    temperatures: Tensor,
    logits_slice_bytes: int,
) -> RowScores:
    """Scores R positions from their hidden states.

    hidden: [R, d], any float dtype. head: V rows in float32 (bfloat16 logits would be off by 0.03 nats).
    target_ids: int64 [R]. candidate_ids: int64 [R, M], M may be 0. temperatures: [R].
    Never holds more than `logits_slice_bytes` of logits (at least one row); about three times as much is in
    use at the peak.
    """
    assert hidden.ndim == 2 and candidate_ids.ndim == 2
    assert len(hidden) == len(target_ids) == len(candidate_ids) == len(temperatures)
    row_bytes = head.weight.shape[0] * head.weight.element_size()
    rows = max(1, logits_slice_bytes // row_bytes)
    slices = [
        _score_slice(
            hidden[start : start + rows],
            head,
            target_ids[start : start + rows],
            top_k,
            candidate_ids[start : start + rows],
            temperatures[start : start + rows],
        )
        for start in range(0, len(hidden), rows)
    ]
    if len(slices) == 1:
        return slices[0]
    return RowScores(
        **{field.name: torch.cat([getattr(part, field.name) for part in slices]) for field in fields(RowScores)}
    )


def _score_slice(
    hidden: Tensor, head: LMHead, target_ids: Tensor, top_k: int, candidate_ids: Tensor, temperatures: Tensor
) -> RowScores:
    z = head.logits(hidden.to(head.weight.dtype))  # [r, V]
    z /= temperatures.to(z.dtype)[:, None]
    log_normalizer = torch.logsumexp(z, dim=-1)
    probabilities = torch.softmax(z, dim=-1)
    # entr is -p log p with entr(0) = 0, so a logit of -inf adds nothing instead of NaN.
    entropy = torch.special.entr(probabilities, out=probabilities).sum(dim=-1)
    del probabilities
    sampled = z.gather(1, target_ids[:, None])[:, 0] - log_normalizer
    candidates = z.gather(1, candidate_ids) - log_normalizer[:, None]
    top_logits, top_ids = torch.topk(z, top_k, dim=-1)
    top_logprobs = top_logits - log_normalizer[:, None]
    # The tails are summed from what is left of the logits: 1 - sum would lose everything under 1e-7. A mass
    # of nearly one may round to more than one; nobody should have to take the log of a negative rest.
    log_tail = torch.zeros_like(log_normalizer)
    if top_k:
        z.scatter_(1, top_ids, -torch.inf)
        log_tail = (torch.logsumexp(z, dim=-1) - log_normalizer).clamp(max=0.0)
    log_support_tail = log_tail
    if candidate_ids.shape[1]:
        z.scatter_(1, candidate_ids, -torch.inf)
        log_support_tail = (torch.logsumexp(z, dim=-1) - log_normalizer).clamp(max=0.0)
    return RowScores(
        top_ids=top_ids.to(torch.int32),
        top_logprobs=top_logprobs,
        sampled_logprobs=sampled,
        candidate_logprobs=candidates,
        log_tail=log_tail,
        log_support_tail=log_support_tail,
        entropy=entropy,
        log_normalizer=log_normalizer,
    )


@torch.inference_mode()
def score_tasks(
    model: ServedModel, tasks: Sequence[ScoreTask], logits_slice_bytes: int
) -> list[Scores | NonFiniteScores]:
    """Scores tasks of the same top_k and number of candidates in one pass of the model.

    Sequences are padded on the right with id 0 and no mask: in a causal model no position sees what comes
    after it. Only the rows to be scored go through the head.
    """
    lengths = [len(task.token_ids) for task in tasks]
    longest = max(lengths)
    ids = np.zeros((len(tasks), longest), np.int64)
    for row, task in zip(ids, tasks, strict=True):
        row[: len(task.token_ids)] = task.token_ids
    counts = [task.num_scored for task in tasks]
    # The row before a token predicts it.
    rows = np.concatenate(
        [index * longest + np.arange(task.score_start - 1, len(task.token_ids) - 1) for index, task in enumerate(tasks)]
    )
    targets = np.concatenate([task.token_ids[task.score_start :] for task in tasks]).astype(np.int64)
    candidates = np.concatenate(
        [np.zeros((task.num_scored, 0)) if task.candidate_ids is None else task.candidate_ids for task in tasks]
    ).astype(np.int64)
    temperatures = np.repeat([task.temperature for task in tasks], counts)

    def on_device(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(model.device)

    hidden = model.backbone(input_ids=on_device(ids), use_cache=False).last_hidden_state
    hidden = hidden.flatten(0, 1)[on_device(rows)]
    scores = score_rows(
        hidden,
        model.head,
        on_device(targets),
        top_k=tasks[0].top_k,
        candidate_ids=on_device(candidates),
        temperatures=on_device(temperatures),
        logits_slice_bytes=logits_slice_bytes,
    ).numpy()
    ends = np.cumsum(counts)
    return [
        _scores_of(model.teacher, task, {name: array[end - count : end] for name, array in scores.items()})
        for task, count, end in zip(tasks, counts, ends, strict=True)
    ]


def _scores_of(teacher: Teacher, task: ScoreTask, rows: dict[str, np.ndarray]) -> Scores | NonFiniteScores:
    broken = np.flatnonzero(~np.isfinite(rows["log_normalizer"]))
    if len(broken):
        return NonFiniteScores(
            f"the model's logits are not finite at {len(broken)} of {task.num_scored} response positions, "
            f"first {broken[0]}; its weights or precision ({teacher.compute_dtype}) cannot score this",
            field="token_ids",
            position=broken[0],
        )
    candidates = rows.pop("candidate_logprobs")
    return Scores(
        **rows,  # pyright: ignore[reportArgumentType]
        candidate_logprobs=None if task.candidate_ids is None else candidates,
        model=teacher.model,
        model_revision=teacher.model_revision,
        temperature=task.temperature,
    )
