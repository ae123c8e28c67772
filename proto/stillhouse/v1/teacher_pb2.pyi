from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ElementType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ELEMENT_TYPE_UNSPECIFIED: _ClassVar[ElementType]
    ELEMENT_TYPE_INT32: _ClassVar[ElementType]
    ELEMENT_TYPE_FLOAT32: _ClassVar[ElementType]
    ELEMENT_TYPE_FLOAT16: _ClassVar[ElementType]
ELEMENT_TYPE_UNSPECIFIED: ElementType
ELEMENT_TYPE_INT32: ElementType
ELEMENT_TYPE_FLOAT32: ElementType
ELEMENT_TYPE_FLOAT16: ElementType

class Array(_message.Message):
    __slots__ = ("dtype", "shape", "data")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    dtype: ElementType
    shape: _containers.RepeatedScalarFieldContainer[int]
    data: bytes
    def __init__(self, dtype: _Optional[_Union[ElementType, str]] = ..., shape: _Optional[_Iterable[int]] = ..., data: _Optional[bytes] = ...) -> None: ...

class ScoreRequest(_message.Message):
    __slots__ = ("model", "token_ids", "score_start", "top_k", "candidate_ids", "temperature", "expected_model_revision", "expected_vocabulary_digest", "logprob_dtype", "expected_compute_dtype", "priority")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SCORE_START_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_IDS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_MODEL_REVISION_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_VOCABULARY_DIGEST_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_DTYPE_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_COMPUTE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    model: str
    token_ids: Array
    score_start: int
    top_k: int
    candidate_ids: Array
    temperature: float
    expected_model_revision: str
    expected_vocabulary_digest: str
    logprob_dtype: ElementType
    expected_compute_dtype: str
    priority: int
    def __init__(self, model: _Optional[str] = ..., token_ids: _Optional[_Union[Array, _Mapping]] = ..., score_start: _Optional[int] = ..., top_k: _Optional[int] = ..., candidate_ids: _Optional[_Union[Array, _Mapping]] = ..., temperature: _Optional[float] = ..., expected_model_revision: _Optional[str] = ..., expected_vocabulary_digest: _Optional[str] = ..., logprob_dtype: _Optional[_Union[ElementType, str]] = ..., expected_compute_dtype: _Optional[str] = ..., priority: _Optional[int] = ...) -> None: ...

class ScoreResponse(_message.Message):
    __slots__ = ("top_ids", "top_logprobs", "sampled_logprobs", "candidate_logprobs", "log_tail", "log_support_tail", "entropy", "log_normalizer", "echo", "timings")
    TOP_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    SAMPLED_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    LOG_TAIL_FIELD_NUMBER: _ClassVar[int]
    LOG_SUPPORT_TAIL_FIELD_NUMBER: _ClassVar[int]
    ENTROPY_FIELD_NUMBER: _ClassVar[int]
    LOG_NORMALIZER_FIELD_NUMBER: _ClassVar[int]
    ECHO_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    top_ids: Array
    top_logprobs: Array
    sampled_logprobs: Array
    candidate_logprobs: Array
    log_tail: Array
    log_support_tail: Array
    entropy: Array
    log_normalizer: Array
    echo: Echo
    timings: Timings
    def __init__(self, top_ids: _Optional[_Union[Array, _Mapping]] = ..., top_logprobs: _Optional[_Union[Array, _Mapping]] = ..., sampled_logprobs: _Optional[_Union[Array, _Mapping]] = ..., candidate_logprobs: _Optional[_Union[Array, _Mapping]] = ..., log_tail: _Optional[_Union[Array, _Mapping]] = ..., log_support_tail: _Optional[_Union[Array, _Mapping]] = ..., entropy: _Optional[_Union[Array, _Mapping]] = ..., log_normalizer: _Optional[_Union[Array, _Mapping]] = ..., echo: _Optional[_Union[Echo, _Mapping]] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ...) -> None: ...

class Echo(_message.Message):
    __slots__ = ("request_digest", "model", "model_revision", "temperature", "compute_dtype")
    REQUEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MODEL_REVISION_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    request_digest: bytes
    model: str
    model_revision: str
    temperature: float
    compute_dtype: str
    def __init__(self, request_digest: _Optional[bytes] = ..., model: _Optional[str] = ..., model_revision: _Optional[str] = ..., temperature: _Optional[float] = ..., compute_dtype: _Optional[str] = ...) -> None: ...

class Timings(_message.Message):
    __slots__ = ("queue_wait_ms", "engine_ms", "batch_sequences")
    QUEUE_WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    ENGINE_MS_FIELD_NUMBER: _ClassVar[int]
    BATCH_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    queue_wait_ms: float
    engine_ms: float
    batch_sequences: int
    def __init__(self, queue_wait_ms: _Optional[float] = ..., engine_ms: _Optional[float] = ..., batch_sequences: _Optional[int] = ...) -> None: ...

class GetTeacherRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class GetTeacherResponse(_message.Message):
    __slots__ = ("model", "model_revision", "vocabulary_size", "vocabulary_digest", "max_sequence_tokens", "max_top_k", "max_candidates", "min_temperature", "max_temperature", "max_response_bytes", "compute_dtype", "engine", "server_version")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MODEL_REVISION_FIELD_NUMBER: _ClassVar[int]
    VOCABULARY_SIZE_FIELD_NUMBER: _ClassVar[int]
    VOCABULARY_DIGEST_FIELD_NUMBER: _ClassVar[int]
    MAX_SEQUENCE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOP_K_FIELD_NUMBER: _ClassVar[int]
    MAX_CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    MIN_TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    MAX_TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    MAX_RESPONSE_BYTES_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
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
    def __init__(self, model: _Optional[str] = ..., model_revision: _Optional[str] = ..., vocabulary_size: _Optional[int] = ..., vocabulary_digest: _Optional[str] = ..., max_sequence_tokens: _Optional[int] = ..., max_top_k: _Optional[int] = ..., max_candidates: _Optional[int] = ..., min_temperature: _Optional[float] = ..., max_temperature: _Optional[float] = ..., max_response_bytes: _Optional[int] = ..., compute_dtype: _Optional[str] = ..., engine: _Optional[str] = ..., server_version: _Optional[str] = ...) -> None: ...
