"""Verifiers, against the real reasoning-gym and math_verify."""

import importlib
import json
import logging
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import reasoning_gym
import yaml
from pydantic import TypeAdapter, ValidationError
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from student_trainer.prompts import Prompt, PromptsConfig
from student_trainer.verifier_config import VerifierConfig
from student_trainer.verifier_worker import MEMORY_BYTES, Worker, WorkerError
from student_trainer.verifiers import Verifier, VerifierError, build_verifier, passed, verify

ROOT = Path(__file__).parents[2]


def _prompt(answer: Any, key: str = "t.jsonl:1", **entry: Any) -> Prompt:
    return Prompt(key, "?", None, (1,), answer, {"prompt": "?", "answer": answer, **entry})


def _verifier_config(**fields: Any) -> VerifierConfig:
    return TypeAdapter(VerifierConfig).validate_python(fields)


def _source(**fields: Any) -> PromptsConfig:
    return TypeAdapter(PromptsConfig).validate_python(fields)


JSONL = _source(source="jsonl", path="t.jsonl", verifier={"kind": "exact"})


def _verifier(*prompts: Prompt, folder: Path | None = None, **fields: Any) -> Verifier:
    return build_verifier(_verifier_config(**fields), JSONL, prompts, folder=folder)


def _gym(dataset: str, size: int = 4, **fields: Any) -> tuple[Verifier, list[Prompt]]:
    source = _source(
        source="reasoning_gym", dataset=dataset, size=size, seed=7, verifier={"kind": "reasoning_gym", **fields}
    )
    entries = reasoning_gym.create_dataset(dataset, size=size, seed=7)
    prompts = [Prompt(f"{dataset}/{i}", e["question"], None, (1,), e["answer"], e) for i, e in enumerate(entries)]
    return build_verifier(source.verifier, source, prompts), prompts


def _says(error: pytest.ExceptionInfo, *parts: str) -> None:
    for part in (*parts, "Fix:"):
        assert part in str(error.value), f"{part!r} is not in: {error.value}"


# reasoning-gym


@pytest.mark.parametrize("dataset", ["chain_sum", "spell_backward", "knights_knaves", "rotate_matrix"])
def test_a_right_answer_to_a_reasoning_gym_question_scores_one_and_a_wrong_one_less(dataset):
    verifier, prompts = _gym(dataset)
    for prompt in prompts:
        assert verifier(prompt, prompt.answer) == 1.0
        assert verifier(prompt, f"\n  {prompt.answer} \n") == 1.0
        assert verifier(prompt, "none of these") < 1.0
        assert verifier(prompt, "") < 1.0


def test_reasoning_gym_scores_are_the_datasets_own():
    verifier, prompts = _gym("countdown")
    dataset = reasoning_gym.create_dataset("countdown", size=4, seed=7)
    for prompt, entry in zip(prompts, dataset, strict=True):
        solution = entry["metadata"]["expression"]
        for completion in (solution, "1 + 1", "nonsense", solution + " + 1"):
            assert verifier(prompt, completion) == dataset.score_answer(completion, entry)
        assert verifier(prompt, solution) == 1.0


def test_white_space_counts_where_strip_is_off():
    verifier, prompts = _gym("gcd", strip=False)
    assert verifier(prompts[0], prompts[0].answer) == 1.0
    assert verifier(prompts[0], prompts[0].answer + "\n") < 1.0


def test_a_reasoning_gym_verifier_that_never_ends_is_stopped_and_the_next_answer_is_judged():
    verifier, prompts = _gym("countdown", timeout_s=1)
    with pytest.raises(VerifierError) as error:
        verifier(prompts[0], "9**9**9**9")
    _says(error, "countdown/0", "9**9**9**9", "longer than 1 s (timeout_s)")
    assert isinstance(error.value.__cause__, TimeoutError)
    assert verifier(prompts[0], prompts[0].entry["metadata"]["expression"]) == 1.0


def test_a_reasoning_gym_verifier_that_raises_is_no_wrong_answer():
    verifier, prompts = _gym("prime_factorization")
    with pytest.raises(VerifierError) as error:
        verifier(prompts[2], "two times three")
    _says(error, "prime_factorization/2", "two times three", "ValueError", "on_error: drop")
    assert isinstance(error.value.__cause__, WorkerError)


def test_an_answer_pattern_makes_a_malformed_answer_wrong_before_the_verifier_sees_it():
    verifier, prompts = _gym("prime_factorization", answer_pattern=r"^\s*(\d+(?: \S \d+)*)\s*$")
    assert verifier(prompts[0], "two times three") == 0.0
    assert verifier(prompts[0], prompts[0].answer) == 1.0


def test_an_answer_that_ends_the_verifiers_process_is_an_error_and_not_the_end_of_the_run():
    verifier, prompts = _gym("string_insertion")  # evaluates answers as Python
    for completion, what in [("exit()", "SystemExit"), ("__import__('os')._exit(3)", "status 3")]:
        with pytest.raises(VerifierError) as error:
            verifier(prompts[0], completion)
        _says(error, "string_insertion/0", what)
    assert verifier(prompts[0], "print('on the pipe')") == 0.0
    assert verifier(prompts[0], prompts[0].answer) == 1.0


def test_the_reasoning_gym_verifier_refuses_a_files_prompts():
    with pytest.raises(ValueError) as error:
        _verifier(_prompt("1"), kind="reasoning_gym")
    _says(error, "verifier.kind", "reasoning_gym", "jsonl", "math_verify")


# math_verify


@pytest.fixture(scope="module")
def math() -> Verifier:
    return _verifier(_prompt("1"), kind="math_verify")


@pytest.mark.parametrize(
    ("answer", "right", "wrong"),
    [
        ("42", ["42", "so the answer is 42.", r"\boxed{42}", "$42.0$"], ["43", r"42 or rather \boxed{43}"]),
        (0.5, [r"$\frac{1}{2}$", "1/2", r"\boxed{50\%}"], ["2", "0.05"]),
        (r"2\pi", [r"$2\pi$", r"\boxed{\pi \cdot 2}"], ["2", r"$\pi$"]),
        ("x^2+1", ["$1+x^2$", r"\boxed{x\cdot x+1}"], ["$x^2$", "1"]),
        (r"\{1,2\}", [r"$\{2,1\}$"], [r"$\{1,3\}$", "1"]),
        ("50\\%", ["50%", "0.5"], ["49%"]),
        ("$3$", ["3"], ["4"]),
        (r"\$5", [r"\boxed{\$5}", "5"], ["6"]),
        ("1 < x < 2", ["$1 < x < 2$"], ["2", "$1 < x < 3$"]),
    ],
)
def test_math_is_compared_by_value(math, answer, right, wrong):
    for completion in right:
        assert math(_prompt(answer), completion) == 1.0, completion
    for completion in (*wrong, "", "I do not know", r"\boxed{", r"$\frac{$"):
        assert math(_prompt(answer), completion) == 0.0, completion


def test_an_extracted_answer_is_read_as_mathematics_as_a_whole():
    verifier = _verifier(_prompt("2"), kind="math_verify", answer_pattern=r"Answer:\s*(.+)")
    assert verifier(_prompt(r"2\pi"), r"Answer: 2\pi") == 1.0
    assert verifier(_prompt("2"), r"Answer: 2\pi") == 0.0
    assert verifier(_prompt("2"), "2") == 0.0
    assert verifier(_prompt("2"), "Answer: $2$") == 1.0


@pytest.mark.parametrize("answer", ["???", r"\sqrt{2", "", "  ", None, True, ["1", "2"]])
def test_an_answer_that_is_no_mathematics_is_an_error_at_the_start(answer):
    with pytest.raises(ValueError) as error:
        _verifier(_prompt("1"), _prompt(answer, key="t.jsonl:2"), kind="math_verify")
    _says(error, "t.jsonl:2", repr(answer), "math_verify")


def test_math_verify_answers_alike_from_every_thread(math):
    results: dict[int, float] = {}

    def judge(number: int) -> None:
        for _ in range(10):
            results[number] = math(_prompt(str(number)), rf"\boxed{{{number - number % 2}}}")

    threads = [threading.Thread(target=judge, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: 1.0 - number % 2 for number in range(8)}


def test_math_that_never_ends_is_an_error_in_any_thread_and_not_a_wrong_answer():
    verifier = _verifier(_prompt("1"), kind="math_verify", timeout_s=1)
    errors = []

    def judge() -> None:
        with pytest.raises(VerifierError) as error:
            verifier(_prompt("1"), "9**9**9**9")
        errors.append(error)

    thread = threading.Thread(target=judge)
    thread.start()
    thread.join()
    judge()
    for error in errors:
        _says(error, "t.jsonl:1", "9**9**9**9", "longer than 1 s (timeout_s)")
    assert len(errors) == 2
    assert verifier(_prompt("1"), "1") == 1.0


@pytest.mark.parametrize(
    ("answer", "what"), [(r"\frac{1}{0}", "ValueError"), ("9^{9^{9^9}}", "longer than 1 s (timeout_s)")]
)
def test_a_reference_that_math_verify_cannot_compare_is_an_error_at_the_start(answer, what):
    with pytest.raises(ValueError) as error:
        _verifier(_prompt("1"), _prompt(answer, key="t.jsonl:2"), kind="math_verify", timeout_s=1)
    _says(error, "t.jsonl:2", repr(answer), "cannot work with", what)


def test_math_verify_raising_is_no_wrong_answer(math):
    with pytest.raises(VerifierError) as error:
        math(_prompt(r"x \neq 3"), "$i < 2$")  # a comparison that it has no case for
    _says(error, "t.jsonl:1", "'$i < 2$'", "KeyError", "on_error: drop")


# exact and regex


@pytest.mark.parametrize(
    ("fields", "answer", "completion", "reward"),
    [
        ({}, "Paris", " Paris\n", 1.0),
        ({}, "Paris", "paris", 0.0),
        ({}, " Paris ", "Paris", 1.0),
        ({}, 42, "42", 1.0),
        ({}, 42, "42.0", 0.0),
        ({"ignore_case": True}, "Straße", "STRASSE", 1.0),
        ({"strip": False}, "Paris", "Paris\n", 0.0),
        ({"strip": False}, "Paris\n", "Paris\n", 1.0),
        ({"answer_pattern": "<answer>(.*?)</answer>"}, "b", "<answer>a</answer> no, <answer>b</answer>", 1.0),
        ({"answer_pattern": "<answer>(.*?)</answer>"}, "a", "<answer>a</answer> no, <answer>b</answer>", 0.0),
        ({"answer_pattern": "<answer>(.*?)</answer>"}, "a", "a", 0.0),
        ({"answer_pattern": "answer(?:: (.*))?"}, "a", "answer", 0.0),
    ],
)
def test_exact_compares_characters(fields, answer, completion, reward):
    prompt = _prompt(answer)
    assert _verifier(prompt, kind="exact", **fields)(prompt, completion) == reward


@pytest.mark.parametrize(
    ("fields", "answer", "completion", "reward"),
    [
        ({}, r"\bfour\b|4", "it is four", 1.0),
        ({}, r"\bfour\b|4", "it is fourteen", 0.0),
        ({"match": "fullmatch"}, "four|4", "4", 1.0),
        ({"match": "fullmatch"}, "four|4", "44", 0.0),
        ({"pattern": "^yes"}, None, "yes, indeed", 1.0),
        ({"pattern": "^yes"}, "[not looked at", "oh yes", 0.0),
    ],
)
def test_regex_matches_the_fixed_pattern_or_the_prompts_own(fields, answer, completion, reward):
    prompt = _prompt(answer)
    assert _verifier(prompt, kind="regex", **fields)(prompt, completion) == reward


@pytest.mark.parametrize("answer", [None, "", " ", True, ["a"]])
@pytest.mark.parametrize("kind", ["exact", "regex"])
def test_an_answer_that_is_no_text_is_an_error_at_the_start(kind, answer):
    with pytest.raises(ValueError) as error:
        _verifier(_prompt("fine"), _prompt(answer, key="t.jsonl:9"), kind=kind)
    _says(error, "t.jsonl:9", repr(answer), kind)


def test_a_prompts_own_pattern_that_does_not_compile_is_named_by_its_line():
    with pytest.raises(ValueError) as error:
        _verifier(_prompt("fine"), _prompt("(4", key="t.jsonl:3"), kind="regex")
    _says(error, "t.jsonl:3", "'(4'", "not a regular expression")


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"kind": "regex", "pattern": "(4"}, ["pattern", "'(4'", "not a regular expression", "Fix:"]),
        ({"kind": "exact", "answer_pattern": "[a"}, ["answer_pattern", "'[a'", "not a regular expression", "Fix:"]),
        ({"kind": "exact", "answer_pattern": "a"}, ["answer_pattern", "'a'", "0 groups", "Fix:"]),
        ({"kind": "exact", "answer_pattern": "(a)(b)"}, ["answer_pattern", "2 groups", "(?:...)", "Fix:"]),
        ({"kind": "python", "function": "rewards.score"}, ["function", "'rewards.score'", "module:function", "Fix:"]),
        ({"kind": "exakt"}, ["exakt", "math_verify", "exact"]),
        ({"kind": "exact", "on_error": "zero"}, ["on_error", "stop", "drop"]),
        ({"kind": "exact", "pass_threshold": float("nan")}, ["pass_threshold", "finite"]),
        ({"kind": "math_verify", "timeout_s": 0}, ["timeout_s", "greater than 0"]),
    ],
)
def test_a_wrong_setting_is_refused_with_field_value_and_fix(fields, parts):
    with pytest.raises(ValidationError) as error:
        _verifier_config(**fields)
    assert all(part in str(error.value) for part in parts), error.value


# Functions of the user's


REWARDS = """
import numpy as np
limit = 3
def score(completion, answer, entry): return 0.25 if completion == answer and entry["level"] == 2 else False
def short(completion): return 1.0
def broken(completion, answer, entry): raise KeyError("no such level")
def give(completion, answer, entry): return eval(answer)
class Judge:
    @staticmethod
    def score(completion, answer, entry): return len(completion) / 10
"""


@pytest.fixture
def rewards(tmp_path, monkeypatch) -> str:
    """Name of a module that lies in a folder of its own, which is not on the path."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    name = f"rewards_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(REWARDS)
    return name


def test_a_function_gets_completion_answer_and_entry(rewards, tmp_path):
    prompt = _prompt("yes", level=2)
    verifier = _verifier(prompt, kind="python", function=f"{rewards}:score", folder=tmp_path)
    assert (verifier(prompt, "yes"), verifier(prompt, "no")) == (0.25, 0.0)
    nested = _verifier(prompt, kind="python", function=f"{rewards}:Judge.score", folder=tmp_path)
    assert nested(prompt, "yes") == 0.3


def test_a_function_gets_what_the_answer_pattern_extracted(rewards, tmp_path):
    prompt = _prompt("yes", level=2)
    fields = {"kind": "python", "function": f"{rewards}:score", "answer_pattern": "<(.*?)>"}
    assert _verifier(prompt, folder=tmp_path, **fields)(prompt, "well, <yes>") == 0.25


def test_a_function_is_found_in_the_working_directory(rewards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prompt = _prompt("yes", level=2)
    assert _verifier(prompt, kind="python", function=f"{rewards}:score")(prompt, "yes") == 0.25


@pytest.mark.parametrize(
    ("function", "parts"),
    [
        ("no_such_module:score", ["'no_such_module'", "ModuleNotFoundError", "no_such_module.py"]),
        ("{rewards}:scores", ["no 'scores'", "'score'", "{rewards}.py"]),
        ("{rewards}:Judge.scores", ["no 'Judge.scores'"]),
        ("{rewards}:limit", ["is a int", "cannot be called"]),
        ("{rewards}:short", ["short(completion)", "f(completion, answer, entry)", "too many"]),
    ],
)
def test_a_function_that_cannot_serve_is_an_error_at_the_start(rewards, tmp_path, function, parts):
    with pytest.raises(ValueError) as error:
        _verifier(_prompt("1"), kind="python", function=function.replace("{rewards}", rewards), folder=tmp_path)
    _says(error, "verifier.function", *(part.replace("{rewards}", rewards) for part in parts))


def test_a_module_whose_own_import_fails_says_which(rewards, tmp_path):
    (tmp_path / f"{rewards}_bad.py").write_text("import no_such_judge")
    with pytest.raises(ValueError) as error:
        _verifier(_prompt("1"), kind="python", function=f"{rewards}_bad:score", folder=tmp_path)
    _says(error, "verifier.function", f"{rewards}_bad", "no_such_judge")


# Rewards and errors


@pytest.mark.parametrize(
    ("value", "reward"),
    [("True", 1.0), ("False", 0.0), ("2", 2.0), ("-0.5", -0.5), ("np.float32(0.5)", 0.5), ("np.bool_(1)", 1.0)],
)
def test_any_finite_number_and_bool_is_a_reward(rewards, tmp_path, value, reward):
    prompt = _prompt(value)
    given = _verifier(prompt, kind="python", function=f"{rewards}:give", folder=tmp_path)(prompt, "x")
    assert type(given) is float and given == reward


@pytest.mark.parametrize("value", ["None", "'1'", "float('nan')", "float('inf')", "np.float32('nan')", "1j", "[1.0]"])
def test_anything_else_is_an_error_with_key_value_and_fix(rewards, tmp_path, value):
    prompt = _prompt(value, key="t.jsonl:5")
    verifier = _verifier(prompt, kind="python", function=f"{rewards}:give", folder=tmp_path)
    with pytest.raises(VerifierError) as error:
        verifier(prompt, "my answer")
    returned = repr(eval(value, {"np": np}))
    _says(error, "t.jsonl:5", "'my answer'", f"it returned {returned}", "finite number or a bool", "on_error: drop")
    assert error.value.__cause__ is None


def test_a_number_too_large_for_a_float_is_an_error(rewards, tmp_path):
    prompt = _prompt("10 ** 400")
    with pytest.raises(VerifierError, match="not a finite number"):
        _verifier(prompt, kind="python", function=f"{rewards}:give", folder=tmp_path)(prompt, "x")


def test_a_verifier_that_raises_is_an_error_with_key_excerpt_and_cause(rewards, tmp_path):
    prompt = _prompt("1", key="t.jsonl:5")
    verifier = _verifier(prompt, kind="python", function=f"{rewards}:broken", folder=tmp_path)
    completion = "beginning" + "x" * 1000 + "the end"
    with pytest.raises(VerifierError) as error:
        verifier(prompt, completion)
    _says(error, "t.jsonl:5", "'beginningxx", "xxthe end'", "1016 characters", "KeyError: 'no such level'")
    assert len(str(error.value)) < 600
    assert isinstance(error.value.__cause__, KeyError)
    assert (error.value.prompt_key, error.value.completion) == ("t.jsonl:5", completion)


def test_a_broken_verifier_stops_or_drops_as_configured(caplog):
    def broken(prompt: Prompt, completion: str) -> float:
        raise ZeroDivisionError("no judges today")

    with pytest.raises(VerifierError) as error:
        verify(broken, _prompt("1"), "x", "stop")
    assert isinstance(error.value.__cause__, ZeroDivisionError)
    with caplog.at_level(logging.WARNING):
        assert verify(broken, _prompt("1"), "x", "drop") is None
    assert "sample dropped" in caplog.text and "no judges today" in caplog.text and "t.jsonl:1" in caplog.text


def test_verify_checks_the_reward_of_any_verifier():
    assert verify(lambda prompt, completion: True, _prompt("1"), "x", "stop") == 1.0
    assert verify(lambda prompt, completion: float("nan"), _prompt("1"), "x", "drop") is None
    with pytest.raises(VerifierError, match="it returned None"):
        verify(lambda prompt, completion: None, _prompt("1"), "x", "stop")  # type: ignore[arg-type, return-value]


def test_what_is_not_an_error_of_the_verifier_is_never_dropped():
    def interrupted(prompt: Prompt, completion: str) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify(interrupted, _prompt("1"), "x", "drop")


@pytest.mark.parametrize(("reward", "threshold", "correct"), [(1.0, 1.0, True), (0.99, 1.0, False), (0.5, 0.5, True)])
def test_an_answer_passes_from_the_threshold_on(reward, threshold, correct):
    assert passed(reward, threshold) is correct


# The worker


SERVING = """
import sys, time
def lengths():
    def serve(request):
        print("printed")
        assert sys.stdin.read() == ""
        if request is None:
            time.sleep(60)
        return len(bytearray(request)) if isinstance(request, int) else len(request)
    return serve
def refuse():
    raise LookupError("cannot start")
"""


@pytest.fixture
def serving(tmp_path, monkeypatch) -> ModuleType:
    """`lengths` counts bytes, takes as many as a number says, or sleeps; it prints and reads, which must not matter."""
    name = f"serving_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(SERVING)
    monkeypatch.syspath_prepend(str(tmp_path))
    return importlib.import_module(name)


def test_a_worker_keeps_its_pipe_to_itself(serving):
    worker = Worker(serving.lengths, timeout_s=30)
    assert [worker("x" * n) for n in (0, 3, 1_000_000)] == [0, 3, 1_000_000]


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is set on Linux only")
def test_a_worker_cannot_take_the_machines_memory(serving):
    worker = Worker(serving.lengths, timeout_s=30)
    with pytest.raises(WorkerError, match="MemoryError"):
        worker(2 * MEMORY_BYTES)
    assert worker("abc") == 3


def test_a_worker_keeps_its_deadline_where_the_trainer_ignores_alarms(serving):
    before = signal.signal(signal.SIGALRM, signal.SIG_IGN)
    try:
        worker = Worker(serving.lengths, timeout_s=0.2)
        with pytest.raises(TimeoutError, match=re.escape("longer than 0.2 s")):
            worker(None)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert worker("abc") == 3


def test_a_worker_that_cannot_start_says_why(serving):
    with pytest.raises(WorkerError, match="LookupError: cannot start"):
        Worker(serving.refuse, timeout_s=30)


def test_a_question_that_was_interrupted_does_not_leave_its_answer_to_the_next(serving, monkeypatch):
    worker = Worker(serving.lengths, timeout_s=30)

    def interrupt(file: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pickle, "load", interrupt)
        with pytest.raises(KeyboardInterrupt):
            worker("abcde")
    assert worker("abc") == 3


def test_a_worker_ends_with_its_owner(serving):
    worker = Worker(serving.lengths, timeout_s=30)
    process = worker._process
    del worker
    assert process.poll() == -signal.SIGKILL


def test_a_worker_ends_when_its_trainer_is_killed():
    code = (
        "import json, os, signal\n"
        "from student_trainer.verifier_worker import Worker, serve_math\n"
        "worker = Worker(serve_math, timeout_s=1)\n"
        "print(json.dumps(worker._process.pid), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL
    pid = json.loads(done.stdout)
    for _ in range(100):
        if not _running(pid):
            return
        time.sleep(0.1)
    pytest.fail("the worker outlived its trainer by 10 s")


def _running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # Where nobody reaps orphans it stays as a zombie, which runs no more.
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"


# The documentation


def test_the_example_of_the_documentation_runs_as_printed(tmp_path):
    page = (ROOT / "docs" / "verifiers.md").read_text()
    files = dict(re.findall(r"^`([\w.]+)`:\n\n```\w+\n(.*?)```$", page, re.MULTILINE | re.DOTALL))
    assert set(files) == {"train.jsonl", "rewards.py", "my.yaml", "try_verifier.py"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    tokenizer = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(tmp_path / "models/my-student")
    done = subprocess.run(
        [sys.executable, "try_verifier.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "proto")])},
        capture_output=True,
        text=True,
    )
    (printed,) = re.findall(r"^```text\n(.*?)```$", page, re.MULTILINE | re.DOTALL)
    assert done.stdout == printed, done.stderr


def test_the_verifiers_of_the_documentation_are_valid():
    page = (ROOT / "docs" / "verifiers.md").read_text()
    lines = re.findall(r"^verifier: \{.*\}$", page, re.MULTILINE)
    assert len(lines) == 5
    for line in lines:
        _verifier_config(**yaml.safe_load(line)["verifier"])
