"""numpy arrays <-> messages, validated: the only place where bytes become numbers and back.

`ScoreTask` is a decoded request, `Scores` a decoded answer, `Teacher` a decoded GetTeacher. Both ends use the
same records, so a test of one is a test of the other.
"""

import hashlib
import math
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillhouse.errors import MalformedArray, WrongAnswer
from stillhouse.v1 import teacher_pb2 as pb

_DTYPES: dict[int, np.dtype[Any]] = {
    pb.ELEMENT_TYPE_INT32: np.dtype("<i4"),
    pb.ELEMENT_TYPE_FLOAT32: np.dtype("<f4"),
    pb.ELEMENT_TYPE_FLOAT16: np.dtype("<f2"),
}
_ELEMENT_TYPES: dict[np.dtype[Any], pb.ElementType] = {
    np.dtype("<i4"): pb.ELEMENT_TYPE_INT32,
    np.dtype("<f4"): pb.ELEMENT_TYPE_FLOAT32,
    np.dtype("<f2"): pb.ELEMENT_TYPE_FLOAT16,
}

MAX_PRIORITY = 100
"""Priorities are -100 .. 100."""

FloatArray = NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True)
class ScoreTask:
    """One sequence to score. L tokens, the last N = L - score_start of them are the response."""

    model: str
    token_ids: NDArray[np.int32]  # [L]
    score_start: int
    top_k: int
    candidate_ids: NDArray[np.int32] | None = None  # [N, M]
    temperature: float = 1.0
    expected_model_revision: str = ""
    expected_vocabulary_digest: str = ""
    half_precision: bool = False  # top-k and candidate log-probabilities travel as float16
    expected_compute_dtype: str = ""
    priority: int = 0  # among the caller's own requests; higher goes first

    @property
    def num_scored(self) -> int:
        """N, the number of response positions."""
        return len(self.token_ids) - self.score_start

    @property
    def num_candidates(self) -> int:
        """M, candidates a position; 0 without."""
        return 0 if self.candidate_ids is None else self.candidate_ids.shape[1]

    @property
    def response_bytes(self) -> int:
        """Upper estimate of the answer's size on the wire: its arrays and 512 bytes for all else.

        Holds as long as the model's name and revision take less than 200 bytes together.
        """
        logprob_bytes = 2 if self.half_precision else 4
        per_row = self.top_k * (4 + logprob_bytes) + self.num_candidates * logprob_bytes + 5 * 4
        return self.num_scored * per_row + 512

    def digest(self) -> bytes:
        """SHA-256 over what was asked, as `Echo.request_digest` defines it."""
        logprob_type = pb.ELEMENT_TYPE_FLOAT16 if self.half_precision else pb.ELEMENT_TYPE_FLOAT32
        digest = hashlib.sha256(self.model.encode() + b"\0")
        digest.update(struct.pack("<III", self.score_start, self.top_k, self.num_candidates))
        digest.update(struct.pack("<dI", self.temperature, logprob_type))
        digest.update(_raw(self.token_ids))
        if self.candidate_ids is not None:
            digest.update(_raw(self.candidate_ids))
        return digest.digest()


@dataclass(frozen=True, slots=True)
class Scores:
    """The teacher's scores of N response tokens, in nats, normalised over the whole vocabulary.

    Row i belongs to response token i, given everything before it. Values are float32.
    """

    top_ids: NDArray[np.int32]  # [N, k], most likely first
    top_logprobs: FloatArray  # [N, k]
    sampled_logprobs: FloatArray  # [N]
    candidate_logprobs: FloatArray | None  # [N, M]
    log_tail: FloatArray  # [N], log mass outside the top k
    log_support_tail: FloatArray  # [N], log mass outside the top k and the candidates
    entropy: FloatArray  # [N], of the whole distribution
    log_normalizer: FloatArray  # [N], log-sum-exp of logits / temperature
    model: str = ""
    model_revision: str = ""
    temperature: float = 1.0
    queue_wait_ms: float = 0.0
    engine_ms: float = 0.0
    batch_sequences: int = 0
    compute_dtype: str = ""

    @property
    def top_logits(self) -> FloatArray:
        """Logits over the temperature of the top k: [N, k]."""
        return self.top_logprobs + self.log_normalizer[:, None]


@dataclass(frozen=True, slots=True)
class Teacher:
    """What a server serves and what it can do (see `GetTeacherResponse`)."""

    model: str
    model_revision: str
    vocabulary_size: int
    vocabulary_digest: str
    max_sequence_tokens: int
    max_top_k: int
    max_candidates: int
    min_temperature: float
    max_temperature: float
    max_response_bytes: int
    compute_dtype: str
    engine: str
    server_version: str


def _raw(array: NDArray[Any]) -> bytes:
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).tobytes()


def encode_array(array: NDArray[Any]) -> pb.Array:
    """Message of an int32, float32 or float16 array of one dimension or more."""
    dtype = _ELEMENT_TYPES.get(array.dtype.newbyteorder("<"))
    if dtype is None:
        raise TypeError(f"array has dtype {array.dtype}; the contract carries int32, float32 and float16")
    return pb.Array(dtype=dtype, shape=array.shape, data=_raw(array))


def decode_array(message: pb.Array, *, field: str, dtypes: tuple[str, ...], ndim: int) -> NDArray[Any]:
    """Read-only array over the message's bytes (no copy).

    Raises MalformedArray naming `field` unless the dtype is one of `dtypes`, the rank is `ndim` and the byte
    count fits the shape.
    """
    dtype = _DTYPES.get(message.dtype)
    if dtype is None or dtype.name not in dtypes:
        name = dtype.name if dtype is not None else f"element type {message.dtype}"
        raise MalformedArray(f"{field} is {name}; send {' or '.join(dtypes)}", field=field, value=name)
    if len(message.shape) != ndim:
        raise MalformedArray(
            f"{field} has {len(message.shape)} dimensions; send {ndim}", field=field, value=len(message.shape)
        )
    shape = tuple(message.shape)
    expected = math.prod(shape) * dtype.itemsize
    if len(message.data) != expected:
        raise MalformedArray(
            f"{field} has {len(message.data)} bytes; shape {shape} of {dtype.name} takes {expected}",
            field=field,
            value=len(message.data),
        )
    return np.frombuffer(message.data, dtype=dtype).reshape(shape)


def encode_request(task: ScoreTask) -> pb.ScoreRequest:
    """Message of a request."""
    request = pb.ScoreRequest(
        model=task.model,
        token_ids=encode_array(task.token_ids),
        score_start=task.score_start,
        top_k=task.top_k,
        temperature=task.temperature,
        expected_model_revision=task.expected_model_revision,
        expected_vocabulary_digest=task.expected_vocabulary_digest,
        logprob_dtype=pb.ELEMENT_TYPE_FLOAT16 if task.half_precision else pb.ELEMENT_TYPE_FLOAT32,
        expected_compute_dtype=task.expected_compute_dtype,
        priority=task.priority,
    )
    if task.candidate_ids is not None and task.num_candidates:
        request.candidate_ids.CopyFrom(encode_array(task.candidate_ids))
    return request


def decode_request(request: pb.ScoreRequest) -> ScoreTask:
    """The request as arrays; raises MalformedArray. What its numbers mean is checked by the server."""
    allowed = (pb.ELEMENT_TYPE_UNSPECIFIED, pb.ELEMENT_TYPE_FLOAT32, pb.ELEMENT_TYPE_FLOAT16)
    if request.logprob_dtype not in allowed:
        raise MalformedArray(
            f"logprob_dtype is {request.logprob_dtype}; send ELEMENT_TYPE_FLOAT32 or ELEMENT_TYPE_FLOAT16",
            field="logprob_dtype",
            value=request.logprob_dtype,
        )
    has_candidates = request.HasField("candidate_ids")
    return ScoreTask(
        model=request.model,
        token_ids=decode_array(request.token_ids, field="token_ids", dtypes=("int32",), ndim=1),
        score_start=request.score_start,
        top_k=request.top_k,
        candidate_ids=decode_array(request.candidate_ids, field="candidate_ids", dtypes=("int32",), ndim=2)
        if has_candidates
        else None,
        temperature=request.temperature if request.HasField("temperature") else 1.0,
        expected_model_revision=request.expected_model_revision,
        expected_vocabulary_digest=request.expected_vocabulary_digest,
        half_precision=request.logprob_dtype == pb.ELEMENT_TYPE_FLOAT16,
        expected_compute_dtype=request.expected_compute_dtype,
        priority=request.priority,
    )


def encode_response(task: ScoreTask, scores: Scores) -> pb.ScoreResponse:
    """Message of the answer to `task`.

    As float16 a log-probability under -65504 becomes -inf; both are probability zero in any format.
    """
    response = pb.ScoreResponse(
        sampled_logprobs=encode_array(scores.sampled_logprobs),
        log_tail=encode_array(scores.log_tail),
        log_support_tail=encode_array(scores.log_support_tail),
        entropy=encode_array(scores.entropy),
        log_normalizer=encode_array(scores.log_normalizer),
        echo=pb.Echo(
            request_digest=task.digest(),
            model=scores.model,
            model_revision=scores.model_revision,
            temperature=task.temperature,
            compute_dtype=scores.compute_dtype,
        ),
        timings=pb.Timings(
            queue_wait_ms=scores.queue_wait_ms,
            engine_ms=scores.engine_ms,
            batch_sequences=scores.batch_sequences,
        ),
    )
    if task.top_k:
        response.top_ids.CopyFrom(encode_array(scores.top_ids))
        response.top_logprobs.CopyFrom(_encode_logprobs(task, scores.top_logprobs))
    if task.num_candidates:
        assert scores.candidate_logprobs is not None
        response.candidate_logprobs.CopyFrom(_encode_logprobs(task, scores.candidate_logprobs))
    return response


def _encode_logprobs(task: ScoreTask, logprobs: FloatArray) -> pb.Array:
    with np.errstate(over="ignore"):
        return encode_array(logprobs.astype(np.float16 if task.half_precision else np.float32, copy=False))


def decode_response(task: ScoreTask, response: pb.ScoreResponse) -> Scores:
    """The answer as arrays. Raises WrongAnswer, naming the field, if it is not the answer to `task`.

    Checked: the echo, every element type and shape, and that no value is NaN or +inf. float32 arrays are
    read-only views of the message.
    """
    _check_echo(task, response.echo)
    rows, k, m = task.num_scored, task.top_k, task.num_candidates
    logprob = "float16" if task.half_precision else "float32"
    candidate_logprobs = None if task.candidate_ids is None else np.empty((rows, 0), np.float32)
    if m:
        candidate_logprobs = _floats(response.candidate_logprobs, "candidate_logprobs", logprob, (rows, m))
    return Scores(
        top_ids=_result(response.top_ids, "top_ids", "int32", (rows, k)) if k else np.empty((rows, 0), np.int32),
        top_logprobs=_floats(response.top_logprobs, "top_logprobs", logprob, (rows, k))
        if k
        else np.empty((rows, 0), np.float32),
        sampled_logprobs=_floats(response.sampled_logprobs, "sampled_logprobs", "float32", (rows,)),
        candidate_logprobs=candidate_logprobs,
        log_tail=_floats(response.log_tail, "log_tail", "float32", (rows,)),
        log_support_tail=_floats(response.log_support_tail, "log_support_tail", "float32", (rows,)),
        entropy=_floats(response.entropy, "entropy", "float32", (rows,)),
        log_normalizer=_floats(response.log_normalizer, "log_normalizer", "float32", (rows,)),
        model=response.echo.model,
        model_revision=response.echo.model_revision,
        temperature=response.echo.temperature,
        queue_wait_ms=response.timings.queue_wait_ms,
        engine_ms=response.timings.engine_ms,
        batch_sequences=response.timings.batch_sequences,
        compute_dtype=response.echo.compute_dtype,
    )


def _check_echo(task: ScoreTask, echo: pb.Echo) -> None:
    if echo.request_digest != task.digest():
        raise WrongAnswer("the answer's request digest is not this request's", field="request_digest")
    if task.model and echo.model != task.model:
        raise WrongAnswer(f"the answer was made by model {echo.model!r}, not {task.model!r}", field="model")
    if task.expected_model_revision and echo.model_revision != task.expected_model_revision:
        raise WrongAnswer(
            f"the answer was made by revision {echo.model_revision!r}, not the pinned {task.expected_model_revision!r}",
            field="model_revision",
        )
    if task.expected_compute_dtype and echo.compute_dtype != task.expected_compute_dtype:
        raise WrongAnswer(
            f"the answer was computed in {echo.compute_dtype!r}, not the pinned {task.expected_compute_dtype!r}",
            field="compute_dtype",
        )
    if echo.temperature != task.temperature:
        raise WrongAnswer(
            f"the answer was made at temperature {echo.temperature}, not {task.temperature}",
            field="temperature",
        )


def _result(message: pb.Array, field: str, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    try:
        array = decode_array(message, field=field, dtypes=(dtype,), ndim=len(shape))
    except MalformedArray as error:
        raise WrongAnswer(f"the answer is malformed: {error.message}", field=field) from error
    if array.shape != shape:
        raise WrongAnswer(f"{field} has shape {array.shape}; expected {shape}", field=field)
    return array


def _floats(message: pb.Array, field: str, dtype: str, shape: tuple[int, ...]) -> FloatArray:
    array = _result(message, field, dtype, shape)
    values = array.astype(np.float32, copy=False)  # first: comparing float16 is several times slower
    if not (values < np.inf).all():
        raise WrongAnswer(f"{field} contains NaN or +inf", field=field)
    return values


def encode_teacher(teacher: Teacher) -> pb.GetTeacherResponse:
    """Message of a server's description."""
    return pb.GetTeacherResponse(**{name: getattr(teacher, name) for name in Teacher.__dataclass_fields__})


def decode_teacher(response: pb.GetTeacherResponse) -> Teacher:
    """A server's description. Raises WrongAnswer if it lacks what every server has."""
    for field in ("model", "model_revision", "vocabulary_size", "max_sequence_tokens"):
        if not getattr(response, field):  # an empty revision would pin nothing
            raise WrongAnswer(f"the server does not say its {field}", field=field)
    return Teacher(**{name: getattr(response, name) for name in Teacher.__dataclass_fields__})
