"""Scores that are kept: a cache, the record of what a run learnt from, and the input of offline distillation.

An entry is one request with its answer. Its key is the SHA-256 of everything that the answer's bytes depend on: the
model's name and revision, the precision it computed in, and what the request asked for (`ScoreTask.digest`: tokens,
`score_start`, `top_k`, candidates, temperature, element type on the wire). Deadline and priority are not part of it.

Bytes of an entry, numbers little-endian:

    8   magic "stillarc"
    4   format version, uint32: 1
    12  lengths of the three parts that follow, uint32 each
        ScoreRequest, serialised. `model`, `expected_model_revision` and `expected_compute_dtype` are those that
        scored; `expected_vocabulary_digest` is what the caller gave
        ScoreResponse, serialised; its echo is of that request
        facts: a JSON object (UTF-8) of whatever else the caller wanted kept
    32  SHA-256 of everything before

An entry proves itself: the checksum, the echo, every shape and value of the answer, and that the key is the one that
its content makes. One that does not is corrupt: counted, told, and treated as if it were not there.
"""

import dataclasses
import hashlib
import json
import logging
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self, Unpack, cast

from google.protobuf.message import DecodeError
from numpy.typing import ArrayLike

from stillhouse.archive_stores import ArchiveError as ArchiveError
from stillhouse.archive_stores import Store, open_store
from stillhouse.client import ClientStats, TeacherClient
from stillhouse.codec import (
    Scores,
    ScoreTask,
    Teacher,
    decode_request,
    decode_response,
    encode_request,
    encode_response,
)
from stillhouse.errors import Cancelled, StillhouseError
from stillhouse.request import ScoreOptions, make_task
from stillhouse.v1 import teacher_pb2 as pb

_log = logging.getLogger(__name__)

FORMAT_VERSION = 1
_HEADER = struct.Struct("<8sIIII")
_MAGIC = b"stillarc"
_CHECKSUM_BYTES = 32
_NOTICE_EVERY_S = 60.0
_THREADS = 8

Mode = Literal["record", "cache"]
OnWriteFailure = Literal["warn", "stop"]


class CorruptEntry(Exception):
    """An entry is not what was written, or not the one that its name says."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What is kept of one scored sequence."""

    task: ScoreTask  # with model, revision and precision as they were served
    scores: Scores
    facts: dict[str, Any]


def entry_key(task: ScoreTask, *, model_revision: str, compute_dtype: str) -> str:
    """Where the scores of `task` are kept: 64 hexadecimal digits. `task.model` is the name as served."""
    digest = hashlib.sha256(b"stillhouse score\0")
    for text in (model_revision.encode(), compute_dtype.encode()):
        digest.update(struct.pack("<I", len(text)) + text)
    digest.update(task.digest())
    return digest.hexdigest()


def encode_entry(task: ScoreTask, scores: Scores, facts: Mapping[str, Any]) -> tuple[str, bytes]:
    """Key and bytes of an entry. Raises TypeError or ValueError for facts that are no JSON."""
    task = _as_served(task, scores.model, scores.model_revision, scores.compute_dtype)
    key = entry_key(task, model_revision=scores.model_revision, compute_dtype=scores.compute_dtype)
    parts = (
        encode_request(task).SerializeToString(),
        encode_response(task, scores).SerializeToString(),
        _facts_json(facts),
    )
    body = _HEADER.pack(_MAGIC, FORMAT_VERSION, *map(len, parts)) + b"".join(parts)
    return key, body + hashlib.sha256(body).digest()


def decode_entry(key: str, data: bytes) -> Entry:
    """The entry that was written under `key`. Raises CorruptEntry."""
    if len(data) < _HEADER.size + _CHECKSUM_BYTES:
        raise CorruptEntry(f"it has {len(data)} bytes, fewer than an empty one")
    magic, version, *lengths = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise CorruptEntry("it does not begin like an entry")
    if version != FORMAT_VERSION:
        raise CorruptEntry(f"it has format version {version}; this program reads {FORMAT_VERSION}")
    if len(data) != (expected := _HEADER.size + sum(lengths) + _CHECKSUM_BYTES):
        raise CorruptEntry(f"it has {len(data)} bytes and should have {expected}")
    if hashlib.sha256(data[:-_CHECKSUM_BYTES]).digest() != data[-_CHECKSUM_BYTES:]:
        raise CorruptEntry("its checksum is wrong")
    request_end = _HEADER.size + lengths[0]
    response_end = request_end + lengths[1]
    try:
        task = decode_request(pb.ScoreRequest.FromString(data[_HEADER.size : request_end]))
        scores = decode_response(task, pb.ScoreResponse.FromString(data[request_end:response_end]))
        facts = json.loads(data[response_end:-_CHECKSUM_BYTES])
    except (DecodeError, StillhouseError, ValueError) as error:
        raise CorruptEntry(f"its content is no request and answer: {error}") from error
    if not isinstance(facts, dict):
        raise CorruptEntry("its facts are no JSON object")
    if entry_key(task, model_revision=scores.model_revision, compute_dtype=scores.compute_dtype) != key:
        raise CorruptEntry("it is the entry of another request")
    return Entry(task, scores, cast(dict[str, Any], facts))


def _as_served(task: ScoreTask, model: str, model_revision: str, compute_dtype: str) -> ScoreTask:
    """The request as it is kept: of one model, revision and precision, without what changes no score."""
    return dataclasses.replace(
        task,
        model=model,
        expected_model_revision=model_revision,
        expected_compute_dtype=compute_dtype,
        priority=0,
    )


def _facts_json(facts: Mapping[str, Any]) -> bytes:
    return json.dumps(dict(facts), allow_nan=False, sort_keys=True).encode()


@dataclass(slots=True)
class ArchiveStats:
    """What this process has done with an archive so far."""

    hits: int = 0  # requests answered from it
    misses: int = 0  # requests that pinned revision and precision, and had no entry that could be used
    corrupt: int = 0  # entries that were not what was written; each is a miss too
    shared: int = 0  # requests answered by the scores of an identical one that was under way
    written: int = 0  # entries
    written_bytes: int = 0
    write_failures: int = 0
    read_failures: int = 0  # the place could not be read; each is a miss too
    evicted: int = 0  # entries removed to stay within the limit


class Archive:
    """Entries in a store, written and checked. Safe from any thread.

    mode: `record` hands a score over only once its entry is durably written; `cache` hands it over first and does not
    wait for the disk. on_write_failure: `warn` counts a failed write, says so now and then, and hands the score over;
    `stop` raises ArchiveError instead (in `cache` mode there is nobody to raise it to, so it always warns).
    """

    def __init__(self, store: Store, *, mode: Mode = "record", on_write_failure: OnWriteFailure = "warn") -> None:
        self.store = store
        self.mode: Mode = mode
        self._on_write_failure = on_write_failure
        self._lock = threading.Lock()
        self._stats = ArchiveStats()
        self._noticed_s: dict[str, float] = {}

    @classmethod
    def open(
        cls,
        url: str,
        *,
        max_bytes: int | None = None,
        mode: Mode = "record",
        on_write_failure: OnWriteFailure = "warn",
    ) -> Self:
        """The archive at a path, `file:///path` or `s3://bucket/prefix`; it need not exist. Raises ArchiveError if it
        cannot be written."""
        store = open_store(url, max_bytes=max_bytes)
        store.check(write=True)
        return cls(store, mode=mode, on_write_failure=on_write_failure)

    @property
    def stats(self) -> ArchiveStats:
        """A copy of the counts so far."""
        with self._lock:
            return dataclasses.replace(self._stats, evicted=self.store.evicted)

    def look_up(self, task: ScoreTask) -> Scores | None:
        """The scores of a request that names its model as served and pins revision and precision, if they are here.

        The same arrays that the teacher sent, bit for bit; no time was spent, so the timings are 0.
        """
        key = entry_key(task, model_revision=task.expected_model_revision, compute_dtype=task.expected_compute_dtype)
        entry = self._read(key)
        asked, kept = task.expected_vocabulary_digest, entry and entry.task.expected_vocabulary_digest
        # Ids that may mean other tokens: whether they do is the teacher's to say.
        if entry is None or (asked and asked != kept):
            self.count("misses")
            return None
        self.count("hits")
        scores = _without_timings(entry.scores)
        if task.candidate_ids is not None and not task.num_candidates:
            # On the wire no candidates and candidates of width 0 are the same; the caller gets what it asked with.
            scores = dataclasses.replace(scores, candidate_logprobs=scores.top_logprobs[:, :0])
        return scores

    def record(self, task: ScoreTask, scores: Scores, facts: Mapping[str, Any]) -> None:
        """Writes an entry. Raises ArchiveError if that fails and `on_write_failure` is `stop` in `record` mode."""
        key, data = encode_entry(task, scores, facts)
        try:
            self.store.put(key, data, durable=self.mode == "record")
        except OSError as error:
            self.count("write_failures")
            if self.mode == "record" and self._on_write_failure == "stop":
                raise ArchiveError(
                    f"an entry could not be written to {self.store.url} ({error}); make room or restore it, or set "
                    "on_write_failure to warn"
                ) from error
            self._notice("write_failures", f"an entry could not be written ({error}); its score is used all the same")
            return
        self.count("written")
        self.count("written_bytes", len(data))

    def read(self, key: str) -> Entry | None:
        """The entry under `key`; None if there is none. Raises CorruptEntry, and OSError if it cannot be read."""
        data = self.store.get(key)
        return None if data is None else decode_entry(key, data)

    def keys(self) -> Iterator[str]:
        """Keys of all entries, in no order. Raises OSError."""
        return self.store.keys()

    def count(self, what: str, by: int = 1) -> None:
        """Adds to one of the counts."""
        with self._lock:
            setattr(self._stats, what, getattr(self._stats, what) + by)

    def _read(self, key: str) -> Entry | None:
        """The entry, or None if there is none that can be used; why is counted and told."""
        try:
            return self.read(key)
        except CorruptEntry as error:
            self.count("corrupt")
            self._notice("corrupt", f"entry {key[:12]} is corrupt and will be scored again: {error}")
        except OSError as error:
            self.count("read_failures")
            self._notice("read_failures", f"entry {key[:12]} cannot be read and will be scored again: {error}")
        return None

    def _notice(self, what: str, message: str) -> None:
        """Tells the first of its kind at once and the others now and then, with their number."""
        now_s = time.monotonic()
        with self._lock:
            if now_s - self._noticed_s.get(what, -_NOTICE_EVERY_S) < _NOTICE_EVERY_S:
                return
            self._noticed_s[what] = now_s
            count = getattr(self._stats, what)
        _log.warning("archive %s: %s (%s so far: %d)", self.store.url, message, what.replace("_", " "), count)


def _without_timings(scores: Scores) -> Scores:
    return dataclasses.replace(scores, queue_wait_ms=0.0, engine_ms=0.0, batch_sequences=0)


class _Call:
    """One request on its way. `future` is the caller's; it is settled exactly once, when the way ends."""

    def __init__(self, task: ScoreTask, send: Callable[[], Future[Scores]], facts: Mapping[str, Any]) -> None:
        self.task = task
        self.send = send
        self.facts = facts
        self.future: Future[Scores] = Future()
        self.followers: list[_Call] = []
        self.settled = False
        self._lock = threading.Lock()
        self._upstream: Future[Scores] | None = None
        self.future.add_done_callback(self._withdraw)

    def begin(self) -> Future[Scores]:
        """Asks the teacher."""
        upstream = self.send()
        with self._lock:
            self._upstream = upstream
        self._withdraw(self.future)  # the caller may have had enough just before
        return upstream

    def settle(self, scores: Scores | None, error: BaseException | None) -> None:
        """Tells the caller, unless it has withdrawn the call."""
        self.settled = True
        if self.future.set_running_or_notify_cancel():
            if scores is not None:
                self.future.set_result(scores)
            else:
                self.future.set_exception(error)

    def _withdraw(self, future: Future[Scores]) -> None:
        with self._lock:
            upstream = self._upstream
        if upstream is not None and future.cancelled():
            upstream.cancel()


class ArchivedClient:
    """A `TeacherClient` that looks into an archive first and keeps what it had to ask for.

    Only a request that pins `expected_model_revision` and `expected_compute_dtype` is looked up: without them nobody
    knows which scores were meant. What is not pinned is asked for and recorded. Identical requests under way at the
    same time are asked for once. Reading and writing happens on threads of its own, never on the client's.

    model: the name as served. "": learnt from `get_teacher`, `wait_until_ready` or the first answer; nothing is looked
    up before. Closing it closes the client and waits for entries that are still being written.
    """

    def __init__(self, client: TeacherClient, archive: Archive, *, model: str = "") -> None:
        self._client = client
        self._model = model
        self.archive = archive
        self._threads = ThreadPoolExecutor(_THREADS, "archive")
        self._lock = threading.Lock()
        self._leaders: dict[tuple[str, str], _Call] = {}  # by key and pinned vocabulary
        self._closed = False

    @property
    def stats(self) -> ClientStats:
        """What the client inside has done so far; `archive.stats` has the archive's counts."""
        return self._client.stats

    def score(self, token_ids: ArrayLike, *, score_start: int, top_k: int, **options: Unpack[ScoreOptions]) -> Scores:
        """See `AsyncTeacherClient.score`."""
        future = self.submit_score(token_ids, score_start=score_start, top_k=top_k, **options)
        try:
            return future.result()
        finally:
            future.cancel()  # does nothing to a future that is done

    def submit_score(
        self,
        token_ids: ArrayLike,
        *,
        score_start: int,
        top_k: int,
        facts: Mapping[str, Any] | None = None,
        **options: Unpack[ScoreOptions],
    ) -> Future[Scores]:
        """Starts a `score` and returns its future; cancelling it withdraws the call.

        facts: JSON to keep with the entry if one is written. Raises ValueError for arguments that can never be right.
        """
        if self._closed:
            raise RuntimeError("the client is closed; make a new one")
        task = make_task(self._model, token_ids, score_start, top_k, options)
        kept = dict(facts or {})
        _facts_json(kept)  # what is no JSON is the caller's fault, and raised to it
        options = options.copy()
        if task.candidate_ids is not None:
            options["candidate_ids"] = task.candidate_ids
        call = _Call(
            task,
            lambda: self._client.submit_score(task.token_ids, score_start=score_start, top_k=top_k, **options),
            kept,
        )
        self._start(call)
        return call.future

    def get_teacher(self, *, deadline_s: float = 10.0) -> Teacher:
        """See `AsyncTeacherClient.get_teacher`."""
        return self._learn(self._client.get_teacher(deadline_s=deadline_s))

    def wait_until_ready(
        self, *, deadline_s: float, on_wait: Callable[[float, StillhouseError], None] | None = None
    ) -> Teacher:
        """See `AsyncTeacherClient.wait_until_ready`."""
        return self._learn(self._client.wait_until_ready(deadline_s=deadline_s, on_wait=on_wait))

    def close(self) -> None:
        """Closes the client; calls that still wait for it raise Cancelled. Returns once every entry is written."""
        self._closed = True
        self._client.close()
        self._threads.shutdown(wait=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _learn(self, teacher: Teacher) -> Teacher:
        self._model = self._model or teacher.model
        return teacher

    def _start(self, call: _Call) -> None:
        """Puts `call` on its way: behind an identical one that is under way, or as the first of its kind."""
        task = call.task
        if self._model and task.expected_model_revision and task.expected_compute_dtype:
            task = call.task = dataclasses.replace(task, model=self._model)
            with self._lock:
                leader = self._leaders.setdefault(_identity(task), call)
                if leader is not call:
                    leader.followers.append(call)
                    return
            self._on_thread(call, self._look_up)
        else:
            self._on_thread(call, self._ask)

    def _on_thread(self, call: _Call, work: Callable[[_Call], None]) -> None:
        def guarded() -> None:
            try:
                work(call)
            except BaseException as error:
                if call.settled:  # its caller has the scores; what failed is what came after
                    _log.exception("archive %s: an entry was not kept", self.archive.store.url)
                else:
                    self._end(call, None, error)

        try:
            self._threads.submit(guarded)
        except RuntimeError as error:  # closed meanwhile
            self._end(call, None, Cancelled(f"the client was closed while the call waited ({error})"))

    def _look_up(self, call: _Call) -> None:
        if call.future.cancelled():
            self._end(call, None, None)
        elif (scores := self.archive.look_up(call.task)) is not None:
            self._end(call, scores, None)
        else:
            self._ask(call)

    def _ask(self, call: _Call) -> None:
        if self._closed:
            self._end(call, None, Cancelled("the client was closed while the call waited"))
            return
        call.begin().add_done_callback(lambda upstream: self._answered(call, upstream))

    def _answered(self, call: _Call, upstream: Future[Scores]) -> None:
        """On the client's thread, which must not wait for a disk."""
        if upstream.cancelled():
            self._end(call, None, Cancelled("the client was closed while the call waited"))
        elif (error := upstream.exception()) is not None:
            self._end(call, None, error)
        else:
            scores = upstream.result()
            self._model = self._model or scores.model
            self._on_thread(call, lambda call: self._keep(call, scores))

    def _keep(self, call: _Call, scores: Scores) -> None:
        if self.archive.mode == "record":
            self.archive.record(call.task, scores, call.facts)
            self._end(call, scores, None)
        else:
            self._end(call, scores, None)
            self.archive.record(call.task, scores, call.facts)

    def _end(self, call: _Call, scores: Scores | None, error: BaseException | None) -> None:
        """Settles `call` and whoever waits behind it: with its scores, or on a way of their own."""
        with self._lock:
            identity = _identity(call.task)
            if self._leaders.get(identity) is call:
                del self._leaders[identity]
            followers, call.followers = call.followers, []
        call.settle(scores, error)
        for follower in followers:
            if scores is None:
                self._start(follower)
            else:
                self.archive.count("shared")
                follower.settle(_without_timings(scores), None)


def _identity(task: ScoreTask) -> tuple[str, str]:
    key = entry_key(task, model_revision=task.expected_model_revision, compute_dtype=task.expected_compute_dtype)
    return key, task.expected_vocabulary_digest


__all__ = [
    "Archive",
    "ArchiveError",
    "ArchiveStats",
    "ArchivedClient",
    "CorruptEntry",
    "Entry",
    "decode_entry",
    "encode_entry",
    "entry_key",
]
