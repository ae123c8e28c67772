"""The file of tenants: what it says, what it may not say, and how it changes under a running server."""

import asyncio
import contextlib
import hashlib
import logging
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from teacher_server.access import ANONYMOUS, Access, AccessError, AccessFile, Tenant, load_access

TOKEN = "3f9c2a7e51d04b8896ae1f00c7d2b65e"
HASH = hashlib.sha256(TOKEN.encode()).hexdigest()
TEAM_A = f"""
tenants:
  team-a:
    models: [teacher-32b]
    weight: 2
    tokens_per_s: 50000
    burst_tokens: 500000
    max_tokens_in_flight: 2000000
    certificates: ["spiffe://cluster.local/ns/team-a/sa/Trainer", "trainer.team-a.example"]
    tokens_sha256: ["{HASH.upper()}"]
    service_accounts: ["team-a/trainer"]
"""
TEAM_B = """
tenants:
  team-b: {models: ["*"], service_accounts: ["team-b/trainer"]}
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "tenants.yaml"
    path.write_text(text)
    return path


def loaded(tmp_path: Path, text: str) -> Access:
    return load_access(written(tmp_path, text))


def refusal(tmp_path: Path, text: str | bytes) -> str:
    """The message for a file, without the path."""
    path = tmp_path / "tenants.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(AccessError) as caught:
        load_access(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message.removeprefix(f"{path}: ")


def with_entry(entry: str) -> str:
    """A file of one tenant who would be right but for `entry`."""
    return f"tenants: {{team-a: {{models: [m], certificates: [a.example], {entry}}}}}"


def test_an_entry_says_what_its_tenant_may_use(tmp_path: Path) -> None:
    access = loaded(tmp_path, TEAM_A)
    assert access.tenants == {"team-a": Tenant("team-a", ("teacher-32b",), 2.0, 50_000.0, 500_000, 2_000_000)}


def test_what_an_entry_leaves_out_is_without_limit(tmp_path: Path) -> None:
    assert loaded(tmp_path, TEAM_B).tenants["team-b"] == Tenant("team-b", ("*",), 1.0, None, None, None)


def test_a_burst_is_a_minute_of_the_rate_unless_given(tmp_path: Path) -> None:
    assert loaded(tmp_path, with_entry("tokens_per_s: 1.5")).tenants["team-a"].burst_tokens == 90
    assert loaded(tmp_path, with_entry("tokens_per_s: 0.001")).tenants["team-a"].burst_tokens == 1


def test_a_tenant_may_use_the_models_it_names(tmp_path: Path) -> None:
    named, every = Tenant("a", ("m", "n")), Tenant("b", ("*",))
    assert [named.may_use(model) for model in ("m", "n", "o", "", "*")] == [True, True, False, False, False]
    assert every.may_use("m") and every.may_use("o") and ANONYMOUS.may_use("m")


def test_every_kind_of_credential_finds_its_tenant(tmp_path: Path) -> None:
    access = loaded(tmp_path, TEAM_A)
    team_a = access.tenants["team-a"]
    assert access.by_token(TOKEN) is team_a
    assert access.by_service_account("team-a/trainer") is team_a
    assert access.by_certificate("spiffe://cluster.local/ns/team-a/sa/Trainer") is team_a
    assert access.by_certificate("Trainer.Team-A.example") is team_a  # DNS names have no case


def test_a_credential_of_nobody_finds_nobody(tmp_path: Path) -> None:
    access = loaded(tmp_path, TEAM_A)
    assert access.by_token(TOKEN + "0") is None
    assert access.by_token(HASH) is None  # who reads the file cannot use what stands in it
    assert access.by_token("") is None
    assert access.by_service_account("team-a/other") is None
    assert access.by_certificate("spiffe://cluster.local/ns/team-a/sa/trainer") is None  # URIs have case
    assert access.by_certificate("other.example") is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "tenants: is missing; add it"),
        ("[]", "tenants: is missing; add it"),
        ("{}", "tenants: is missing; add it"),
        ("tenants: {}", "tenants: names no tenant; add one, or serve without --access"),
        ("tenants:", "tenants: Input should be a valid dictionary"),
        ("teams: {}" + TEAM_B, "teams: is no known key; known are tenants"),
        (with_entry("weigth: 2"), "tenants.team-a.weigth: is no known key; known are models, weight, tokens_per_s"),
        (with_entry("weight: 0"), "tenants.team-a.weight: is 0; input should be greater than 0"),
        (with_entry("weight: .nan"), "tenants.team-a.weight: is nan; input should be"),
        (with_entry("weight: .inf"), "tenants.team-a.weight: is inf; input should be a finite number"),
        (with_entry("weight: true"), "tenants.team-a.weight: is True; input should be a valid number"),
        (with_entry("weight: '2'"), "tenants.team-a.weight: is '2'; input should be a valid number"),
        (with_entry("tokens_per_s: -1"), "tenants.team-a.tokens_per_s: is -1; input should be greater than 0"),
        (with_entry("burst_tokens: 9"), "tenants.team-a: has burst_tokens without tokens_per_s"),
        (with_entry("burst_tokens: 0, tokens_per_s: 1"), "tenants.team-a.burst_tokens: is 0; input should be greater"),
        (with_entry("max_tokens_in_flight: 1.5"), "tenants.team-a.max_tokens_in_flight: is 1.5; input should be"),
        ("tenants: {a: {certificates: [b.example]}}", "tenants.a.models: is missing; add it"),
        ("tenants: {a: {models: [], certificates: [b.example]}}", "tenants.a.models: names no model"),
        ("tenants: {a: {models: [''], certificates: [b.example]}}", "tenants.a.models: has an empty name"),
        ("tenants: {a: {models: ['*', m], certificates: [b.example]}}", 'tenants.a.models: has "*" beside names'),
        ("tenants: {a: {models: m, certificates: [b.example]}}", "tenants.a.models: is 'm'; input should be a valid"),
        ("tenants: {a: {models: [m]}}", "tenants.a: has nobody who could use it; add certificates, tokens_sha256 or"),
        ("tenants: {a: {models: [m], certificates: []}}", "tenants.a: has nobody who could use it"),
        ("tenants: {A: {models: [m], certificates: [b.example]}}", "tenants: 'A' is no name of a tenant"),
        ('tenants: {"a\\n": {models: [m], certificates: [b.example]}}', "tenants: 'a\\n' is no name of a tenant"),
        (
            "tenants: {anonymous: {models: [m], certificates: [b.example]}}",
            "tenants: 'anonymous' is the name of callers",
        ),
        (
            with_entry("service_accounts: [trainer]"),
            "tenants.team-a.service_accounts.0: 'trainer' is not the name of a",
        ),
        (with_entry("service_accounts: [a/b/c]"), "tenants.team-a.service_accounts.0: 'a/b/c' is not the name of a"),
        (with_entry("tokens_sha256: [abc]"), "tenants.team-a.tokens_sha256.0: is not a SHA-256 in 64 hexadecimal"),
        (
            with_entry(f"tokens_sha256: [{hashlib.sha256().hexdigest()}]"),
            "tenants.team-a.tokens_sha256.0: is the hash of nothing",
        ),
        ("tenants: {a: 1}", "tenants.a: is 1; input should be a valid dictionary"),
        ("tenants: {a: [}", "is not YAML in line 1, column 15"),
        ("tenants: {a: !!python/object:os.system {}}", "is not YAML in line 1"),
        ("tenants: 2001-99-99", "is not YAML (ValueError)"),
        (b"tenants: \xff\xfe", "is not YAML (ReaderError)"),
    ],
)
def test_a_wrong_file_is_refused_by_field_value_and_fix(tmp_path: Path, text: str | bytes, expected: str) -> None:
    assert refusal(tmp_path, text).startswith(expected)


def test_a_file_that_is_too_deep_or_too_large_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, "[" * 100_000).startswith("is not YAML (RecursionError)")
    assert refusal(tmp_path, "#" * (2**22 + 1)).startswith("is larger than 4194304 bytes")


@pytest.mark.parametrize(
    "name", ["*.example", "10.0.0.1", "::1", "Upper.example", "a@b.example", "", "a..b", "://x", "a b"]
)
def test_a_certificate_is_named_by_a_uri_or_a_dns_name(tmp_path: Path, name: str) -> None:
    message = refusal(tmp_path, f"tenants: {{a: {{models: [m], certificates: ['{name}']}}}}")
    assert message.startswith(f"tenants.a.certificates.0: {name!r} is neither a URI nor a DNS name in lower case")


@pytest.mark.parametrize(
    "credential", [f"tokens_sha256: ['{HASH}']", "certificates: [x.example]", "service_accounts: [n/a]"]
)
def test_a_credential_belongs_to_one_tenant(tmp_path: Path, credential: str) -> None:
    entry = f"{{models: [m], {credential}}}"
    field = credential.partition(":")[0]
    message = refusal(tmp_path, f"tenants: {{a: {entry}, b: {entry}}}")
    assert message.startswith(f"tenants.b.{field}.0: ") and "is tenant a's already" in message
    assert HASH not in message


def test_a_tenant_may_name_a_credential_twice(tmp_path: Path) -> None:
    access = loaded(tmp_path, with_entry(f"tokens_sha256: ['{HASH}', '{HASH.upper()}']"))
    assert access.by_token(TOKEN) is access.tenants["team-a"]


@pytest.mark.parametrize(
    "text",
    [
        "tenants:\n  a: {models: [m], certificates: [a.example]}\n  a: {models: [n], certificates: [b.example]}",
        "tenants: {a: {models: [m], certificates: [a.example], models: [n]}}",
        "tenants: {}\ntenants: {a: {models: [m], certificates: [a.example]}}",
    ],
)
def test_a_key_that_stands_twice_is_refused(tmp_path: Path, text: str) -> None:
    message = refusal(tmp_path, text)
    assert message.startswith("is not YAML in line") and message.endswith("a key stands twice")


@pytest.mark.parametrize(
    "text",
    [
        with_entry(f"tokens_sha256: ['{TOKEN}']"),
        with_entry(f"tokens_sha256: '{TOKEN}'"),
        with_entry(f"tokens_sha256: {{ {TOKEN}: x}}"),
        with_entry(f"tokens: ['{TOKEN}']"),
        with_entry(f"tokens_sha256: ['{HASH}0']"),
        f"tenants:\n  a:\n    tokens_sha256: ['{TOKEN}'\n    models: [m]",
    ],
)
def test_no_message_quotes_a_token_or_a_hash(tmp_path: Path, text: str) -> None:
    message = refusal(tmp_path, text)
    assert TOKEN not in message and HASH not in message


def test_a_file_with_many_faults_names_the_first_ones(tmp_path: Path) -> None:
    message = refusal(tmp_path, with_entry(f"service_accounts: {[f'x{number}' for number in range(20)]}"))
    assert message.count("is not the name of a service account") == 5 and message.endswith("; and 15 more")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    for path, cause in ((tmp_path / "none.yaml", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(AccessError, match=cause) as caught:
            AccessFile(path, lambda good: None)
        assert str(caught.value).startswith(f"{path}: cannot be read")


@contextlib.asynccontextmanager
async def watching(path: Path) -> AsyncIterator[tuple[AccessFile, list[bool]]]:
    """A file that is watched, and what `on_reload` was told."""
    told: list[bool] = []
    file = AccessFile(path, told.append)
    watch = asyncio.create_task(file.watch(every_s=0.005))
    try:
        yield file, told
        assert not watch.done(), "the file is no longer watched"
    finally:
        watch.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watch


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.005)


async def test_a_new_file_counts_without_a_restart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    path = written(tmp_path, TEAM_A)
    async with watching(path) as (file, told):
        path.write_text(TEAM_B)
        await until(lambda: "team-b" in file.current.tenants)
        assert file.current.by_token(TOKEN) is None  # team-a is gone, and its token with it
        await until(lambda: told == [True])
        assert "access file reloaded: tenants=1" in caplog.messages


async def test_a_broken_file_leaves_the_rights_as_they_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = written(tmp_path, TEAM_A)
    async with watching(path) as (file, told):
        before = file.current
        path.write_text(TEAM_B.replace("models", "model"))
        await until(lambda: told == [False])
        await asyncio.sleep(0.1)  # many looks at the same broken file
        assert file.current is before
        errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
        assert len(errors) == 1 and "tenants.team-b.models: is missing" in errors[0] and told == [False]
        path.write_text("tenants: {}")  # another fault is told again
        await until(lambda: told == [False, False])
        path.write_text(TEAM_A)  # and the old contents count as mended
        await until(lambda: told == [False, False, True])


async def test_a_file_that_vanishes_leaves_the_rights_and_comes_back(tmp_path: Path) -> None:
    path = written(tmp_path, TEAM_A)
    async with watching(path) as (file, told):
        path.unlink()
        await until(lambda: told == [False])
        await asyncio.sleep(0.05)
        assert told == [False] and file.current.by_token(TOKEN) is not None
        path.write_text(TEAM_B)
        await until(lambda: told == [False, True])
        assert "team-b" in file.current.tenants


async def test_a_mount_that_exchanges_links_is_seen(tmp_path: Path) -> None:
    # How Kubernetes renews a mounted ConfigMap: the file's own link never changes, the folder behind it does.
    for version, text in (("..1", TEAM_A), ("..2", TEAM_B)):
        (tmp_path / version).mkdir()
        written(tmp_path / version, text)
    (tmp_path / "..data").symlink_to("..1")
    path = tmp_path / "tenants.yaml"
    path.symlink_to(Path("..data", "tenants.yaml"))
    async with watching(path) as (file, told):
        assert "team-a" in file.current.tenants
        (tmp_path / "..new").symlink_to("..2")
        os.replace(tmp_path / "..new", tmp_path / "..data")
        await until(lambda: told == [True])
        assert "team-b" in file.current.tenants
