"""Where an archive keeps its entries: `Store` is the seam; a local directory and an S3 bucket are behind it.

A store maps a key (64 hexadecimal digits) to bytes. It knows nothing of what they mean: whether an entry is whole is
for `stillhouse.archive` to see. Every failure to read or write is an OSError.
"""

import contextlib
import os
import re
import secrets
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

LEFTOVER_AFTER_S = 3600.0
"""A temporary file older than this was left by a writer that is gone: a write takes seconds."""

_SUFFIX = ".score"
_KEY = re.compile(r"[0-9a-f]{64}")


class ArchiveError(Exception):
    """The archive cannot be used as it was asked for; the message names what and the fix."""


class Store(Protocol):
    """Bytes by key. Safe from any thread, and for several processes on the same place at once."""

    url: str
    """Where it is, for messages."""

    @property
    def evicted(self) -> int:
        """Entries that this object removed so far to stay within its limit."""
        ...

    def check(self, *, write: bool) -> None:
        """Raises ArchiveError if what is asked of it cannot work: without `write` the place has to exist."""
        ...

    def get(self, key: str) -> bytes | None:
        """The entry, or None if there is none. Raises OSError."""
        ...

    def put(self, key: str, data: bytes, *, durable: bool) -> None:
        """Writes the entry, whole or not at all, over what was there. Raises OSError.

        durable: it has reached the disk when this returns, and survives a loss of power.
        """
        ...

    def keys(self) -> Iterator[str]:
        """Keys of all entries, in no order. Raises OSError."""
        ...

    def delete(self, key: str) -> None:
        """Removes the entry, if it is there. Raises OSError."""
        ...


def open_store(url: str, *, max_bytes: int | None = None) -> Store:
    """The store of a plain path, `file:///path` or `s3://bucket/prefix`. Nothing is read or written yet.

    max_bytes: size that a local directory is kept below; None: no limit. Raises ArchiveError.
    """
    if "://" not in url:
        if not url:
            raise ArchiveError("the archive's url is empty; give a directory or s3://bucket/prefix")
        return LocalStore(Path(url), max_bytes=max_bytes)
    parts = urlsplit(url)
    if parts.query or parts.fragment:
        raise ArchiveError(f"the archive's url {url!r} has a query or a fragment; leave them out")
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
            raise ArchiveError(f"the archive's url {url!r} names no absolute path of this machine; write file:///path")
        return LocalStore(Path(unquote(parts.path)), max_bytes=max_bytes)
    if parts.scheme == "s3":
        if not parts.netloc:
            raise ArchiveError(f"the archive's url {url!r} names no bucket; write s3://bucket/prefix")
        if max_bytes is not None:
            raise ArchiveError(
                f"max_bytes is {max_bytes} for {url}; a bucket is not limited from here: leave it out, and give the "
                "bucket a lifecycle rule"
            )
        return S3Store(parts.netloc, parts.path.strip("/"))
    raise ArchiveError(
        f"the archive's url {url!r} is of no known kind; write a path, file:///path or s3://bucket/prefix"
    )


class LocalStore:
    """Entries as files: `directory/3/f/3f...<64 digits>.score`.

    An entry is written under another name, flushed and renamed, so no reader ever sees half of one. Reading an entry
    touches its modification time. Above `max_bytes` the entries that were not used for longest are removed until 90%
    is left. The total is kept by counting and taken anew from the directory when it is above the limit, or when this
    object has written a tenth of it: so n writers can together exceed the limit by n tenths, for a while.
    """

    def __init__(self, directory: Path, *, max_bytes: int | None = None) -> None:
        if max_bytes is not None and max_bytes < 1:
            raise ArchiveError(f"max_bytes is {max_bytes}; it must be 1 or more, or left out for no limit")
        self.url = str(directory)
        self._directory = directory
        self._partial = directory / ".partial"
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._total: int | None = None  # bytes of all entries; None: not counted yet
        self._since_scan = 0  # bytes written since they were counted
        self._evicted = 0
        self._synced: set[Path] = set()  # directories whose own names have reached the disk
        self._cleaned = False

    @property
    def evicted(self) -> int:
        """See `Store`."""
        return self._evicted

    def check(self, *, write: bool) -> None:
        """See `Store`. Makes nothing."""
        if self._directory.exists() and not self._directory.is_dir():
            raise ArchiveError(f"{self.url} is no directory; give another path")
        if not write:
            if not self._directory.is_dir():
                raise ArchiveError(f"there is no archive at {self.url} (working directory: {Path.cwd()})")
            return
        existing = self._directory.absolute()
        while not existing.exists():
            existing = existing.parent
        if not existing.is_dir():
            raise ArchiveError(f"{self.url} cannot be made: {existing} is no directory")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise ArchiveError(f"{self.url} cannot be written: no right to write in {existing}")

    def get(self, key: str) -> bytes | None:
        """See `Store`."""
        path = self._path(key)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        # Who may only read still gets the entry; somebody else keeps the limit then.
        with contextlib.suppress(OSError):
            os.utime(path)
        return data

    def put(self, key: str, data: bytes, *, durable: bool) -> None:
        """See `Store`."""
        path = self._path(key)
        self._clean()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._partial.mkdir(exist_ok=True)
        partial = self._partial / f"{key}-{os.getpid()}-{secrets.token_hex(4)}"
        try:
            with partial.open("xb") as file:
                file.write(data)
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        if durable:
            self._sync_names(path.parent)
        self._count(len(data))

    def keys(self) -> Iterator[str]:
        """See `Store`."""
        for entry in self._files():
            yield entry.name.removesuffix(_SUFFIX)

    def delete(self, key: str) -> None:
        """See `Store`."""
        self._path(key).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self._directory / key[0] / key[1] / f"{key}{_SUFFIX}"

    def _files(self) -> Iterator[os.DirEntry[str]]:
        """All entries. What vanishes meanwhile was evicted by somebody."""
        for first in "0123456789abcdef":
            for second in "0123456789abcdef":
                with contextlib.suppress(FileNotFoundError), os.scandir(self._directory / first / second) as found:
                    for entry in found:
                        name = entry.name
                        if name.endswith(_SUFFIX) and _KEY.fullmatch(name.removesuffix(_SUFFIX)):
                            yield entry

    def _sync_names(self, folder: Path) -> None:
        """The entry's name, and once for each directory its own name and those above it, reach the disk."""
        _sync_directory(folder)
        with self._lock:
            known = folder in self._synced
        if not known:
            # Another process may have made them a moment ago, so this does not ask who did.
            _sync_directory(folder.parent)
            _sync_directory(self._directory)
            with contextlib.suppress(PermissionError):  # then the directory was not made from here
                _sync_directory(self._directory.absolute().parent)
            with self._lock:
                self._synced.add(folder)

    def _clean(self) -> None:
        """Removes, once, what writers left that were killed."""
        with self._lock:
            if self._cleaned:
                return
            self._cleaned = True
        if not self._partial.is_dir():
            return
        with os.scandir(self._partial) as found:
            for entry in found:
                with contextlib.suppress(FileNotFoundError):  # another process cleans too
                    if time.time() - entry.stat().st_mtime > LEFTOVER_AFTER_S:
                        os.unlink(entry.path)

    def _count(self, added: int) -> None:
        """Notes that `added` bytes were written, and evicts if it is time to look."""
        if self._max_bytes is None:
            return
        with self._lock:
            self._since_scan += added
            if self._total is not None:
                self._total += added
                if self._total <= self._max_bytes and self._since_scan <= self._max_bytes // 10:
                    return
            self._total, self._since_scan = self._evict(self._max_bytes), 0

    def _evict(self, max_bytes: int) -> int:
        """Removes the least recently used entries if all together are above `max_bytes`; bytes that are left."""
        found: list[tuple[int, int, str]] = []  # time of last use, bytes, path
        for entry in self._files():
            with contextlib.suppress(FileNotFoundError):
                status = entry.stat()
                found.append((status.st_mtime_ns, status.st_size, entry.path))
        total = sum(size for _, size, _ in found)
        if total <= max_bytes:
            return total
        for _, size, path in sorted(found):
            if total <= max_bytes * 9 // 10:
                break
            # Several processes evict the same ones: gone is gone, whoever did it.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
                self._evicted += 1
            total -= size
        return total


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class S3Store:
    """Entries as objects `prefix/3/f/3f...<64 digits>.score` of an S3 bucket, or of anything that speaks S3.

    Settings come from the environment: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION,
    AWS_ENDPOINT_URL, and the roles of instances and of service accounts. An object is durable once it is written.
    Nothing is evicted: that is what a bucket's lifecycle rules are for.
    """

    evicted = 0

    def __init__(self, bucket: str, prefix: str = "") -> None:
        try:
            import obstore
            from obstore.exceptions import BaseError
            from obstore.store import S3Store as Bucket
        except ImportError as error:
            raise ArchiveError(
                f"s3://{bucket}/{prefix} needs obstore, which cannot be imported ({error}); "
                "pip install 'stillhouse[archive]'"
            ) from error
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")
        self._obstore: Any = obstore
        self._errors = (BaseError, ValueError)
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
        options: dict[str, Any] = {"endpoint": endpoint} if endpoint else {}
        try:
            self._bucket: Any = Bucket(
                bucket,
                prefix=prefix or None,
                # A score must not wait for minutes for a bucket that is away.
                retry_config={"max_retries": 4, "retry_timeout": timedelta(seconds=30)},
                client_options={"timeout": "60s", "connect_timeout": "10s", "allow_http": endpoint.startswith("http:")},
                **options,
            )
        except self._errors as error:
            raise ArchiveError(f"{self.url} cannot be used: {_first_line(error)}") from error

    def check(self, *, write: bool) -> None:
        """See `Store`. Asks for the names of a few objects; whether they may be written is seen when one is."""
        try:
            for _ in self.keys():
                break
        except OSError as error:
            raise ArchiveError(
                f"{error}; check the bucket's name, the rights to it and the AWS_* environment variables"
            ) from error

    def get(self, key: str) -> bytes | None:
        """See `Store`."""
        try:
            return bytes(self._obstore.get(self._bucket, _object_name(key)).bytes())
        except FileNotFoundError:
            return None
        except self._errors as error:
            raise self._failed("read", error) from error

    def put(self, key: str, data: bytes, *, durable: bool) -> None:
        """See `Store`."""
        try:
            self._obstore.put(self._bucket, _object_name(key), data)
        except (FileNotFoundError, *self._errors) as error:  # not found: there is no such bucket
            raise self._failed("written", error) from error

    def keys(self) -> Iterator[str]:
        """See `Store`."""
        try:
            for chunk in self._obstore.list(self._bucket, chunk_size=1000):
                for found in chunk:
                    name = str(found["path"]).rpartition("/")[2]
                    if name.endswith(_SUFFIX) and _KEY.fullmatch(name.removesuffix(_SUFFIX)):
                        yield name.removesuffix(_SUFFIX)
        except (FileNotFoundError, *self._errors) as error:
            raise self._failed("listed", error) from error

    def delete(self, key: str) -> None:
        """See `Store`."""
        try:
            self._obstore.delete(self._bucket, _object_name(key))
        except FileNotFoundError:
            pass  # it is gone, as was asked
        except self._errors as error:
            raise self._failed("deleted", error) from error

    def _failed(self, what: str, error: Exception) -> OSError:
        return OSError(f"{self.url} cannot be {what}: {_first_line(error)}")


def _object_name(key: str) -> str:
    return f"{key[0]}/{key[1]}/{key}{_SUFFIX}"


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
