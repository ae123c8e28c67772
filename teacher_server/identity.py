"""Who asks: the tenant of a call, by its bearer token or its client certificate."""

import logging
import re
from collections.abc import Mapping, Sequence

from stillhouse.errors import Unauthenticated
from teacher_server.access import ANONYMOUS, Access, AccessFile, Tenant
from teacher_server.token_review import MAX_TOKEN_BYTES, TokenReview

logger = logging.getLogger(__name__)

_BEARER = re.compile(r"bearer +([A-Za-z0-9._~+/-]+=*) *", re.IGNORECASE)
"""RFC 6750, section 2.1."""
_NAMES = "x509_subject_alternative_name"
_MAX_LOGGED_NAMES = 4


class Authenticator:
    """Finds the tenant of each call. Without `access` everybody is `ANONYMOUS`.

    A token decides if there is one, and it must be good: a caller that shows a wrong token is refused, however good
    its certificate. Otherwise the certificate's subject alternative names decide (RFC 9525); its common name never
    does. `certificates` says whether the server demands certificates of clients and checks them; `token_review` asks
    Kubernetes about tokens that are not in the file.
    """

    def __init__(self, access: AccessFile | None, *, certificates: bool, token_review: TokenReview | None) -> None:
        self._access = access
        self._certificates = certificates
        self._token_review = token_review

    @property
    def enabled(self) -> bool:
        """Whether callers must show who they are."""
        return self._access is not None

    async def authenticate(
        self, metadata: Sequence[tuple[str, str | bytes]], auth_context: Mapping[str, Sequence[bytes]]
    ) -> Tenant:
        """The tenant of a call, from its metadata and gRPC's authentication context.

        Raises Unauthenticated, whose text is the same whatever was wrong with a token or a certificate; the log says
        more. Raises Unavailable if Kubernetes must be asked and does not answer.
        """
        if self._access is None:
            return ANONYMOUS
        authorizations = [value for key, value in metadata if key.lower() == "authorization"]
        token = _bearer_token(authorizations) if authorizations else None
        by_token = None if token is None else await self._tenant_of_token(self._access, token)
        if token is not None and by_token is None:
            raise _refusal("token of no tenant")
        names = _certificate_names(auth_context) if self._certificates else []
        by_certificate = _tenant_of_names(self._access.current, names)
        if by_token is not None and by_certificate is not None and by_token.name != by_certificate.name:
            raise _refusal(f"token of tenant {by_token.name}, certificate of tenant {by_certificate.name}")
        tenant = by_token or by_certificate
        if tenant is None:
            shown = [name[:200] for name in names[:_MAX_LOGGED_NAMES]]
            raise _refusal(f"certificate of no tenant, names {shown}" if names else "no certificate and no token")
        return tenant

    async def _tenant_of_token(self, file: AccessFile, token: str) -> Tenant | None:
        if len(token) > MAX_TOKEN_BYTES:
            return None
        tenant = file.current.by_token(token)
        if tenant is not None or self._token_review is None:
            return tenant
        account = await self._token_review.review(token)
        # The rights of now: the file may have changed while Kubernetes was asked.
        return None if account is None else file.current.by_service_account(account)


def _bearer_token(authorizations: Sequence[str | bytes]) -> str:
    """The one bearer token. Raises Unauthenticated if there are several, or what is there is none."""
    if len(authorizations) == 1 and isinstance(authorizations[0], str):
        found = _BEARER.fullmatch(authorizations[0])
        if found is not None:
            return found[1]
    logger.info("call refused: authorization metadata is not one bearer token: entries=%d", len(authorizations))
    raise Unauthenticated(
        "the server does not accept the authorization metadata; send one entry, 'Bearer TOKEN'", field="authorization"
    )


def _certificate_names(auth_context: Mapping[str, Sequence[bytes]]) -> list[str]:
    return [name.decode("utf-8", "replace") for name in auth_context.get(_NAMES, ())]


def _tenant_of_names(access: Access, names: Sequence[str]) -> Tenant | None:
    """The tenant of the first name that is known."""
    return next((tenant for tenant in map(access.by_certificate, names) if tenant is not None), None)


def _refusal(cause: str) -> Unauthenticated:
    """Logs why, and returns the error that does not say it."""
    logger.info("call refused: %s", cause)
    return Unauthenticated(
        "the server does not accept this call: it came with no certificate or token that this server knows"
    )
