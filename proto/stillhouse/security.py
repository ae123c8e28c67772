"""What a client shows to servers and accepts of them: TLS files and a token, which may change under way.

The files are read when the client is made, and again when they changed: looked at once a second at most, by
`stat`, and at once when a connection or a call was refused. What cannot be used (half written, a key that is
not the certificate's) changes nothing, so a rotation need not be atomic.
"""

import logging
import math
import os
import ssl
import time
from dataclasses import dataclass
from pathlib import Path

import grpc

LOOK_EVERY_S = 1.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM files. A client proves who it is with `certificate` and `key`, which go together.

    ca: whom to trust as signers of servers' certificates; None for gRPC's default roots.
    server_name: the name that servers' certificates must have; None for the one that the address has.
    """

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    server_name: str | None = None


@dataclass(frozen=True, slots=True)
class _Pem:
    """The files' content."""

    ca: bytes | None
    certificate: bytes | None
    key: bytes | None


class Security:
    """The credentials of one client, as of the last look.

    `version` counts every change, `tls_version` those that only a new connection makes use of.
    """

    def __init__(
        self,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        tls: Tls | None = None,
        token_file: Path | None = None,
        plaintext_token: bool = False,
    ) -> None:
        if credentials is not None and tls is not None:
            raise ValueError("credentials and tls are both given; give one of them")
        if tls is not None and (tls.certificate is None) != (tls.key is None):
            raise ValueError(
                f"tls.certificate is {tls.certificate} and tls.key is {tls.key}; give both, or neither if the server "
                "asks for no certificate"
            )
        if token_file is not None and credentials is None and tls is None and not plaintext_token:
            raise ValueError(
                f"token_file is {token_file} without tls, so anybody on the way could read the token; give tls, or "
                "plaintext_token=True where a proxy or a mesh encrypts"
            )
        self._tls = tls
        self._token_file = None if token_file is None else Path(token_file)
        self._given = credentials
        self._made: grpc.ChannelCredentials | None = None
        self._pem: _Pem | None = None
        self._token = ""
        self._looked_s = -math.inf
        self._seen: dict[Path, tuple[int, ...]] = {}
        self.version = 0
        self.tls_version = 0
        self._tls_changed(self._tls_files())
        self._token_changed(() if self._token_file is None else (self._token_file,))

    @property
    def credentials(self) -> grpc.ChannelCredentials | None:
        """For new connections; None for plaintext."""
        if self._pem is None:
            return self._given
        if self._made is None:  # not when read: it starts gRPC, which a later fork would not survive
            self._made = grpc.ssl_channel_credentials(self._pem.ca, self._pem.key, self._pem.certificate)
        return self._made

    @property
    def server_name(self) -> str | None:
        """The name to verify in place of the address's own."""
        return None if self._tls is None else self._tls.server_name

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What every call carries."""
        return (("authorization", f"Bearer {self._token}"),) if self._token else ()

    def look(self, *, at_once: bool = False) -> None:
        """Reads the files again if they changed; what is wrong with them is logged, and the old content stays."""
        now_s = time.monotonic()
        if (self._tls is None and self._token_file is None) or (not at_once and now_s - self._looked_s < LOOK_EVERY_S):
            return
        self._looked_s = now_s
        for files, read in (
            (self._tls_files(), self._tls_changed),
            (() if self._token_file is None else (self._token_file,), self._token_changed),
        ):
            try:
                read(files)
            except ValueError as error:
                _log.warning("%s; what it held before stays in use", error)

    def _tls_files(self) -> tuple[Path, ...]:
        if self._tls is None:
            return ()
        given = (self._tls.ca, self._tls.certificate, self._tls.key)
        return tuple(Path(file) for file in given if file is not None)

    def _tls_changed(self, files: tuple[Path, ...]) -> None:
        if self._tls is None or (self._pem is not None and not self._differ(files)):
            return
        pem = _read_pem(self._tls)
        if pem != self._pem:
            self._pem, self._made = pem, None
            self.version += 1
            self.tls_version += 1

    def _token_changed(self, files: tuple[Path, ...]) -> None:
        if self._token_file is None or (self._token and not self._differ(files)):
            return
        token = _read_token(self._token_file)
        if token != self._token:
            self._token = token
            self.version += 1

    def _differ(self, files: tuple[Path, ...]) -> bool:
        """Whether any file is another than when last asked. Remembered before reading: a change in between shows."""
        found = {file: _stamp(file) for file in files}
        differ = any(self._seen.get(file) != stamp for file, stamp in found.items())
        self._seen |= found
        return differ


def _stamp(file: Path) -> tuple[int, ...]:
    try:
        status = os.stat(file)
    except OSError:
        return ()  # missing: as good a state as any; reading says what is wrong
    return status.st_mtime_ns, status.st_ino, status.st_size


def _read(file: Path, field: str) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ValueError(f"{field} is {file}, which cannot be read ({error.strerror}); give a readable file") from None


def _read_pem(tls: Tls) -> _Pem:
    def contents() -> _Pem:
        return _Pem(
            ca=None if tls.ca is None else _read(Path(tls.ca), "tls.ca"),
            certificate=None if tls.certificate is None else _read(Path(tls.certificate), "tls.certificate"),
            key=None if tls.key is None else _read(Path(tls.key), "tls.key"),
        )

    pem = contents()
    checked = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if tls.ca is not None:
        try:
            checked.load_verify_locations(tls.ca)
        except (ssl.SSLError, OSError):
            raise ValueError(f"tls.ca is {tls.ca}, which holds no certificate; give a PEM file") from None
    if tls.certificate is not None:
        try:
            checked.load_cert_chain(tls.certificate, tls.key, password=_no_password)
        except (ssl.SSLError, OSError):
            raise ValueError(
                f"tls.certificate is {tls.certificate} and tls.key is {tls.key}, which do not belong together; give "
                "a PEM certificate and its PEM key, not encrypted"
            ) from None
    if contents() != pem:  # OpenSSL reads files itself: what was checked must be what was read
        raise ValueError(f"one of the files of {tls} changes as it is read; wait until it is written")
    return pem


def _no_password() -> str:
    return ""  # without it OpenSSL would ask the terminal


def _read_token(file: Path) -> str:
    try:
        token = _read(file, "token_file").decode("ascii").strip()
    except UnicodeDecodeError:
        token = ""
    if not token or not all("!" <= letter <= "~" for letter in token):  # the value itself is not for logs
        raise ValueError(f"token_file is {file}, which holds no token; give a file with one line of visible ASCII")
    return token
