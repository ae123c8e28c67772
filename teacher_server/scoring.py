"""Tasks in, scores out: the arithmetic of the torch engine, without queue, thread or message."""

from collections.abc import Sequence

import numpy as np
import torch

from stillhouse.codec import Scores, ScoreTask, Teacher
from stillhouse.errors import NonFiniteScores
from teacher_server.loading import ServedModel
from teacher_server.row_scores import score_rows


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
    temperatures = None
    if any(task.temperature != 1.0 for task in tasks):
        temperatures = np.repeat(np.array([task.temperature for task in tasks], np.float32), counts)

    def on_device(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(model.device)

    hidden = model.backbone(input_ids=on_device(ids), use_cache=False).last_hidden_state
    hidden = hidden.flatten(0, 1)[on_device(rows)]
    head = model.head
    scores = score_rows(
        hidden,
        lambda rows: head.logits(rows.to(head.weight.dtype)),
        on_device(targets),
        columns=head.weight.shape[0],
        top_k=tasks[0].top_k,
        candidate_ids=on_device(candidates),
        temperatures=None if temperatures is None else on_device(temperatures),
        logits_slice_bytes=logits_slice_bytes,
    ).numpy()
    ends = np.cumsum(counts)
    return [
        scores_of(model.teacher, task, {name: array[end - count : end] for name, array in scores.items()})
        for task, count, end in zip(tasks, counts, ends, strict=True)
    ]


@torch.inference_mode()
def whole_logprobs(model: ServedModel, task: ScoreTask) -> np.ndarray:
    """Log-probabilities at the response positions, straight from the whole logits in float64: [N, V]. For checks."""
    ids = torch.from_numpy(task.token_ids.astype(np.int64))[None].to(model.device)
    hidden = model.backbone(input_ids=ids, use_cache=False).last_hidden_state[0, task.score_start - 1 : -1]
    logits = model.head.logits(hidden.to(model.head.weight.dtype))
    return torch.log_softmax(logits.double() / task.temperature, dim=-1).cpu().numpy()


def scores_of(teacher: Teacher, task: ScoreTask, rows: dict[str, np.ndarray]) -> Scores | NonFiniteScores:
    """The scores of a task from its arrays, unless the model produced none."""
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
        compute_dtype=teacher.compute_dtype,
    )
