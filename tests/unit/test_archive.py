"""An archived score is the teacher's, bit for bit, or is not used; what goes wrong with the archive costs no score."""

import concurrent.futures
import dataclasses
import errno
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillhouse import archive as module
from stillhouse import archive_stores as stores
from stillhouse.archive import (
    Archive,
    ArchivedClient,
    ArchiveError,
    CorruptEntry,
    decode_entry,
    encode_entry,
    entry_key,
)
from stillhouse.archive_stores import LocalStore, open_store
from stillhouse.client import TeacherClient
from stillhouse.codec import Scores, ScoreTask
from stillhouse.errors import Cancelled, EngineFailed, VocabularyMismatch
from tests.fakes import ROOT, BigramTeacher, FakeServer, child_environment

TOKENS = [3, 4, 5, 6, 7]
PINS: dict[str, Any] = {"expected_model_revision": "r1", "expected_compute_dtype": "float64"}
CANDIDATES = np.array([[1, 2], [3, 4], [5, 6]])
KEYS = [f"{index:02x}" * 32 for index in range(100)]


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as running:
        yield running


def _client(server: FakeServer, folder: Path, **options: Any) -> ArchivedClient:
    archive = Archive.open(str(folder), **options)
    return ArchivedClient(TeacherClient([server.address]), archive, model="bigram")


def _score(client: ArchivedClient, tokens: Any = TOKENS, **options: Any) -> Scores:
    return client.score(tokens, **({"score_start": 2, "top_k": 4, "candidate_ids": CANDIDATES} | PINS | options))


def _submit(client: ArchivedClient, tokens: Any = TOKENS, **options: Any) -> Future[Scores]:
    return client.submit_score(tokens, **({"score_start": 2, "top_k": 4} | PINS | options))


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("?/?/*.score"))


def _same(one: Scores, other: Scores) -> bool:
    """Every array bit for bit, dtype and shape included, and everything else but the timings."""
    for field in dataclasses.fields(Scores):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, np.ndarray):
            if not (isinstance(b, np.ndarray) and (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())):
                return False
        elif field.name not in ("queue_wait_ms", "engine_ms", "batch_sequences") and a != b:
            return False
    return True


def _task(**changes: Any) -> ScoreTask:
    task = ScoreTask("bigram", np.array(TOKENS, np.int32), 2, 4, CANDIDATES.astype(np.int32), 0.7)
    return dataclasses.replace(task, **changes)


def _entry(**changes: Any) -> tuple[str, bytes]:
    task = _task(**changes)
    return encode_entry(task, BigramTeacher().score(task), {"finished": True})


# ---- entries


def test_an_entry_alone_holds_request_answer_and_facts():
    key, data = _entry(expected_vocabulary_digest="v", priority=3)
    entry = decode_entry(key, data)
    assert entry.facts == {"finished": True}
    assert entry.task.token_ids.tolist() == TOKENS and entry.task.score_start == 2
    assert entry.task.candidate_ids is not None and entry.task.candidate_ids.tolist() == CANDIDATES.tolist()
    assert (entry.task.model, entry.task.expected_model_revision) == ("bigram", "r1")
    assert (entry.task.expected_compute_dtype, entry.task.expected_vocabulary_digest) == ("float64", "v")
    assert entry.task.priority == 0
    assert _same(entry.scores, BigramTeacher().score(_task()))


@pytest.mark.parametrize(
    "change",
    [
        {"token_ids": np.array([3, 4, 5, 6, 8], np.int32)},
        {"score_start": 3, "candidate_ids": None},
        {"top_k": 5},
        {"candidate_ids": None},
        {"candidate_ids": CANDIDATES.astype(np.int32)[::-1]},
        {"temperature": 0.8},
        {"half_precision": True},
        {"model": "other"},
    ],
)
def test_whatever_changes_the_scores_changes_the_key(change):
    pins = {"model_revision": "r1", "compute_dtype": "float64"}
    assert entry_key(_task(), **pins) != entry_key(_task(**change), **pins)


def test_the_key_is_of_the_revision_and_the_precision_and_of_nothing_that_changes_no_score():
    key = entry_key(_task(), model_revision="r1", compute_dtype="float64")
    assert key != entry_key(_task(), model_revision="r2", compute_dtype="float64")
    assert key != entry_key(_task(), model_revision="r1", compute_dtype="bfloat16")
    assert key != entry_key(_task(), model_revision="r1f", compute_dtype="loat64")
    assert key == entry_key(_task(priority=5), model_revision="r1", compute_dtype="float64")


def test_a_flipped_bit_anywhere_is_found():
    key, data = _entry()
    for position in range(len(data)):
        for bit in (0, 3, 7):
            damaged = bytearray(data)
            damaged[position] ^= 1 << bit
            with pytest.raises(CorruptEntry):
                decode_entry(key, bytes(damaged))


def test_an_entry_cut_or_lengthened_anywhere_is_found():
    key, data = _entry()
    for length in range(len(data)):
        with pytest.raises(CorruptEntry):
            decode_entry(key, data[:length])
    with pytest.raises(CorruptEntry, match="bytes and should have"):
        decode_entry(key, data + b"\0")


def _resealed(body: bytes) -> bytes:
    return body + module.hashlib.sha256(body).digest()


def test_an_entry_with_a_right_checksum_and_wrong_content_is_found():
    key, data = _entry()
    other_key, _ = _entry(top_k=5)
    with pytest.raises(CorruptEntry, match="of another request"):
        decode_entry(other_key, data)
    body = data[:-32]
    with pytest.raises(CorruptEntry, match="format version 2; this program reads 1"):
        decode_entry(key, _resealed(body[:8] + b"\2" + body[9:]))
    with pytest.raises(CorruptEntry, match="does not begin like an entry"):
        decode_entry(key, _resealed(b"another!" + body[8:]))
    with pytest.raises(CorruptEntry, match="facts are no JSON object"):
        decode_entry(key, _resealed(body.replace(b'{"finished": true}', b"[1,2,3,4,5,6,7,89]")))
    entropy = BigramTeacher().score(_task()).entropy.tobytes()
    assert body.count(entropy) == 1
    with pytest.raises(CorruptEntry, match="entropy contains NaN"):
        decode_entry(key, _resealed(body.replace(entropy, np.full(3, np.nan, "<f4").tobytes())))
    with pytest.raises(CorruptEntry, match="request digest"):
        decode_entry(key, _resealed(body.replace(_task().digest(), bytes(32))))


def test_facts_that_are_no_json_are_refused_when_they_are_given(server, tmp_path):
    with _client(server, tmp_path / "a") as client:
        with pytest.raises(TypeError):
            _submit(client, facts={"array": np.zeros(2)})
        with pytest.raises(ValueError, match="JSON"):
            _submit(client, facts={"number": float("nan")})


# ---- the client


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"half_precision": True},
        {"candidate_ids": None},
        {"candidate_ids": np.zeros((3, 0), int)},
        {"top_k": 0},
        {"top_k": 19, "temperature": 0.5},
    ],
)
@pytest.mark.parametrize("mode", ["record", "cache"])
def test_a_hit_is_the_teachers_answer_bit_for_bit_and_asks_nobody(server, tmp_path, options, mode):
    with _client(server, tmp_path / "a", mode=mode) as client:
        first = _score(client, **options)
    with _client(server, tmp_path / "a", mode=mode) as client, TeacherClient([server.address]) as plain:
        hit = _score(client, **options)
        assert server.calls["Score"] == 1
        asked = plain.score(TOKENS, **({"score_start": 2, "top_k": 4, "candidate_ids": CANDIDATES} | PINS | options))
        stats = client.archive.stats
    assert _same(hit, first) and _same(hit, asked)
    assert (hit.queue_wait_ms, hit.engine_ms) == (0.0, 0.0) and first.engine_ms == 1.5
    assert (stats.hits, stats.misses, stats.written) == (1, 0, 0)


def test_a_record_is_on_its_way_to_the_disk_before_the_score_is_handed_over(server, tmp_path, monkeypatch):
    synced: list[str] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), real(fd))[1])
    with _client(server, tmp_path / "a") as client:
        _score(client)
        entry = _files(tmp_path / "a")[0]
        file, *folders = synced
    assert f"/.partial/{entry.stem}" in file
    assert folders[0] == str(entry.parent) and {str(tmp_path / "a"), str(tmp_path)} <= set(folders)


def test_a_score_waits_for_its_record_and_not_for_its_cache(server, tmp_path, monkeypatch):
    go = threading.Event()
    real = LocalStore.put

    def slow(self, key, data, *, durable):
        assert go.wait(20)
        real(self, key, data, durable=durable)

    monkeypatch.setattr(LocalStore, "put", slow)
    with _client(server, tmp_path / "a", mode="cache") as client:
        _score(client)
        assert _files(tmp_path / "a") == []
        threading.Timer(0.3, go.set).start()
    assert len(_files(tmp_path / "a")) == 1  # closing waited for it
    go.clear()
    with _client(server, tmp_path / "b") as client:
        future = _submit(client)
        server.wait_for(lambda s: s.calls["Score"] == 2 and s.in_flight == 0)
        assert not concurrent.futures.wait([future], timeout=0.2).done
        go.set()
        future.result(timeout=20)
        assert len(_files(tmp_path / "b")) == 1


def test_without_pins_nothing_is_looked_up_and_everything_recorded(server, tmp_path):
    with _client(server, tmp_path / "a") as client:
        for pins in ({"expected_model_revision": ""}, {"expected_compute_dtype": ""}):
            _score(client, **pins)
        assert server.calls["Score"] == 2 and client.archive.stats.misses == 0
        _score(client)
        assert server.calls["Score"] == 2  # what was recorded is found by who pins


def test_the_models_name_is_learnt_from_the_teacher(server, tmp_path):
    def client() -> ArchivedClient:
        return ArchivedClient(TeacherClient([server.address]), Archive.open(str(tmp_path / "a")))

    with client() as first:
        _score(first)
        _score(first)  # its first answer said it
        assert server.calls["Score"] == 1
    with client() as second:
        second.get_teacher()
        _score(second)
        assert server.calls["Score"] == 1
    with client() as third:
        third.wait_until_ready(deadline_s=5.0)
        _score(third)
        assert server.calls["Score"] == 1 and third.stats.answered == 1


def test_scores_of_another_vocabulary_are_not_served(server, tmp_path):
    with _client(server, tmp_path / "a") as client:
        _score(client, expected_vocabulary_digest="one")
        _score(client, expected_vocabulary_digest="one")
        _score(client)
        assert server.calls["Score"] == 1
        server.faults.fail_at(error=VocabularyMismatch("another"))
        with pytest.raises(VocabularyMismatch):
            _score(client, expected_vocabulary_digest="two")


def _damage(how: str, path: Path, other: Path) -> None:
    content = bytearray(path.read_bytes())
    match how:
        case "truncated":
            path.write_bytes(content[: len(content) // 2])
        case "flipped":
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
        case "empty":
            path.write_bytes(b"")
        case "version":
            content[8] = 9
            path.write_bytes(content)
        case "copied":
            path.write_bytes(other.read_bytes())


@pytest.mark.parametrize("how", ["truncated", "flipped", "empty", "version", "copied"])
def test_a_corrupt_entry_is_told_and_scored_again_and_then_it_is_whole(server, tmp_path, caplog, how):
    with _client(server, tmp_path / "a") as client:
        right = _score(client)
        path = _files(tmp_path / "a")[0]
        _score(client, top_k=5)
        other = next(file for file in _files(tmp_path / "a") if file != path)
        _damage(how, path, other)
        with caplog.at_level(logging.WARNING, "stillhouse"):
            assert _same(_score(client), right)
        assert server.calls["Score"] == 3
        assert f"entry {path.stem[:12]} is corrupt and will be scored again" in caplog.text
        assert _same(_score(client), right) and server.calls["Score"] == 3
        stats = client.archive.stats
    assert (stats.corrupt, stats.misses, stats.hits, stats.written) == (1, 3, 1, 3)


def test_an_error_of_the_teacher_is_raised_and_nothing_kept(server, tmp_path):
    server.faults.fail_at(call=1, error=EngineFailed("a bug"))
    with _client(server, tmp_path / "a") as client:
        with pytest.raises(EngineFailed):
            _score(client)
        assert _files(tmp_path / "a") == []
        _score(client)
    assert len(_files(tmp_path / "a")) == 1


def test_arguments_that_can_never_be_right_are_refused_at_once(server, tmp_path):
    with _client(server, tmp_path / "a") as client, pytest.raises(ValueError, match="score_start is 9"):
        _submit(client, score_start=9)


def test_the_caller_may_reuse_its_arrays_at_once(server, tmp_path):
    tokens, candidates = np.array(TOKENS), CANDIDATES.copy()
    with _client(server, tmp_path / "a") as client:
        futures = []
        for _ in range(20):
            futures.append(_submit(client, tokens, candidate_ids=candidates))
            tokens[-1], candidates[0, 0] = 8, 9
            futures[-1].result()
            tokens[-1], candidates[0, 0] = TOKENS[-1], CANDIDATES[0, 0]
    asked = server.requests[0]
    assert len(server.requests) == 1
    assert np.frombuffer(asked.token_ids.data, np.int32).tolist() == TOKENS
    assert np.frombuffer(asked.candidate_ids.data, np.int32).tolist() == CANDIDATES.ravel().tolist()


def test_identical_requests_under_way_are_asked_for_once(server, tmp_path):
    server.faults.hang_at(call=1)
    with _client(server, tmp_path / "a") as client:
        futures = [_submit(client) for _ in range(5)]
        server.wait_for(lambda s: s.in_flight == 1)
        other = _submit(client, top_k=5).result(timeout=20)
        assert server.calls["Score"] == 2 and other.top_ids.shape == (3, 5)
        server.release()
        results = [future.result(timeout=20) for future in futures]
        assert server.calls["Score"] == 2
        assert all(_same(result, results[0]) for result in results)
        assert client.archive.stats.shared == 4


def test_who_waits_behind_a_request_that_fails_or_is_withdrawn_asks_for_itself(server, tmp_path):
    server.faults.hang_at(call=1)
    with _client(server, tmp_path / "a") as client:
        first, *others = [_submit(client) for _ in range(3)]
        server.wait_for(lambda s: s.in_flight == 1)
        first.cancel()
        results = [future.result(timeout=20) for future in others]
        server.wait_for(lambda s: s.cancelled == 1)
        assert server.calls["Score"] == 2 and _same(*results)
    with _client(server, tmp_path / "b") as client:
        server.faults.fail_at(call=3, error=EngineFailed("a bug"))
        server.faults.hang_at(call=4)
        futures = [_submit(client) for _ in range(3)]
        assert isinstance(futures[0].exception(timeout=20), EngineFailed)
        server.release()
        assert _same(futures[1].result(timeout=20), futures[2].result(timeout=20))
        assert server.calls["Score"] == 4


def test_cancelling_withdraws_the_call(server, tmp_path):
    server.faults.hang_at()
    with _client(server, tmp_path / "a") as client:
        future = _submit(client)
        server.wait_for(lambda s: s.in_flight == 1)
        assert future.cancel()
        server.wait_for(lambda s: s.cancelled == 1)
        with pytest.raises(CancelledError):
            future.result()
        assert concurrent.futures.wait([future], timeout=20).done  # whoever waits is told
    assert client.archive.stats.written == 0


def test_a_call_withdrawn_while_it_is_being_sent_is_withdrawn(server, tmp_path, monkeypatch):
    server.faults.hang_at()
    sent: list[Future[Scores]] = []
    submitted: list[Future[Scores]] = []
    go = threading.Event()
    with _client(server, tmp_path / "a") as client:
        real = client._client.submit_score

        def send(*arguments: Any, **options: Any) -> Future[Scores]:
            assert go.wait(20)
            sent.append(real(*arguments, **options))
            submitted[0].cancel()
            return sent[0]

        monkeypatch.setattr(client._client, "submit_score", send)
        submitted.append(_submit(client))
        go.set()
        assert concurrent.futures.wait(submitted, timeout=20).done
        assert sent[0].cancelled()


def test_cancelling_at_any_moment_leaves_no_future_open(server, tmp_path):
    with _client(server, tmp_path / "a") as client:
        futures = []
        for index in range(200):
            futures.append(_submit(client, [3, 4 + index % 7, 5, 6, 3 + index % 11]))
            if index % 3:
                futures[-1 - index % 2].cancel()
        assert concurrent.futures.wait(futures, timeout=60).not_done == set()
        assert all(future.cancelled() or future.result() for future in futures)
        assert not client._leaders


def test_closing_ends_what_waits_and_twice_does_nothing(server, tmp_path):
    server.faults.hang_at()
    client = _client(server, tmp_path / "a")
    futures = [_submit(client) for _ in range(3)] + [_submit(client, top_k=5)]
    server.wait_for(lambda s: s.in_flight == 2)
    client.close()
    client.close()
    for future in futures:
        with pytest.raises(Cancelled):
            future.result(timeout=20)
    with pytest.raises(RuntimeError, match="closed"):
        _submit(client)


# ---- disks


def _full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_costs_no_score_and_leaves_no_file(server, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(stores.os, "fsync", _full)
    with caplog.at_level(logging.WARNING, "stillhouse"), _client(server, tmp_path / "a") as client:
        results = [_score(client, top_k=k) for k in (1, 2, 3)]
        stats = client.archive.stats
    assert [result.top_ids.shape[1] for result in results] == [1, 2, 3]
    assert (stats.write_failures, stats.written, stats.written_bytes) == (3, 0, 0)
    assert caplog.text.count("No space left on device") == 1  # now and then, not each time
    assert _files(tmp_path / "a") == [] and [*(tmp_path / "a" / ".partial").iterdir()] == []


def test_a_record_that_must_not_fail_ends_in_an_error_that_says_what_to_do(server, tmp_path, monkeypatch):
    monkeypatch.setattr(stores.os, "fsync", _full)
    with (
        _client(server, tmp_path / "a", on_write_failure="stop") as client,
        pytest.raises(ArchiveError, match=r"could not be written to .* \(.*No space left.*\); make room"),
    ):
        _score(client)


def test_a_place_that_cannot_be_read_is_a_miss(server, tmp_path, monkeypatch, caplog):
    with _client(server, tmp_path / "a") as client:
        right = _score(client)

        def broken(self: LocalStore, key: str) -> bytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(LocalStore, "get", broken)
        assert _same(_score(client), right)
        assert "cannot be read and will be scored again" in caplog.text
        assert client.archive.stats.read_failures == 1 and server.calls["Score"] == 2


def test_what_killed_writers_left_is_removed_and_what_others_write_now_is_not(tmp_path):
    partial = tmp_path / ".partial"
    partial.mkdir()
    (partial / "old").write_bytes(b"x")
    long_ago_s = time.time() - stores.LEFTOVER_AFTER_S - 60
    os.utime(partial / "old", (long_ago_s, long_ago_s))
    (partial / "new").write_bytes(b"x")
    LocalStore(tmp_path).put(KEYS[0], b"entry", durable=True)
    assert [path.name for path in partial.iterdir()] == ["new"]


def test_keys_are_those_of_whole_entries_only(tmp_path):
    store = LocalStore(tmp_path)
    for key in KEYS[:3]:
        store.put(key, b"entry", durable=False)
    (tmp_path / "0" / "0" / "notes.txt").write_text("not an entry")
    assert sorted(store.keys()) == KEYS[:3]
    store.delete(KEYS[0])
    store.delete(KEYS[0])
    assert sorted(store.keys()) == KEYS[1:3] and store.get(KEYS[0]) is None and store.get(KEYS[1]) == b"entry"


def _used_s(store: LocalStore, folder: Path, key: str, when_s: float) -> None:
    os.utime(folder / key[0] / key[1] / f"{key}.score", (when_s, when_s))


def test_above_the_limit_the_least_recently_used_go_until_nine_tenths_are_left(tmp_path):
    store = LocalStore(tmp_path, max_bytes=1000)
    for index, key in enumerate(KEYS[:10]):
        store.put(key, bytes(100), durable=False)
        _used_s(store, tmp_path, key, 1000.0 + index)
    assert store.evicted == 0
    assert store.get(KEYS[0]) is not None  # used just now
    store.put(KEYS[10], bytes(100), durable=False)
    assert sorted(store.keys()) == sorted([KEYS[0], *KEYS[3:11]]) and store.evicted == 2


def test_an_eviction_knows_what_others_wrote(tmp_path):
    one, other = LocalStore(tmp_path, max_bytes=1000), LocalStore(tmp_path, max_bytes=1000)
    for index in range(60):
        (one, other)[index % 2].put(KEYS[index], bytes(50), durable=False)
        assert sum(path.stat().st_size for path in _files(tmp_path)) <= 1200  # the limit and a tenth for each
    assert one.evicted + other.evicted >= 60 - 1200 // 50


_WRITER = """
import sys
from pathlib import Path
from stillhouse.archive_stores import LocalStore
store = LocalStore(Path(sys.argv[1]), max_bytes=20_000)
for round in range(8):
    for index in range(50):
        key = f"{index:02x}" * 32
        data = bytes([index]) * 1000
        store.put(key, data, durable=False)
        found = store.get(key)
        assert found in (None, data), "a torn entry"
"""


def test_several_processes_write_read_and_evict_in_one_directory(tmp_path):
    command = [sys.executable, "-c", _WRITER, str(tmp_path)]
    processes = [
        subprocess.Popen(command, cwd=ROOT, env=child_environment(), stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for process in processes:
        _, error = process.communicate(timeout=100)
        assert process.returncode == 0, error
    files = _files(tmp_path)
    assert 0 < sum(path.stat().st_size for path in files) <= 26_000
    assert all(path.read_bytes() == bytes([int(path.stem[:2], 16)]) * 1000 for path in files)
    assert [*(tmp_path / ".partial").iterdir()] == []


def test_a_writer_killed_at_any_moment_leaves_no_torn_entry(tmp_path):
    program = _WRITER.replace("range(8)", "range(10**6)").replace("max_bytes=20_000", "max_bytes=None")
    for _ in range(4):
        process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, env=child_environment())
        seen, end_s = len(_files(tmp_path)), time.monotonic() + 60
        while len(_files(tmp_path)) <= min(seen, 20):
            assert process.poll() is None and time.monotonic() < end_s
        process.kill()
        process.wait()
        assert all(path.read_bytes() == bytes([int(path.stem[:2], 16)]) * 1000 for path in _files(tmp_path))


# ---- where


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "is empty; give a directory or s3://"),
        ("ftp://host/x", "'ftp://host/x' is of no known kind"),
        ("file://host/x", "no absolute path of this machine; write file:///path"),
        ("s3:///prefix", "names no bucket"),
        ("s3://bucket/x?region=a", "a query or a fragment"),
    ],
)
def test_a_url_that_is_no_place_is_refused(url, message):
    with pytest.raises(ArchiveError, match=message):
        open_store(url)


def test_a_limit_is_of_a_directory_only_and_above_zero(tmp_path):
    with pytest.raises(ArchiveError, match="max_bytes is 5 for s3://b; a bucket is not limited"):
        open_store("s3://b", max_bytes=5)
    with pytest.raises(ArchiveError, match="max_bytes is 0; it must be 1 or more"):
        open_store(str(tmp_path), max_bytes=0)


def test_a_path_and_a_file_url_are_the_same_place(tmp_path):
    folder = tmp_path / "with space"
    open_store(str(folder)).put(KEYS[0], b"entry", durable=False)
    assert open_store(f"file://{tmp_path}/with%20space").get(KEYS[0]) == b"entry"


def test_opening_makes_nothing_and_refuses_a_place_that_cannot_be_one(tmp_path):
    Archive.open(str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArchiveError, match="is no directory"):
        Archive.open(str(tmp_path / "file"))
    with pytest.raises(ArchiveError, match="there is no archive at"):
        open_store(str(tmp_path / "new")).check(write=False)


def test_s3_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(ArchiveError, match=r"pip install 'stillhouse\[archive\]'"):
        open_store("s3://bucket/prefix")
