"""TLS of a real server: who is let in, and certificates that are renewed under it."""

import asyncio
import contextlib
import datetime
import logging
import re
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat

from stillhouse.errors import StillhouseError
from teacher_server.access import AccessFile
from teacher_server.identity import Authenticator
from teacher_server.tls import TlsError, certificate_expires_at, server_credentials
from tests.certificates import Authority, KeyPair, replace
from tests.fakes import ROOT

METHOD = "/test.Service/WhoAmI"


class Handler(grpc.GenericRpcHandler):
    """Answers with what `answer` makes of a call's context."""

    def __init__(self, answer: Callable[[Any], Awaitable[str]]) -> None:
        self._answer = answer

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        async def call(data: bytes, context: Any) -> bytes:
            return (await self._answer(context)).encode()

        return grpc.unary_unary_rpc_method_handler(call)


async def hello(context: Any) -> str:
    return "hello"


def tenant_by(authenticator: Authenticator) -> Callable[[Any], Awaitable[str]]:
    """Answers with the name of the caller's tenant, or the reason why there is none."""

    async def answer(context: Any) -> str:
        try:
            return (await authenticator.authenticate(context.invocation_metadata(), context.auth_context())).name
        except StillhouseError as error:
            return error.reason

    return answer


@contextlib.asynccontextmanager
async def serving(
    pair: KeyPair,
    client_ca: Path | None,
    on_reload: Callable[[bool], None] = lambda good: None,
    answer: Callable[[Any], Awaitable[str]] = hello,
) -> AsyncIterator[int]:
    """The port of a server with these files; `answer` makes those to calls."""
    credentials = server_credentials(pair.certificate, pair.key, client_ca, on_reload=on_reload)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Handler(answer),))
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    try:
        yield port
    finally:
        await server.stop(None)


def channel(port: int, authority: Authority | KeyPair, pair: KeyPair | None) -> grpc.aio.Channel:
    """A connection of its own."""
    credentials = grpc.ssl_channel_credentials(
        authority.certificate.read_bytes(),
        None if pair is None else pair.key.read_bytes(),
        None if pair is None else pair.certificate.read_bytes(),
    )
    return grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials, options=(("grpc.use_local_subchannel_pool", 1),))


async def asked(port: int, authority: Authority | KeyPair, pair: KeyPair | None) -> str:
    """The answer to one call over a new connection."""
    async with channel(port, authority, pair) as opened:
        return (await opened.unary_unary(METHOD)(b"", timeout=30)).decode()


async def refused(port: int, authority: Authority | KeyPair, pair: KeyPair | None) -> bool:
    """Whether the handshake of a new connection fails."""
    try:
        await asked(port, authority, pair)
    except grpc.aio.AioRpcError as error:
        assert error.code() is grpc.StatusCode.UNAVAILABLE, error
        return True
    return False


async def served_certificate(port: int, authority: Authority, pair: KeyPair) -> str:
    """The certificate, PEM, that the server shows to a new connection."""

    def look() -> str:
        context = ssl.create_default_context(cafile=str(authority.certificate))
        context.load_cert_chain(pair.certificate, pair.key)
        context.set_alpn_protocols(["h2"])
        with (
            socket.create_connection(("127.0.0.1", port), timeout=30) as plain,
            context.wrap_socket(plain, server_hostname="127.0.0.1") as wrapped,
        ):
            shown = wrapped.getpeercert(binary_form=True)
        assert shown is not None
        return ssl.DER_cert_to_PEM_cert(shown)

    return await asyncio.to_thread(look)


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(60):
        while not await condition():
            await asyncio.sleep(0.05)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "pki")


async def test_only_clients_with_a_certificate_of_the_authority_are_let_in(
    authority: Authority, tmp_path: Path
) -> None:
    stranger = Authority(tmp_path / "stranger")
    async with serving(authority.server(), authority.certificate) as port:
        assert await asked(port, authority, authority.client("trainer.example")) == "hello"
        assert await refused(port, authority, None)
        assert await refused(port, authority, stranger.client("trainer.example"))
        over = authority.client("trainer.example", name="over", ends=datetime.datetime(2001, 1, 1))
        assert await refused(port, authority, over)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as plain:
            with pytest.raises(grpc.aio.AioRpcError):
                await plain.unary_unary(METHOD)(b"", timeout=30)


async def test_without_an_authority_of_clients_the_server_alone_shows_a_certificate(
    authority: Authority, tmp_path: Path
) -> None:
    async with serving(authority.server(), None) as port:
        assert await asked(port, authority, None) == "hello"
        assert await refused(port, Authority(tmp_path / "stranger"), None)  # by the client


@pytest.mark.parametrize(
    "key",
    [ec.generate_private_key(ec.SECP384R1()), rsa.generate_private_key(65537, 2048)],
    ids=["p384", "rsa"],
)
async def test_other_kinds_of_keys_that_are_let_pass_do_serve(authority: Authority, key: object) -> None:
    async with serving(authority.server(key=key), authority.certificate) as port:
        assert await asked(port, authority, authority.client("trainer.example")) == "hello"


async def test_a_tenant_is_known_by_the_names_of_a_real_certificate(authority: Authority, tmp_path: Path) -> None:
    file = tmp_path / "tenants.yaml"
    file.write_text(
        "tenants:\n  team-a: {models: ['*'], certificates: ['spiffe://pool/a']}\n"
        "  team-b: {models: ['*'], certificates: [trainer.b.example]}\n"
    )
    authenticator = Authenticator(AccessFile(file, lambda good: None), certificates=True, token_review=None)

    async with serving(authority.server(), authority.certificate, answer=tenant_by(authenticator)) as port:
        assert await asked(port, authority, authority.client("spiffe://pool/a", name="a")) == "team-a"
        named_twice = authority.client("other.example", "trainer.b.example", name="b")
        assert await asked(port, authority, named_twice) == "team-b"
        common_name = authority.client("other.example", name="c", common_name="trainer.b.example")
        assert await asked(port, authority, common_name) == "UNAUTHENTICATED"
        nameless = authority.client(name="d", common_name="trainer.b.example")
        assert await asked(port, authority, nameless) == "UNAUTHENTICATED"


async def test_the_commands_and_the_file_of_the_page_make_a_pool_of_two_teams(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "access.md").read_text()
    commands = "\n".join(re.findall(r"^```bash\n(.*?)^```$", page, re.MULTILINE | re.DOTALL))
    ran = await asyncio.to_thread(
        subprocess.run,
        ["bash", "-euc", commands],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    token, token_hash = (tmp_path / "team-b.token").read_text(), ran.stdout.split()[-2]
    tenants = re.findall(r"^```yaml\n# tenants.yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)[0]
    file = tmp_path / "tenants.yaml"
    file.write_text(re.sub(r"(?<=tokens_sha256: ..)[0-9a-f]{64}", token_hash, tenants))
    authenticator = Authenticator(AccessFile(file, lambda good: None), certificates=True, token_review=None)
    server = KeyPair(tmp_path / "server.pem", tmp_path / "server.key")
    team_a = KeyPair(tmp_path / "team-a.pem", tmp_path / "team-a.key")
    authority = KeyPair(tmp_path / "authority.pem", tmp_path / "authority.key")
    async with serving(server, authority.certificate, answer=tenant_by(authenticator)) as port:
        assert await asked(port, authority, team_a) == "team-a"
        # The server's own certificate is for servers, and opens no door.
        assert await refused(port, authority, server)
    async with serving(server, None, answer=tenant_by(authenticator)) as port, channel(port, authority, None) as opened:
        metadata = (("authorization", f"Bearer {token}"),)
        assert await opened.unary_unary(METHOD)(b"", timeout=30, metadata=metadata) == b"team-b"


async def test_a_renewed_certificate_is_shown_without_an_error_of_any_client(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    pair, new = authority.server(), authority.server(name="new")
    client = authority.client("trainer.example")
    told: list[bool] = []
    calls = {"kept connection": 0, "new connections": 0}
    renewed = asyncio.Event()

    async def call_over_one_connection() -> None:
        async with channel(port, authority, client) as kept:
            while not renewed.is_set():
                await kept.unary_unary(METHOD)(b"", timeout=30)
                calls["kept connection"] += 1

    async def call_over_new_connections() -> None:
        while not renewed.is_set():
            await asked(port, authority, client)
            calls["new connections"] += 1

    async with serving(pair, authority.certificate, told.append) as port:
        assert await served_certificate(port, authority, client) == pair.certificate.read_text()
        callers = [asyncio.create_task(call_over_one_connection()), asyncio.create_task(call_over_new_connections())]
        await until(lambda: asyncio.sleep(0, all(calls.values())))
        before = dict(calls)
        new.replace(pair)

        async def shows_new() -> bool:
            return await served_certificate(port, authority, client) == new.certificate.read_text()

        await until(shows_new)
        renewed.set()
        await asyncio.gather(*callers)  # raises if any call failed
    assert all(calls[kind] > before[kind] for kind in calls)
    # The looks between the two files see a pair that does not fit, if any does: told, and mended.
    assert told in ([True], [False, True])
    assert any(message.startswith("TLS files reloaded") for message in caplog.messages)


async def test_a_listener_that_fails_costs_no_renewal(authority: Authority, caplog: pytest.LogCaptureFixture) -> None:
    pair, new = authority.server(), authority.server(name="new")
    client = authority.client("trainer.example")

    def fail(good: bool) -> None:
        raise RuntimeError("no metric today")

    async with serving(pair, authority.certificate, fail) as port:
        new.replace(pair)

        async def shows_new() -> bool:
            return await served_certificate(port, authority, client) == new.certificate.read_text()

        await until(shows_new)
    assert "no metric today" in caplog.text


async def test_a_new_authority_lets_its_clients_in_and_others_no_more(authority: Authority, tmp_path: Path) -> None:
    new = Authority(tmp_path / "new")
    client_ca = tmp_path / "client-ca.pem"
    client_ca.write_bytes(authority.certificate.read_bytes())
    old_client, new_client = authority.client("trainer.example"), new.client("trainer.example")
    async with serving(authority.server(), client_ca) as port:
        assert await refused(port, authority, new_client)
        async with channel(port, authority, old_client) as kept:
            await kept.unary_unary(METHOD)(b"", timeout=30)
            # Without a gap: first both authorities, then the new one alone.
            replace(client_ca, authority.certificate.read_bytes() + new.certificate.read_bytes())

            async def new_is_let_in() -> bool:
                return not await refused(port, authority, new_client)

            await until(new_is_let_in)
            assert not await refused(port, authority, old_client)
            replace(client_ca, new.certificate.read_bytes())

            async def old_is_refused() -> bool:
                return await refused(port, authority, old_client)

            await until(old_is_refused)
            assert not await refused(port, authority, new_client)
            # An open connection was let in when it was made: the file of tenants is what ends a caller's rights.
            assert await kept.unary_unary(METHOD)(b"", timeout=30) == b"hello"


@pytest.mark.parametrize("broken", ["cut off", "another key", "empty", "missing"])
async def test_broken_new_files_leave_the_old_ones_in_use(
    authority: Authority, broken: str, caplog: pytest.LogCaptureFixture
) -> None:
    pair, new = authority.server(), authority.server(name="new")
    client = authority.client("trainer.example")
    old = pair.certificate.read_text()
    told: list[bool] = []
    async with serving(pair, authority.certificate, told.append) as port:
        if broken == "cut off":
            replace(pair.key, pair.key.read_bytes()[:100])
        elif broken == "another key":
            replace(pair.key, new.key.read_bytes())
        elif broken == "empty":
            replace(pair.certificate, b"")
        else:
            pair.certificate.unlink()

        async def is_told() -> bool:
            assert await served_certificate(port, authority, client) == old
            return bool(told)

        await until(is_told)
        await asyncio.sleep(1.2)
        assert await asked(port, authority, client) == "hello"  # makes it look once more
        errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
        assert told == [False] and len(errors) == 1 and errors[0].startswith("TLS files not reloaded")
        new.replace(pair)

        async def shows_new() -> bool:
            return await served_certificate(port, authority, client) == new.certificate.read_text()

        await until(shows_new)
        assert told[-1]


def start_fault(certificate: Path, key: Path, client_ca: Path | None = None) -> str:
    with pytest.raises(TlsError) as caught:
        server_credentials(certificate, key, client_ca, on_reload=lambda good: None)
    message = str(caught.value)
    secret = key.read_text().splitlines()[1:-1] if key.exists() else []
    assert not any(line in message for line in secret if line)
    return message


def test_files_that_cannot_serve_are_refused_by_option_file_and_fix(authority: Authority, tmp_path: Path) -> None:
    pair, other = authority.server(), authority.server(name="other")
    missing, wrong = tmp_path / "none.pem", tmp_path / "wrong.pem"
    wrong.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    server_credentials(pair.certificate, pair.key, authority.certificate, on_reload=lambda good: None)
    assert start_fault(missing, pair.key) == (
        f"--tls-certificate {missing} cannot be read (No such file or directory); give an existing PEM file"
    )
    assert start_fault(pair.certificate, missing).startswith(f"--tls-key {missing} cannot be read")
    assert start_fault(pair.certificate, pair.key, missing).startswith(f"--tls-client-ca {missing} cannot be read")
    assert start_fault(pair.certificate, other.key).startswith(f"--tls-key {other.key} does not belong to the first")
    assert start_fault(pair.key, pair.key).startswith(f"--tls-certificate {pair.key} holds no whole certificate")
    assert start_fault(wrong, pair.key).startswith(f"--tls-certificate {wrong} holds no whole certificate")
    assert start_fault(pair.certificate, pair.certificate).startswith(f"--tls-key {pair.certificate} holds no whole")
    assert start_fault(pair.certificate, pair.key, wrong).startswith(f"--tls-client-ca {wrong} holds no whole")
    over = authority.server(name="over", ends=datetime.datetime(2001, 1, 1))
    assert start_fault(over.certificate, over.key).endswith("ended at 2001-01-01T00:00:00+00:00; renew it")


@pytest.mark.parametrize("key", [ed25519.Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP521R1())])
def test_a_key_that_grpc_cannot_serve_with_is_refused_at_the_start(authority: Authority, key: object) -> None:
    pair = authority.server(key=key)
    assert start_fault(pair.certificate, pair.key).endswith("make one of RSA, EC P-256 or EC P-384")


@pytest.mark.parametrize("form", [PrivateFormat.PKCS8, PrivateFormat.TraditionalOpenSSL])
def test_an_encrypted_key_is_refused_and_the_way_out_is_named(authority: Authority, form: PrivateFormat) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    pair = authority.server(key=key)
    pair.key.write_bytes(key.private_bytes(Encoding.PEM, form, BestAvailableEncryption(b"secret")))
    message = start_fault(pair.certificate, pair.key)
    assert message.startswith(f"--tls-key {pair.key} is encrypted") and "openssl pkey -in KEY -out NEW" in message


def test_a_chain_ends_with_the_first_of_its_certificates(authority: Authority, tmp_path: Path) -> None:
    early = authority.server(name="early", ends=datetime.datetime(2040, 5, 6, 7, 8, 9))
    late = authority.server(name="late", ends=datetime.datetime(2050, 1, 1))
    chain = tmp_path / "chain.pem"
    chain.write_bytes(late.certificate.read_bytes() + early.certificate.read_bytes())
    assert certificate_expires_at(chain) == datetime.datetime(2040, 5, 6, 7, 8, 9, tzinfo=datetime.UTC).timestamp()
    with pytest.raises(TlsError, match="--tls-certificate"):
        certificate_expires_at(early.key)
