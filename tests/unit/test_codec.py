"""Arrays and messages: what goes in comes out, and what does not fit is refused by the name of its field."""

import dataclasses
import hashlib
import struct
import warnings
from collections.abc import Callable

import numpy as np
import pytest

from stillhouse.codec import (
    Scores,
    ScoreTask,
    decode_array,
    decode_request,
    decode_response,
    decode_teacher,
    encode_array,
    encode_request,
    encode_response,
    encode_teacher,
)
from stillhouse.errors import MalformedArray, WrongAnswer
from stillhouse.v1 import teacher_pb2 as pb
from tests.fakes import BigramTeacher

DTYPES = ["int32", "float32", "float16"]
SHAPES = [(0,), (1,), (7,), (3, 0), (0, 3), (1, 1), (5, 3), (2, 3, 4)]


def a_task(**changes: object) -> ScoreTask:
    task = ScoreTask(
        model="bigram",
        token_ids=np.array([3, 1, 4, 1, 5, 9, 2, 6], np.int32),
        score_start=3,
        top_k=4,
        candidate_ids=np.array([[7, 8], [0, 1], [3, 4], [5, 6], [2, 2]], np.int32),
        temperature=0.7,
        expected_model_revision="r1",
        expected_vocabulary_digest="v",
    )
    return dataclasses.replace(task, **changes)


def an_answer(task: ScoreTask) -> pb.ScoreResponse:
    """The right answer, as a client that knows nothing of the server receives it."""
    return pb.ScoreResponse.FromString(encode_response(task, BigramTeacher().score(task)).SerializeToString())


# --- arrays


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_array_survives_the_round_trip(dtype: str, shape: tuple[int, ...]) -> None:
    array = (np.random.default_rng(1).normal(0, 1000, shape)).astype(dtype)
    message = pb.Array.FromString(encode_array(array).SerializeToString())
    assert list(message.shape) == list(shape)
    assert len(message.data) == array.size * array.itemsize
    decoded = decode_array(message, field="x", dtypes=(dtype,), ndim=len(shape))
    assert decoded.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(decoded, array)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_on_the_wire_are_little_endian_row_major_whatever_the_array_in_memory(dtype: str) -> None:
    array = np.arange(24).reshape(4, 6).astype(dtype)
    form = {"int32": "<24i", "float32": "<24f", "float16": "<24e"}[dtype]
    expected = struct.pack(form, *range(24))
    big_endian = array.astype(np.dtype(dtype).newbyteorder(">"))
    column_major = np.asfortranarray(array)
    every_second = np.repeat(array, 2, axis=1)[:, ::2]
    backwards = array[::-1].copy()[::-1]
    for variant in (array, big_endian, column_major, every_second, backwards):
        np.testing.assert_array_equal(variant, array)
        assert encode_array(variant).data == expected


@pytest.mark.parametrize("dtype", ["int64", "float64", "int16", "uint32", "bool", "complex64", "object"])
def test_an_array_of_another_dtype_is_not_converted_in_silence(dtype: str) -> None:
    with pytest.raises(TypeError, match=dtype):
        encode_array(np.zeros(3, dtype))


def test_minus_infinity_and_the_smallest_values_survive() -> None:
    values = np.array([-np.inf, -0.0, 0.0, -1e-45, np.finfo(np.float32).min], np.float32)
    decoded = decode_array(encode_array(values), field="x", dtypes=("float32",), ndim=1)
    assert decoded.tobytes() == values.tobytes()


@pytest.mark.parametrize(
    ("message", "value"),
    [
        (pb.Array(shape=[2], data=bytes(8)), "element type 0"),
        (pb.Array(dtype=pb.ELEMENT_TYPE_FLOAT16, shape=[2], data=bytes(4)), "float16"),
        (pb.Array(dtype=99, shape=[2], data=bytes(8)), "element type 99"),  # pyright: ignore
        (pb.Array(dtype=pb.ELEMENT_TYPE_INT32, shape=[], data=bytes(4)), "0"),
        (pb.Array(dtype=pb.ELEMENT_TYPE_INT32, shape=[1, 2], data=bytes(8)), "2"),
        (pb.Array(dtype=pb.ELEMENT_TYPE_INT32, shape=[2] * 100_000, data=bytes(8)), "100000"),
        (pb.Array(dtype=pb.ELEMENT_TYPE_INT32, shape=[2], data=bytes(7)), "7"),
        (pb.Array(dtype=pb.ELEMENT_TYPE_INT32, shape=[2], data=bytes(9)), "9"),
        (pb.Array(dtype=pb.ELEMENT_TYPE_INT32, shape=[2]), "0"),
        (pb.Array(dtype=pb.ELEMENT_TYPE_INT32, shape=[0], data=bytes(4)), "4"),
        (pb.Array(dtype=pb.ELEMENT_TYPE_INT32, shape=[2**32 - 1], data=bytes(4)), "4"),
    ],
)
def test_a_malformed_array_is_refused_with_field_and_value(message: pb.Array, value: str) -> None:
    with pytest.raises(MalformedArray) as caught:
        decode_array(message, field="token_ids", dtypes=("int32",), ndim=1)
    assert caught.value.fields == {"field": "token_ids", "value": value}
    assert "token_ids" in str(caught.value)
    assert len(str(caught.value)) < 200, "a hostile array must not make a hostile message"


def test_dimensions_whose_product_overflows_64_bits_are_not_taken_for_small() -> None:
    # 2^31 * 2^31 * 4 bytes is 0 modulo 2^64.
    message = pb.Array(dtype=pb.ELEMENT_TYPE_INT32, shape=[2**31, 2**31], data=b"")
    with pytest.raises(MalformedArray):
        decode_array(message, field="candidate_ids", dtypes=("int32",), ndim=2)


def test_a_huge_dimension_beside_a_zero_costs_no_memory() -> None:
    message = pb.Array(dtype=pb.ELEMENT_TYPE_INT32, shape=[2**32 - 1, 0], data=b"")
    assert decode_array(message, field="x", dtypes=("int32",), ndim=2).shape == (2**32 - 1, 0)


# --- requests


@pytest.mark.parametrize("half_precision", [False, True])
@pytest.mark.parametrize("candidates", [None, 1, 3])
def test_a_request_survives_the_round_trip(candidates: int | None, half_precision: bool) -> None:
    ids = None if candidates is None else np.arange(5 * candidates, dtype=np.int32).reshape(5, candidates)
    task = a_task(candidate_ids=ids, half_precision=half_precision)
    decoded = decode_request(pb.ScoreRequest.FromString(encode_request(task).SerializeToString()))
    for field in dataclasses.fields(ScoreTask):
        np.testing.assert_array_equal(getattr(decoded, field.name), getattr(task, field.name))
    assert decoded.digest() == task.digest()


def test_what_a_request_leaves_unset_has_the_documented_meaning() -> None:
    decoded = decode_request(pb.ScoreRequest(token_ids=encode_array(np.array([1, 2], np.int32)), score_start=1))
    assert (decoded.model, decoded.top_k, decoded.candidate_ids) == ("", 0, None)
    assert (decoded.temperature, decoded.half_precision) == (1.0, False)
    assert (decoded.expected_model_revision, decoded.expected_vocabulary_digest) == ("", "")
    assert (decoded.num_scored, decoded.num_candidates) == (1, 0)


def test_a_temperature_of_zero_is_not_taken_for_unset() -> None:
    request = encode_request(a_task())
    request.temperature = 0.0
    assert decode_request(request).temperature == 0.0


def test_no_candidates_and_an_empty_array_of_them_are_one_request() -> None:
    none, empty = a_task(candidate_ids=None), a_task(candidate_ids=np.empty((5, 0), np.int32))
    assert encode_request(none) == encode_request(empty)
    assert none.digest() == empty.digest()
    scores = decode_response(empty, an_answer(none))
    assert scores.candidate_logprobs is not None
    assert scores.candidate_logprobs.shape == (5, 0)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("token_ids", lambda r: r.ClearField("token_ids")),
        ("token_ids", lambda r: r.token_ids.CopyFrom(encode_array(np.zeros(8, np.float32)))),
        ("token_ids", lambda r: r.token_ids.CopyFrom(encode_array(np.zeros((1, 8), np.int32)))),
        ("token_ids", lambda r: setattr(r.token_ids, "data", b"123")),
        ("candidate_ids", lambda r: r.candidate_ids.CopyFrom(encode_array(np.zeros(5, np.int32)))),
        ("candidate_ids", lambda r: r.candidate_ids.CopyFrom(encode_array(np.zeros((5, 2), np.float16)))),
        ("candidate_ids", lambda r: r.candidate_ids.CopyFrom(pb.Array())),
        ("logprob_dtype", lambda r: setattr(r, "logprob_dtype", pb.ELEMENT_TYPE_INT32)),
        ("logprob_dtype", lambda r: setattr(r, "logprob_dtype", 77)),
    ],
)
def test_a_malformed_request_is_refused_by_field(field: str, change: Callable[[pb.ScoreRequest], object]) -> None:
    request = encode_request(a_task())
    change(request)
    with pytest.raises(MalformedArray) as caught:
        decode_request(request)
    assert caught.value.fields["field"] == field


def test_the_digest_is_the_one_the_proto_defines() -> None:
    task = a_task()
    assert task.candidate_ids is not None
    written_out = (
        b"bigram\0"
        + struct.pack("<III", 3, 4, 2)
        + struct.pack("<d", 0.7)
        + struct.pack("<I", 2)
        + struct.pack("<8i", *task.token_ids)
        + struct.pack("<10i", *task.candidate_ids.ravel())
    )
    assert task.digest() == hashlib.sha256(written_out).digest()


def test_the_digest_of_big_endian_and_strided_ids_is_the_digest_of_their_values() -> None:
    task = a_task()
    odd = a_task(token_ids=np.repeat(task.token_ids, 2).astype(">i4")[::2])
    assert odd.digest() == task.digest()


def test_the_digest_changes_with_everything_that_changes_the_scores() -> None:
    task = a_task()
    assert task.candidate_ids is not None
    other_candidate = task.candidate_ids.copy()
    other_candidate[4, 1] += 1
    variants = [
        task,
        a_task(model="bigram2"),
        a_task(model=""),
        a_task(token_ids=np.array([3, 1, 4, 1, 5, 9, 2, 7], np.int32)),
        a_task(token_ids=np.array([3, 1, 4, 1, 5, 9, 2, 6, 0], np.int32)),
        a_task(score_start=4),
        a_task(top_k=5),
        a_task(candidate_ids=None),
        a_task(candidate_ids=other_candidate),
        a_task(candidate_ids=task.candidate_ids.reshape(5, 2)[:, ::-1]),
        a_task(temperature=np.nextafter(0.7, 1)),
        a_task(half_precision=True),
    ]
    assert len({variant.digest() for variant in variants}) == len(variants)


# --- answers


@pytest.mark.parametrize("half_precision", [False, True])
@pytest.mark.parametrize("with_candidates", [False, True])
@pytest.mark.parametrize("top_k", [0, 1, 19])
def test_an_answer_survives_the_round_trip(top_k: int, with_candidates: bool, half_precision: bool) -> None:
    task = a_task(top_k=top_k, half_precision=half_precision)
    task = task if with_candidates else dataclasses.replace(task, candidate_ids=None)
    sent = BigramTeacher().score(task)
    received = decode_response(task, an_answer(task))
    for field in dataclasses.fields(Scores):
        before, after = getattr(sent, field.name), getattr(received, field.name)
        if isinstance(before, np.ndarray):
            assert after.shape == before.shape
            assert after.dtype == before.dtype, "float16 on the wire is float32 in the hand"
            rounded = half_precision and field.name in ("top_logprobs", "candidate_logprobs")
            np.testing.assert_array_equal(after, before.astype(np.float16) if rounded else before)
        else:
            assert after == before, field.name
    assert (received.top_logprobs.shape, received.sampled_logprobs.shape) == ((5, top_k), (5,))


def test_probability_zero_arrives_as_minus_infinity() -> None:
    for half_precision in (False, True):
        task = a_task(top_k=19, half_precision=half_precision)
        scores = decode_response(task, an_answer(task))
        assert scores.candidate_logprobs is not None
        assert scores.candidate_logprobs[1, 0] == -np.inf, "token 0 never follows in the bigram teacher"
        assert (scores.top_logprobs[:, -1] == -np.inf).all()
        assert (scores.log_tail == -np.inf).all(), "nothing is outside a top k of the whole vocabulary"


def test_top_logits_are_the_teachers_logits_over_the_temperature() -> None:
    task, teacher = a_task(), BigramTeacher()
    scores = decode_response(task, an_answer(task))
    expected = np.take_along_axis(teacher.scaled(task), scores.top_ids, axis=1)
    np.testing.assert_allclose(scores.top_logits, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("largest", [1.0, 16.0, 78.0, 1000.0])
def test_float16_is_off_by_at_most_half_a_step_of_its_11_bits(largest: float) -> None:
    logprobs = -np.random.default_rng(2).uniform(0, largest, (5, 1000)).astype(np.float32)
    task = a_task(half_precision=True, top_k=1000)
    scores = dataclasses.replace(
        BigramTeacher().score(a_task()), top_logprobs=logprobs, top_ids=np.zeros((5, 1000), np.int32)
    )
    received = decode_response(task, encode_response(task, scores)).top_logprobs
    error = np.abs(received - logprobs)
    assert (error <= np.maximum(np.abs(logprobs) * 2.0**-11, 2.0**-25)).all()
    assert error.max() > 0


def test_a_log_probability_that_float16_cannot_hold_becomes_minus_infinity_without_a_warning() -> None:
    task = a_task(half_precision=True)
    scores = BigramTeacher().score(task)
    scores = dataclasses.replace(scores, top_logprobs=np.full((5, 4), -70_000.0, np.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        response = encode_response(task, scores)
    assert (decode_response(task, response).top_logprobs == -np.inf).all()


@pytest.mark.parametrize("rows", [1, 100, 4000])
@pytest.mark.parametrize("half_precision", [False, True])
@pytest.mark.parametrize(("top_k", "candidates"), [(0, 0), (1, 0), (19, 8), (0, 8)])
def test_response_bytes_is_an_upper_bound_within_a_few_hundred_bytes(
    top_k: int, candidates: int, half_precision: bool, rows: int
) -> None:
    task = ScoreTask(
        model="m" * 50,
        token_ids=np.ones(rows + 1, np.int32),
        score_start=1,
        top_k=top_k,
        candidate_ids=np.ones((rows, candidates), np.int32) if candidates else None,
        half_precision=half_precision,
    )
    scores = dataclasses.replace(
        BigramTeacher().score(task), model="m" * 50, model_revision="r" * 100, queue_wait_ms=1e3
    )
    real = encode_response(task, scores).ByteSize()
    assert task.response_bytes - 512 < real <= task.response_bytes


def set_value(name: str, value: float) -> Callable[[pb.ScoreResponse], object]:
    """Puts `value` into the last element of the array `name`."""

    def change(response: pb.ScoreResponse) -> None:
        message = getattr(response, name)
        data = np.frombuffer(message.data, "<f4").copy()
        data[-1] = value
        message.data = data.tobytes()

    return change


def one_row_less(name: str) -> Callable[[pb.ScoreResponse], object]:
    """A well-formed array of N - 1 rows."""

    def change(response: pb.ScoreResponse) -> None:
        message = getattr(response, name)
        row = len(message.data) // message.shape[0]
        message.shape[0] -= 1
        message.data = message.data[:-row]

    return change


FLOATS = [
    "top_logprobs",
    "sampled_logprobs",
    "candidate_logprobs",
    "log_tail",
    "log_support_tail",
    "entropy",
    "log_normalizer",
]
ARRAYS = ["top_ids", *FLOATS]
half = encode_array(np.zeros((5, 4), np.float16))


@pytest.mark.parametrize(
    ("field", "change"),
    [
        *[(name, lambda r, name=name: r.ClearField(name)) for name in ARRAYS],
        *[(name, one_row_less(name)) for name in ARRAYS],
        *[(name, lambda r, name=name: setattr(getattr(r, name), "data", b"x")) for name in ARRAYS],
        *[(name, lambda r, name=name: getattr(r, name).shape.append(1)) for name in ARRAYS],
        *[(name, set_value(name, np.nan)) for name in FLOATS],
        *[(name, set_value(name, np.inf)) for name in FLOATS],
        *[(name, lambda r, name=name: setattr(getattr(r, name), "dtype", 1)) for name in FLOATS],
        ("top_ids", lambda r: setattr(r.top_ids, "dtype", pb.ELEMENT_TYPE_FLOAT32)),
        ("top_logprobs", lambda r: r.top_logprobs.CopyFrom(half)),
        ("request_digest", lambda r: setattr(r.echo, "request_digest", bytes(32))),
        ("request_digest", lambda r: setattr(r.echo, "request_digest", b"")),
        ("request_digest", lambda r: r.ClearField("echo")),
        ("model", lambda r: setattr(r.echo, "model", "another")),
        ("model_revision", lambda r: setattr(r.echo, "model_revision", "r2")),
        ("temperature", lambda r: setattr(r.echo, "temperature", 1.0)),
    ],
)
def test_a_manipulated_answer_is_refused_by_field(field: str, change: Callable[[pb.ScoreResponse], object]) -> None:
    task = a_task()
    response = an_answer(task)
    decode_response(task, response)
    change(response)
    with pytest.raises(WrongAnswer) as caught:
        decode_response(task, response)
    assert caught.value.fields == {"field": field}


def test_the_answer_to_another_request_is_refused() -> None:
    with pytest.raises(WrongAnswer, match="digest"):
        decode_response(a_task(), an_answer(a_task(temperature=0.8)))


def test_an_answer_less_precise_than_asked_for_is_refused() -> None:
    task = a_task()
    response = an_answer(a_task(half_precision=True))
    response.echo.request_digest = task.digest()
    with pytest.raises(WrongAnswer) as caught:
        decode_response(task, response)
    assert caught.value.fields["field"] in ("top_logprobs", "candidate_logprobs")


def test_without_a_pin_any_revision_is_taken_and_named() -> None:
    task = a_task(expected_model_revision="")
    response = an_answer(task)
    response.echo.model_revision = "r7"
    assert decode_response(task, response).model_revision == "r7"


# --- GetTeacher


def test_a_description_survives_the_round_trip() -> None:
    teacher = BigramTeacher().describe()
    message = pb.GetTeacherResponse.FromString(encode_teacher(teacher).SerializeToString())
    assert decode_teacher(message) == teacher
    assert {f.name for f in pb.GetTeacherResponse.DESCRIPTOR.fields} == {f.name for f in dataclasses.fields(teacher)}


@pytest.mark.parametrize("field", ["model", "model_revision", "vocabulary_size", "max_sequence_tokens"])
def test_a_description_that_promises_nothing_is_refused(field: str) -> None:
    message = encode_teacher(BigramTeacher().describe())
    message.ClearField(field)
    with pytest.raises(WrongAnswer) as caught:
        decode_teacher(message)
    assert caught.value.fields == {"field": field}
