"""Who a request is from: known from the interceptor to the servicer, without a parameter in between."""

import contextvars
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass

from teacher_server.access import ANONYMOUS, Tenant

REQUEST_ID_KEY = "stillhouse-request-id"
ATTEMPT_KEY = "stillhouse-attempt"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_ATTEMPT = re.compile(r"[0-9]{1,4}")


@dataclass(frozen=True, slots=True)
class Caller:
    """The tenant, and the ids that the client gave the request, which its own log has too."""

    tenant: Tenant
    request_id: str
    attempt: int


_NOBODY = Caller(ANONYMOUS, "", 1)
CALLER: contextvars.ContextVar[Caller] = contextvars.ContextVar("caller", default=_NOBODY)


def request_ids(metadata: Iterable[tuple[str, str | bytes]]) -> tuple[str, int]:
    """Id and attempt of a request. An id that is missing or could not stand in a log is replaced by one of ours."""
    found = {key: value for key, value in metadata if isinstance(value, str)}
    request_id, attempt = found.get(REQUEST_ID_KEY, ""), found.get(ATTEMPT_KEY, "1")
    return (
        request_id if _REQUEST_ID.fullmatch(request_id) else f"server-{secrets.token_hex(8)}",
        int(attempt) if _ATTEMPT.fullmatch(attempt) else 1,
    )
