"""Tokens checked by an API server: a real one over TLS, that speaks TokenReview as Kubernetes does."""

import asyncio
import http.server
import json
import logging
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import teacher_server.token_review as module
from stillhouse.errors import Unavailable
from teacher_server.token_review import MAX_TOKEN_BYTES, TokenReview, TokenReviewError
from tests.certificates import Authority

AUDIENCE = "stillhouse"
OWN_TOKEN = "eyJ.own-of-the-server.sig"
TOKEN = "eyJ.trainer-of-team-a.sig"
ACCOUNT = "system:serviceaccount:team-a:trainer"


WHOLE = json.dumps({"status": {"authenticated": True, "audiences": [AUDIENCE], "user": {"username": ACCOUNT}}}).encode()
"""An answer that vouches, unless something else is wrong with it."""


class Clock:
    """A monotonic clock that a test moves."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class ApiServer:
    """POST tokenreviews: valid tokens are those in `users`, the caller must show one of `own_tokens`."""

    def __init__(self, authority: Authority) -> None:
        self.users: dict[str, tuple[str, list[str]]] = {TOKEN: (ACCOUNT, [AUDIENCE, "other"])}
        self.own_tokens = {OWN_TOKEN}
        self.asked: list[str] = []
        """Tokens reviewed, in order."""
        self.requests: list[tuple[str, Any]] = []
        """Path and body of each request."""
        self.knows_audiences = True
        self.answer: tuple[int, dict[str, str], bytes] | None = None
        """Given instead of a review: status, headers, body."""
        self.open = threading.Event()
        """Answers wait for it."""
        self.open.set()
        self.in_drops = False
        """Answers come byte by byte, each within any timeout."""
        self.stopped = threading.Event()
        api = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                api.requests.append((self.path, body))
                api.asked.append(body["spec"]["token"])
                api.open.wait(30)
                if self.headers["Authorization"].removeprefix("Bearer ") not in api.own_tokens:
                    status, headers, data = 401, {}, b'{"kind":"Status","code":401}'
                else:
                    status, headers, data = api.answer or (201, {}, json.dumps(api.reviewed(body)).encode())
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                for byte in data if api.in_drops else ():
                    self.wfile.write(bytes([byte]))
                    if api.stopped.wait(0.05):
                        return
                if not api.in_drops:
                    self.wfile.write(data)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.handle_error = lambda request, client_address: None  # clients that go away
        pair = authority.server(name="api-server")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pair.certificate, pair.key)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)
        self.port = self._server.server_port
        self.url = f"https://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def reviewed(self, review: Any) -> Any:
        """The review with its status, as the Kubernetes API server fills it in."""
        username, audiences = self.users.get(review["spec"]["token"], (None, []))
        common = [audience for audience in review["spec"].get("audiences", []) if audience in audiences]
        if username is None or (self.knows_audiences and not common):
            return review | {"status": {"user": {}, "error": "[invalid bearer token, token lookup failed]"}}
        status: dict[str, Any] = {
            "authenticated": True,
            "user": {"username": username, "groups": ["system:authenticated"]},
        }
        return review | {"status": status | ({"audiences": common} if self.knows_audiences else {})}

    def stop(self) -> None:
        self.stopped.set()
        self.open.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "pki")


@pytest.fixture
def api(authority: Authority) -> Iterator[ApiServer]:
    server = ApiServer(authority)
    yield server
    server.stop()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text(OWN_TOKEN + "\n")
    return path


@pytest.fixture
def reviews(api: ApiServer, authority: Authority, token_file: Path, clock: Clock) -> Iterator[TokenReview]:
    made = TokenReview(api.url, audience=AUDIENCE, ca=authority.certificate, token_file=token_file, clock=clock)
    yield made
    made.close()


async def until_asked(api: ApiServer, times: int) -> None:
    async with asyncio.timeout(30):
        while len(api.asked) < times:
            await asyncio.sleep(0.005)


async def test_a_valid_token_names_its_service_account(reviews: TokenReview, api: ApiServer) -> None:
    assert await reviews.review(TOKEN) == "team-a/trainer"
    path, body = api.requests[0]
    assert path == "/apis/authentication.k8s.io/v1/tokenreviews"
    assert body == {
        "apiVersion": "authentication.k8s.io/v1",
        "kind": "TokenReview",
        "spec": {"token": TOKEN, "audiences": [AUDIENCE]},
    }


async def test_an_api_server_below_a_path_is_asked_there(
    api: ApiServer, authority: Authority, token_file: Path
) -> None:
    reviews = TokenReview(api.url + "/k8s/", audience=AUDIENCE, ca=authority.certificate, token_file=token_file)
    await reviews.review(TOKEN)
    assert api.requests[0][0] == "/k8s/apis/authentication.k8s.io/v1/tokenreviews"


async def test_an_unknown_token_is_refused(reviews: TokenReview) -> None:
    assert await reviews.review("eyJ.unknown.sig") is None


async def test_a_token_for_another_audience_is_refused(reviews: TokenReview, api: ApiServer) -> None:
    api.users[TOKEN] = (ACCOUNT, ["https://kubernetes.default.svc"])
    assert await reviews.review(TOKEN) is None


async def test_an_api_server_that_knows_no_audiences_vouches_for_nobody(reviews: TokenReview, api: ApiServer) -> None:
    api.knows_audiences = False
    assert await reviews.review(TOKEN) is None


@pytest.mark.parametrize(
    "username",
    [
        "kubernetes-admin",
        "system:node:team-a:trainer",
        "system:serviceaccount:team-a",
        "system:serviceaccount::trainer",
        "system:serviceaccount:team-a:",
        "",
    ],
)
async def test_only_service_accounts_are_accepted(reviews: TokenReview, api: ApiServer, username: str) -> None:
    api.users[TOKEN] = (username, [AUDIENCE])
    assert await reviews.review(TOKEN) is None


@pytest.mark.parametrize(
    "status",
    [
        {"authenticated": False},
        {"authenticated": "true"},
        {"audiences": None},
        {"audiences": AUDIENCE},
        {"audiences": ["other"]},
        {"user": None},
        {"user": {"username": 7}},
    ],
)
async def test_a_review_that_does_not_vouch_wholly_refuses(
    reviews: TokenReview, api: ApiServer, status: dict[str, Any]
) -> None:
    api.answer = (201, {}, json.dumps({"status": json.loads(WHOLE)["status"] | status}).encode())
    assert await reviews.review(TOKEN) is None
    api.answer = (200, {}, WHOLE)  # so that this test can fail
    assert await reviews.review(TOKEN + "2") == "team-a/trainer"


@pytest.mark.parametrize("token", ["", "x" * (MAX_TOKEN_BYTES + 1), "tökén"])
async def test_what_can_be_no_token_is_refused_unasked(reviews: TokenReview, api: ApiServer, token: str) -> None:
    assert await reviews.review(token) is None and api.asked == []


async def test_an_accepted_token_is_asked_about_once_a_minute(
    reviews: TokenReview, api: ApiServer, clock: Clock
) -> None:
    for now_s, times in ((1000.0, 1), (1059.9, 1), (1060.0, 2), (1119.9, 2), (1120.0, 3)):
        clock.now_s = now_s
        assert await reviews.review(TOKEN) == "team-a/trainer"
        assert len(api.asked) == times


async def test_a_revoked_token_is_refused_a_minute_later(reviews: TokenReview, api: ApiServer, clock: Clock) -> None:
    await reviews.review(TOKEN)
    del api.users[TOKEN]
    clock.now_s += 60.0
    assert await reviews.review(TOKEN) is None
    api.stop()  # nor does the answer of before count again
    assert await reviews.review(TOKEN) is None
    clock.now_s += 10.0
    with pytest.raises(Unavailable):
        await reviews.review(TOKEN)


async def test_a_refused_token_is_asked_about_again_after_ten_seconds(
    reviews: TokenReview, api: ApiServer, clock: Clock
) -> None:
    api.users.clear()
    for now_s, times in ((1000.0, 1), (1009.9, 1), (1010.0, 2)):
        clock.now_s = now_s
        assert await reviews.review(TOKEN) is None
        assert len(api.asked) == times
    api.users[TOKEN] = (ACCOUNT, [AUDIENCE])
    clock.now_s = 1020.0
    assert await reviews.review(TOKEN) == "team-a/trainer"


async def test_callers_share_a_question_and_one_that_leaves_takes_nothing(reviews: TokenReview, api: ApiServer) -> None:
    api.open.clear()
    first, *others = [asyncio.create_task(reviews.review(TOKEN)) for _ in range(5)]
    await until_asked(api, 1)
    first.cancel()
    api.open.set()
    assert await asyncio.gather(*others) == ["team-a/trainer"] * 4
    assert api.asked == [TOKEN] and first.cancelled()


async def test_the_own_token_is_read_for_every_question(reviews: TokenReview, api: ApiServer, token_file: Path) -> None:
    await reviews.review(TOKEN)
    api.own_tokens = {"eyJ.renewed.sig"}
    token_file.write_text("eyJ.renewed.sig")
    assert await reviews.review("eyJ.another.sig") is None  # an answer, where the old token would get none


@pytest.mark.parametrize(
    "answer",
    [
        (500, {}, WHOLE),
        (503, {}, b""),
        (401, {}, b"{}"),
        (403, {}, b"{}"),
        (404, {}, b"{}"),
        (429, {"Retry-After": "1"}, b"{}"),
        (201, {}, b"not JSON"),
        (201, {}, b"[]"),
        (201, {}, b"{}"),
        (201, {}, b"[" * 100_000),
        (201, {}, WHOLE + b" " * 2**20),
        (302, {"Location": "/elsewhere"}, WHOLE),
    ],
    ids=lambda answer: f"{answer[0]}-{len(answer[2])}",
)
async def test_what_is_no_answer_accepts_nobody(
    reviews: TokenReview, api: ApiServer, answer: tuple[int, dict[str, str], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    api.answer = answer
    with pytest.raises(Unavailable, match="cannot check tokens now"):
        await reviews.review(TOKEN)
    assert len(api.requests) == 1  # no redirect is followed
    assert "the API server does not answer token reviews" in caplog.text
    assert TOKEN not in caplog.text and OWN_TOKEN not in caplog.text
    api.answer = None
    assert await reviews.review(TOKEN) == "team-a/trainer"  # nothing of it was kept


async def test_an_api_server_of_another_authority_is_told_nothing(
    api: ApiServer, tmp_path: Path, token_file: Path
) -> None:
    stranger = Authority(tmp_path / "other")
    reviews = TokenReview(api.url, audience=AUDIENCE, ca=stranger.certificate, token_file=token_file)
    with pytest.raises(Unavailable):
        await reviews.review(TOKEN)
    assert api.requests == []


async def test_an_api_server_that_hangs_is_not_waited_for(
    api: ApiServer, authority: Authority, token_file: Path
) -> None:
    api.open.clear()
    reviews = TokenReview(api.url, audience=AUDIENCE, ca=authority.certificate, token_file=token_file, timeout_s=0.2)
    async with asyncio.timeout(20):  # the server itself holds its answer back for 30 s
        with pytest.raises(Unavailable):
            await reviews.review(TOKEN)
    api.open.set()


async def test_an_answer_in_drops_is_not_waited_for(api: ApiServer, authority: Authority, token_file: Path) -> None:
    api.in_drops = True
    reviews = TokenReview(api.url, audience=AUDIENCE, ca=authority.certificate, token_file=token_file, timeout_s=0.5)
    with pytest.raises(Unavailable):  # the whole answer takes many times that
        await reviews.review(TOKEN)


async def test_accepted_tokens_count_for_five_minutes_without_the_api_server(
    reviews: TokenReview, api: ApiServer, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    await reviews.review(TOKEN)
    api.answer = (503, {}, b"")
    for now_s in (1060.0, 1100.0, 1299.9):
        clock.now_s = now_s
        assert await reviews.review(TOKEN) == "team-a/trainer"
    with pytest.raises(Unavailable):
        await reviews.review("eyJ.another.sig")  # never seen, so never accepted
    clock.now_s = 1300.0
    with pytest.raises(Unavailable):
        await reviews.review(TOKEN)
    assert [record.levelno for record in caplog.records].count(logging.ERROR) == 1  # not one a question
    api.answer = None
    caplog.set_level(logging.INFO)
    assert await reviews.review(TOKEN) == "team-a/trainer"
    assert "the API server answers token reviews again" in caplog.messages


async def test_without_the_api_server_it_is_asked_every_ten_seconds_and_one_caller_waits(
    reviews: TokenReview, api: ApiServer, clock: Clock
) -> None:
    await reviews.review(TOKEN)
    api.answer = (503, {}, b"")
    for now_s, times in ((1060.0, 2), (1069.9, 2), (1070.0, 3)):
        clock.now_s = now_s
        await reviews.review(TOKEN)
        assert len(api.asked) == times
    clock.now_s = 1080.0
    api.open.clear()
    waits = asyncio.create_task(reviews.review(TOKEN))
    await until_asked(api, 4)
    assert await reviews.review(TOKEN) == "team-a/trainer" and not waits.done()
    api.open.set()
    assert await waits == "team-a/trainer"


async def test_no_more_answers_are_kept_than_the_limit(
    reviews: TokenReview, api: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MAX_ENTRIES", 2)
    api.users |= {name: (ACCOUNT, [AUDIENCE]) for name in ("a", "b", "c")}
    for token in ("a", "b", "a", "c", "a", "b"):  # c drives out b, which was used least recently
        await reviews.review(token)
    assert api.asked == ["a", "b", "c", "b"]


async def test_unknown_tokens_drive_out_no_accepted_one(
    reviews: TokenReview, api: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MAX_ENTRIES", 2)
    await reviews.review(TOKEN)
    for number in range(4):
        assert await reviews.review(f"unknown{number}") is None
    await reviews.review("unknown3")
    await reviews.review(TOKEN)
    assert api.asked == [TOKEN, *(f"unknown{number}" for number in range(4))]


async def test_too_many_unknown_tokens_at_once_are_told_to_come_again(
    reviews: TokenReview, api: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MAX_WAITING", 2)
    api.open.clear()
    waiting = [asyncio.create_task(reviews.review(token)) for token in (TOKEN, "unknown")]
    await until_asked(api, 2)
    with pytest.raises(Unavailable, match="too many new tokens"):
        await reviews.review("one more")
    api.open.set()
    assert await asyncio.gather(*waiting) == ["team-a/trainer", None]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"url": "http://kubernetes.default.svc"}, "--token-review-url is 'http://kubernetes.default.svc'; give"),
        ({"url": "https://"}, "--token-review-url is 'https://'"),
        ({"url": "https://host:port"}, "--token-review-url is 'https://host:port'"),
        ({"url": "https://host/?x=1"}, "--token-review-url is"),
        ({"audience": ""}, "--token-audience is empty"),
        ({"ca": Path("/none")}, "--token-review cannot use"),
        ({"token_file": Path("/none")}, "--token-review cannot use /none"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_option(
    settings: dict[str, Any], expected: str, authority: Authority, token_file: Path
) -> None:
    right: dict[str, Any] = {"audience": AUDIENCE, "ca": authority.certificate, "token_file": token_file}
    TokenReview(**right)
    with pytest.raises(TokenReviewError) as caught:
        TokenReview(**right | settings)
    assert str(caught.value).startswith(expected)


@pytest.mark.parametrize("contents", ["", "\n", f"{OWN_TOKEN}\nX-Header: {OWN_TOKEN}", "x" * (MAX_TOKEN_BYTES + 1)])
async def test_a_file_that_holds_no_token_is_not_quoted(
    reviews: TokenReview, api: ApiServer, token_file: Path, contents: str, caplog: pytest.LogCaptureFixture
) -> None:
    token_file.write_text(contents)
    with pytest.raises(Unavailable):
        await reviews.review(TOKEN)
    assert f"{token_file} holds no token" in caplog.text and OWN_TOKEN not in caplog.text
    assert api.requests == []
