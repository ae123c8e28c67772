"""A caller's arguments, checked and copied into a `ScoreTask` before anything is sent.

Only what can never be right is refused here, with ValueError; what depends on the server (its limits, its
vocabulary) is the server's to refuse.
"""

import math
import operator
from typing import TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stillhouse.codec import MAX_PRIORITY, ScoreTask


class ScoreOptions(TypedDict, total=False):
    """What `score` takes besides tokens, `score_start` and `top_k`; see `AsyncTeacherClient.score`."""

    candidate_ids: ArrayLike | None
    temperature: float
    deadline_s: float
    half_precision: bool
    expected_model_revision: str
    expected_vocabulary_digest: str
    expected_compute_dtype: str
    priority: int


def make_task(model: str, token_ids: ArrayLike, score_start: int, top_k: int, options: ScoreOptions) -> ScoreTask:
    """The checked request, with arrays of its own."""
    candidate_ids = options.get("candidate_ids")
    task = ScoreTask(
        model=model,
        token_ids=_int32(token_ids, "token_ids", 1),
        score_start=_integer(score_start, "score_start"),
        top_k=_integer(top_k, "top_k"),
        candidate_ids=None if candidate_ids is None else _int32(candidate_ids, "candidate_ids", 2),
        temperature=float(options.get("temperature", 1.0)),
        expected_model_revision=options.get("expected_model_revision", ""),
        expected_vocabulary_digest=options.get("expected_vocabulary_digest", ""),
        half_precision=options.get("half_precision", False),
        expected_compute_dtype=options.get("expected_compute_dtype", ""),
        priority=_integer(options.get("priority", 0), "priority"),
    )
    if not 1 <= task.score_start < len(task.token_ids):
        raise ValueError(
            f"score_start is {task.score_start}; with {len(task.token_ids)} tokens it must be "
            f"1 .. {len(task.token_ids) - 1}"
        )
    if not 0 <= task.top_k < 2**31:
        raise ValueError(f"top_k is {task.top_k}; it must be 0 or more, at most the server's max_top_k")
    if not -MAX_PRIORITY <= task.priority <= MAX_PRIORITY:
        raise ValueError(f"priority is {task.priority}; it must be -{MAX_PRIORITY} .. {MAX_PRIORITY}")
    if not (math.isfinite(task.temperature) and task.temperature > 0):
        raise ValueError(f"temperature is {task.temperature}; it must be finite and above 0")
    if task.candidate_ids is not None and len(task.candidate_ids) != task.num_scored:
        raise ValueError(f"candidate_ids has {len(task.candidate_ids)} rows; the response has {task.num_scored} tokens")
    return task


def _integer(value: int, name: str) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} is {value!r}; give an integer") from None


def _int32(values: ArrayLike, name: str, ndim: int) -> NDArray[np.int32]:
    array = np.asarray(values)
    if array.ndim != ndim or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(f"{name} has shape {array.shape} and dtype {array.dtype}; give {ndim}-dimensional integers")
    if array.size and (array.min() < 0 or array.max() > np.iinfo(np.int32).max):
        raise ValueError(f"{name} holds {array.min()} .. {array.max()}; ids are 0 .. 2^31 - 1")
    return array.astype(np.int32)  # always a copy: the caller may change its own at once
