"""TLS and tokens of the client: what is checked, what is refused, and files that change while it runs."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from stillhouse import discovery, security
from stillhouse.client import AsyncTeacherClient, Backoff, TeacherClient, Tls
from stillhouse.errors import StillhouseError, Unauthenticated, Unavailable
from stillhouse.pool import Pool
from stillhouse.security import Security
from tests.calls import QUICK, score, submit, until
from tests.certificates import Authority, KeyPair, replace
from tests.fakes import FakeServer

ONCE = Backoff(1e9, 1e9)  # no second attempt: it would come after any deadline


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "pki")


@pytest.fixture
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(security, "LOOK_EVERY_S", 0.0)


def server_credentials(pair: KeyPair, *, client_ca: Path | None = None) -> grpc.ServerCredentials:
    return grpc.ssl_server_credentials(
        [(pair.key.read_bytes(), pair.certificate.read_bytes())],
        None if client_ca is None else client_ca.read_bytes(),
        require_client_auth=client_ca is not None,
    )


@pytest.fixture
def secure(authority: Authority) -> Iterator[FakeServer]:
    """A server with a certificate for localhost, 127.0.0.1 and ::1."""
    with FakeServer(credentials=server_credentials(authority.server())) as running:
        yield running


def only_token(server: FakeServer, token: str) -> None:
    """Makes `server` refuse every other token."""
    right = server._scores

    def scores(request: Any) -> Any:
        if server.metadata[-1].get("authorization") != f"Bearer {token}":
            raise Unauthenticated("no token that is known here")
        return right(request)

    server._scores = scores


# --- TLS


def test_scores_come_over_tls(secure: FakeServer, authority: Authority) -> None:
    with TeacherClient([secure.address], tls=Tls(ca=authority.certificate)) as client:
        assert score(client).model == "bigram"
        assert client.get_teacher().model == "bigram"


def test_a_server_of_another_authority_is_not_believed(secure: FakeServer, tmp_path: Path) -> None:
    other = Authority(tmp_path / "other")
    with (
        TeacherClient([secure.address], tls=Tls(ca=other.certificate), backoff=ONCE) as client,
        pytest.raises(Unavailable),
    ):
        score(client)
    assert secure.requests == []


def test_a_server_whose_certificate_has_another_name_is_not_believed(authority: Authority) -> None:
    credentials = server_credentials(authority.server("teachers.example"))
    with FakeServer(credentials=credentials) as server:
        with (
            TeacherClient([server.address], tls=Tls(ca=authority.certificate), backoff=ONCE) as client,
            pytest.raises(Unavailable),
        ):
            score(client)
        with TeacherClient(
            [server.address], tls=Tls(ca=authority.certificate, server_name="teachers.example")
        ) as client:
            assert score(client).model == "bigram"


def name_stands_for(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    async def resolve(host: str, port: int) -> tuple[str, ...]:
        return addresses

    monkeypatch.setattr(discovery, "resolve", resolve)


def test_a_looked_up_address_must_have_a_certificate_of_the_name(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    tls = Tls(ca=authority.certificate)
    with FakeServer(credentials=server_credentials(authority.server("teachers.example"))) as server:
        name_stands_for(monkeypatch, server.address)
        with TeacherClient(["dns:///teachers.example:50051"], tls=tls) as client:
            assert score(client).model == "bigram"
        with (
            TeacherClient(["dns:///impostors.example:50051"], tls=tls, backoff=ONCE) as client,
            pytest.raises(Unavailable),
        ):
            score(client)
        named = Tls(ca=authority.certificate, server_name="teachers.example")
        with TeacherClient(["dns:///a-service:50051"], tls=named) as client:
            assert score(client).model == "bigram"


def test_a_certificate_for_the_address_alone_is_not_enough_for_a_name(
    secure: FakeServer, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    name_stands_for(monkeypatch, secure.address)
    tls = Tls(ca=authority.certificate)
    with (
        TeacherClient(["dns:///teachers.example:50051"], tls=tls, backoff=ONCE) as client,
        pytest.raises(Unavailable),
    ):
        score(client)


def test_a_client_shows_its_certificate(authority: Authority) -> None:
    credentials = server_credentials(authority.server(), client_ca=authority.certificate)
    mine = authority.client("spiffe://pool/team-a")
    with FakeServer(credentials=credentials) as server:
        with (
            TeacherClient([server.address], tls=Tls(ca=authority.certificate), backoff=ONCE) as client,
            pytest.raises(Unavailable),
        ):
            score(client)
        tls = Tls(ca=authority.certificate, certificate=mine.certificate, key=mine.key)
        with TeacherClient([server.address], tls=tls) as client:
            assert score(client).model == "bigram"


def test_grpcs_own_credentials_still_do(secure: FakeServer, authority: Authority) -> None:
    credentials = grpc.ssl_channel_credentials(authority.certificate.read_bytes())
    with TeacherClient([secure.address], credentials=credentials) as client:
        assert score(client).model == "bigram"


# --- what is refused before anything is sent


def broken(text: str, path: Path) -> Path:
    path.write_text(text)
    return path


BAD_OPTIONS: list[tuple[str, Callable[[Path, Authority], dict[str, Any]]]] = [
    (r"tls\.ca is .*none\.pem.*No such file", lambda d, a: {"tls": Tls(ca=d / "none.pem")}),
    (r"tls\.ca is .*/ca.*no certificate", lambda d, a: {"tls": Tls(ca=broken("no PEM", d / "ca"))}),
    (r"tls\.ca is .*/empty.*no certificate", lambda d, a: {"tls": Tls(ca=broken("", d / "empty"))}),
    (r"tls\.certificate is .* and tls\.key is None", lambda d, a: {"tls": Tls(certificate=a.client("x").certificate)}),
    (r"tls\.certificate is None and tls\.key is", lambda d, a: {"tls": Tls(key=a.client("x").key)}),
    (
        r"tls\.key is .*/none\.key",
        lambda d, a: {"tls": Tls(certificate=a.client("x").certificate, key=d / "none.key")},
    ),
    (
        r"do not belong together",
        lambda d, a: {"tls": Tls(certificate=a.client("x").certificate, key=a.client("y", name="y").key)},
    ),
    (r"token_file is .*without tls", lambda d, a: {"token_file": broken("secret", d / "token")}),
    (r"token_file is .*none", lambda d, a: {"token_file": d / "none", "plaintext_token": True}),
    (r"holds no token", lambda d, a: {"token_file": broken(" \n", d / "token"), "plaintext_token": True}),
    (r"holds no token", lambda d, a: {"token_file": broken("se\ncret", d / "token"), "plaintext_token": True}),
    (r"holds no token", lambda d, a: {"token_file": broken("sécret", d / "token"), "plaintext_token": True}),
    (
        r"credentials and tls",
        lambda d, a: {"tls": Tls(ca=a.certificate), "credentials": grpc.ssl_channel_credentials()},
    ),
]


@pytest.mark.parametrize(("text", "options"), BAD_OPTIONS)
@pytest.mark.parametrize("kind", [TeacherClient, AsyncTeacherClient])
def test_files_that_cannot_be_right_are_refused_by_name(
    text: str,
    options: Callable[[Path, Authority], dict[str, Any]],
    kind: type[Any],
    tmp_path: Path,
    authority: Authority,
) -> None:
    threads = threading.active_count()
    with pytest.raises(ValueError, match=text) as caught:
        kind(["127.0.0.1:1"], **options(tmp_path, authority))
    assert "cret" not in str(caught.value).replace(str(tmp_path), "")
    assert threading.active_count() == threads


# --- tokens


def test_a_token_travels_with_every_call(secure: FakeServer, authority: Authority, tmp_path: Path) -> None:
    token = broken("secret\n", tmp_path / "token")
    with TeacherClient([secure.address], tls=Tls(ca=authority.certificate), token_file=token) as client:
        score(client)
    assert secure.metadata[0]["authorization"] == "Bearer secret"


def test_without_a_token_file_no_authorization_is_sent(server: FakeServer, client: TeacherClient) -> None:
    score(client)
    assert "authorization" not in server.metadata[0]


@pytest.mark.usefixtures("quick_looks")
def test_a_new_token_is_sent_and_a_broken_file_keeps_the_old(
    server: FakeServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    token = broken("first", tmp_path / "token")
    with TeacherClient([server.address], token_file=token, plaintext_token=True) as client:
        score(client)
        replace(token, b"second\n")
        score(client)
        for content in (b"", b"\xff\xfe"):
            replace(token, content)
            score(client)
        token.unlink()
        score(client)
        score(client)
        replace(token, b"third\n")
        score(client)
    sent = [str(seen["authorization"]).removeprefix("Bearer ") for seen in server.metadata]
    assert sent == ["first", "second", "second", "second", "second", "second", "third"]
    assert len(caplog.records) == 3, "once for each thing that was wrong"
    assert "second" not in caplog.text


def test_files_are_looked_at_no_more_than_once_a_second(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert security.LOOK_EVERY_S == 1.0
    monkeypatch.setattr(security, "LOOK_EVERY_S", 3600.0)
    token = broken("first", tmp_path / "token")
    with TeacherClient([server.address], token_file=token, plaintext_token=True) as client:
        client._client._attempts._security.look(at_once=True)
        replace(token, b"second")
        score(client)
        assert server.metadata[-1]["authorization"] == "Bearer first"
        monkeypatch.setattr(security, "LOOK_EVERY_S", 0.0)
        score(client)
        assert server.metadata[-1]["authorization"] == "Bearer second"


def test_a_call_refused_with_a_token_that_was_just_replaced_is_sent_again_once(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(security, "LOOK_EVERY_S", 3600.0)
    only_token(server, "new")
    token = broken("old", tmp_path / "token")
    with TeacherClient([server.address], token_file=token, plaintext_token=True) as client:
        with pytest.raises(Unauthenticated):
            score(client)
        assert len(server.requests) == 1, "nothing had changed"
        replace(token, b"new")
        assert score(client).model == "bigram"
        assert [seen["authorization"] for seen in server.metadata[1:]] == ["Bearer old", "Bearer new"]
        replace(token, b"wrong")
        client._client._attempts._security.look(at_once=True)
        replace(token, b"wrong-too")
        with pytest.raises(Unauthenticated):
            score(client)
        assert [seen["authorization"] for seen in server.metadata[3:]] == ["Bearer wrong", "Bearer wrong-too"]


def test_a_token_that_changes_at_every_attempt_is_not_tried_for_ever(server: FakeServer, tmp_path: Path) -> None:
    token = broken("0", tmp_path / "token")

    def scores(request: Any) -> Any:
        replace(token, str(len(server.requests)).encode())
        raise Unauthenticated("no")

    server._scores = scores
    with (
        TeacherClient([server.address], token_file=token, plaintext_token=True) as client,
        pytest.raises(Unauthenticated),
    ):
        score(client)
    assert len(server.requests) == 2


# --- rotation


async def test_servers_that_rest_are_asked_again_with_new_certificates(authority: Authority) -> None:
    mine, next_one = authority.client("a"), authority.client("b", name="next")
    shown = Security(tls=Tls(ca=authority.certificate, certificate=mine.certificate, key=mine.key))
    pool = Pool(["127.0.0.1:1", "127.0.0.1:2"], shown)
    for _ in range(2):
        server = pool.pick(1)
        assert server is not None
        pool._gone(server)
    assert [state.resting for state in pool.servers] == [True, True]
    next_one.replace(mine)
    shown.look(at_once=True)
    await pool.ready(20.0)
    assert [state.resting for state in pool.servers] == [False, False]
    await pool.close()


def test_files_that_change_as_they_are_read_are_not_used(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = iter(range(100))
    real = security._read
    monkeypatch.setattr(security, "_read", lambda file, field: real(file, field) + b"\n" * next(reads))
    with pytest.raises(ValueError, match="changes as it is read"):
        Security(tls=Tls(ca=authority.certificate))


@pytest.mark.usefixtures("quick_looks")
def test_certificates_are_exchanged_without_an_error_while_calls_go_on(authority: Authority, tmp_path: Path) -> None:
    new = Authority(tmp_path / "new")
    both = authority.certificate.read_bytes() + new.certificate.read_bytes()
    ca = tmp_path / "ca.pem"
    ca.write_bytes(authority.certificate.read_bytes())
    mine = authority.client("spiffe://pool/team-a")
    old_pair, new_pair = authority.server(), new.server()
    configuration = [grpc.ssl_server_certificate_configuration([pem(old_pair)], authority.certificate.read_bytes())]
    credentials = grpc.dynamic_ssl_server_credentials(configuration[0], lambda: configuration[-1], True)
    with FakeServer(credentials=credentials) as server:
        tls = Tls(ca=ca, certificate=mine.certificate, key=mine.key)
        with TeacherClient([server.address], tls=tls, backoff=QUICK) as client:
            for step in range(4):
                if step == 1:  # everybody trusts both
                    replace(ca, both)
                    configuration.append(grpc.ssl_server_certificate_configuration([pem(old_pair)], both))
                if step == 2:  # everybody shows the new
                    new.client("spiffe://pool/team-a").replace(mine)
                    configuration.append(grpc.ssl_server_certificate_configuration([pem(new_pair)], both))
                if step == 3:  # nobody trusts the old
                    replace(ca, new.certificate.read_bytes())
                    configuration.append(
                        grpc.ssl_server_certificate_configuration([pem(new_pair)], new.certificate.read_bytes())
                    )
                for future in [submit(client) for _ in range(20)]:
                    future.result(timeout=20)
            assert not client.stats.failures
            assert not client.stats.retries
            assert client.stats.answered == 80


def pem(pair: KeyPair) -> tuple[bytes, bytes]:
    return pair.key.read_bytes(), pair.certificate.read_bytes()


@pytest.mark.usefixtures("quick_looks")
def test_new_files_mean_a_new_connection_and_the_old_one_ends_with_its_last_call(
    secure: FakeServer, tmp_path: Path, authority: Authority
) -> None:
    ca = tmp_path / "ca.pem"
    ca.write_bytes(authority.certificate.read_bytes())
    secure.faults.hang_at(call=1)
    with TeacherClient([secure.address], tls=Tls(ca=ca)) as client:
        hanging = submit(client)
        secure.wait_for(lambda s: s.in_flight == 1)
        (server,) = client._client._pool._servers
        old = server.connection
        assert old is not None
        score(client)
        assert server.connection is old
        replace(ca, authority.certificate.read_bytes())
        score(client)
        assert server.connection is old, "the same content is no reason"
        replace(ca, authority.certificate.read_bytes() + Authority(tmp_path / "other").certificate.read_bytes())
        score(client)
        assert server.connection is not old
        assert (old.retired, old.calls) == (True, 1)
        secure.release()
        assert hanging.result(timeout=20).model == "bigram"
        until(lambda: old.channel.get_state() == grpc.ChannelConnectivity.SHUTDOWN)
        assert not client.stats.retries


def test_a_connection_that_fails_makes_the_files_be_looked_at_at_once(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(security, "LOOK_EVERY_S", 3600.0)
    other = Authority(tmp_path / "other")
    ca = tmp_path / "ca.pem"
    ca.write_bytes(other.certificate.read_bytes())
    with (
        FakeServer(credentials=server_credentials(authority.server())) as server,
        TeacherClient([server.address], tls=Tls(ca=ca), backoff=QUICK) as client,
    ):
        with pytest.raises(StillhouseError):
            score(client, deadline_s=0.5)
        replace(ca, authority.certificate.read_bytes())
        assert score(client).model == "bigram"


def test_a_pair_that_is_half_exchanged_is_not_used(authority: Authority, caplog: pytest.LogCaptureFixture) -> None:
    mine, next_one = authority.client("a"), authority.client("b", name="next")
    now = Security(tls=Tls(ca=authority.certificate, certificate=mine.certificate, key=mine.key))
    first = now.credentials
    replace(mine.certificate, next_one.certificate.read_bytes())
    now.look(at_once=True)
    assert now.credentials is first
    assert now.tls_version == 1
    assert "do not belong together" in caplog.text
    replace(mine.key, next_one.key.read_bytes())
    now.look(at_once=True)
    assert now.tls_version == 2
    assert now.credentials is not first
