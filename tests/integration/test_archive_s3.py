"""The archive in a bucket, over HTTP against moto's S3: the same promises as on a disk."""

import logging
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import boto3
import numpy as np
import pytest

from stillhouse.archive import Archive, ArchivedClient, ArchiveError, CorruptEntry
from stillhouse.archive_stores import open_store
from stillhouse.client import TeacherClient
from stillhouse.codec import Scores
from tests.fakes import FakeServer

PINS: dict[str, Any] = {"expected_model_revision": "r1", "expected_compute_dtype": "float64"}
KEYS = [f"{index:02x}" * 32 for index in range(3)]


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """moto's server, with the bucket `scores`."""
    log = tmp_path_factory.mktemp("moto") / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"], stdout=file, stderr=file
        )
    try:
        end_s = time.monotonic() + 60
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())):
            assert process.poll() is None and time.monotonic() < end_s, log.read_text()
            time.sleep(0.05)
        keys = {"aws_access_key_id": "key", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
        boto3.client("s3", endpoint_url=found.group(), **keys).create_bucket(Bucket="scores")
        yield found.group()
    finally:
        process.kill()
        process.wait()


@pytest.fixture(autouse=True)
def environment(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("AWS_ENDPOINT_URL", endpoint),
        ("AWS_ACCESS_KEY_ID", "key"),
        ("AWS_SECRET_ACCESS_KEY", "secret"),
        ("AWS_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(name, value)


def _client(server: FakeServer, url: str) -> ArchivedClient:
    return ArchivedClient(TeacherClient([server.address]), Archive.open(url), model="bigram")


def _score(client: ArchivedClient, top_k: int = 4) -> Scores:
    return client.score([3, 4, 5, 6, 7], score_start=2, top_k=top_k, **PINS)


def test_objects_are_written_read_listed_and_deleted_below_their_prefix() -> None:
    store, other = open_store("s3://scores/one/two/"), open_store("s3://scores/other")
    store.check(write=True)
    for key in KEYS:
        store.put(key, key.encode(), durable=True)
    other.put(KEYS[0], b"other", durable=True)
    assert sorted(store.keys()) == KEYS and list(other.keys()) == [KEYS[0]]
    assert store.get(KEYS[1]) == KEYS[1].encode() and other.get(KEYS[1]) is None
    store.put(KEYS[1], b"over it", durable=True)
    assert store.get(KEYS[1]) == b"over it"
    store.delete(KEYS[1])
    store.delete(KEYS[1])
    assert store.get(KEYS[1]) is None and sorted(store.keys()) == [KEYS[0], KEYS[2]]


def test_more_objects_than_a_page_are_all_listed() -> None:
    store = open_store("s3://scores/many")
    wanted = [f"{index:064x}" for index in range(1100)]  # S3 lists a thousand at a time
    for key in wanted:
        store.put(key, b"", durable=True)
    assert sorted(store.keys()) == wanted


def test_a_hit_is_the_teachers_answer_and_asks_nobody() -> None:
    with FakeServer() as server:
        with _client(server, "s3://scores/hits") as client:
            first = _score(client)
        with _client(server, "s3://scores/hits") as client:
            hit = _score(client)
            stats = client.archive.stats
        assert server.calls["Score"] == 1
    assert (stats.hits, stats.misses) == (1, 0)
    for name in ("top_ids", "top_logprobs", "sampled_logprobs", "log_tail", "entropy", "log_normalizer"):
        np.testing.assert_array_equal(getattr(hit, name), getattr(first, name))


def test_a_corrupt_object_is_scored_again_and_then_it_is_whole() -> None:
    store = open_store("s3://scores/corrupt")
    with FakeServer() as server, _client(server, "s3://scores/corrupt") as client:
        _score(client)
        (key,) = store.keys()
        whole = store.get(key)
        assert whole is not None
        store.put(key, whole[:-1], durable=True)
        with pytest.raises(CorruptEntry):
            client.archive.read(key)
        _score(client)
        assert client.archive.stats.corrupt == 1 and server.calls["Score"] == 2
        assert client.archive.read(key) is not None


def test_a_bucket_that_does_not_exist_is_refused_at_the_start() -> None:
    with pytest.raises(ArchiveError, match=r"s3://nowhere/x cannot be listed: .*check the bucket's name"):
        Archive.open("s3://nowhere/x")


def test_a_bucket_that_goes_away_costs_no_score(caplog: pytest.LogCaptureFixture) -> None:
    with FakeServer() as server:
        archive = Archive(open_store("s3://nowhere/x"))
        with (
            caplog.at_level(logging.WARNING, "stillhouse"),
            ArchivedClient(TeacherClient([server.address]), archive, model="bigram") as client,
        ):
            assert _score(client).top_ids.shape == (3, 4)
        assert archive.stats.write_failures == 1
    assert "s3://nowhere/x cannot be written" in caplog.text
