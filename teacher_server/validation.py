"""All checks of a request against what the server can do, before any compute."""

import math

import numpy as np

from stillhouse.codec import MAX_PRIORITY, ScoreTask, Teacher
from stillhouse.errors import (
    CandidatesOutOfRange,
    InvalidRequest,
    MalformedArray,
    ModelRevisionMismatch,
    PermissionDenied,
    ResponseTooLarge,
    SequenceTooLong,
    TemperatureOutOfRange,
    TokenIdOutOfRange,
    TopKOutOfRange,
    UnknownModel,
    VocabularyMismatch,
)
from teacher_server.access import Tenant


def check_right(tenant: Tenant, model: str, teacher: Teacher) -> None:
    """Raises PermissionDenied unless `tenant` may use `model`; unset means the one served.

    Checked before the name is: who may not use a model does not learn here whether it exists, or that it is the one
    served: then another, which he may use, is an UnknownModel without that name.
    """
    asked = model or teacher.model
    if not tenant.may_use(asked):
        raise PermissionDenied(
            f"tenant {tenant.name!r} may not use model {model!r}"
            if model
            else f"tenant {tenant.name!r} may not use this server's model",
            field="model",
            value=model,
        )
    if asked != teacher.model and not tenant.may_use(teacher.model):
        raise UnknownModel(f"model is {model!r}; this server has another", field="model", value=model)


def check_model_name(model: str, teacher: Teacher) -> None:
    """Raises UnknownModel unless `model` is the one served or unset."""
    if model not in ("", teacher.model):
        raise UnknownModel(
            f"model is {model!r}; this server has {teacher.model!r}",
            field="model",
            value=model,
            served=teacher.model,
        )


def check_task(task: ScoreTask, teacher: Teacher) -> None:
    """Raises the named error of the first thing in `task` that this teacher cannot do."""
    check_model_name(task.model, teacher)
    _check_pins(task, teacher)
    _check_lengths(task, teacher)
    _check_ids("token_ids", task.token_ids, teacher)
    _check_top_k(task, teacher)
    _check_candidates(task, teacher)
    _check_temperature(task, teacher)
    if abs(task.priority) > MAX_PRIORITY:
        raise InvalidRequest(
            f"priority is {task.priority}; it must be -{MAX_PRIORITY} .. {MAX_PRIORITY}",
            field="priority",
            value=task.priority,
            max=MAX_PRIORITY,
        )
    if task.response_bytes > teacher.max_response_bytes:
        raise ResponseTooLarge(
            f"the answer would have {task.response_bytes} bytes; the server sends at most "
            f"{teacher.max_response_bytes}: lower top_k or the candidates, or ask for float16",
            field="top_k",
            value=task.response_bytes,
            max=teacher.max_response_bytes,
        )


def _check_pins(task: ScoreTask, teacher: Teacher) -> None:
    if task.expected_model_revision not in ("", teacher.model_revision):
        raise ModelRevisionMismatch(
            f"expected_model_revision is {task.expected_model_revision!r}; this server has "
            f"{teacher.model_revision!r}: ask GetTeacher again, and check what its scores are mixed with",
            field="expected_model_revision",
            value=task.expected_model_revision,
            served=teacher.model_revision,
        )
    if task.expected_compute_dtype not in ("", teacher.compute_dtype):
        raise ModelRevisionMismatch(
            f"expected_compute_dtype is {task.expected_compute_dtype!r}; this server computes in "
            f"{teacher.compute_dtype!r}: serve one pool with one --dtype",
            field="expected_compute_dtype",
            value=task.expected_compute_dtype,
            served=teacher.compute_dtype,
        )
    if task.expected_vocabulary_digest not in ("", teacher.vocabulary_digest):
        served = repr(teacher.vocabulary_digest) if teacher.vocabulary_digest else "no tokenizer and cannot say"
        raise VocabularyMismatch(
            f"expected_vocabulary_digest is {task.expected_vocabulary_digest!r}; this server has {served}: "
            "use a teacher whose token ids mean the same",
            field="expected_vocabulary_digest",
            value=task.expected_vocabulary_digest,
            served=teacher.vocabulary_digest,
        )


def _check_lengths(task: ScoreTask, teacher: Teacher) -> None:
    tokens = len(task.token_ids)
    if tokens < 2:
        raise InvalidRequest(
            f"token_ids has {tokens} tokens; send 2 or more, prompt and response together",
            field="token_ids",
            value=tokens,
        )
    if tokens > teacher.max_sequence_tokens:
        raise SequenceTooLong(
            f"token_ids has {tokens} tokens; the server takes at most {teacher.max_sequence_tokens}",
            field="token_ids",
            value=tokens,
            max=teacher.max_sequence_tokens,
        )
    if not 1 <= task.score_start < tokens:
        raise InvalidRequest(
            f"score_start is {task.score_start}; with {tokens} tokens it must be 1 .. {tokens - 1}",
            field="score_start",
            value=task.score_start,
            max=tokens - 1,
        )


def _check_ids(field: str, ids: np.ndarray, teacher: Teacher) -> None:
    if ids.size == 0:
        return
    wrong = ids.min() if ids.min() < 0 else ids.max()
    if not 0 <= wrong < teacher.vocabulary_size:
        raise TokenIdOutOfRange(
            f"{field} holds {wrong}; ids are 0 .. {teacher.vocabulary_size - 1}",
            field=field,
            value=wrong,
            max=teacher.vocabulary_size - 1,
        )


def _check_top_k(task: ScoreTask, teacher: Teacher) -> None:
    if not 0 <= task.top_k <= teacher.max_top_k:
        raise TopKOutOfRange(
            f"top_k is {task.top_k}; the server returns 0 .. {teacher.max_top_k}",
            field="top_k",
            value=task.top_k,
            max=teacher.max_top_k,
        )


def _check_candidates(task: ScoreTask, teacher: Teacher) -> None:
    if task.candidate_ids is None:
        return
    if len(task.candidate_ids) != task.num_scored:
        raise MalformedArray(
            f"candidate_ids has {len(task.candidate_ids)} rows; the response has {task.num_scored} tokens",
            field="candidate_ids",
            value=len(task.candidate_ids),
            expected=task.num_scored,
        )
    if task.num_candidates > teacher.max_candidates:
        raise CandidatesOutOfRange(
            f"candidate_ids has {task.num_candidates} ids a position; the server scores at most "
            f"{teacher.max_candidates}",
            field="candidate_ids",
            value=task.num_candidates,
            max=teacher.max_candidates,
        )
    _check_ids("candidate_ids", task.candidate_ids, teacher)


def _check_temperature(task: ScoreTask, teacher: Teacher) -> None:
    low, high = teacher.min_temperature, teacher.max_temperature
    if not (math.isfinite(task.temperature) and low <= task.temperature <= high):
        raise TemperatureOutOfRange(
            f"temperature is {task.temperature}; the server takes {low} .. {high}",
            field="temperature",
            value=task.temperature,
            min=low,
            max=high,
        )
