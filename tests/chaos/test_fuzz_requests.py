"""A server and everything bad that can be sent to it: each by its name, at random, and too much of it.

After every part the server is as it was. `STILLHOUSE_CHAOS=full` makes the random parts and the floods ten times
longer.
"""

import asyncio
import contextlib
import dataclasses
import math
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2

from benchmarks.synthetic_server import VOCABULARY, describe, synthetic_scores
from stillhouse.codec import ScoreTask, decode_request, decode_response, encode_request
from stillhouse.errors import BY_REASON, StillhouseError
from stillhouse.v1 import teacher_pb2 as pb
from tests.chaos import limited_server
from tests.chaos.attacked import (
    CHECK,
    GET_TEACHER,
    INTERNALS,
    REFLECTION,
    SCORE,
    WATCH,
    Attacked,
    Ending,
    RawClient,
    attacked,
    ending_of,
    frame,
    wait_for,
)
from tests.fakes import ROOT, child_environment

TIMES = 10 if os.environ.get("STILLHOUSE_CHAOS") == "full" else 1
MAX_GROWTH_BYTES = 100 * 2**20
QUEUE_BYTES = 2**26
MOST_UNREAD_BYTES = 2 * (limited_server.UNSENT_BYTES + QUEUE_BYTES)
TEACHER = describe("synthetic", "r1")
INT32, FLOAT32, FLOAT16 = pb.ELEMENT_TYPE_INT32, pb.ELEMENT_TYPE_FLOAT32, pb.ELEMENT_TYPE_FLOAT16


def task_of(seed: int, length: int = 20, start: int = 5, *, k: int = 4, m: int = 3) -> ScoreTask:
    rng = np.random.default_rng(seed)
    return ScoreTask(
        model="",
        token_ids=rng.integers(0, VOCABULARY, length).astype(np.int32),
        score_start=start,
        top_k=k,
        candidate_ids=rng.integers(0, VOCABULARY, (length - start, m)).astype(np.int32) if m else None,
    )


def is_right(data: bytes, answer: bytes) -> bool:
    """Whether `answer` holds, bit for bit, the scores of the request with these bytes."""
    task = decode_request(pb.ScoreRequest.FromString(data))
    # An array of no candidates a position comes back as none at all.
    scores = decode_response(task, pb.ScoreResponse.FromString(answer))
    wanted = synthetic_scores(task, TEACHER)
    for field in ("top_ids", "top_logprobs", "sampled_logprobs", "candidate_logprobs", "entropy", "log_normalizer"):
        got, want = getattr(scores, field), getattr(wanted, field)
        if (got is None) != (want is None):
            return False
        if want is None:
            continue
        if task.half_precision and field in ("top_logprobs", "candidate_logprobs"):
            want = want.astype(np.float16).astype(np.float32)
        if not np.array_equal(got, want):
            return False
    return True


GOOD = encode_request(task_of(0)).SerializeToString()


@dataclasses.dataclass(frozen=True)
class Calm:
    """The server before anybody did it anything."""

    memory_bytes: int
    descriptors: int


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Attacked, Calm]]:
    options = ("--tokens-per-s", 5e6, "--overhead-ms", 1, "--max-queue-tokens", 2**16, "--max-queue-bytes", QUEUE_BYTES)
    with attacked(
        tmp_path_factory.mktemp("fuzz"),
        *options,
        *("--log-level", "info", "--health-listen", "127.0.0.1:0"),
        module="tests.chaos.limited_server",
    ) as server:
        for _ in range(3):  # first calls load and open what stays
            check_is_well(server)
        yield server, Calm(server.memory_bytes, server.descriptors)


@pytest.fixture
def server(calm: tuple[Attacked, Calm]) -> Iterator[Attacked]:
    """The server; after the test it must be as it was before all."""
    running, before = calm
    yield running
    wait_for(lambda: running.metric("requests_in_flight") == 0, "the last request")
    assert running.metric("pending_tokens") == running.metric("pending_bytes") == 0
    assert running.metric("running_tokens") == 0
    wait_for(lambda: running.descriptors <= before.descriptors + 2, f"descriptors, now {running.descriptors}", 30.0)
    check_is_well(running)
    grown = running.memory_bytes - before.memory_bytes
    assert grown < MAX_GROWTH_BYTES, f"{grown >> 20} MiB more than at the start"
    assert "Traceback" not in running.log


def check_is_well(server: Attacked) -> None:
    """A right answer, at once and bit for bit; ready and alive."""
    own = (("grpc.use_local_subchannel_pool", 1),)  # a connection of its own, not that of a channel that just closed
    with grpc.insecure_channel(server.address, own) as channel:
        assert is_right(GOOD, channel.unary_unary(SCORE)(GOOD, timeout=20))
        assert state_of(channel) == health_pb2.HealthCheckResponse.SERVING
    with grpc.insecure_channel(f"127.0.0.1:{server.said['health_port']}") as channel:
        assert state_of(channel) == health_pb2.HealthCheckResponse.SERVING
        assert state_of(channel, "liveness") == health_pb2.HealthCheckResponse.SERVING


def state_of(channel: grpc.Channel, service: str = "") -> int:
    request = health_pb2.HealthCheckRequest(service=service).SerializeToString()
    return health_pb2.HealthCheckResponse.FromString(channel.unary_unary(CHECK)(request, timeout=20)).status


@pytest.fixture
def channel(server: Attacked) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as opened:
        yield opened


# a. By name


def changed(**fields: Any) -> bytes:
    """The good request with other fields; None unsets one."""
    request = pb.ScoreRequest.FromString(GOOD)
    for name, value in fields.items():
        if value is None:
            request.ClearField(name)
        elif isinstance(value, pb.Array):
            getattr(request, name).CopyFrom(value)
        else:
            setattr(request, name, value)
    return request.SerializeToString()


def array(dtype: Any, shape: tuple[int, ...], data: bytes) -> pb.Array:
    return pb.Array(dtype=dtype, shape=shape, data=data)


def ids(*values: int) -> pb.Array:
    return array(INT32, (len(values),), struct.pack(f"<{len(values)}i", *values))


def candidates(rows: int, m: int, value: int = 0) -> pb.Array:
    return array(INT32, (rows, m), struct.pack("<i", value) * rows * m)


def nested_groups(depth: int) -> bytes:
    return b"\xa3\x06" * depth + b"\xa4\x06" * depth  # field 100 in itself


# name: (request bytes, reason, field)
BAD: dict[str, tuple[bytes, str, str]] = {
    "nothing": (b"", "MALFORMED_ARRAY", "token_ids"),
    "no ids": (changed(token_ids=None), "MALFORMED_ARRAY", "token_ids"),
    "float32 ids": (changed(token_ids=array(FLOAT32, (2,), bytes(8))), "MALFORMED_ARRAY", "token_ids"),
    "float16 ids": (changed(token_ids=array(FLOAT16, (2,), bytes(4))), "MALFORMED_ARRAY", "token_ids"),
    "ids of no type": (changed(token_ids=array(0, (2,), bytes(8))), "MALFORMED_ARRAY", "token_ids"),
    "ids of unknown type": (changed(token_ids=array(99, (2,), bytes(8))), "MALFORMED_ARRAY", "token_ids"),
    "ids of negative type": (changed(token_ids=array(-1, (2,), bytes(8))), "MALFORMED_ARRAY", "token_ids"),
    "ids of rank 0": (changed(token_ids=array(INT32, (), bytes(4))), "MALFORMED_ARRAY", "token_ids"),
    "ids of rank 2": (changed(token_ids=array(INT32, (2, 1), bytes(8))), "MALFORMED_ARRAY", "token_ids"),
    "ids of rank 100000": (changed(token_ids=array(INT32, (1,) * 100_000, bytes(4))), "MALFORMED_ARRAY", "token_ids"),
    "a byte too few": (changed(token_ids=array(INT32, (2,), bytes(7))), "MALFORMED_ARRAY", "token_ids"),
    "a byte too many": (changed(token_ids=array(INT32, (2,), bytes(9))), "MALFORMED_ARRAY", "token_ids"),
    "an element too few": (changed(token_ids=array(INT32, (20,), bytes(76))), "MALFORMED_ARRAY", "token_ids"),
    "shape without bytes": (changed(token_ids=array(INT32, (2**32 - 1,), b"")), "MALFORMED_ARRAY", "token_ids"),
    "bytes that wrap at 32 bits": (changed(token_ids=array(INT32, (2**30,), b"")), "MALFORMED_ARRAY", "token_ids"),
    "empty ids": (changed(token_ids=ids()), "INVALID_REQUEST", "token_ids"),
    "one id": (changed(token_ids=ids(7)), "INVALID_REQUEST", "token_ids"),
    "too long": (changed(token_ids=ids(*[1] * 8193)), "SEQUENCE_TOO_LONG", "token_ids"),
    "far too long": (changed(token_ids=ids(*[1] * 500_000)), "SEQUENCE_TOO_LONG", "token_ids"),
    "negative id": (changed(token_ids=ids(*[1] * 19, -1)), "TOKEN_ID_OUT_OF_RANGE", "token_ids"),
    "smallest id": (changed(token_ids=ids(*[1] * 19, -(2**31))), "TOKEN_ID_OUT_OF_RANGE", "token_ids"),
    "first id beyond": (changed(token_ids=ids(*[1] * 19, VOCABULARY)), "TOKEN_ID_OUT_OF_RANGE", "token_ids"),
    "largest id": (changed(token_ids=ids(2**31 - 1, *[1] * 19)), "TOKEN_ID_OUT_OF_RANGE", "token_ids"),
    "start 0": (changed(score_start=0), "INVALID_REQUEST", "score_start"),
    "start at the end": (changed(score_start=20), "INVALID_REQUEST", "score_start"),
    "largest start": (changed(score_start=2**32 - 1), "INVALID_REQUEST", "score_start"),
    "k above": (changed(top_k=257), "TOP_K_OUT_OF_RANGE", "top_k"),
    "largest k": (changed(top_k=2**32 - 1), "TOP_K_OUT_OF_RANGE", "top_k"),
    "too many candidates": (changed(candidate_ids=candidates(15, 65)), "CANDIDATES_OUT_OF_RANGE", "candidate_ids"),
    "a row too few": (changed(candidate_ids=candidates(14, 3)), "MALFORMED_ARRAY", "candidate_ids"),
    "a row too many": (changed(candidate_ids=candidates(16, 3)), "MALFORMED_ARRAY", "candidate_ids"),
    "candidates of rank 1": (changed(candidate_ids=array(INT32, (15,), bytes(60))), "MALFORMED_ARRAY", "candidate_ids"),
    "candidates of rank 3": (
        changed(candidate_ids=array(INT32, (15, 1, 1), bytes(60))),
        "MALFORMED_ARRAY",
        "candidate_ids",
    ),
    "float candidates": (changed(candidate_ids=array(FLOAT32, (15, 1), bytes(60))), "MALFORMED_ARRAY", "candidate_ids"),
    "an empty array": (changed(candidate_ids=pb.Array()), "MALFORMED_ARRAY", "candidate_ids"),
    "bytes that wrap at 64 bits": (
        changed(candidate_ids=array(INT32, (2**31, 2**31), b"")),
        "MALFORMED_ARRAY",
        "candidate_ids",
    ),
    "largest shape": (
        changed(candidate_ids=array(INT32, (2**32 - 1, 2**32 - 1), bytes(4))),
        "MALFORMED_ARRAY",
        "candidate_ids",
    ),
    "many rows of nothing": (
        changed(candidate_ids=array(INT32, (2**32 - 1, 0), b"")),
        "MALFORMED_ARRAY",
        "candidate_ids",
    ),
    "no rows of many": (changed(candidate_ids=array(INT32, (0, 2**32 - 1), b"")), "MALFORMED_ARRAY", "candidate_ids"),
    "negative candidate": (changed(candidate_ids=candidates(15, 3, -1)), "TOKEN_ID_OUT_OF_RANGE", "candidate_ids"),
    "candidate beyond": (
        changed(candidate_ids=candidates(15, 3, VOCABULARY)),
        "TOKEN_ID_OUT_OF_RANGE",
        "candidate_ids",
    ),
    "temperature NaN": (changed(temperature=math.nan), "TEMPERATURE_OUT_OF_RANGE", "temperature"),
    "temperature inf": (changed(temperature=math.inf), "TEMPERATURE_OUT_OF_RANGE", "temperature"),
    "temperature -inf": (changed(temperature=-math.inf), "TEMPERATURE_OUT_OF_RANGE", "temperature"),
    "temperature 0": (changed(temperature=0.0), "TEMPERATURE_OUT_OF_RANGE", "temperature"),
    "temperature -0": (changed(temperature=-0.0), "TEMPERATURE_OUT_OF_RANGE", "temperature"),
    "temperature below 0": (changed(temperature=-1.0), "TEMPERATURE_OUT_OF_RANGE", "temperature"),
    "tiny temperature": (changed(temperature=5e-324), "TEMPERATURE_OUT_OF_RANGE", "temperature"),
    "huge temperature": (changed(temperature=1e300), "TEMPERATURE_OUT_OF_RANGE", "temperature"),
    "scores in int32": (changed(logprob_dtype=INT32), "MALFORMED_ARRAY", "logprob_dtype"),
    "scores of unknown type": (changed(logprob_dtype=77), "MALFORMED_ARRAY", "logprob_dtype"),
    "scores of negative type": (changed(logprob_dtype=-1), "MALFORMED_ARRAY", "logprob_dtype"),
    "priority above": (changed(priority=101), "INVALID_REQUEST", "priority"),
    "priority below": (changed(priority=-101), "INVALID_REQUEST", "priority"),
    "smallest priority": (changed(priority=-(2**31)), "INVALID_REQUEST", "priority"),
    "another model": (changed(model="elm"), "UNKNOWN_MODEL", "model"),
    "a model in capitals": (changed(model="Synthetic"), "UNKNOWN_MODEL", "model"),
    "a model with control characters": (changed(model="a\n\0\x1b[31mb\r\u202e\ufeff"), "UNKNOWN_MODEL", "model"),
    "a model that is a path": (changed(model="../../etc/passwd"), "UNKNOWN_MODEL", "model"),
    "a model that is a template": (changed(model="{0.__class__} %s %n ${x}"), "UNKNOWN_MODEL", "model"),
    "a model of astral characters": (changed(model="\U0001f525" * 5000), "UNKNOWN_MODEL", "model"),
    "a model of a megabyte": (changed(model="x" * 2**20), "UNKNOWN_MODEL", "model"),
    "another revision": (changed(expected_model_revision="r2"), "MODEL_REVISION_MISMATCH", "expected_model_revision"),
    "another precision": (
        changed(expected_compute_dtype="bfloat16"),
        "MODEL_REVISION_MISMATCH",
        "expected_compute_dtype",
    ),
    "another vocabulary": (
        changed(expected_vocabulary_digest="0" * 64),
        "VOCABULARY_MISMATCH",
        "expected_vocabulary_digest",
    ),
    "a revision of a megabyte": (
        changed(expected_model_revision="\n" * 2**20),
        "MODEL_REVISION_MISMATCH",
        "expected_model_revision",
    ),
    "model of no UTF-8": (GOOD + b"\x0a\x02\xff\xfe", "INVALID_REQUEST", "request"),
    "revision of half a character": (GOOD + b"\x3a\x01\xc3", "INVALID_REQUEST", "request"),
    "model of surrogates": (GOOD + b"\x0a\x03\xed\xa0\x80", "INVALID_REQUEST", "request"),
    "last byte missing": (GOOD[:-1], "INVALID_REQUEST", "request"),
    "ten bytes": (GOOD[:10], "INVALID_REQUEST", "request"),
    "all ones": (b"\xff" * 1000, "INVALID_REQUEST", "request"),
    "zeros": (bytes(1000), "INVALID_REQUEST", "request"),
    "HTTP/1.1 as a message": (b"GET / HTTP/1.1\r\n\r\n", "INVALID_REQUEST", "request"),
    "a varint of 11 bytes": (b"\x18" + b"\xff" * 10 + b"\x01", "INVALID_REQUEST", "request"),
    "a length beyond the end": (b"\x12\xff\xff\xff\xff\x07abc", "INVALID_REQUEST", "request"),
    "an end without a start": (GOOD + b"\xa4\x06", "INVALID_REQUEST", "request"),
    "a start without an end": (GOOD + b"\xa3\x06", "INVALID_REQUEST", "request"),
    "groups in groups in groups": (GOOD + nested_groups(10_000), "INVALID_REQUEST", "request"),
    "ids twice": (GOOD + changed(candidate_ids=None), "MALFORMED_ARRAY", "token_ids"),  # protobuf joins them
}

GOOD_AFTER_ALL: dict[str, bytes] = {
    "an unknown field": GOOD + b"\xfa\x01\x03abc",
    "a megabyte of an unknown field": GOOD + b"\xfa\x01\x80\x80\x40" + bytes(2**20),
    "a million unknown fields": GOOD + b"\xf8\x01\x01" * 1_000_000,
    "groups in groups": GOOD + nested_groups(50),
    "a known field of another kind": GOOD + b"\x08\x05",
    "a scalar twice": GOOD + b"\x20\x02",
    "no temperature": changed(temperature=None),
    "k of none": changed(top_k=0),
    "candidates of none": changed(candidate_ids=candidates(15, 0)),
    "highest priority": changed(priority=100),
    "lowest priority": changed(priority=-100),
    "half precision": changed(logprob_dtype=FLOAT16),
    "all pins": changed(
        model="synthetic",
        expected_model_revision="r1",
        expected_compute_dtype="float32",
        expected_vocabulary_digest="synthetic",
    ),
    "longest": encode_request(task_of(1, 8192, 8000, k=256, m=64)).SerializeToString(),
}

CODES = {reason: kind.code.name for reason, kind in BY_REASON.items()}


def call(channel: grpc.Channel, data: bytes, path: str = SCORE, **options: Any) -> tuple[Ending, bytes]:
    try:
        return Ending("OK"), channel.unary_unary(path)(data, **{"timeout": 20, **options})
    except grpc.RpcError as error:
        return ending_of(error), b""


def test_every_named_bad_request_gets_its_reason_and_the_field_at_fault(
    server: Attacked, channel: grpc.Channel
) -> None:
    for name, (data, reason, field) in BAD.items():
        ending, _ = call(channel, data)
        assert (ending.code, ending.reason, dict(ending.fields)["field"]) == (CODES[reason], reason, field), name
        assert not INTERNALS.search(ending.everything), ending
        assert len(ending.text) < 1100, name
    assert len(BAD) >= 30


def test_what_only_looks_bad_is_answered_right(server: Attacked, channel: grpc.Channel) -> None:
    for name, data in GOOD_AFTER_ALL.items():
        ending, answer = call(channel, data)
        assert ending == Ending("OK"), name
        assert is_right(data, answer), name


def test_get_teacher_and_health_and_reflection_refuse_bytes_that_are_no_message(
    server: Attacked, channel: grpc.Channel
) -> None:
    refused = ("INVALID_ARGUMENT", "INVALID_REQUEST")
    for data in (b"\xff\xff", b"\x0a\x02\xff\xfe", b"\x0a\x7f", nested_groups(10_000)):
        for path in (GET_TEACHER, CHECK):
            ending, _ = call(channel, data, path)
            assert (ending.code, ending.reason) == refused, (path, data[:10])
        for stream in (
            channel.unary_stream(WATCH)(data, timeout=20),
            channel.stream_stream(REFLECTION)(iter([data]), timeout=20),
        ):
            with pytest.raises(grpc.RpcError) as raised:
                next(stream)
            ending = ending_of(raised.value)
            assert (ending.code, ending.reason) == refused
            assert not INTERNALS.search(ending.everything)


# name: (what RawClient.start takes, body, codes that are right, reason). Codes with INTERNAL are gRPC's own, from below
# this program, for what no gRPC client sends; their texts say nothing of Python.
Start = dict[str, Any]
ON_THE_WIRE: dict[str, tuple[Start, bytes, set[str], str]] = {
    "gzip of garbage": (
        {"replace": {b"grpc-encoding": b"gzip"}},
        frame(b"garbage", compressed=True),
        {"INTERNAL"},
        "",
    ),
    "compressed by nothing": ({}, frame(GOOD, compressed=True), {"INTERNAL"}, ""),
    "unknown compression": (
        {"replace": {b"grpc-encoding": b"br"}},
        frame(GOOD, compressed=True),
        {"INTERNAL", "UNIMPLEMENTED"},
        "",
    ),
    "a frame of unknown flags": ({}, b"\x07" + frame(GOOD)[1:], {"INVALID_ARGUMENT"}, "INVALID_REQUEST"),
    "a frame longer than the body": ({}, frame(GOOD, length=len(GOOD) + 9), {"INVALID_ARGUMENT"}, "INVALID_REQUEST"),
    "a frame shorter than the body": ({}, frame(GOOD, length=len(GOOD) - 9), {"INVALID_ARGUMENT"}, "INVALID_REQUEST"),
    "a frame of 4 GiB": ({}, frame(GOOD, length=2**32 - 1), {"RESOURCE_EXHAUSTED"}, ""),
    "a message over the limit": ({}, frame(bytes(9 * 2**20)), {"RESOURCE_EXHAUSTED"}, ""),
    "half a frame's head": ({}, b"\0\0", {"INVALID_ARGUMENT"}, "INVALID_REQUEST"),
    "no message": ({}, b"", {"INVALID_ARGUMENT"}, "INVALID_REQUEST"),
    "a stream of two messages": ({}, frame(GOOD) * 2, {"OK"}, ""),
    "a stream of a thousand": ({}, frame(GOOD) * 1000, {"OK", "RST-0"}, ""),
    "content-type of JSON": ({"replace": {b"content-type": b"application/json"}}, frame(GOOD), {"OK"}, ""),
    "no content-type": ({"replace": {b"content-type": None}}, frame(GOOD), {"OK"}, ""),
    "GET": ({"replace": {b":method": b"GET"}}, frame(GOOD), {"RST-2"}, ""),
    "a method of nothing": ({"replace": {b":method": b""}}, frame(GOOD), {"INTERNAL", "RST-2"}, ""),
    "no path": ({"replace": {b":path": None}}, frame(GOOD), {"RST-2"}, ""),
    "no authority": ({"replace": {b":authority": None}}, frame(GOOD), {"RST-2"}, ""),
    "no te": ({"replace": {b"te": None}}, frame(GOOD), {"RST-2"}, ""),
    "an empty path": ({"path": ""}, frame(GOOD), {"UNIMPLEMENTED"}, ""),
    "a path of nothing": ({"path": "/"}, frame(GOOD), {"UNIMPLEMENTED"}, ""),
    "a path of control characters": ({"path": "/\0\x01\n"}, frame(GOOD), {"UNIMPLEMENTED"}, ""),
    "a path upwards": ({"path": f"/..{SCORE}"}, frame(GOOD), {"UNIMPLEMENTED"}, ""),
    "a path of 10 kB": ({"path": "/" + "x" * 10_000}, frame(GOOD), {"UNIMPLEMENTED"}, ""),
    "a path with a query": ({"path": SCORE + "?admin=1"}, frame(GOOD), {"UNIMPLEMENTED"}, ""),
    "no deadline": ({}, frame(GOOD), {"OK"}, ""),
    "a deadline of 0": ({"replace": {b"grpc-timeout": b"0n"}}, frame(GOOD), {"DEADLINE_EXCEEDED"}, ""),
    "a negative deadline": ({"replace": {b"grpc-timeout": b"-1S"}}, frame(GOOD), {"INTERNAL"}, ""),
    "a deadline of words": ({"replace": {b"grpc-timeout": b"soon"}}, frame(GOOD), {"INTERNAL"}, ""),
    "a deadline in a million years": ({"replace": {b"grpc-timeout": b"99999999H"}}, frame(GOOD), {"OK"}, ""),
    "a request id of control characters": (
        {"metadata": ((b"stillhouse-request-id", b"a\x01\x1b[31m code=OK"),)},
        frame(GOOD),
        {"OK"},
        "",
    ),
    "a request id of two lines": ({"metadata": ((b"stillhouse-request-id", b"a\nb"),)}, frame(GOOD), {"OK"}, ""),
    "a request id of no UTF-8": ({"metadata": ((b"stillhouse-request-id", b"\xff\xfe"),)}, frame(GOOD), {"OK"}, ""),
    "an attempt of words": ({"metadata": ((b"stillhouse-attempt", b"-1e9"),)}, frame(GOOD), {"OK"}, ""),
    "1,000 keys": (
        {"metadata": tuple((f"k{key}".encode(), b"v") for key in range(1000))},
        frame(GOOD),
        {"OK", "RESOURCE_EXHAUSTED"},
        "",
    ),
    "metadata of 100 kB": (
        {"metadata": ((b"k", b"vw" * 50_000),)},
        frame(GOOD),
        {"OK", "RESOURCE_EXHAUSTED"},
        "",
    ),
    "binary metadata that is none": ({"metadata": ((b"x-bin", b"!!!"),)}, frame(GOOD), {"INTERNAL"}, ""),
    "a key of nothing": ({"metadata": ((b"", b"v"),)}, frame(GOOD), {"INTERNAL"}, ""),
    "a key with a blank": ({"metadata": ((b"a b", b"v"),)}, frame(GOOD), {"INTERNAL"}, ""),
    "a key in capitals": ({"metadata": ((b"Key", b"v"),)}, frame(GOOD), {"INTERNAL"}, ""),
    "a second path": ({"metadata": ((b":path", b"/x"),)}, frame(GOOD), {"UNIMPLEMENTED", "INTERNAL"}, ""),
    "an unknown pseudo-header": ({"metadata": ((b":x", b"v"),)}, frame(GOOD), {"INTERNAL"}, ""),
    "a status of its own": ({"metadata": ((b"grpc-status", b"0"),)}, frame(GOOD), {"OK"}, ""),
}


def test_every_named_bad_call_on_the_wire_ends_as_the_table_says(server: Attacked) -> None:
    for name, (start, body, codes, reason) in ON_THE_WIRE.items():
        with RawClient(server.port) as client:
            stream = client.start(**start)
            client.send(stream, body)
            answer = client.wait(stream)
        assert answer.ending.code in codes, (name, answer.ending)
        # gRPC tells a message that broke off as none at all or, now and then, as one of no bytes.
        broken = reason == "INVALID_REQUEST" and answer.ending.reason == "MALFORMED_ARRAY"
        assert answer.ending.reason == reason or broken, name
        assert not INTERNALS.search(answer.ending.everything), answer.ending
        assert answer.ending.code != "OK" or is_right(GOOD, answer.body[5:]), name
    assert "\x1b" not in server.log
    for line in server.log.splitlines():
        assert line.count("code=") <= 1, line


NOT_GRPC = {
    "HTTP/1.1": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "HTTP/1.1 that asks for HTTP/2": b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: h2c\r\nHTTP2-Settings: \r\n\r\n",
    "TLS": bytes.fromhex("1603010200010001fc0303") + bytes(505),
    "SSH": b"SSH-2.0-OpenSSH_9.2\r\n",
    "PROXY": b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n",
    "all bytes": bytes(range(256)) * 40,
    "HTTP/2, then all bytes": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(range(256)) * 40,
    "HTTP/2, then a frame of 16 MiB": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff\xff\xff\x00\x00\x00\x00\x00\x01",
    "HTTP/2, then data of no stream": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    + bytes.fromhex("000000040000000000")
    + b"\x00\x00\x04\x00\x01\x00\x00\x00\x07abcd" * 10,
}


def test_bytes_that_are_no_grpc_are_cut_off_and_learn_nothing(server: Attacked) -> None:
    for name, data in NOT_GRPC.items():
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
            connection.sendall(data)
            got = b""
            with contextlib.suppress(ConnectionResetError):
                if name.endswith("no stream"):
                    connection.shutdown(socket.SHUT_WR)  # such data is ignored, as HTTP/2 wants it just after a reset
                while piece := connection.recv(2**16):
                    got += piece
        assert not INTERNALS.search(got.decode("latin-1")), name
        assert b"stillhouse" not in got
        assert len(got) < 10_000


def test_pings_settings_and_endless_headers_end_the_connection_or_change_nothing(server: Attacked) -> None:
    def flood(frames: bytes) -> None:
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
            connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes.fromhex("000000040000000000"))
            connection.setblocking(False)
            for _ in range(200 * TIMES):  # whether it is read or refused is the server's to choose
                with contextlib.suppress(BlockingIOError, ConnectionError):
                    connection.send(frames)

    flood(bytes.fromhex("000008060000000000") + bytes(8))  # a ping
    flood((bytes.fromhex("000006040000000000") + bytes.fromhex("000400000000")) * 100)  # settings: no window
    flood(bytes.fromhex("000400010000000001") + b"\x00" * 1024)  # headers that do not end
    flood((bytes.fromhex("000400090000000001") + b"\x00" * 1024) * 10)  # and go on


# b. At random


def mutations(seed: int) -> Iterator[bytes]:
    """Well-formed requests, damaged: endless, the same for the same seed."""
    rng = random.Random(seed)
    while True:
        length = rng.randint(2, 300)
        start = rng.randint(1, length - 1)
        task = task_of(rng.getrandbits(30), length, start, k=rng.choice((0, 1, 64)), m=rng.choice((0, 2)))
        task = dataclasses.replace(
            task,
            temperature=rng.choice((1.0, 0.5, 2.0)),
            half_precision=rng.random() < 0.5,
            model=rng.choice(("", "synthetic")),
            expected_model_revision=rng.choice(("", "r1")),
            priority=rng.randint(-100, 100),
        )
        request = encode_request(task)
        for _ in range(rng.randint(0, 2)):
            edit(request, rng)
        data = bytearray(request.SerializeToString())
        for _ in range(rng.choice((0, 0, 1, 1, 2, 5))):
            data = damage(data, rng)
        yield bytes(data)


def edit(request: pb.ScoreRequest, rng: random.Random) -> None:
    """Gives one field a value at random."""
    name = rng.choice([field.name for field in request.DESCRIPTOR.fields])
    odd_int = rng.choice((0, 1, 2, 19, 20, 255, 256, 2**16, 2**31 - 1))
    if name in ("token_ids", "candidate_ids"):
        part = getattr(request, name)
        match rng.randrange(4):
            case 0:
                part.dtype = rng.choice((0, 1, 2, 3, 4, 99))
            case 1:
                part.shape[:] = [rng.choice((0, 1, odd_int, 2**32 - 1)) for _ in range(rng.randint(0, 4))]
            case 2:
                part.data = part.data[: rng.randint(0, len(part.data))]
            case _:
                part.data = rng.randbytes(len(part.data))
    elif name == "temperature":
        request.temperature = rng.choice((struct.unpack("<d", rng.randbytes(8))[0], 1e-3, 1e3, 3.5))
    elif name == "logprob_dtype":
        request.logprob_dtype = rng.choice((0, 1, 2, 3, 4, -5))  # type: ignore[assignment]
    elif name == "priority":
        request.priority = rng.choice((odd_int, -odd_int))
    elif name in ("score_start", "top_k"):
        setattr(request, name, odd_int)
    else:
        setattr(request, name, "".join(chr(rng.choice((0, 10, 65, 0x202E, 0x1F525))) for _ in range(rng.randint(0, 9))))


def damage(data: bytearray, rng: random.Random) -> bytearray:
    """Damages bytes at one place."""
    if not data:
        return data
    first, second = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
    match rng.randrange(7):
        case 0:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        case 1:
            data[rng.randrange(len(data))] = rng.randrange(256)
        case 2:
            del data[first:]
        case 3:
            del data[first : first + rng.randint(1, 8)]
        case 4:
            data[first:first] = rng.randbytes(rng.randint(1, 8))
        case 5:
            data[first:first] = data[first:second]
        case _:
            data += data[first:second]
    return data


def judged(data: bytes, ending: Ending, answer: bytes) -> str:
    """The reason of a refusal that may be, or "" for an answer that is right; fails the test for all else."""
    if ending.code == "OK":
        assert is_right(data, answer), data.hex()
        return ""
    assert ending.code not in ("UNKNOWN", "INTERNAL"), (ending, data.hex())
    assert ending.reason in BY_REASON and CODES[ending.reason] == ending.code, (ending, data.hex())
    assert issubclass(BY_REASON[ending.reason], StillhouseError)
    assert not INTERNALS.search(ending.text), (ending, data.hex())
    return ending.reason


@pytest.mark.parametrize("seed", range(4))
def test_damaged_requests_are_answered_right_or_refused_by_a_reason_of_the_table(server: Attacked, seed: int) -> None:
    async def run() -> Counter[str]:
        found: Counter[str] = Counter()
        source = mutations(seed)
        async with grpc.aio.insecure_channel(server.address) as channel:

            async def some() -> None:
                for _ in range(125 * TIMES):
                    data = next(source)
                    try:
                        answer = await channel.unary_unary(SCORE)(data, timeout=60)
                    except grpc.RpcError as error:
                        ending, answer = ending_of(error), b""
                    else:
                        ending = Ending("OK")
                    found[judged(data, ending, answer)] += 1

            await asyncio.gather(*(some() for _ in range(16)))
        return found

    found = asyncio.run(run())
    print(dict(found))
    assert sum(found.values()) == 2000 * TIMES
    # The fuzzer is worth something: it gets through, and it is refused in many ways.
    assert found[""] > 100 * TIMES
    assert len(found) >= 9, found


# c. Too much


def test_2000_calls_at_once_over_one_connection_are_answered_right_or_told_to_come_again(server: Attacked) -> None:
    requests = [encode_request(task_of(seed, 200, 100)).SerializeToString() for seed in range(2000)]

    async def one(channel: grpc.aio.Channel, data: bytes) -> str:
        try:
            answer = await channel.unary_unary(SCORE)(data, timeout=60)
        except grpc.RpcError as error:
            ending = ending_of(error)
            assert not INTERNALS.search(ending.everything)
            # gRPC itself takes back what it has too much of, with nothing but the code.
            return ending.reason or ending.code
        assert is_right(data, answer)
        return ""

    async def run() -> Counter[str]:
        async with grpc.aio.insecure_channel(server.address) as channel:
            return Counter(await asyncio.gather(*(one(channel, data) for data in requests)))

    for _ in range(TIMES):
        found = asyncio.run(run())
        # Late is a call that was being read while the machine paused for the two seconds of `RECEIVE_S`.
        assert found.keys() <= {"", "OVERLOADED", "CANCELLED", "DEADLINE_EXCEEDED"}, found
        assert found[""] >= limited_server.REQUESTS // 2, found


def test_hundreds_of_connections_that_say_nothing_are_closed_in_the_end_and_stop_nobody(server: Attacked) -> None:
    opening = [b"", b"PRI * HT", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x00" * 3]
    with contextlib.ExitStack() as stack:
        before = server.descriptors
        for number in range(400 if TIMES == 1 else 900):  # a process may have 1024
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=20))
            connection.sendall(opening[number % len(opening)])
        check_is_well(server)
        # Those that never said HTTP/2 are cut off by the handshake's time limit, 10 s.
        wait_for(lambda: server.descriptors < before + 20, f"the server to close, has {server.descriptors}", 30.0)


def test_calls_that_are_taken_back_at_once_leave_nothing(server: Attacked) -> None:
    logged = len(server.log)
    for _ in range(TIMES):
        for body in (b"", frame(GOOD)[:50], frame(GOOD)):
            with RawClient(server.port) as client:
                for number in range(1500):
                    stream = client.start()
                    if body:
                        client.send(stream, body, end=False)
                    client.reset(stream)
                    if number % 100 == 99:
                        client.socket.settimeout(0.01)
                        with contextlib.suppress(TimeoutError):
                            client.receive()
                        client.socket.settimeout(20)
        check_is_well(server)
    # Two thirds were taken back before there was a request, which is nothing to write down.
    assert server.log[logged:].count("code=CANCELLED") <= 1500 * TIMES


def test_callers_that_hang_up_in_the_middle_leave_nothing(server: Attacked) -> None:
    long = frame(encode_request(task_of(3, 8000, 1, k=256, m=0)).SerializeToString())
    for number in range(60 * TIMES):
        with RawClient(server.port) as client:
            for _ in range(5):
                client.send(client.start(), long)
            if number % 2:  # without a farewell
                client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wait_for(lambda: server.metric("requests_in_flight") == 0, "the calls to end")


def test_answers_that_nobody_reads_are_bounded_and_the_caller_is_refused_more(server: Attacked) -> None:
    large = encode_request(task_of(4, 8000, 4000, k=256, m=0)).SerializeToString()  # answers of 8 MB
    before = server.memory_bytes
    refused = server.counted(reason="OVERLOADED")
    with RawClient(server.port, window=1000) as client:
        for _ in range(40 * TIMES):
            client.send(client.start(), frame(large))
            time.sleep(0.01)
        wait_for(lambda: server.counted(reason="OVERLOADED") > refused, "a refusal")
        # Each answer is there twice, in Python and in gRPC; what was in the queue already is still answered.
        grown = server.memory_bytes - before
        assert grown < MOST_UNREAD_BYTES, f"{grown >> 20} MiB"
    # The limit is the tenant's; here everybody is the same one, and free again once those answers are gone.
    wait_for(lambda: answers(server), "room for an answer")


def answers(server: Attacked) -> bool:
    with grpc.insecure_channel(server.address) as channel:
        return call(channel, GOOD)[0] == Ending("OK")


READS_NOTHING = """
import sys, time
from tests.chaos.attacked import RawClient, frame
client = RawClient(int(sys.argv[1]), receive_buffer=4096)
data = frame(bytes.fromhex(sys.stdin.readline()))
print("go", flush=True)
while True:
    client.send(client.start(), data)
    time.sleep(0.005)
"""


def test_a_client_that_is_stopped_in_the_middle_costs_bounded_memory_and_nobody_else_waits(server: Attacked) -> None:
    large = encode_request(task_of(5, 4000, 2000, k=256, m=0)).SerializeToString()
    before = server.memory_bytes
    child = subprocess.Popen(
        [sys.executable, "-c", READS_NOTHING, str(server.port)],
        cwd=ROOT,
        env=child_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdin and child.stdout
        child.stdin.write(large.hex() + "\n")
        child.stdin.flush()
        assert child.stdout.readline() == "go\n"
        time.sleep(1.0 * min(TIMES, 5))
        child.send_signal(signal.SIGSTOP)
        grown = server.memory_bytes - before
        assert grown < MOST_UNREAD_BYTES, f"{grown >> 20} MiB"
        with grpc.insecure_channel(server.address) as channel:
            assert state_of(channel) == health_pb2.HealthCheckResponse.SERVING
    finally:
        child.kill()
        child.communicate()
    wait_for(lambda: answers(server), "room for an answer")


def test_bodies_that_never_come_cost_little_and_are_given_up(server: Attacked) -> None:
    """gRPC takes a message in before it asks whose it is, unless one asks for it oneself."""
    before, late = server.memory_bytes, server.counted(reason="DEADLINE_EXCEEDED")
    body = frame(bytes(8_000_000), length=8_400_000)
    with RawClient(server.port) as client:
        client.socket.settimeout(0.02)
        sent = dict.fromkeys((client.start() for _ in range(40)), 0)
        end_s = time.monotonic() + 0.75 * limited_server.RECEIVE_S
        while time.monotonic() < end_s:
            for stream in sent:
                sent[stream] += client.push(stream, body[sent[stream] :])
            with contextlib.suppress(TimeoutError):
                client.receive()
        print(f"sent {sum(sent.values()) >> 20} MiB of {len(sent) * len(body) >> 20}")
        grown = server.memory_bytes - before
        assert grown < (limited_server.RECEIVING + 2) * 2**23 + 2**25, f"{grown >> 20} MiB"
        # What waits for its bytes does not stop health, not even on the same connection.
        with grpc.insecure_channel(server.address) as channel:
            assert state_of(channel) == health_pb2.HealthCheckResponse.SERVING
        wait_for(lambda: server.counted(reason="DEADLINE_EXCEEDED") > late, "the time limit")
    wait_for(lambda: answers(server), "a free place")


def test_more_open_calls_than_the_limit_are_refused_and_health_still_answers(server: Attacked) -> None:
    def over() -> float:
        # Those that were admitted are given up one by one, which makes room for others.
        return server.counted(reason="OVERLOADED") + server.counted(reason="DEADLINE_EXCEEDED")

    before = over()
    with RawClient(server.port) as client, grpc.insecure_channel(server.address) as channel:

        def open_calls(number: int) -> None:
            for _ in range(number):
                client.start()

        def refused() -> bool:
            open_calls(100)  # in the places of those that were given up
            ending, _ = call(channel, GOOD, timeout=1.0)
            assert ending.code in ("RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"), ending
            return ending.reason == "OVERLOADED"

        open_calls(limited_server.REQUESTS + 50)
        wait_for(lambda: over() >= before + 50, "the refusals")
        assert state_of(channel) == health_pb2.HealthCheckResponse.SERVING
        wait_for(refused, "a refusal", 60.0)
    wait_for(lambda: answers(server), "a free place")


def test_a_body_that_trickles_in_is_answered_if_it_arrives_in_time(server: Attacked) -> None:
    for _ in range(5):
        with RawClient(server.port) as client:
            stream = client.start()
            body = frame(GOOD)
            for place in range(0, len(body), 10):
                client.send(stream, body[place : place + 10], end=False)
                time.sleep(0.01)
            client.send(stream, b"")
            answer = client.wait(stream)
        if answer.ending.code != "DEADLINE_EXCEEDED":  # this machine paused, and it did not arrive in time
            break
    assert is_right(GOOD, answer.body[5:]), answer.ending


def test_a_watcher_that_does_not_read_delays_no_other_and_not_the_end(tmp_path: Any) -> None:
    with attacked(tmp_path, "--health-listen", "127.0.0.1:0", "--drain-s", 5) as server:
        with RawClient(server.port, window=0) as client:
            for _ in range(20):
                client.send(client.start(WATCH), frame(b""))
            with grpc.insecure_channel(server.address) as channel:
                states = channel.unary_stream(WATCH)(b"", timeout=60)
                assert next(states) == b"\x08\x01"
                server.process.terminate()
                assert next(states) == b"\x08\x02"
                with pytest.raises(grpc.RpcError):
                    next(states)
        assert server.process.wait(20) == 0
