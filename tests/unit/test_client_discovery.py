"""Names that stand for servers that come and go, and which of many servers a client uses."""

import asyncio
import socket
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import grpc
import pytest

from stillhouse import discovery, pool
from stillhouse.balancing import POLICIES
from stillhouse.client import TeacherClient
from stillhouse.discovery import Discovery, Target, hash_order
from stillhouse.errors import ModelRevisionMismatch, Overloaded, QuotaExceeded, StillhouseError, Unavailable
from stillhouse.pool import Pool
from stillhouse.security import Security
from tests.calls import QUICK, record_sleeps, score, submit, until
from tests.fakes import FakeServer


class FakeNames:
    """A resolver whose answers a test sets; `asked` counts look-ups."""

    def __init__(self, *addresses: str) -> None:
        self.addresses: Sequence[str] = addresses
        self.error: OSError | None = None
        self.asked = 0
        self.hold: asyncio.Event | None = None

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked += 1
        if self.hold is not None:
            await self.hold.wait()
        if self.error is not None:
            raise self.error
        return self.addresses


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> FakeNames:
    """What every name resolves to, looked up again every 20 ms."""
    fake = FakeNames()
    monkeypatch.setattr(discovery, "resolve", fake)
    monkeypatch.setattr(discovery.Discovery.look, "__kwdefaults__", {"older_than_s": 0.02})
    monkeypatch.setattr(pool, "SOONEST_S", 0.01)
    return fake


def score_until(client: TeacherClient, server: FakeServer) -> None:
    """Scores until `server` has got one more call."""
    before = len(server.requests)
    until(lambda: bool(score(client)) and len(server.requests) > before)


# --- names


def test_a_name_stands_for_all_its_addresses(three: list[FakeServer], names: FakeNames) -> None:
    names.addresses = [server.address for server in three]
    # In turn: by speed, a pause would give one server's calls to the others.
    with TeacherClient(["dns:///teachers:50051"], balancing="round_robin") as client:
        for future in [submit(client) for _ in range(60)]:
            future.result(timeout=20)
        assert min(len(server.requests) for server in three) >= 10
        assert sorted(state.address for state in client.servers) == sorted(names.addresses)


def test_a_new_address_is_used_and_one_that_vanished_gets_no_call(three: list[FakeServer], names: FakeNames) -> None:
    one, two, _ = three
    names.addresses = [one.address]
    with TeacherClient(["dns:///teachers:50051"]) as client:
        score(client)
        names.addresses = [one.address, two.address]
        score_until(client, two)
        names.addresses = [two.address]
        until(lambda: bool(score(client)) and len(client.servers) == 1)
        before = len(one.requests)
        for _ in range(20):
            score(client)
        assert len(one.requests) == before
        assert not client.stats.retries


def test_a_call_at_an_address_that_vanishes_is_answered_and_then_its_connection_closes(
    three: list[FakeServer], names: FakeNames
) -> None:
    one, two, _ = three
    one.faults.hang_at(call=1)
    names.addresses = [one.address]
    with TeacherClient(["dns:///teachers:50051"]) as client:
        hanging = submit(client)
        one.wait_for(lambda s: s.in_flight == 1)
        (server,) = client._client._pool._servers
        connection = server.connection
        assert connection is not None
        names.addresses = [two.address]
        score_until(client, two)
        assert connection.retired
        assert connection.channel.get_state() == grpc.ChannelConnectivity.READY
        one.release()
        assert hanging.result(timeout=20).model == "bigram"
        until(lambda: connection.channel.get_state() == grpc.ChannelConnectivity.SHUTDOWN)
        assert not client.stats.retries


async def test_an_address_that_vanishes_between_choice_and_call_leaves_no_connection() -> None:
    names = FakeNames("127.0.0.1:1")
    used = Pool(["dns:///teachers:1"], Security(), look_up=names)
    await used.ready(20.0)
    server = used.pick(1)
    assert server is not None
    names.addresses = ["127.0.0.1:2"]
    used._discovery.look(older_than_s=0.0)
    until_looked_up = used._discovery._names[0].task
    assert until_looked_up is not None
    await until_looked_up
    with used.calling(server, 1) as connection:
        assert not connection.retired
    assert connection.retired
    assert server.connection is None
    await used.close()


@pytest.mark.parametrize("error", [OSError("no such host"), None])
def test_a_look_up_that_fails_or_finds_nothing_keeps_what_was_known(
    server: FakeServer, names: FakeNames, error: OSError | None, caplog: pytest.LogCaptureFixture
) -> None:
    names.addresses = [server.address]
    with TeacherClient(["dns:///teachers:50051"]) as client:
        score(client)
        asked = names.asked
        names.addresses, names.error = [], error
        until(lambda: bool(score(client)) and names.asked >= asked + 3)
        assert [state.address for state in client.servers] == [server.address]
    assert len(caplog.records) == 1, "said once, not at every look"


def test_a_name_that_does_not_resolve_is_retried_and_then_said(server: FakeServer, names: FakeNames) -> None:
    names.error = OSError("no such host")
    with TeacherClient(["dns:///teachers:50051"], backoff=QUICK) as client:
        with pytest.raises(Unavailable, match=r"teachers cannot be resolved: no such host"):
            score(client, deadline_s=0.3)
        waiting = submit(client)
        asked = names.asked
        until(lambda: names.asked > asked)
        names.addresses, names.error = [server.address], None
        assert waiting.result(timeout=20).model == "bigram"


def test_a_look_up_that_hangs_holds_up_no_call_once_something_is_known(server: FakeServer, names: FakeNames) -> None:
    names.addresses = [server.address]
    with TeacherClient(["dns:///teachers:50051"]) as client:
        score(client)
        names.hold = asyncio.Event()
        asked = names.asked
        until(lambda: bool(score(client)) and names.asked > asked)
        end_s = time.monotonic() + 0.2  # ten times as long as between two look-ups
        while time.monotonic() < end_s:
            score(client)
        assert names.asked == asked + 1, "one look-up at a time"


def test_the_first_call_waits_for_a_slow_look_up_no_longer_than_its_deadline(names: FakeNames) -> None:
    names.hold = asyncio.Event()
    with TeacherClient(["dns:///teachers:50051"]) as client, pytest.raises(Unavailable, match="looking up"):
        score(client, deadline_s=0.2)


def test_a_server_that_fails_makes_the_name_be_looked_up_at_once(
    three: list[FakeServer], names: FakeNames, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(discovery.Discovery.look, "__kwdefaults__", {"older_than_s": 3600.0})
    one, two, _ = three
    names.addresses = [one.address]
    with TeacherClient(["dns:///teachers:50051"], backoff=QUICK) as client:
        score(client)
        assert names.asked == 1
        names.addresses = [two.address]
        one.stop()
        assert score(client).model == "bigram"
        assert len(two.requests) == 1


def test_a_name_of_which_nothing_is_known_is_looked_up_sooner(
    server: FakeServer, names: FakeNames, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(discovery.Discovery.look, "__kwdefaults__", {"older_than_s": 3600.0})
    monkeypatch.setattr(discovery, "SOONEST_S", 0.01)
    names.error = OSError("not yet")
    with TeacherClient(["dns:///teachers:50051"], backoff=QUICK) as client:
        waiting = submit(client)
        until(lambda: names.asked >= 3)
        names.addresses, names.error = [server.address], None
        assert waiting.result(timeout=20).model == "bigram"


async def test_failures_in_a_row_do_not_make_a_storm_of_look_ups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "SOONEST_S", 3600.0)
    names = FakeNames("127.0.0.1:1")
    watched = Discovery(["dns:///teachers:1"], lambda: None, names)
    for _ in range(100):
        watched.look(older_than_s=discovery.SOONEST_S)
        await watched.first(20.0)
        await asyncio.sleep(0)
    assert names.asked == 1
    await watched.close()


def test_the_systems_resolver_gives_both_families(monkeypatch: pytest.MonkeyPatch, three: list[FakeServer]) -> None:
    found = [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.2", 50051)),
        (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", 50051, 0, 0)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.2", 50051)),
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **options: found)
    assert asyncio.run(discovery.resolve("teachers", 50051)) == ["127.0.0.2:50051", "[::1]:50051"]


def test_servers_at_several_loopback_addresses_are_found_by_a_real_look_up(monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.getaddrinfo
    with FakeServer(host="127.0.0.2") as one, FakeServer(host="127.0.0.3", port=one.port) as two:

        def both(host: Any, *arguments: Any, **options: Any) -> Any:
            hosts = ["127.0.0.2", "127.0.0.3"] if host in ("teachers", b"teachers") else [host]
            return [found for each in hosts for found in real(each, *arguments, **options)]

        monkeypatch.setattr(socket, "getaddrinfo", both)
        with TeacherClient([f"dns:///teachers:{one.port}"], balancing="round_robin") as client:
            for future in [submit(client) for _ in range(40)]:
                future.result(timeout=20)
        assert min(len(one.requests), len(two.requests)) >= 10


def test_localhost_is_looked_up_for_real(server: FakeServer) -> None:
    with TeacherClient([f"dns:///localhost:{server.port}"], backoff=QUICK) as client:
        assert score(client).model == "bigram"


@pytest.mark.parametrize("name", ["teachers", "teachers:", ":50051", "teachers:0", "teachers:65536", "a/b:1", ""])
def test_a_name_without_host_or_port_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="addresses has"):
        TeacherClient([f"dns:///{name}"])


# --- some of many


def targets(count: int) -> list[Target]:
    return [Target(f"10.0.{n // 256}.{n % 256}:50051") for n in range(count)]


def test_clients_of_many_servers_spread_evenly() -> None:
    chosen: Counter[Target] = Counter()
    for client in range(1000):
        chosen.update(hash_order(targets(100), client.to_bytes(16, "big"))[:10])
    assert len(chosen) == 100
    assert 60 < min(chosen.values()) <= max(chosen.values()) < 145  # mean 100, deviation 9.5


def test_a_server_that_comes_or_goes_moves_no_other() -> None:
    before = hash_order(targets(100), b"client")
    gone = before[3]
    assert hash_order([t for t in targets(100) if t != gone], b"client") == [t for t in before if t != gone]
    assert hash_order(reversed(targets(100)), b"client") == before
    assert hash_order(targets(100), b"other") != before


def test_a_client_connects_to_no_more_than_max_servers_and_a_resting_one_is_replaced() -> None:
    servers = [FakeServer() for _ in range(6)]
    addresses = [server.address for server in servers]
    with TeacherClient(addresses, max_servers=2, backoff=QUICK, balancing="round_robin") as client:
        for future in [submit(client) for _ in range(40)]:
            future.result(timeout=20)
        used = [server for server in servers if server.requests]
        assert len(used) == 2
        used[0].stop()
        for future in [submit(client) for _ in range(40)]:
            future.result(timeout=20)
        # If the calls sent again came after its rest, the other one of the two had them.
        until(lambda: bool(score(client)) and sum(bool(server.requests) for server in servers) >= 3)
        assert sum(bool(server.requests) for server in servers) == 3
        assert not client.stats.failures
        with FakeServer(port=used[0].port) as again:
            score_until(client, again)
            for future in [submit(client) for _ in range(40)]:
                future.result(timeout=20)
            # The one that stood in has got nothing since, and is let go when another is connected to.
            assert sum(state.connected for state in client.servers) <= 3
    for server in servers:
        server.stop()


async def test_connections_to_stand_ins_are_let_go() -> None:
    many = Pool([f"127.0.0.1:{port}" for port in range(1, 20)], Security(), max_servers=2)
    for _ in range(50):
        server = many.pick(1)
        assert server is not None
        with many.calling(server, 1):
            pass
        many._gone(server)
    assert sum(state.connected for state in many.servers) <= 4, "two, and those they stand in for"
    await many.close()


@pytest.mark.parametrize(
    ("options", "text"),
    [({"max_servers": 0}, "max_servers is 0"), ({"balancing": "random"}, "least_outstanding_tokens")],
)
def test_options_that_can_never_be_right_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        TeacherClient(["127.0.0.1:1"], **options)


# --- who is asked next


@pytest.mark.parametrize("balancing", POLICIES)
def test_every_policy_serves_a_client(three: list[FakeServer], balancing: str) -> None:
    with TeacherClient([server.address for server in three], balancing=balancing) as client:
        for future in [submit(client) for _ in range(60)]:
            future.result(timeout=20)
        assert min(len(server.requests) for server in three) >= 1, "one never measured counts as the fastest"


@pytest.mark.parametrize("refusal", [Overloaded, QuotaExceeded])
def test_another_server_is_asked_at_once_when_one_says_come_again(
    three: list[FakeServer], refusal: type[StillhouseError], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = record_sleeps(monkeypatch)
    for server in three[:2]:
        server.faults.fail_at(error=refusal("full", retry_delay_s=3600.0))
    with TeacherClient([server.address for server in three]) as client:
        for _ in range(20):
            assert score(client).model == "bigram"
        assert waits == []
        # They said when to come again, and are left alone until then.
        assert [len(server.requests) for server in three[:2]] == [1, 1] or client.stats.retries.total() < 2
        assert client.stats.retries.total() == len(three[0].requests) + len(three[1].requests)


def test_when_all_say_come_again_the_soonest_is_waited_for(
    three: list[FakeServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    for server, delay_s in zip(three, (2000.0, 300.0, 1000.0), strict=True):
        server.faults.fail_at(call=1, error=Overloaded("full", retry_delay_s=delay_s))
    for _ in range(8):  # in each client's own order
        waits = record_sleeps(monkeypatch)
        for server in three:
            server.calls["Score"] = 0
        with TeacherClient([server.address for server in three], backoff=QUICK) as client:
            score(client, deadline_s=5000.0)
        assert len(waits) == 1
        assert 200.0 < waits[0] <= 300.0 + 0.01


def test_every_server_is_asked_before_a_revision_is_said_to_be_gone(three: list[FakeServer]) -> None:
    for server in three[:2]:
        server.faults.fail_at(error=ModelRevisionMismatch("r2 here"))
    with TeacherClient([server.address for server in three]) as client:
        for _ in range(30):
            assert score(client, expected_model_revision="r1").model == "bigram"
        assert len(three[0].requests) <= 1, "remembered"
        assert len(three[1].requests) <= 1
        three[2].faults.fail_at(error=ModelRevisionMismatch("r2 here"))
        before = sum(len(server.requests) for server in three)
        with pytest.raises(ModelRevisionMismatch):
            score(client, expected_model_revision="r1")
        assert sum(len(server.requests) for server in three) == before + 3


def test_a_full_server_of_the_right_revision_is_waited_for() -> None:
    with FakeServer() as right, FakeServer() as wrong:
        right.faults.fail_at(call=1, error=Overloaded("full", retry_delay_s=0.05))
        wrong.faults.fail_at(error=ModelRevisionMismatch("r2 here"))
        for _ in range(8):  # in each client's own order
            right.calls["Score"] = 0
            with TeacherClient([right.address, wrong.address], backoff=QUICK) as client:
                assert score(client, expected_model_revision="r1").model == "bigram"


def test_a_server_of_another_revision_still_gets_calls_that_want_none(three: list[FakeServer]) -> None:
    three[0].faults.fail_at(call=1, error=ModelRevisionMismatch("r2 here"))
    with TeacherClient([server.address for server in three], balancing="round_robin") as client:
        until(lambda: bool(score(client, expected_model_revision="r1")) and len(three[0].requests) == 1)
        for future in [submit(client) for _ in range(30)]:
            future.result(timeout=20)
        assert len(three[0].requests) > 5


def test_the_next_attempt_prefers_a_server_that_did_not_fail_the_call(three: list[FakeServer]) -> None:
    for server in three[:2]:
        server.faults.fail_at(error=Overloaded("full"))  # without a delay: only the call itself remembers it
    with TeacherClient([server.address for server in three], backoff=QUICK) as client:
        for _ in range(20):
            assert score(client).model == "bigram"
        assert client.stats.retries.total() >= 2
    for server in three[:2]:
        ids = [seen["stillhouse-request-id"] for seen in server.metadata]
        assert len(ids) == len(set(ids))


# --- ids


def test_every_attempt_says_which_call_it_is_of_and_which_attempt(server: FakeServer, client: TeacherClient) -> None:
    server.faults.fail_at(call=1, error=Unavailable("again"))
    score(client)
    score(client)
    ids = [seen["stillhouse-request-id"] for seen in server.metadata]
    assert [seen["stillhouse-attempt"] for seen in server.metadata] == ["1", "2", "1"]
    assert ids[0] == ids[1] != ids[2]
    assert all(len(str(id_)) == 32 and int(str(id_), 16) >= 0 for id_ in ids)


def test_an_error_says_which_call_it_ended_and_who_was_asked_last(server: FakeServer, client: TeacherClient) -> None:
    server.faults.fail_at(error=ModelRevisionMismatch("r2 here"))
    with pytest.raises(ModelRevisionMismatch) as caught:
        score(client)
    assert caught.value.request_id == server.metadata[0]["stillhouse-request-id"]
    assert caught.value.address == server.address
    assert caught.value.request_id in caught.value.__notes__[0], "tracebacks show it"


def test_what_is_known_of_the_servers_can_be_read(server: FakeServer, free_address: str) -> None:
    server.faults.hang_at(call=1)
    with TeacherClient([server.address, free_address], backoff=QUICK) as client:
        assert {(s.address, s.connected, s.in_flight) for s in client.servers} == {
            (server.address, False, 0),
            (free_address, False, 0),
        }
        future = submit(client)
        server.wait_for(lambda s: s.in_flight == 1)
        for other in [submit(client) for _ in range(10)]:
            other.result(timeout=20)
        states = {state.address: state for state in client.servers}
        assert (states[server.address].in_flight, states[server.address].outstanding_tokens) == (1, 5)
        assert states[free_address].failures >= 1
        assert states[free_address].seconds_per_token is None
        server.release()
        future.result(timeout=20)
        states = {state.address: state for state in client.servers}
        assert (states[server.address].in_flight, states[server.address].outstanding_tokens) == (0, 0)
