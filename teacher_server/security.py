"""From options to who may connect and who may call."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from teacher_server.access import AccessError, AccessFile
from teacher_server.identity import Authenticator
from teacher_server.metrics import Metrics
from teacher_server.options import OptionError
from teacher_server.tls import TlsError, certificate_expires_at, server_credentials
from teacher_server.token_review import TokenReview, TokenReviewError


@dataclass(frozen=True, slots=True)
class Security:
    """Who may connect and who may call. As it is: everybody, in plaintext."""

    credentials: grpc.ServerCredentials | None = None
    access: AccessFile | None = None
    authenticator: Authenticator = field(
        default_factory=lambda: Authenticator(None, certificates=False, token_review=None)
    )


def load_security(
    metrics: Metrics,
    *,
    access: Path | None,
    tls_certificate: Path | None,
    tls_key: Path | None,
    tls_client_ca: Path | None,
    token_review: bool,
    token_audience: str,
    token_review_url: str,
    token_review_credentials: Path,
) -> Security:
    """Reads the files. Raises OptionError for those that cannot be used."""
    try:
        file = None if access is None else AccessFile(access, _counted(metrics, "access"))
        review = None
        if token_review:
            review = TokenReview(
                token_review_url,
                audience=token_audience,
                ca=token_review_credentials / "ca.crt",
                token_file=token_review_credentials / "token",
            )
        credentials = None
        if tls_certificate is not None and tls_key is not None:
            count, certificate = _counted(metrics, "tls"), tls_certificate

            def reloaded(ok: bool) -> None:
                count(ok)
                if ok:
                    metrics.certificate_expires.set(certificate_expires_at(certificate))

            credentials = server_credentials(certificate, tls_key, tls_client_ca, on_reload=reloaded)
            metrics.certificate_expires.set(certificate_expires_at(certificate))
    except AccessError as error:
        raise OptionError(f"{error}{_hint(access)}", reason="access") from error
    except TokenReviewError as error:
        raise OptionError(f"{error}{_hint(token_review_credentials / 'token')}", reason="access") from error
    except TlsError as error:
        raise OptionError(f"{error}{_hint(tls_certificate, tls_key, tls_client_ca)}", reason="tls") from error
    authenticator = Authenticator(file, certificates=tls_client_ca is not None, token_review=review)
    return Security(credentials, file, authenticator)


def _hint(*files: Path | None) -> str:
    """Where these files come from in a pod, if one is missing."""
    missing = next((file for file in files if file is not None and not os.path.exists(file)), None)
    if missing is None:
        return ""
    return f" (in a pod: the Secret mounted at {missing.parent} may be missing, or have no key {missing.name})"


def _counted(metrics: Metrics, what: str) -> Callable[[bool], None]:
    return lambda ok: metrics.reloaded(what, ok)
