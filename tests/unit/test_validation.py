"""Every request that a teacher cannot answer is refused by name before any compute."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from stillhouse.codec import ScoreTask, Teacher
from stillhouse.errors import (
    CandidatesOutOfRange,
    InvalidRequest,
    MalformedArray,
    ModelRevisionMismatch,
    ResponseTooLarge,
    SequenceTooLong,
    StillhouseError,
    TemperatureOutOfRange,
    TokenIdOutOfRange,
    TopKOutOfRange,
    UnknownModel,
    VocabularyMismatch,
)
from teacher_server.validation import check_model_name, check_task

TEACHER = Teacher(
    model="oak",
    model_revision="r1",
    vocabulary_size=50,
    vocabulary_digest="d1",
    max_sequence_tokens=16,
    max_top_k=8,
    max_candidates=4,
    min_temperature=0.5,
    max_temperature=2.0,
    max_response_bytes=10_000,
    compute_dtype="float32",
    engine="torch",
    server_version="0",
)


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


GOOD = ScoreTask(model="oak", token_ids=ids(1, 2, 3, 4, 5), score_start=2, top_k=3)


def candidates(rows: int, columns: int, value: int = 7) -> np.ndarray:
    return np.full((rows, columns), value, np.int32)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"model": ""},
        {"expected_model_revision": "r1", "expected_vocabulary_digest": "d1"},
        {"token_ids": ids(0, 49), "score_start": 1},
        {"token_ids": np.zeros(16, np.int32), "score_start": 15},
        {"top_k": 0},
        {"top_k": 8},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"candidate_ids": candidates(3, 4, 49)},
        {"candidate_ids": candidates(3, 0)},
    ],
)
def test_everything_up_to_the_limits_is_accepted(change: dict[str, Any]) -> None:
    check_task(replace(GOOD, **change), TEACHER)


REFUSED: list[tuple[dict[str, Any], type[StillhouseError], str, str]] = [
    ({"model": "elm"}, UnknownModel, "model", "elm"),
    ({"expected_model_revision": "r2"}, ModelRevisionMismatch, "expected_model_revision", "r2"),
    ({"expected_vocabulary_digest": "d2"}, VocabularyMismatch, "expected_vocabulary_digest", "d2"),
    ({"token_ids": ids()}, InvalidRequest, "token_ids", "0"),
    ({"token_ids": ids(1), "score_start": 0}, InvalidRequest, "token_ids", "1"),
    ({"score_start": 0}, InvalidRequest, "score_start", "0"),
    ({"score_start": 5}, InvalidRequest, "score_start", "5"),
    ({"score_start": 2**32 - 1}, InvalidRequest, "score_start", "4294967295"),
    ({"token_ids": np.zeros(17, np.int32)}, SequenceTooLong, "token_ids", "17"),
    ({"token_ids": ids(1, 2, 50, 4, 5)}, TokenIdOutOfRange, "token_ids", "50"),
    ({"token_ids": ids(1, -1, 3, 4, 5)}, TokenIdOutOfRange, "token_ids", "-1"),
    ({"token_ids": ids(-(2**31), 1, 2**31 - 1)}, TokenIdOutOfRange, "token_ids", "-2147483648"),
    ({"top_k": 9}, TopKOutOfRange, "top_k", "9"),
    ({"candidate_ids": candidates(2, 4)}, MalformedArray, "candidate_ids", "2"),
    ({"candidate_ids": candidates(5, 4)}, MalformedArray, "candidate_ids", "5"),
    ({"candidate_ids": candidates(3, 5)}, CandidatesOutOfRange, "candidate_ids", "5"),
    ({"candidate_ids": candidates(3, 4, 50)}, TokenIdOutOfRange, "candidate_ids", "50"),
    ({"candidate_ids": candidates(3, 4, -7)}, TokenIdOutOfRange, "candidate_ids", "-7"),
    ({"temperature": 0.0}, TemperatureOutOfRange, "temperature", "0.0"),
    ({"temperature": -1.0}, TemperatureOutOfRange, "temperature", "-1.0"),
    ({"temperature": 0.499}, TemperatureOutOfRange, "temperature", "0.499"),
    ({"temperature": 2.001}, TemperatureOutOfRange, "temperature", "2.001"),
    ({"temperature": float("nan")}, TemperatureOutOfRange, "temperature", "nan"),
    ({"temperature": float("inf")}, TemperatureOutOfRange, "temperature", "inf"),
]


@pytest.mark.parametrize(("change", "error", "field", "value"), REFUSED)
def test_each_wrong_request_is_refused_by_name_with_field_and_value(
    change: dict[str, Any], error: type[StillhouseError], field: str, value: str
) -> None:
    with pytest.raises(StillhouseError) as raised:
        check_task(replace(GOOD, **change), TEACHER)
    assert type(raised.value) is error
    assert raised.value.fields["field"] == field
    assert raised.value.fields["value"] == value
    assert value in raised.value.message


@pytest.mark.parametrize("half_precision", [False, True])
def test_an_answer_may_be_as_large_as_the_limit_and_no_larger(half_precision: bool) -> None:
    task = replace(GOOD, candidate_ids=candidates(3, 2), half_precision=half_precision)
    check_task(task, replace(TEACHER, max_response_bytes=task.response_bytes))
    with pytest.raises(ResponseTooLarge) as raised:
        check_task(task, replace(TEACHER, max_response_bytes=task.response_bytes - 1))
    assert raised.value.fields["value"] == str(task.response_bytes)


def test_a_server_without_a_tokenizer_cannot_confirm_a_vocabulary() -> None:
    task = replace(GOOD, expected_vocabulary_digest="d1")
    with pytest.raises(VocabularyMismatch, match="no tokenizer"):
        check_task(task, replace(TEACHER, vocabulary_digest=""))


def test_get_teacher_takes_the_served_name_or_none() -> None:
    check_model_name("", TEACHER)
    check_model_name("oak", TEACHER)
    with pytest.raises(UnknownModel, match="'oak'"):
        check_model_name("Oak", TEACHER)
