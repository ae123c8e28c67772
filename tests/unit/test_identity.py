"""Which tenant a call is, and that a refusal tells a stranger nothing."""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from stillhouse.errors import Unauthenticated, Unavailable
from teacher_server.access import ANONYMOUS, AccessFile
from teacher_server.identity import Authenticator
from teacher_server.token_review import TokenReview

TOKENS = {team: hashlib.md5(team.encode()).hexdigest() for team in ("a", "b")}
ACCOUNT_TOKENS = {"eyJ.account-c.sig": "team-c/trainer", "eyJ.account-x.sig": "team-x/trainer"}
FILE = "tenants:\n" + "".join(
    f"  team-{team}: {{models: ['*'], certificates: ['spiffe://pool/{team}', {team}.example], "
    f"tokens_sha256: ['{hashlib.sha256(token.encode()).hexdigest()}']}}\n"
    for team, token in TOKENS.items()
)
FILE += "  team-c: {models: ['*'], service_accounts: [team-c/trainer]}\n"
UNKNOWN = "the server does not accept this call: it came with no certificate or token that this server knows"

Metadata = Sequence[tuple[str, str | bytes]]


class FakeReview:
    """Kubernetes as far as an Authenticator sees it."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.fault: Exception | None = None

    async def review(self, token: str) -> str | None:
        self.asked.append(token)
        if self.fault is not None:
            raise self.fault
        return ACCOUNT_TOKENS.get(token)


@pytest.fixture
def file(tmp_path: Path) -> AccessFile:
    path = tmp_path / "tenants.yaml"
    path.write_text(FILE)
    return AccessFile(path, lambda good: None)


@pytest.fixture
def review() -> FakeReview:
    return FakeReview()


@pytest.fixture
def authenticator(file: AccessFile, review: FakeReview) -> Authenticator:
    return Authenticator(file, certificates=True, token_review=cast(TokenReview, review))


def bearer(token: str) -> Metadata:
    return [("user-agent", "grpc"), ("authorization", f"Bearer {token}")]


def certificate(*names: str, common_name: str = "nobody") -> dict[str, Sequence[bytes]]:
    context: dict[str, Sequence[bytes]] = {"x509_common_name": [common_name.encode()]}
    return context | {"x509_subject_alternative_name": [name.encode() for name in names]}


async def refused(authenticator: Authenticator, metadata: Metadata, auth_context: Any) -> str:
    with pytest.raises(Unauthenticated) as caught:
        await authenticator.authenticate(metadata, auth_context)
    return caught.value.message


async def test_without_a_file_of_tenants_everybody_is_anonymous() -> None:
    open_to_all = Authenticator(None, certificates=False, token_review=None)
    assert not open_to_all.enabled
    assert await open_to_all.authenticate(bearer("whatever"), certificate("spiffe://pool/a")) is ANONYMOUS


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
async def test_a_token_names_its_tenant(authenticator: Authenticator, scheme: str) -> None:
    tenant = await authenticator.authenticate([("authorization", f"{scheme} {TOKENS['a']}")], {})
    assert authenticator.enabled and tenant.name == "team-a"


@pytest.mark.parametrize("name", ["spiffe://pool/b", "b.example"])
async def test_a_certificate_names_its_tenant(authenticator: Authenticator, name: str) -> None:
    assert (await authenticator.authenticate([], certificate(name))).name == "team-b"


async def test_the_first_known_name_of_a_certificate_decides(authenticator: Authenticator) -> None:
    names = certificate("other.example", "b.example", "a.example")
    assert (await authenticator.authenticate([], names)).name == "team-b"


async def test_a_common_name_is_no_name(authenticator: Authenticator) -> None:
    assert await refused(authenticator, [], certificate("other.example", common_name="a.example")) == UNKNOWN


async def test_certificates_do_not_count_where_the_server_does_not_check_them(file: AccessFile) -> None:
    tokens_only = Authenticator(file, certificates=False, token_review=None)
    assert await refused(tokens_only, [], certificate("a.example")) == UNKNOWN
    tenant = await tokens_only.authenticate(bearer(TOKENS["a"]), certificate("b.example"))
    assert tenant.name == "team-a"


async def test_a_token_and_a_certificate_of_one_tenant_agree(authenticator: Authenticator) -> None:
    assert (await authenticator.authenticate(bearer(TOKENS["a"]), certificate("a.example"))).name == "team-a"


async def test_a_token_counts_beside_a_certificate_of_no_tenant(authenticator: Authenticator) -> None:
    assert (await authenticator.authenticate(bearer(TOKENS["a"]), certificate("mesh.example"))).name == "team-a"


async def test_every_refusal_reads_the_same(authenticator: Authenticator) -> None:
    cases = [
        ([], {}),
        ([], certificate("other.example")),
        ([], certificate()),
        (bearer("0" * 32), {}),
        (bearer("0" * 32), certificate("a.example")),  # a wrong token is not made good by a certificate
        (bearer(TOKENS["a"]), certificate("b.example")),
        (bearer("eyJ.account-x.sig"), {}),  # an account that Kubernetes knows and the file does not
        (bearer("eyJ.account-c.sig"), certificate("a.example")),
        (bearer("0" * 16_385), {}),
    ]
    assert {await refused(authenticator, *case) for case in cases} == {UNKNOWN}


@pytest.mark.parametrize(
    "values",
    [
        [""],
        ["Bearer"],
        ["Bearer "],
        [TOKENS["a"]],
        [f"Basic {TOKENS['a']}"],
        [f"Bearer {TOKENS['a']} {TOKENS['a']}"],
        [f"Bearer {TOKENS['a']}\n"],
        ["Bearer tökén"],
        [f"Bearer {TOKENS['a']}".encode()],
        [f"Bearer {TOKENS['a']}", f"Bearer {TOKENS['a']}"],
        [f"Bearer {TOKENS['a']}", "Basic eA=="],
    ],
)
async def test_anything_but_one_bearer_token_is_refused(authenticator: Authenticator, values: list[Any]) -> None:
    metadata = [("authorization", value) for value in values]
    message = await refused(authenticator, metadata, certificate("a.example"))
    assert message == "the server does not accept the authorization metadata; send one entry, 'Bearer TOKEN'"


async def test_kubernetes_is_asked_about_tokens_that_are_not_in_the_file(
    authenticator: Authenticator, review: FakeReview
) -> None:
    assert (await authenticator.authenticate(bearer("eyJ.account-c.sig"), {})).name == "team-c"
    await authenticator.authenticate(bearer(TOKENS["a"]), {})
    await refused(authenticator, bearer("0" * 16_385), {})
    assert review.asked == ["eyJ.account-c.sig"]


async def test_without_an_answer_of_kubernetes_callers_are_told_to_come_again(
    authenticator: Authenticator, review: FakeReview
) -> None:
    review.fault = Unavailable("the server cannot check tokens now")
    with pytest.raises(Unavailable):
        await authenticator.authenticate(bearer("eyJ.account-c.sig"), certificate("a.example"))


async def test_a_log_names_the_cause_and_never_a_token(
    authenticator: Authenticator, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    await refused(authenticator, [], certificate("spiffe://pool/typo\nforged line"))
    await refused(authenticator, bearer(TOKENS["a"]), certificate("b.example"))
    await refused(authenticator, [("authorization", TOKENS["a"])], {})
    assert caplog.messages == [
        "call refused: certificate of no tenant, names ['spiffe://pool/typo\\nforged line']",
        "call refused: token of tenant team-a, certificate of tenant team-b",
        "call refused: authorization metadata is not one bearer token: entries=1",
    ]
