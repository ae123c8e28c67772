"""`student-trainer` as its users meet it: a process, its output, its exit status; the README's own commands."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import transformers

from student_trainer.cli import main
from tests.deploy.rendering import helm_3
from tests.fakes import ROOT, FakeServer, child_environment
from tests.models import reference_scores, save_model
from tests.toy import ToyTeacher, save_student, write_config

TRAINER = [sys.executable, "-m", "student_trainer.cli"]


@dataclass(frozen=True)
class Done:
    """How a command ended and what it said."""

    returncode: int
    stdout: str
    stderr: str


def _run(*arguments: object) -> Done:
    """The program in a process of its own."""
    command = [*TRAINER, *map(str, arguments)]
    done = subprocess.run(command, env=child_environment(), cwd=ROOT, capture_output=True, text=True, timeout=120)
    return Done(done.returncode, done.stdout, done.stderr)


def _call(capsys: pytest.CaptureFixture[str], *arguments: object) -> Done:
    """The program's entry point in this process: ten times faster, for what needs no process."""
    capsys.readouterr()
    status = main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return Done(status, said.out, said.err)


@pytest.fixture
def teacher():
    with FakeServer(ToyTeacher()) as server:
        yield server


def test_help_imports_nothing_heavy():
    code = "import sys; from student_trainer.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "print([name for name in ('torch', 'transformers', 'grpc', 'pydantic') if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], env=child_environment(), cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_training_prints_a_line_a_step_and_ends_with_the_summary(teacher, tmp_path):
    done = _run("train", write_config(tmp_path, teacher.address), "steps=2")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("step 1/2  reward ") and lines[1].startswith("step 2/2  reward ")
    for figure in ("pass ", "kl ", "entropy ", "tok/s", "rollout ", "waiting ", "training "):
        assert figure in lines[0]
    summary = json.loads("\n".join(lines[2:]))
    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text())


def test_a_faulty_configuration_exits_with_2_and_one_line_a_fault(teacher, tmp_path):
    done = _run("train", write_config(tmp_path, teacher.address), "stepz=1", "rollout.top_p=7")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "student-trainer: nothing was started:",
        "rollout.top_p: Input should be less than or equal to 1 (got 7)",
        "stepz: unknown key (value 1); did you mean 'steps'?",
    ]
    assert not (tmp_path / "run").exists()


def test_a_broken_line_of_the_prompts_is_named(teacher, tmp_path, capsys):
    config = write_config(tmp_path, teacher.address)
    with (tmp_path / "prompts.jsonl").open("a") as file:
        file.write('{"prompt": "w1"\n')
    done = _call(capsys, "train", config)
    assert done.returncode == 2 and "prompts.jsonl:13" in done.stderr


def test_no_teacher_is_a_visible_wait_and_exit_status_3(tmp_path):
    done = _run("train", write_config(tmp_path, "127.0.0.1:9"), "teacher.start_deadline_s=1")
    assert done.returncode == 3
    assert "waiting for the teacher at 127.0.0.1:9" in done.stderr
    assert "student-trainer: the teacher: UNAVAILABLE" in done.stderr and "Traceback" not in done.stderr


def test_a_verifier_that_raises_ends_the_run_with_the_samples_name(teacher, tmp_path, capsys):
    config = write_config(tmp_path, teacher.address)
    done = _call(capsys, "train", config, "prompts.verifier.function=tests.toy:broken_verifier")
    assert done.returncode == 1
    assert re.search(r"prompts\.jsonl:\d+", done.stderr) and "the sandbox is gone" in done.stderr


def test_an_interrupted_run_leaves_whole_files_and_its_checkpoints(teacher, tmp_path):
    config = write_config(tmp_path, teacher.address)
    command = [*TRAINER, "train", str(config), "steps=10000", "checkpoints.every_steps=2", "checkpoints.keep=1000"]
    with subprocess.Popen(
        command,
        env=child_environment(),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Shells start background jobs with SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        for line in process.stdout:
            if line.startswith("step     5/"):
                process.send_signal(signal.SIGINT)
                break
        assert process.wait(timeout=60) == 130
        assert "stopped by SIGINT: saved, --resume goes on from here" in process.stderr.read()
    run = tmp_path / "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) >= 4
    for checkpoint in (run / "checkpoints").glob("step-*"):
        transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    assert (run / "checkpoints" / "step-4").is_dir()
    assert (run / "checkpoints" / f"step-{len(rows)}").is_dir()  # where it stopped


def test_a_killed_run_leaves_no_half_checkpoint_under_a_checkpoints_name(teacher, tmp_path):
    config = write_config(tmp_path, teacher.address)
    command = [*TRAINER, "train", str(config), "steps=10000", "checkpoints.every_steps=1", "checkpoints.keep=1000"]
    with subprocess.Popen(command, env=child_environment(), cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step     8/"):
                process.kill()
                break
    checkpoints = list((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert len(checkpoints) >= 6
    for checkpoint in checkpoints:
        transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
        transformers.AutoTokenizer.from_pretrained(checkpoint)


def test_the_metrics_endpoint_shows_the_last_step(teacher, tmp_path):
    config = write_config(tmp_path, teacher.address)
    command = [*TRAINER, "train", str(config), "steps=10000", "metrics_port=0"]
    with subprocess.Popen(command, env=child_environment(), cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        text = ""
        for line in process.stdout:
            if line.startswith("step "):
                text = urllib.request.urlopen(url, timeout=10).read().decode()
                if "stillhouse_student_kl " in text:
                    break
        process.kill()
    for name in ("reward", "pass_rate", "kl", "entropy", "tokens_per_s", "rollout_s", "scoring_s", "training_s"):
        assert re.search(rf"^stillhouse_student_{name} -?\d", text, re.MULTILINE)


def test_eval_prints_and_writes_the_same(tmp_path, capsys):
    prompts = {"source": "jsonl", "path": str(tmp_path / "prompts.jsonl")}
    prompts["verifier"] = {"kind": "python", "function": "tests.toy:share_of_small_words", "pass_threshold": 0.6}
    evaluation = {"prompts": prompts, "num_prompts": 6, "answers_per_prompt": 4, "k": [1, 4]}
    done = _call(
        capsys,
        "eval",
        write_config(tmp_path, None, evaluation=evaluation, objective={"recipe": "grpo"}),
        "--out",
        tmp_path / "eval.json",
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((tmp_path / "eval.json").read_text())


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A real teacher-server of a tiny model: (model directory, address)."""
    directory = save_model(tmp_path_factory.mktemp("model") / "oak")
    command = [sys.executable, "-m", "teacher_server.cli", "--engine", "torch", "--model", str(directory)]
    command += ["--listen", "127.0.0.1:0", "--metrics-port", "0"]
    with subprocess.Popen(command, env=child_environment(), cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield directory, server.stdout.readline().split("listen=")[1].split()[0]
        server.terminate()


def _texts(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _score(capsys, served, tmp_path: Path, rows: list[dict], *options: object) -> Done:
    directory, address = served
    texts = _texts(tmp_path / "texts.jsonl", rows)
    return _call(
        capsys,
        "score",
        "--teacher",
        address,
        "--tokenizer",
        directory,
        "--input",
        texts,
        "--output",
        tmp_path / "scores",
        *options,
    )


ROWS = [
    {"prompt": "w5 w6", "response": "w7 w8 w9"},
    {"token_ids": [3, 4, 5, 6, 7], "score_start": 4},
    {"prompt": "w11", "response": "w12 w13"},
]


def test_score_writes_the_teachers_arrays(served, tmp_path, capsys):
    done = _score(capsys, served, tmp_path, ROWS, "--top-k", 5, "--temperature", 0.7, "--part-size", 2)
    assert done.returncode == 0, done.stderr
    parts = [dict(np.load(path)) for path in sorted((tmp_path / "scores").glob("part-*.npz"))]
    assert [part["line"].tolist() for part in parts] == [[1, 2], [3]]
    assert [part["length"].tolist() for part in parts] == [[3, 1], [2]]
    sequences = [([5, 6, 7, 8, 9], 2), ([3, 4, 5, 6, 7], 4), ([11, 12, 13], 1)]
    merged = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    row = 0
    for ids, start in sequences:
        expected = reference_scores(served[0], np.array(ids), score_start=start, top_k=5, temperature=0.7)
        rows = slice(row, row + len(ids) - start)
        row = rows.stop
        assert merged["token_ids"][rows].tolist() == ids[start:]
        assert np.array_equal(merged["top_ids"][rows], expected["top_ids"])
        for name in ("top_logprobs", "sampled_logprobs", "log_tail", "entropy", "log_normalizer"):
            np.testing.assert_allclose(merged[name][rows], expected[name], atol=1e-4)


def test_score_again_keeps_the_parts_that_exist_and_refuses_other_settings(served, tmp_path, capsys):
    assert _score(capsys, served, tmp_path, ROWS, "--part-size", 2).returncode == 0
    first, second = sorted((tmp_path / "scores").glob("part-*.npz"))
    kept, content = first.stat().st_mtime_ns, second.read_bytes()
    second.unlink()
    done = _score(capsys, served, tmp_path, ROWS, "--part-size", 2)
    assert done.returncode == 0 and "exists, kept" in done.stderr
    assert first.stat().st_mtime_ns == kept and len(second.read_bytes()) == len(content)
    done = _score(capsys, served, tmp_path, ROWS, "--part-size", 2, "--temperature", 2)
    assert done.returncode == 2 and "made with another temperature" in done.stderr


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"prompt": "w1"}], (), "texts.jsonl:1: needs"),
        ([ROWS[0], {"prompt": "w1", "response": ""}], (), "texts.jsonl:2: 1 tokens with score_start 1"),
        ([{"token_ids": [1, 2.5], "score_start": 1}], (), "texts.jsonl:1: token_ids must be"),
        ([{"token_ids": [1, 97], "score_start": 1}], (), "texts.jsonl:1: token ids 1 .. 97; the vocabulary is 0 .. 96"),
        ([{"token_ids": [1] * 200, "score_start": 1}], (), "texts.jsonl:1: 200 tokens, the teacher takes 128"),
        (ROWS, ("--top-k", 98), "--top-k: 98 is outside the server's 0 .. 97"),
        ([], (), "holds no line to score"),
    ],
)
def test_score_refuses_what_cannot_be_scored_before_it_writes(served, tmp_path, rows, options, message, capsys):
    done = _score(capsys, served, tmp_path, rows, *options)
    assert done.returncode == 2 and message in done.stderr
    assert not (tmp_path / "scores").exists()


def test_score_refuses_another_models_tokenizer(served, tmp_path, capsys):
    save_student(tmp_path / "student")
    texts = _texts(tmp_path / "texts.jsonl", ROWS)
    done = _call(
        capsys,
        "score",
        "--teacher",
        served[1],
        "--tokenizer",
        tmp_path / "student",
        "--input",
        texts,
        "--output",
        tmp_path / "scores",
    )
    assert done.returncode == 2 and "is not the tokenizer of teacher 'oak'" in done.stderr


# The README


def _commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line.split("#")[0].strip() for line in lines if line.strip()]


def test_every_command_of_the_readme_exists():
    """`make` targets are known to make; programs accept the options as written."""
    commands = _commands()
    assert commands[:2] == ["make demo", "make test"]
    for command in commands:
        words = shlex.split(command)
        if words[0] == "make":
            subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, check=True, capture_output=True)
        elif words[0] == "student-trainer":
            from student_trainer.cli import _parser

            _parser().parse_args(words[1:])
        elif words[0] == "teacher-server":
            done = subprocess.run(
                [sys.executable, "-m", "teacher_server.cli", *words[1:]],
                env=child_environment(),
                cwd=ROOT,
                capture_output=True,
                text=True,
                timeout=60,
            )
            assert "--model 'DIR'" in done.stderr or "--model DIR" in done.stderr, done.stderr
        elif words[:2] == ["helm", "install"]:
            helm = [helm_3(), "template", *words[2:], "--kube-version", "1.34.0"]
            subprocess.run(helm, cwd=ROOT, check=True, capture_output=True)
        else:
            assert words[:2] == ["pip", "install"], command


def test_files_that_the_docs_link_to_exist():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_demo_never_removes_what_is_not_a_demo(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    done = subprocess.run(
        [sys.executable, "examples/chain_sum/demo.py", "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1 and "not an earlier demo" in done.stderr
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.slow
def test_the_demo_in_short(tmp_path):
    """Three steps of the demo: real server, both arms, table, picture."""
    start_s = time.monotonic()
    done = subprocess.run(
        [
            sys.executable,
            "examples/chain_sum/demo.py",
            "--out",
            str(tmp_path / "demo"),
            "steps=3",
            "evaluation.num_prompts=24",
            "evaluation.every_steps=2",
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    for name in ("teacher", "before", "grpo", "distilled"):
        assert 0 <= summary[name]["pass@1"] <= summary[name]["pass@8"] <= 1
        low, high = summary[name]["pass@1_interval"]
        assert low <= summary[name]["pass@1"] <= high
    assert summary["teacher"]["pass@1"] > summary["before"]["pass@1"] + 0.4
    assert summary["rollouts"] == 3 * 256
    assert 0 < summary["wall_s"] <= time.monotonic() - start_s
    assert (tmp_path / "demo" / "curves.png").read_bytes().startswith(b"\x89PNG")
    for name in ("distilled", "grpo"):
        assert len((tmp_path / "demo" / name / "metrics.jsonl").read_text().splitlines()) == 3
    for word in ("teacher", "student before", "GRPO alone", "distilled", "pass@1", "95% interval"):
        assert word in done.stdout
