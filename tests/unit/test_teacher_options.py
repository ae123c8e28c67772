"""The command line of `teacher-server`: fast, and one clear message for what is wrong."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from teacher_server.cli import main
from teacher_server.options import check, parse

FREE = ["--listen", "127.0.0.1:0", "--metrics-port", "0"]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    model = tmp_path / "oak"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (model / "model.safetensors").write_bytes(b"")
    return model


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    try:
        code = main(arguments)
    except SystemExit as ended:  # argparse's own
        code = ended.code
    assert code == 2
    output = capsys.readouterr()
    assert output.out == ""
    usage, message = output.err.splitlines()
    assert usage == "usage: teacher-server --model DIR [options]"
    return message.removeprefix("teacher-server: error: ")


def test_help_and_errors_import_nothing_heavy() -> None:
    program = (
        "import sys\n"
        "from teacher_server.cli import main\n"
        "try:\n"
        "    sys.exit(main(sys.argv[1:]))\n"
        "finally:\n"
        "    heavy = {'torch', 'transformers', 'grpc', 'numpy', 'google', 'prometheus_client'}\n"
        "    print('HEAVY', sorted(heavy & set(sys.modules)))\n"
    )
    for arguments, code in ((["--help"], 0), (["--model", "/nonexistent"], 2)):
        done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        assert done.stdout.splitlines()[-1] == "HEAVY []"


def test_the_name_is_the_directorys_unless_given(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse(["--model", str(directory), *FREE]).name == "oak"
    assert parse(["--model", str(directory), "--name", "elm", *FREE]).name == "elm"
    monkeypatch.chdir(directory)
    assert parse(["--model", ".", *FREE]).name == "oak"


def test_listen_is_split_into_host_and_port(directory: Path) -> None:
    options = parse(["--model", str(directory), "--listen", "[::]:0", "--metrics-port", "0"])
    assert (options.host, options.port) == ("::", 0)


@pytest.mark.parametrize(
    ("option", "value", "fix"),
    [
        ("--engine", "jax", "choose from torch, vllm"),
        ("--engine", "vllm", "vllm is not installed; pip install 'stillhouse[vllm]'"),
        ("--dtype", "int8", "choose from auto, float32, bfloat16, float16"),
        ("--log-level", "loud", "choose from debug"),
        ("--log-format", "xml", "choose from text, json"),
        ("--name", "my model", "without white space"),
        ("--revision", "r" * 200, "at most 190 bytes"),
        ("--expect-revision", "r1", "give 64 hexadecimal digits"),
        ("--expect-revision", "a" * 63, "give 64 hexadecimal digits"),
        ("--hold-failed-s", "-1", "give 0 .. 86400"),
        ("--hold-failed-s", "soon", "invalid float value"),
        ("--vocabulary-size", "0", "give 1 or more"),
        ("--max-sequence-tokens", "1", "give 2 or more"),
        ("--max-top-k", "-1", "give 0 or more"),
        ("--max-batch-tokens", "0", "give 1 or more"),
        ("--max-batch-tokens", "many", "invalid int value"),
        ("--max-response-bytes", "268435456", "the most that clients receive"),
        ("--tensor-parallel-size", "0", "give 1 or more"),
        ("--tensor-parallel-size", "2", "add --engine vllm"),
        ("--pipeline-parallel-size", "2", "add --engine vllm"),
        ("--quantization", "fp8", "add --engine vllm"),
        ("--gpu-memory-utilization", "0.5", "add --engine vllm"),
        ("--gpu-memory-utilization", "1.5", "above 0 and up to 1"),
        ("--kv-cache-bytes", "0", "give 1 or more"),
        ("--vllm-options", '{"max_num_seqs": 4}', "add --engine vllm"),
        ("--vllm-options", "max_num_seqs=4", "is not JSON"),
        ("--vllm-options", "[4]", "is not a JSON object"),
        ("--drain-s", "-1", "give 0 .. 86400"),
        ("--drain-s", "nan", "give 0 .. 86400"),
        ("--listen", "50051", "give HOST:PORT"),
        ("--listen", "127.0.0.1:fifty", "give HOST:PORT"),
        ("--listen", "127.0.0.1:65536", "give HOST:PORT"),
        ("--listen", "no.such.host.invalid:0", "cannot listen there"),
        ("--metrics-port", "65536", "give 0 .. 65535"),
    ],
)
def test_a_wrong_value_is_named_with_its_option_and_the_fix(
    directory: Path, capsys: pytest.CaptureFixture[str], option: str, value: str, fix: str
) -> None:
    message = refusal(["--model", str(directory), *FREE, option, value], capsys)
    assert option in message
    assert value in message
    assert fix in message


def test_a_wrong_model_directory_is_named(tmp_path: Path, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such directory" in refusal(["--model", str(tmp_path / "no"), *FREE], capsys)
    assert "has no config.json" in refusal(["--model", str(tmp_path), *FREE], capsys)
    (directory / "model.safetensors").unlink()
    assert "no *.safetensors file" in refusal(["--model", str(directory), *FREE], capsys)
    (directory / "config.json").write_text("{")
    assert "not a JSON object" in refusal(["--model", str(directory), *FREE], capsys)


@pytest.mark.parametrize("option", ["--listen", "--metrics-port"])
def test_a_port_in_use_is_named_before_anything_is_loaded(
    directory: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        value = f"127.0.0.1:{port}" if option == "--listen" else str(port)
        message = refusal(["--model", str(directory), *FREE, option, value], capsys)
    assert message.startswith(f"{option} {value}: cannot listen there")


def test_one_port_cannot_serve_both(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", str(directory), "--listen", "127.0.0.1:50999", "--metrics-port", "50999"]
    assert "--listen has this port" in refusal(arguments, capsys)


@pytest.mark.parametrize("other", [("--revision", "r1"), ("--follow",)])
def test_an_expected_digest_goes_with_no_option_that_makes_it_meaningless(
    directory: Path, capsys: pytest.CaptureFixture[str], other: tuple[str, ...]
) -> None:
    expected = "0123456789abcdef" * 4
    message = refusal(["--model", str(directory), *FREE, "--expect-revision", expected, *other], capsys)
    assert message.startswith(f"--expect-revision {expected}: {other[0]} ")
    assert message.endswith("give one of them")


def test_an_expected_digest_may_be_written_in_capitals(directory: Path) -> None:
    options = parse(["--model", str(directory), *FREE, "--expect-revision", "AB" * 32])
    check(options)
    assert options.expect_revision == "ab" * 32
