"""Asks Kubernetes whose token this is: the TokenReview of authentication.k8s.io/v1.

Answers are kept for a while, so that the API server is asked once a minute and token, not with every request. A token
that was revoked or ran out is therefore accepted for up to a minute more, and for up to five while the API server does
not answer.
"""

import asyncio
import hashlib
import http.client
import json
import logging
import ssl
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from stillhouse.errors import Unavailable

logger = logging.getLogger(__name__)

MAX_TOKEN_BYTES = 16 * 2**10
"""Longer tokens are refused unseen; those of service accounts have one or two KiB."""
ACCEPTED_S = 60.0
"""How long an accepted token is not asked about again."""
REFUSED_S = 10.0
"""How long a refused token is not asked about again: the account may just have been made."""
STALE_S = 300.0
"""How long after the last answer an accepted token counts while the API server does not answer."""
_ASK_AGAIN_S = 10.0
"""Between two questions about an accepted token while the API server does not answer."""
_MAX_ENTRIES = 1_000
_MAX_WAITING = 100
"""Tokens asked about at once. Only tokens never seen before come in such numbers."""
_MAX_RESPONSE_BYTES = 2**20
_THREADS = 4
_PATH = "/apis/authentication.k8s.io/v1/tokenreviews"
_ACCOUNT_PREFIX = "system:serviceaccount:"


class TokenReviewError(ValueError):
    """Tokens cannot be checked with these settings; the message names option, value and fix."""


class _NoAnswer(Exception):
    """The API server did not say whose token it is; the text is for the log."""


@dataclass(slots=True)
class _Accepted:
    """What is known of a token that was accepted; times are of the monotonic clock."""

    account: str
    stale_at_s: float
    ask_at_s: float
    unanswered: bool = False


class TokenReview:
    """Whose token, by the API server at `url`, for tokens made for `audience`.

    `ca` is the authority of the API server's certificate (None: the system's), `token_file` the token by which this
    server itself may ask. Both are read for every question, since Kubernetes exchanges them. Belongs to one event loop.
    `clock` is for tests.

    Raises TokenReviewError if it cannot work with these settings.
    """

    def __init__(
        self,
        url: str = "https://kubernetes.default.svc",
        *,
        audience: str,
        ca: Path | None,
        token_file: Path,
        timeout_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._host, self._port, self._path = _address(url)
        if not audience:
            raise TokenReviewError("--token-audience is empty; give the audience that the callers' tokens are made for")
        self._audience = audience
        self._ca = ca
        self._token_file = token_file
        self._timeout_s = timeout_s
        self._clock = clock
        try:
            self._own_token()
            self._tls()
        except (_NoAnswer, OSError) as error:
            raise TokenReviewError(
                f"--token-review cannot use {token_file} and {ca or 'the authorities of the system'}: {_cause(error)}; "
                "run in a pod with a service account, and mount its token and authority"
            ) from None
        self._accepted: OrderedDict[bytes, _Accepted] = OrderedDict()
        # Apart from the accepted ones: random tokens must not be able to drive those out.
        self._refused_until_s: OrderedDict[bytes, float] = OrderedDict()
        self._asking: dict[bytes, asyncio.Task[str | None]] = {}
        self._answers = True
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="token-review")

    async def review(self, token: str) -> str | None:
        """The service account of a token as namespace/name, or None if the token is not one's for our audience.

        Raises Unavailable if the API server does not answer and has not for long.
        """
        if not token or len(token) > MAX_TOKEN_BYTES or not token.isascii():
            return None
        digest = hashlib.sha256(token.encode()).digest()
        now_s = self._clock()
        known = self._accepted.get(digest)
        if known is not None and now_s < known.ask_at_s and now_s < known.stale_at_s:
            self._accepted.move_to_end(digest)
            return known.account
        if now_s < self._refused_until_s.get(digest, now_s):
            self._refused_until_s.move_to_end(digest)
            return None
        if known is not None and known.unanswered:
            known.ask_at_s = now_s + _ASK_AGAIN_S  # one caller waits for the next try, not all of them
        asking = self._asking.get(digest)
        if asking is None:
            if len(self._asking) >= _MAX_WAITING:
                raise Unavailable("the server has too many new tokens to check; come again")
            asking = self._asking[digest] = asyncio.create_task(self._ask(digest, token))
            asking.add_done_callback(lambda task: self._asked(digest, task))
        # Callers share the question: one that goes away must not take it from the others.
        return await asyncio.shield(asking)

    def close(self) -> None:
        """Drops questions that have not begun."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _asked(self, digest: bytes, task: asyncio.Task[str | None]) -> None:
        del self._asking[digest]
        if not task.cancelled():
            task.exception()  # it was raised to the callers, if they still wait

    async def _ask(self, digest: bytes, token: str) -> str | None:
        loop = asyncio.get_running_loop()
        try:
            # The sockets have the timeout too, but neither name resolution nor an answer in drops ends by that.
            account = await asyncio.wait_for(loop.run_in_executor(self._threads, self._post, token), self._timeout_s)
        except (_NoAnswer, TimeoutError) as error:
            return self._without_answer(digest, error)
        if not self._answers:
            self._answers = True
            logger.info("the API server answers token reviews again")
        now_s = self._clock()
        if account is None:
            self._accepted.pop(digest, None)
            _keep(self._refused_until_s, digest, now_s + REFUSED_S)
        else:
            self._refused_until_s.pop(digest, None)
            _keep(self._accepted, digest, _Accepted(account, now_s + STALE_S, now_s + ACCEPTED_S))
        return account

    def _without_answer(self, digest: bytes, error: Exception) -> str:
        """What counts without an answer: the last one for a while, then nothing."""
        if self._answers:
            self._answers = False
            logger.error(
                "the API server does not answer token reviews: %s; tokens accepted in the last %g s still count",
                _cause(error),
                STALE_S,
            )
        now_s = self._clock()
        known = self._accepted.get(digest)
        if known is None or now_s >= known.stale_at_s:
            raise Unavailable("the server cannot check tokens now; come again") from None
        known.unanswered = True
        known.ask_at_s = now_s + _ASK_AGAIN_S
        return known.account

    def _post(self, token: str) -> str | None:
        """Asks once. Runs in a thread. Raises _NoAnswer."""
        review = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "spec": {"token": token, "audiences": [self._audience]},
        }
        try:
            headers = {
                "Authorization": f"Bearer {self._own_token()}",
                "Content-Type": "application/json",
                "Accept": "application/json",
            }
            # http.client, since urllib would follow redirects and proxies with the tokens in hand.
            connection = http.client.HTTPSConnection(
                self._host, self._port, timeout=self._timeout_s, context=self._tls()
            )
            try:
                connection.request("POST", self._path, json.dumps(review), headers)
                response = connection.getresponse()
                data = response.read(_MAX_RESPONSE_BYTES + 1)
            finally:
                connection.close()
        except (OSError, http.client.HTTPException) as error:
            raise _NoAnswer(_cause(error)) from None
        if response.status not in (200, 201):
            hint = "; let the pod's account create tokenreviews" if response.status == 403 else ""
            raise _NoAnswer(f"HTTP status {response.status}{hint}")
        if len(data) > _MAX_RESPONSE_BYTES:
            raise _NoAnswer(f"an answer of more than {_MAX_RESPONSE_BYTES} bytes")
        try:
            answer = json.loads(data)
        except (ValueError, RecursionError):
            raise _NoAnswer("an answer that is not JSON") from None
        return self._account(answer)

    def _account(self, answer: Any) -> str | None:
        """The service account in a reviewed TokenReview; None if it does not vouch for one and our audience."""
        status = answer.get("status") if isinstance(answer, dict) else None
        if not isinstance(status, dict):
            raise _NoAnswer("an answer without status")
        # `user` may be filled in without `authenticated`, and `error` stands beside every token that is not valid.
        if status.get("authenticated") is not True:
            logger.info("token refused by the API server: error=%r", str(status.get("error", ""))[:200])
            return None
        # An API server that knows no audiences leaves them out: then the token may be meant for anybody.
        audiences = status.get("audiences")
        if not isinstance(audiences, list) or self._audience not in audiences:
            logger.info("token refused: the API server does not vouch for audience %r", self._audience)
            return None
        user = status.get("user")
        username = user.get("username") if isinstance(user, dict) else None
        if not isinstance(username, str) or not username.startswith(_ACCOUNT_PREFIX):
            logger.info("token refused: its user is no service account")
            return None
        namespace, colon, name = username.removeprefix(_ACCOUNT_PREFIX).partition(":")
        return f"{namespace}/{name}" if namespace and colon and name else None

    def _own_token(self) -> str:
        # Checked here: http.client quotes a header that it refuses in its error.
        text = self._token_file.read_bytes()[: MAX_TOKEN_BYTES + 1].strip()
        if not 0 < len(text) <= MAX_TOKEN_BYTES or not all(33 <= byte <= 126 for byte in text):
            raise _NoAnswer(f"{self._token_file} holds no token")
        return text.decode("ascii")

    def _tls(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=None if self._ca is None else str(self._ca))


def _address(url: str) -> tuple[str, int, str]:
    """Host, port and path of the reviews. Raises TokenReviewError."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or 443
    except ValueError:
        host, port, parts = None, 0, urlsplit("")
    if parts.scheme != "https" or host is None or parts.query or parts.fragment or parts.username is not None:
        raise TokenReviewError(
            f"--token-review-url is {url!r}; give https://HOST[:PORT], the address of the API server"
        )
    return host, port, parts.path.rstrip("/") + _PATH


def _cause(error: Exception) -> str:
    """What went wrong, without what was sent."""
    if isinstance(error, _NoAnswer):
        return str(error)
    if isinstance(error, TimeoutError):
        return "no answer in time"
    # The texts of the rest (certificate, name, connection) are the system's; those of HTTP quote what came back.
    return f"{type(error).__name__}: {error}" if isinstance(error, OSError) else type(error).__name__


def _keep(entries: OrderedDict[bytes, Any], digest: bytes, value: Any) -> None:
    """Puts an entry last and drops those that were longest unused."""
    entries[digest] = value
    entries.move_to_end(digest)
    while len(entries) > _MAX_ENTRIES:
        entries.popitem(last=False)
