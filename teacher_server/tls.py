"""The server's certificate and the authority of its clients, exchanged without a restart.

gRPC asks for them with every new connection, so whoever renews the files does nothing else. Connections that are open
keep what they were made with: a caller loses its rights by the file of tenants, which counts for every request.
"""

import datetime
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key

logger = logging.getLogger(__name__)

_LOOK_EVERY_S = 1.0
"""Between two looks at the files, however many connections come."""
_MAX_FILE_BYTES = 2**22


class TlsError(ValueError):
    """The files cannot be used for TLS; the message names option, file and fix, and never what a file holds."""


@dataclass(frozen=True, slots=True, repr=False)
class _Contents:
    """What the files hold, PEM. Without a representation: one of them is a private key."""

    certificate: bytes
    key: bytes
    client_ca: bytes | None

    def configuration(self) -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration([(self.key, self.certificate)], self.client_ca)


def server_credentials(
    certificate: Path, key: Path, client_ca: Path | None, *, on_reload: Callable[[bool], None]
) -> grpc.ServerCredentials:
    """Credentials of a server that follow their files.

    `certificate` holds the chain, the server's own first; with `client_ca` every client must show a certificate of
    one of its authorities. Files that change are taken over with the next connection, at most one second later; new
    ones that do not fit together leave the old ones in use, are logged once and told to `on_reload` as False.
    `on_reload` is called in a thread of gRPC's.

    Raises TlsError if the files cannot be used now.
    """
    files = _Files(certificate, key, client_ca, on_reload)
    fetch: Any = files.changed  # None means no change, which the stub does not say
    return grpc.dynamic_ssl_server_credentials(files.first, fetch, client_ca is not None)


def certificate_expires_at(path: Path) -> float:
    """When the first certificate of the chain in `path` ends, in seconds since 1970. Raises TlsError."""
    chain = _certificates(_read(path, "--tls-certificate"), path, "--tls-certificate")
    return min(certificate.not_valid_after_utc.timestamp() for certificate in chain)


class _Files:
    """The three files, as they were when last looked at."""

    def __init__(self, certificate: Path, key: Path, client_ca: Path | None, on_reload: Callable[[bool], None]) -> None:
        self._certificate = certificate
        self._key = key
        self._client_ca = client_ca
        self._on_reload = on_reload
        self._lock = threading.Lock()
        self._seen: _Contents | str = self._checked(self._read())
        self.first = self._seen.configuration()
        self._next_look_s = time.monotonic() + _LOOK_EVERY_S

    def changed(self) -> grpc.ServerCertificateConfiguration | None:
        """The new configuration, or None if there is none. gRPC calls this before each handshake, in its threads."""
        if time.monotonic() < self._next_look_s or not self._lock.acquire(blocking=False):
            return None
        try:
            return self._look()
        finally:
            self._next_look_s = time.monotonic() + _LOOK_EVERY_S
            self._lock.release()

    def _look(self) -> grpc.ServerCertificateConfiguration | None:
        try:
            contents = self._read()
        except TlsError as error:
            self._refuse(str(error), error)
            return None
        if contents == self._seen:
            return None
        try:
            configuration = self._checked(contents).configuration()
        except TlsError as error:
            self._refuse(contents, error)
            return None
        self._seen = contents
        logger.info("TLS files reloaded: certificate=%s", self._certificate)
        self._tell(True)
        return configuration

    def _refuse(self, seen: _Contents | str, error: TlsError) -> None:
        if seen == self._seen:
            return
        self._seen = seen
        logger.error("TLS files not reloaded, those of before stay in use: %s", error)
        self._tell(False)

    def _tell(self, good: bool) -> None:
        try:
            self._on_reload(good)
        except Exception:
            # Raised through gRPC it would cost the new configuration, which is then never offered again.
            logger.exception("whoever wanted to know of new TLS files failed")

    def _read(self) -> _Contents:
        return _Contents(
            _read(self._certificate, "--tls-certificate"),
            _read(self._key, "--tls-key"),
            None if self._client_ca is None else _read(self._client_ca, "--tls-client-ca"),
        )

    def _checked(self, contents: _Contents) -> _Contents:
        """The same, if a server can serve with it. Raises TlsError."""
        chain = _certificates(contents.certificate, self._certificate, "--tls-certificate")
        private = _private_key(contents.key, self._key)
        if _public_key(chain[0]) != private.public_key():
            raise TlsError(
                f"--tls-key {self._key} does not belong to the first certificate in --tls-certificate "
                f"{self._certificate}; give the key it was made with, and the server's own certificate first"
            )
        ends = chain[0].not_valid_after_utc
        if ends <= datetime.datetime.now(datetime.UTC):
            raise TlsError(f"--tls-certificate {self._certificate} ended at {ends.isoformat()}; renew it")
        if contents.client_ca is not None and self._client_ca is not None:
            _certificates(contents.client_ca, self._client_ca, "--tls-client-ca")
        return contents


def _read(path: Path, option: str) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise TlsError(f"{option} {path} cannot be read ({error.strerror}); give an existing PEM file") from None
    if len(data) > _MAX_FILE_BYTES:
        raise TlsError(f"{option} {path} is larger than {_MAX_FILE_BYTES} bytes; give a PEM file")
    return data


def _certificates(data: bytes, path: Path, option: str) -> list[x509.Certificate]:
    # The libraries' own texts are left out here and below: some quote what they could not read.
    try:
        return x509.load_pem_x509_certificates(data)
    except ValueError:
        raise TlsError(f"{option} {path} holds no whole certificate; give certificates in PEM") from None


def _public_key(certificate: x509.Certificate) -> Any:
    try:
        return certificate.public_key()
    except (ValueError, UnsupportedAlgorithm):
        return None  # no key that is served with belongs to it


def _private_key(data: bytes, path: Path) -> rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey:
    try:
        key = load_pem_private_key(data, password=None)
    except TypeError:
        raise TlsError(
            f"--tls-key {path} is encrypted, and there is nobody to ask for its password; "
            "decrypt it with `openssl pkey -in KEY -out NEW` and protect the file"
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        raise TlsError(f"--tls-key {path} holds no whole private key; give an RSA or EC key in PEM") from None
    if isinstance(key, rsa.RSAPrivateKey):
        return key
    # Clients of gRPC offer no other signatures; the handshakes would fail one by one.
    if isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(key.curve, ec.SECP256R1 | ec.SECP384R1):
        return key
    raise TlsError(
        f"--tls-key {path} is of a kind that gRPC does not serve with; make one of RSA, EC P-256 or EC P-384"
    )
