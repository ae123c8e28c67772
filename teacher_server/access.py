"""Who may use what: the file of tenants, and the rights that it gives.

A tenant is a team that shares the pool. Its entry names what it may use and how a caller shows to belong to it: names
in client certificates, SHA-256 hashes of bearer tokens, Kubernetes service accounts. See `docs/access.md`.

The file holds hashes and no tokens, and still no message quotes what stands under `tokens_sha256`: a token pasted there
by mistake must not end in a log.
"""

import asyncio
import hashlib
import ipaddress
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

logger = logging.getLogger(__name__)

BURST_S = 60.0
"""Seconds of `tokens_per_s` that a tenant may use at once unless its entry says otherwise."""
EVERY_MODEL = "*"
_MAX_FILE_BYTES = 2**22
_MAX_VALUE_CHARACTERS = 80
_MAX_FAULTS = 5
"""Faults named in one message; a file with one wrong line often has many."""

_TENANT_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_DNS_LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
_DNS_NAME = re.compile(rf"(?=.{{1,253}}\Z){_DNS_LABEL}(\.{_DNS_LABEL})*")
_URI = re.compile(r"[a-z][a-z0-9+.-]*://[!-~]+")
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_SERVICE_ACCOUNT = re.compile(rf"{_DNS_LABEL}/(?=.{{1,253}}\Z){_DNS_LABEL}(\.{_DNS_LABEL})*")
_NO_TOKEN = hashlib.sha256(b"").hexdigest()


class AccessError(ValueError):
    """The file of tenants cannot be used; the message names file, field and fix on one line."""


@dataclass(frozen=True, slots=True)
class Tenant:
    """Somebody who shares the pool, and what he may use. Quotas are of each server, not of the pool.

    `name` is short and plain: it labels metrics and stands in log lines. `weight` is its share while the pool is busy.
    `burst_tokens` is set whenever `tokens_per_s` is. None means without limit.
    """

    name: str
    models: tuple[str, ...]
    weight: float = 1.0
    tokens_per_s: float | None = None
    burst_tokens: int | None = None
    max_tokens_in_flight: int | None = None

    def may_use(self, model: str) -> bool:
        """Whether the tenant may use the model of that name."""
        return EVERY_MODEL in self.models or model in self.models


ANONYMOUS = Tenant("anonymous", (EVERY_MODEL,))
"""Everybody, on a server without authentication."""


def _check_models(models: tuple[str, ...]) -> tuple[str, ...]:
    if not models:
        raise ValueError('names no model; name some, or write ["*"] for all')
    if EVERY_MODEL in models and len(models) > 1:
        raise ValueError('has "*" beside names, which would mean nothing; write ["*"] or names')
    if not all(models):
        raise ValueError("has an empty name; write the name that the server has by --name")
    return models


def _check_certificate(name: str) -> str:
    if _URI.fullmatch(name):
        return name
    if not _DNS_NAME.fullmatch(name) or _is_ip_address(name):
        raise ValueError(
            "is neither a URI nor a DNS name in lower case; write one subject alternative name, no wildcard"
        )
    return name


def _is_ip_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _check_token_hash(digest: str) -> str:
    if not _SHA256.fullmatch(digest):
        raise ValueError("is not a SHA-256 in 64 hexadecimal digits; write what `printf %s TOKEN | sha256sum` prints")
    if digest.lower() == _NO_TOKEN:
        raise ValueError("is the hash of nothing; the variable that should hold the token was empty")
    return digest.lower()


def _check_service_account(name: str) -> str:
    if not _SERVICE_ACCOUNT.fullmatch(name):
        raise ValueError("is not the name of a service account; write namespace/name")
    return name


# Strict: `weight: yes` or a quoted number is a slip of the pen, and rights are no place to guess.
_Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
_Tokens = Annotated[int, Field(strict=True, ge=1)]


class _TenantEntry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    models: Annotated[tuple[str, ...], AfterValidator(_check_models)]
    weight: _Positive = 1.0
    tokens_per_s: _Positive | None = None
    burst_tokens: _Tokens | None = None
    max_tokens_in_flight: _Tokens | None = None
    certificates: tuple[Annotated[str, AfterValidator(_check_certificate)], ...] = ()
    tokens_sha256: tuple[Annotated[str, AfterValidator(_check_token_hash)], ...] = ()
    service_accounts: tuple[Annotated[str, AfterValidator(_check_service_account)], ...] = ()

    @model_validator(mode="after")
    def _complete(self) -> "_TenantEntry":
        if self.burst_tokens is not None and self.tokens_per_s is None:
            raise ValueError("has burst_tokens without tokens_per_s; add tokens_per_s, or remove burst_tokens")
        if not (self.certificates or self.tokens_sha256 or self.service_accounts):
            raise ValueError("has nobody who could use it; add certificates, tokens_sha256 or service_accounts")
        return self

    def tenant(self, name: str) -> Tenant:
        burst_tokens = self.burst_tokens
        if burst_tokens is None and self.tokens_per_s is not None:
            burst_tokens = max(1, round(BURST_S * self.tokens_per_s))
        return Tenant(
            name=name,
            models=self.models,
            weight=self.weight,
            tokens_per_s=self.tokens_per_s,
            burst_tokens=burst_tokens,
            max_tokens_in_flight=self.max_tokens_in_flight,
        )


def _check_tenants(tenants: dict[str, _TenantEntry]) -> dict[str, _TenantEntry]:
    if not tenants:
        raise ValueError("names no tenant; add one, or serve without --access")
    for name in tenants:
        if not _TENANT_NAME.fullmatch(name):
            raise ValueError(f"{_quoted(name)} is no name of a tenant; use up to 63 of a-z, 0-9, '.', '_' and '-'")
        if name == ANONYMOUS.name:
            raise ValueError(f"{name!r} is the name of callers without authentication; choose another")
    return tenants


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    tenants: Annotated[dict[str, _TenantEntry], AfterValidator(_check_tenants)]


class Access:
    """The rights of one version of the file. Immutable."""

    def __init__(self, file: _File) -> None:
        tenants = {name: entry.tenant(name) for name, entry in file.tenants.items()}
        self.tenants: Mapping[str, Tenant] = MappingProxyType(tenants)
        self._by_certificate = _owners(file, tenants, "certificates")
        self._by_token_hash = _owners(file, tenants, "tokens_sha256")
        self._by_service_account = _owners(file, tenants, "service_accounts")

    def by_certificate(self, name: str) -> Tenant | None:
        """Whose certificates carry this subject alternative name, a URI or a DNS name."""
        return self._by_certificate.get(name if "://" in name else name.lower())

    def by_token(self, token: str) -> Tenant | None:
        """Whose bearer token this is.

        A dictionary of digests, and not a comparison in constant time: what its timing could tell is about the SHA-256
        of a guess, and nobody can steer that towards a stored one. Neither can a digest be turned back into its
        token as long as tokens are random with 128 bits or more (`openssl rand -hex 32`); a password would need a slow,
        salted hash instead.
        """
        return self._by_token_hash.get(hashlib.sha256(token.encode()).hexdigest())

    def by_service_account(self, name: str) -> Tenant | None:
        """Whose service account this is, as namespace/name."""
        return self._by_service_account.get(name)


def _owners(file: _File, tenants: Mapping[str, Tenant], field: str) -> dict[str, Tenant]:
    """The tenant of each credential of one kind. Raises AccessError if two tenants have the same."""
    owners: dict[str, Tenant] = {}
    for name, entry in file.tenants.items():
        for index, credential in enumerate(getattr(entry, field)):
            owner = owners.setdefault(credential, tenants[name])
            if owner.name != name:
                shown = "this hash" if field == "tokens_sha256" else _quoted(credential)
                raise AccessError(
                    f"tenants.{name}.{field}.{index}: {shown} is tenant {owner.name}'s already; remove it from one"
                )
    return owners


class _Loader(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error. PyYAML would take the last one and drop the other's rights."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge" and isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, "a key stands twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def load_access(path: Path) -> Access:
    """The rights in the file. Raises AccessError."""
    return _parse(path, _read(path))


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise AccessError(f"{path}: cannot be read ({error.strerror}); give an existing YAML file") from None
    if len(data) > _MAX_FILE_BYTES:
        raise AccessError(f"{path}: is larger than {_MAX_FILE_BYTES} bytes; give a file of tenants")
    return data


def _parse(path: Path, data: bytes) -> Access:
    try:
        values = yaml.load(data, _Loader)
    except yaml.MarkedYAMLError as error:
        # Not its own text, which quotes the line.
        mark = error.problem_mark or error.context_mark
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise AccessError(f"{path}: is not YAML{where}: {_one_line(error.problem or '')}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise AccessError(f"{path}: is not YAML ({type(error).__name__}); give a YAML file with tenants") from None
    if not isinstance(values, dict):
        raise AccessError(f"{path}: tenants: is missing; add it")
    try:
        return Access(_File.model_validate(values))
    except ValidationError as error:
        details = error.errors(include_url=False)
        faults = [_explain(detail) for detail in details[:_MAX_FAULTS]]
        if len(details) > _MAX_FAULTS:
            faults.append(f"and {len(details) - _MAX_FAULTS} more")
        raise AccessError(f"{path}: {'; '.join(faults)}") from None
    except AccessError as error:
        raise AccessError(f"{path}: {error}") from None


def _explain(detail: Any) -> str:
    """One pydantic error as `tenants.team-a.weight: ...`, without values that may be secret."""
    location = [_one_line(str(part)) for part in detail["loc"] if part != "[key]"]
    path = ".".join(location) or "tenants"
    if detail["type"] == "missing":
        return f"{path}: is missing; add it"
    if detail["type"] == "extra_forbidden":
        model = _TenantEntry if len(location) > 1 else _File
        return f"{path}: is no known key; known are {', '.join(model.model_fields)}"
    message = _one_line(detail["msg"].removeprefix("Value error, "))
    if "tokens_sha256" in location or not isinstance(detail["input"], str | int | float):
        return f"{path}: {message}"
    if detail["type"] == "value_error":
        return f"{path}: {_quoted(detail['input'])} {message}"
    return f"{path}: is {_quoted(detail['input'])}; {message[:1].lower()}{message[1:]}"


def _quoted(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_VALUE_CHARACTERS else text[:_MAX_VALUE_CHARACTERS] + "..."


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]


class AccessFile:
    """The file of tenants and its newest version that could be read. Raises AccessError if there is none yet."""

    def __init__(self, path: Path, on_reload: Callable[[bool], None]) -> None:
        self._path = path
        self._on_reload = on_reload
        data = _read(path)
        self.current = _parse(path, data)
        """The rights now. Ask for it with every request: a tenant that was removed has none from then on."""
        self._seen = _digest(data)

    async def watch(self, every_s: float = 2.0) -> None:
        """Takes over changes of the file, looking every `every_s` seconds, until cancelled.

        What the file holds is compared, not its time: Kubernetes mounts exchange symbolic links. A version that cannot
        be used leaves the rights as they are, and is logged once.
        """
        while True:
            await asyncio.sleep(every_s)
            await asyncio.to_thread(self._look)

    def _look(self) -> None:
        try:
            data = _read(self._path)
        except AccessError as error:
            self._refuse(str(error).encode(), error)
            return
        if _digest(data) == self._seen:
            return
        try:
            access = _parse(self._path, data)
        except AccessError as error:
            self._refuse(data, error)
            return
        self._seen = _digest(data)
        self.current = access
        logger.info("access file reloaded: tenants=%d", len(access.tenants))
        self._on_reload(True)

    def _refuse(self, seen: bytes, error: AccessError) -> None:
        if _digest(seen) == self._seen:
            return
        self._seen = _digest(seen)
        logger.error("access file not reloaded, the rights stay as they are: %s", error)
        self._on_reload(False)


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
