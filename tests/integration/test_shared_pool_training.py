"""Runs of the trainer on a pool as it is shared: certificates, tokens, quotas, a teacher that is the student itself."""

import hashlib
import json
import time
from pathlib import Path

import pytest
import yaml

from stillhouse.client import TeacherClient
from student_trainer.config import ConfigError
from student_trainer.train import train
from tests.certificates import Authority
from tests.fakes import FakeServer
from tests.servers import serving
from tests.toy import ToyTeacher, save_student, toy_config

TOKEN = "5f0c0e" * 8


def tenants(path: Path, **entries: dict) -> Path:
    path.write_text(yaml.safe_dump({"tenants": entries}))
    return path


def run(folder: Path, address: str, *overrides: str, resume: bool = False, **changes) -> list[dict]:
    """Trains; the run's rows of metrics.jsonl."""
    folder.mkdir(exist_ok=True)
    config = toy_config(folder, address, overrides, **changes)
    train(config, folder, resume=resume)
    return [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_over_mutual_tls_with_a_token_learns_what_one_in_the_open_does(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "pki")
    server_files, client_files = authority.server(), authority.client("spiffe://pool/team-a")
    (tmp_path / "token").write_text(TOKEN)
    entry = {
        "models": ["toy"],
        "tokens_sha256": [hashlib.sha256(TOKEN.encode()).hexdigest()],
        "certificates": ["spiffe://pool/team-a"],
    }
    access = tenants(tmp_path / "tenants.yaml", **{"team-a": entry})
    model = save_student(tmp_path / "teacher", seed=5)
    # One sequence a batch: the scores are then the same bit for bit.
    common = ("--name", "toy", "--max-batch-tokens", "1")
    secure = (
        *("--access", str(access), "--tls-certificate", str(server_files.certificate)),
        *("--tls-key", str(server_files.key), "--tls-client-ca", str(authority.certificate)),
    )
    with serving(model, *common) as open_server:
        expected = run(tmp_path / "open", open_server.said["listen"], steps=3)
    keys = {
        "tls_ca": authority.certificate,
        "tls_certificate": client_files.certificate,
        "tls_key": client_files.key,
        "token_file": tmp_path / "token",
    }
    with serving(model, *common, *secure) as server:
        address = server.said["listen"]
        with pytest.raises(ConfigError, match="teacher"):
            run(tmp_path / "refused", address, "teacher.start_deadline_s=1", f"teacher.token_file={tmp_path / 'token'}")
        assert not (tmp_path / "refused" / "run").exists()
        rows = run(tmp_path / "closed", address, *[f"teacher.{key}={value}" for key, value in keys.items()], steps=3)
        assert server.metric('stillhouse_teacher_scored_tokens_total{model="toy",tenant="team-a"}')
    assert [(row["loss"], row["kl"], row["grad_norm"]) for row in rows] == [
        (row["loss"], row["kl"], row["grad_norm"]) for row in expected
    ]


def test_a_run_that_exceeds_its_quota_waits_and_loses_nothing(tmp_path: Path) -> None:
    entry = {
        "models": ["*"],
        "tokens_sha256": [hashlib.sha256(TOKEN.encode()).hexdigest()],
        "tokens_per_s": 150,
        "burst_tokens": 150,
    }
    access = tenants(tmp_path / "tenants.yaml", slow=entry)
    (tmp_path / "token").write_text(TOKEN)
    model = save_student(tmp_path / "teacher", seed=5)
    with serving(model, "--access", str(access), "--plaintext-tokens") as server:
        keys = (f"teacher.token_file={tmp_path / 'token'}", "teacher.plaintext_token=true")
        rows = run(tmp_path / "a", server.said["listen"], *keys, steps=2)
        page = server.metrics
    assert len(rows) == 2
    assert all(row["unscored"] == 0 for row in rows)
    refused = 'reason="QUOTA_EXCEEDED",tenant="slow"'
    assert any("requests_total" in line and refused in line for line in page.splitlines()), "the quota was never met"


def test_a_student_can_be_its_own_recent_teacher(tmp_path: Path) -> None:
    folder = tmp_path / "self"
    keep = ("teacher.on_new_revision=follow", "checkpoints.every_steps=1", "checkpoints.keep=1000")
    with FakeServer(ToyTeacher()) as first:
        run(folder, first.address, *keep, steps=1)
    latest = folder / "run" / "checkpoints" / "latest"
    with serving(latest, "--name", "self", "--follow") as server:
        address = server.said["listen"]
        run(folder, address, *keep, resume=True, steps=4)
        with TeacherClient([address]) as client:
            end_s = time.monotonic() + 200
            while client.get_teacher().model_revision == server.said["revision"]:
                assert time.monotonic() < end_s, server.log
                time.sleep(0.2)
        run(folder, address, *keep, resume=True, steps=6)
        log = server.log
    samples = [json.loads(line) for line in (folder / "run" / "samples.jsonl").read_text().splitlines()]
    revisions = list(dict.fromkeys(sample["teacher_revision"] for sample in samples if sample["step"] > 1))
    assert len(revisions) >= 2, log
    assert server.said["revision"] == revisions[0]
