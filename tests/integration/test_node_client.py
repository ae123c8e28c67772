"""A client in another language, written from the contract alone, gets the bytes that ours gets."""

import base64
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillhouse.client import TeacherClient
from stillhouse.codec import Scores, ScoreTask, encode_request
from stillhouse.errors import Overloaded, VocabularyMismatch
from tests.fakes import ROOT, FakeServer, child_environment, wrong_digest

SCRIPT = ROOT / "tests" / "integration" / "node" / "score.mjs"

REQUESTS: list[dict[str, Any]] = [
    {"tokenIds": [3, 1, 4, 1, 5, 9, 2, 6], "scoreStart": 3, "topK": 4},
    {"tokenIds": [3, 1], "scoreStart": 1, "topK": 0},
    {
        "tokenIds": [3, 1, 4, 1, 5, 9],
        "scoreStart": 3,
        "topK": 5,
        "candidateIds": [[1, 2], [0, 18], [7, 7]],
        "temperature": 0.7,
    },
    {
        "tokenIds": [3, 1, 4, 1, 5, 9],
        "scoreStart": 5,
        "topK": 17,
        "candidateIds": [[1, 2, 3]],
        "temperature": 1.7,
        "halfPrecision": True,
    },
]


def node(address: str, request: dict[str, Any]) -> dict[str, Any]:
    """What score.mjs prints."""
    program = shutil.which("node")
    assert program, "node is missing: install Node.js 18 or newer"
    assert (ROOT / "node_modules" / "@grpc" / "grpc-js").is_dir(), "node_modules is missing: run `make deps`"
    ended = subprocess.run(
        [program, SCRIPT, address], input=json.dumps(request), capture_output=True, text=True, timeout=60
    )
    assert ended.stderr == ""
    return json.loads(ended.stdout)


def python(address: str, request: dict[str, Any], model: str, revision: str) -> Scores:
    with TeacherClient([address], model=model) as client:
        return client.score(
            request["tokenIds"],
            score_start=request["scoreStart"],
            top_k=request["topK"],
            candidate_ids=request.get("candidateIds"),
            temperature=request.get("temperature", 1.0),
            half_precision=request.get("halfPrecision", False),
            expected_model_revision=revision,
        )


def assert_same(answer: dict[str, Any], scores: Scores, request: dict[str, Any]) -> None:
    """Bit for bit. float16 of the wire is compared after the exact widening to float32."""
    names = {
        "topIds": "top_ids",
        "topLogprobs": "top_logprobs",
        "sampledLogprobs": "sampled_logprobs",
        "candidateLogprobs": "candidate_logprobs",
        "logTail": "log_tail",
        "logSupportTail": "log_support_tail",
        "entropy": "entropy",
        "logNormalizer": "log_normalizer",
    }
    expected = set(names)
    if not request["topK"]:
        expected -= {"topIds", "topLogprobs"}
    if "candidateIds" not in request:
        expected -= {"candidateLogprobs"}
    assert set(answer["arrays"]) == expected
    for theirs, ours in names.items():
        if theirs not in expected:
            continue
        half = request.get("halfPrecision") and theirs in ("topLogprobs", "candidateLogprobs")
        wire = "<i4" if theirs == "topIds" else "<f2" if half else "<f4"
        values = np.frombuffer(base64.b64decode(answer["arrays"][theirs]), wire)
        mine = getattr(scores, ours)
        assert values.astype(mine.dtype).tobytes() == mine.tobytes(), theirs
        assert values.size == mine.size > 0


@pytest.mark.parametrize("request_", REQUESTS)
def test_node_and_python_get_the_same_bytes_from_the_fake(server: FakeServer, request_: dict[str, Any]) -> None:
    answer = node(server.address, request_)
    assert "error" not in answer
    assert_same(answer, python(server.address, request_, "", "r1"), request_)
    theirs, ours = server.requests
    if "temperature" not in request_:
        ours.ClearField("temperature")  # Node leaves it unset, which means 1; Python says 1
    assert theirs == ours
    assert answer["echo"]["modelRevision"] == "r1"
    assert answer["timings"] == {"queueWaitMs": 0.5, "engineMs": 1.5, "batchSequences": 1}


def test_node_computes_the_digest_that_python_computes(server: FakeServer) -> None:
    answer = node(server.address, {"tokenIds": [1, 2, 3], "scoreStart": 1, "topK": 2, "model": "bigram"})
    task = ScoreTask("bigram", np.array([1, 2, 3], np.int32), 1, 2, expected_model_revision="r1")
    assert answer["echo"]["requestDigest"] == task.digest().hex()
    expected = encode_request(task)
    expected.ClearField("temperature")
    assert server.requests == [expected]


def test_node_refuses_the_answer_to_another_request(server: FakeServer) -> None:
    server.faults.answer_at(wrong_digest)
    answer = node(server.address, REQUESTS[0])
    assert answer == {"error": "the request digest is not ours", "code": None}


def test_node_reads_the_reason_and_the_fields_of_an_error(server: FakeServer) -> None:
    server.faults.fail_at(call=1, error=VocabularyMismatch("other ids", field="expected_vocabulary_digest"))
    answer = node(server.address, REQUESTS[0])
    assert (answer["code"], answer["reason"]) == ("FAILED_PRECONDITION", "VOCABULARY_MISMATCH")
    assert answer["fields"] == {"field": "expected_vocabulary_digest"}
    server.faults.fail_at(call=2, error=Overloaded("full", retry_delay_s=0.5))
    assert node(server.address, REQUESTS[0])["reason"] == "OVERLOADED"


# --- against the real server


@pytest.fixture(scope="module")
def teacher_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a `teacher-server` process with a tiny random Llama."""
    from tests.models import save_model

    directory = save_model(tmp_path_factory.mktemp("teacher") / "tiny")
    log = directory.parent / "log"
    with open(log, "w") as errors:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "teacher_server.cli", "--model", directory, "--device", "cpu"),
                *("--listen", "127.0.0.1:0", "--metrics-port", "0"),
            ],
            cwd=directory.parent,
            env=child_environment() | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    try:
        assert process.stdout is not None
        ready = re.search(r" listen=(\S+)", process.stdout.readline())
        assert ready, Path(log).read_text()
        yield ready[1]
    finally:
        process.terminate()
        process.communicate(timeout=60)


@pytest.mark.parametrize("request_", REQUESTS)
def test_node_and_python_get_the_same_bytes_from_the_teacher_server(
    teacher_server: str, request_: dict[str, Any]
) -> None:
    answer = node(teacher_server, request_)
    assert "error" not in answer, answer
    assert answer["teacher"]["vocabularySize"] == 97
    revision = answer["teacher"]["modelRevision"]
    assert_same(answer, python(teacher_server, request_, "tiny", revision), request_)


@pytest.mark.parametrize(
    ("change", "code", "reason", "field"),
    [
        ({"model": "other"}, "NOT_FOUND", "UNKNOWN_MODEL", "model"),
        ({"tokenIds": [3, 97]}, "INVALID_ARGUMENT", "TOKEN_ID_OUT_OF_RANGE", "token_ids"),
        ({"scoreStart": 0}, "INVALID_ARGUMENT", "INVALID_REQUEST", "score_start"),
        ({"topK": 98}, "INVALID_ARGUMENT", "TOP_K_OUT_OF_RANGE", "top_k"),
        ({"temperature": 0}, "INVALID_ARGUMENT", "TEMPERATURE_OUT_OF_RANGE", "temperature"),
        ({"candidateIds": [[97]]}, "INVALID_ARGUMENT", "TOKEN_ID_OUT_OF_RANGE", "candidate_ids"),
        ({"tokenIds": [1] * 200}, "INVALID_ARGUMENT", "SEQUENCE_TOO_LONG", "token_ids"),
        (
            {"expectedModelRevision": "r0"},
            "FAILED_PRECONDITION",
            "MODEL_REVISION_MISMATCH",
            "expected_model_revision",
        ),
        (
            {"expectedVocabularyDigest": "d"},
            "FAILED_PRECONDITION",
            "VOCABULARY_MISMATCH",
            "expected_vocabulary_digest",
        ),
    ],
)
def test_the_teacher_server_names_what_is_wrong_to_node(
    teacher_server: str, change: dict[str, Any], code: str, reason: str, field: str
) -> None:
    answer = node(teacher_server, {"tokenIds": [3, 1], "scoreStart": 1, "topK": 2, **change})
    assert (answer["code"], answer["reason"], answer["fields"]["field"]) == (code, reason, field)
    assert answer["error"]
