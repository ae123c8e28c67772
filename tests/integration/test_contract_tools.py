"""The contract as its tools see it: linted, compatible with what was released, its code as generated."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.fakes import ROOT

PROTO = Path("proto/stillhouse/v1/teacher.proto")
BASELINE = ROOT / "proto" / "baseline.binpb"
GENERATED = ["teacher_pb2.py", "teacher_pb2.pyi", "teacher_pb2_grpc.py"]


def buf(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    program = ROOT / "node_modules" / ".bin" / "buf"
    assert program.exists(), f"{program} is missing: run `make deps`"
    return subprocess.run([program, *arguments], cwd=folder, capture_output=True, text=True, timeout=60)


def copy_with(folder: Path, old: str, new: str) -> Path:
    """A copy of the contract with one edit."""
    text = (ROOT / PROTO).read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{old!r} is in teacher.proto {text.count(old)} times"
    (folder / PROTO).parent.mkdir(parents=True)
    (folder / PROTO).write_text(text.replace(old, new), encoding="utf-8")
    shutil.copy(ROOT / "buf.yaml", folder)
    return folder


def test_the_contract_passes_buf_lint() -> None:
    ended = buf("lint")
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_the_contract_breaks_nobody_who_uses_the_released_one() -> None:
    ended = buf("breaking", "--against", str(BASELINE))
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("  uint32 top_k = 4;", "  uint32 top_k = 14;"),
        ("  uint32 top_k = 4;", "  uint64 top_k = 4;"),
        ("  uint32 top_k = 4;", "  uint32 k = 4;"),
        ("  optional double temperature = 6;", "  double temperature = 6;"),
        ("  ELEMENT_TYPE_FLOAT16 = 3;", "  ELEMENT_TYPE_FLOAT16 = 4;"),
        ("  string server_version = 13;\n", ""),
        ("rpc Score(ScoreRequest) returns (ScoreResponse);", "rpc Score(ScoreRequest) returns (Echo);"),
        ("package stillhouse.v1;", "package stillhouse.v2;"),
    ],
)
def test_an_edit_that_breaks_clients_is_caught(tmp_path: Path, old: str, new: str) -> None:
    ended = buf("breaking", "--against", str(BASELINE), folder=copy_with(tmp_path, old, new))
    assert ended.returncode == 100, ended.stdout + ended.stderr  # buf's status for "found something"
    assert "teacher.proto" in ended.stdout


def test_a_new_field_is_no_break(tmp_path: Path) -> None:
    old = "  string server_version = 13;\n"
    folder = copy_with(tmp_path, old, old + "  // New.\n  string colour = 14;\n")
    ended = buf("breaking", "--against", str(BASELINE), folder=folder)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.parametrize("comment", ["  // How many of the", "  // Version of the server program.\n"])
def test_lint_asks_for_a_comment_on_every_field(tmp_path: Path, comment: str) -> None:
    # An edit that leaves a field without one.
    text = (ROOT / PROTO).read_text(encoding="utf-8")
    start = text.index(comment)
    end = text.index(";", start)
    field = text[start : end + 1].splitlines()[-1]
    ended = buf("lint", folder=copy_with(tmp_path, text[start : end + 1], field))
    assert ended.returncode == 100
    assert "comment" in ended.stdout


def test_the_generated_code_is_what_the_pinned_generator_writes(tmp_path: Path) -> None:
    generated = subprocess.run(
        [ROOT / "scripts" / "generate_protos.sh", tmp_path],
        env=os.environ | {"PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert generated.returncode == 0, generated.stdout + generated.stderr
    for name in GENERATED:
        committed = ROOT / PROTO.parent / name
        assert (tmp_path / "stillhouse" / "v1" / name).read_text() == committed.read_text(), (
            f"{name} was edited by hand or is stale: run scripts/generate_protos.sh"
        )
    assert sorted(path.name for path in (tmp_path / "stillhouse" / "v1").iterdir()) == sorted(GENERATED)
