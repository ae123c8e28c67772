"""Certificates for tests: an authority that writes PEM files.

```python
authority = Authority(tmp_path / "pki")
authority.certificate                              # the authority's own certificate, for `--tls-client-ca` and `tls_ca`
server = authority.server()                        # a KeyPair for localhost, 127.0.0.1 and ::1
client = authority.client("spiffe://pool/team-a")  # a KeyPair with this URI (or DNS name) as its only name
client.certificate, client.key                     # paths of its PEM files
authority.client("team-b.example", name="b")       # `name` is the stem of the files; each needs its own
authority.server(ends=datetime(2001, 1, 1))        # one that is over; UTC
authority.server(name="new").replace(server)       # its contents at server's paths, exchanged as a renewal does it
```

An authority is a `trustme.CA`; the leaves are signed here, since trustme knows no URIs.
"""

import datetime
import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path

import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

SERVER_NAMES = ("localhost", "127.0.0.1", "::1")
_BEGINS = datetime.datetime(2000, 1, 1)
_ENDS = datetime.datetime(2100, 1, 1)


@dataclass(frozen=True)
class KeyPair:
    """PEM files of a certificate, its chain included, and of its key."""

    certificate: Path
    key: Path

    def replace(self, other: "KeyPair") -> None:
        """Puts these contents at the paths of `other`: each file at once, one after the other."""
        replace(other.certificate, self.certificate.read_bytes())
        replace(other.key, self.key.read_bytes())


def replace(path: Path, data: bytes) -> None:
    """Exchanges what a file holds, all at once."""
    new = path.with_name(f".{path.name}.new")
    new.write_bytes(data)
    os.replace(new, path)


class Authority:
    """Signs certificates and writes them to `directory`; see the module's text."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self._authority = trustme.CA()
        self.certificate = directory / "authority.pem"
        self._authority.cert_pem.write_to_path(self.certificate)

    def server(self, *names: str, name: str = "server", key: object = None, ends: datetime.datetime = _ENDS) -> KeyPair:
        """A certificate for a server of these DNS names and addresses, by default those of this machine."""
        return self._issue(names or SERVER_NAMES, name, key, ends)

    def client(
        self,
        *names: str,
        name: str = "client",
        key: object = None,
        ends: datetime.datetime = _ENDS,
        common_name: str = "",
    ) -> KeyPair:
        """A certificate for a client with these URIs and DNS names as subject alternative names."""
        return self._issue(names, name, key, ends, common_name)

    def _issue(
        self, names: tuple[str, ...], name: str, given: object, ends: datetime.datetime, common_name: str = ""
    ) -> KeyPair:
        key = ec.generate_private_key(ec.SECP256R1()) if given is None else given
        authority = x509.load_pem_x509_certificate(self._authority.cert_pem.bytes())
        subject = [x509.NameAttribute(x509.NameOID.COMMON_NAME, common_name)] if common_name else []
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name(subject))
            .issuer_name(authority.subject)
            .public_key(key.public_key())  # pyright: ignore[reportAttributeAccessIssue]
            .serial_number(x509.random_serial_number())
            .not_valid_before(_BEGINS)
            .not_valid_after(ends)
        )
        if names:
            builder = builder.add_extension(
                x509.SubjectAlternativeName(list(map(_general_name, names))), critical=False
            )
        signer = load_pem_private_key(self._authority.private_key_pem.bytes(), None)
        certificate = builder.sign(signer, hashes.SHA256())  # pyright: ignore[reportArgumentType]
        pair = KeyPair(self.directory / f"{name}.pem", self.directory / f"{name}.key")
        assert not pair.key.exists(), f"{pair.key} exists; give each certificate a name of its own"
        pair.certificate.write_bytes(certificate.public_bytes(Encoding.PEM))
        pair.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))  # pyright: ignore[reportAttributeAccessIssue]
        return pair


def _general_name(name: str) -> x509.GeneralName:
    if "://" in name:
        return x509.UniformResourceIdentifier(name)
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
