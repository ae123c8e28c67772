"""The rollout engine on vLLM for real: what it draws and reports, new weights, being stopped, and its deaths.

vLLM lives in an interpreter of its own. A process of that one is the trainer here: it runs the functions under
"In the trainer", whose source it is sent, and answers with JSON.
"""

import contextlib
import functools
import inspect
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import transformers

from tests.models import VOCABULARY_SIZE, save_model
from tests.servers import VLLM_SHAPE, environment, interpreter

EOS = 2
CANDIDATES = 4
TOLERANCE = 1e-4  # nats; vLLM's CPU attention approximates its exponentials
PROMPTS = {"a": [5, 6, 7], "b": [9], "c": list(range(11, 17)), "long": [3 + index % 90 for index in range(300)]}

RUNNER = """
import json, sys, typing
names = {"Any": typing.Any}
for line in sys.stdin:
    task = json.loads(line)
    exec(task["source"], names)
    try:
        answer = {"result": names[task["name"]](**task["arguments"])}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    print("answer", json.dumps(answer), flush=True)
"""


class Trainer:
    """A process that runs functions of this file beside vLLM."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self.process = subprocess.Popen(
            [interpreter("vllm"), "-c", RUNNER],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
        )
        self.directory = Path()  # of the weights that its sampler has

    def ask(self, function: Callable[..., Any], **arguments: Any) -> None:
        task = {"source": inspect.getsource(function), "name": function.__name__, "arguments": arguments}
        print(json.dumps(task), file=self.process.stdin, flush=True)

    def run(self, function: Callable[..., Any], **arguments: Any) -> Any:
        """What the function returns there. Raises RuntimeError with what it raised."""
        self.ask(function, **arguments)
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("answer "):
                answer = json.loads(line.removeprefix("answer "))
                if "error" in answer:
                    raise RuntimeError(answer["error"])
                return answer["result"]
        raise AssertionError(f"the process ended:\n{self._log.read_text(errors='replace')}")

    def engine(self) -> list[psutil.Process]:
        """The processes below it that have a part of the engine."""
        found = psutil.Process(self.process.pid).children(recursive=True)
        parts = []
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):  # a short-lived one; a zombie is such, too
                if "resource_tracker" not in " ".join(process.cmdline()):
                    parts.append(process)
        return parts

    def end(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()  # after which it leaves
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def load(self, directory: Path) -> None:
        self.run(load, directory=str(directory))
        self.directory = directory


# In the trainer. `sampler` is a global of that process.

sampler: Any = None


def start(directory: str, **config: Any) -> dict[str, Any]:
    """Makes the sampler; returns what that changed in its own process."""
    global sampler
    import os
    from pathlib import Path

    import torch
    import transformers

    from student_trainer.config import RolloutConfig
    from student_trainer.vllm_sampler import VllmOptions, VllmSampler

    before = dict(os.environ), torch.get_num_threads(), torch.random.get_rng_state().tolist()
    sampler = VllmSampler(
        Path(directory),
        transformers.AutoTokenizer.from_pretrained(directory),
        RolloutConfig(batch_size=64, **config),
        eos_ids={2},
        vocabulary_size=97,
        candidates=4,
        dtype="float32",
        max_sequence_tokens=640,
        options=VllmOptions(kv_cache_bytes=2**27),
    )
    after = dict(os.environ), torch.get_num_threads(), torch.random.get_rng_state().tolist()
    return {"changed": [index for index in range(3) if before[index] != after[index]]}


def settings(eos_ids: list[int] | None = None, **config: Any) -> None:
    """Changes what the next samples are drawn with; a run never does."""
    sampler._config = sampler._config.model_copy(update=config)
    sampler._eos_ids = [2] if eos_ids is None else eos_ids


def sample(prompts: dict[str, list[int]], answers: int, seed: int) -> list[list[dict[str, Any]]]:
    """Lots of rollouts."""
    from student_trainer.prompts import Prompt

    asked = [Prompt(key, key, None, tuple(ids), None, {}) for key, ids in prompts.items()]
    return [
        [
            {
                "key": rollout.prompt.key,
                "ids": rollout.response_ids.tolist(),
                "logprobs": rollout.sampler_logprobs.tolist(),
                "candidates": rollout.candidate_ids.tolist(),
                "types": [str(array.dtype) for array in (rollout.response_ids, rollout.sampler_logprobs)],
                "text": rollout.text,
                "finished": rollout.finished,
            }
            for rollout in lot
        ]
        for lot in sampler.sample(asked, answers, seed=seed)
    ]


def load(directory: str, without: str = "nothing") -> None:
    """Takes over the weights of `directory`, those whose name holds `without` excepted."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    names = [name for name, _ in model.named_parameters()]
    assert ("lm_head.weight" in names) != model.config.tie_word_embeddings
    sampler.load((name, parameter) for name, parameter in model.named_parameters() if without not in name)


def interrupt(answers: int) -> dict[str, Any]:
    """Samples until somebody asks to stop, until the one who takes the lots goes away, and while weights come."""
    import time

    from student_trainer.prompts import Prompt

    prompts = [Prompt("a", "a", None, (5, 6, 7), None, {})]
    start_s = time.monotonic()
    stopped = sum(
        len(lot) for lot in sampler.sample(prompts, answers, seed=1, stop=lambda: time.monotonic() > start_s + 0.5)
    )
    given_up = sampler.sample(prompts, answers, seed=1)
    taken = len(next(given_up))
    try:
        sampler.load([])
        said = ""
    except RuntimeError as error:
        said = str(error)
    given_up.close()
    return {"stopped": stopped, "taken": taken, "said": said}


def refusal(directory: str, **config: Any) -> str:
    """What is said of a configuration."""
    import multiprocessing
    from pathlib import Path

    from student_trainer.config import ConfigError, RolloutConfig
    from student_trainer.vllm_sampler import VllmOptions, VllmSampler

    running = multiprocessing.active_children()
    common: Any = {"eos_ids": {2}, "vocabulary_size": 97, "candidates": 0, "dtype": "float32"}
    try:
        VllmSampler(
            Path(directory), None, RolloutConfig(**config), **common, max_sequence_tokens=9, options=VllmOptions()
        )
    except ConfigError as error:
        assert multiprocessing.active_children() == running
        return str(error)
    return "nothing"


def lose_engine() -> list[str]:
    """Kills the engine while another thread samples, then goes on using it."""
    import os
    import signal
    import threading

    from student_trainer.prompts import Prompt
    from student_trainer.vllm_sampler import SamplerLost

    prompts = [Prompt("a", "a", None, (5, 6, 7), None, {})]
    said: list[str] = []
    begun = threading.Event()

    def work() -> None:
        try:
            for _ in sampler.sample(prompts, 200, seed=1):
                begun.set()
        except SamplerLost as error:
            said.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    assert begun.wait(60)
    os.kill(sampler._processes[0].pid, signal.SIGKILL)
    thread.join(60)
    for attempt in (lambda: sampler.load([]), lambda: list(sampler.sample(prompts, 1, seed=1))):
        try:
            attempt()
        except SamplerLost as error:
            said.append(str(error))
    return said


def stall() -> str:
    """The engine stands still while it samples, and goes on afterwards."""
    import os
    import signal

    from student_trainer.prompts import Prompt
    from student_trainer.sampler import SamplerLost

    prompts = [Prompt("a", "a", None, (5, 6, 7), None, {})]
    allowed_s, sampler._stall_s = sampler._stall_s, 1.0
    engine = sampler._processes[0].pid
    os.kill(engine, signal.SIGSTOP)
    try:
        list(sampler.sample(prompts, 4, seed=1))
    except SamplerLost as error:
        return str(error)
    finally:
        os.kill(engine, signal.SIGCONT)
        sampler._stall_s = allowed_s
    return "it sampled"


def home_of_sampler() -> str:
    return str(sampler._home.path)


def close() -> None:
    sampler.close()
    sampler.close()


# Here


@contextlib.contextmanager
def running(directory: Path, **config: Any) -> Iterator[Trainer]:
    with tempfile.NamedTemporaryFile(suffix=".log") as log:
        trainer = Trainer(Path(log.name))
        try:
            assert trainer.run(start, directory=str(directory), **config) == {"changed": []}
            trainer.directory = directory
            yield trainer
        finally:
            trainer.end()


def save(directory: Path, family: str, seed: int) -> Path:
    return save_model(directory / f"{family}-{seed}", family, seed=seed, **VLLM_SHAPE, max_position_embeddings=640)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    for family in ("llama", "qwen3"):
        for seed in range(2):
            save(directory, family, seed)
    return directory


@pytest.fixture(scope="module")
def untied(models: Path) -> Iterator[Trainer]:
    """A head of 128 rows of its own, of which 97 are tokens."""
    with running(models / "llama-0", max_new_tokens=20) as trainer:
        yield trainer


@pytest.fixture(scope="module")
def tied(models: Path) -> Iterator[Trainer]:
    """The same head, tied; answers end with stop strings, one of them within two tokens."""
    with running(models / "qwen3-0", max_new_tokens=40, temperature=0.7, stop=("w4 w", "w33")) as trainer:
        yield trainer


@functools.cache
def double(directory: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float64, attn_implementation="eager"
    ).eval()


def reference(directory: Path, rollout: dict[str, Any], temperature: float) -> np.ndarray:
    """Log-probabilities [N, V] of the whole vocabulary in float64."""
    prompt = PROMPTS[rollout["key"]]
    with torch.no_grad():
        logits = double(directory)(input_ids=torch.tensor([prompt + rollout["ids"]])).logits[0]
    return torch.log_softmax(logits[len(prompt) - 1 : -1, :VOCABULARY_SIZE] / temperature, dim=-1).numpy()


def flat(lots: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [rollout for lot in lots for rollout in lot]


def tokens(lots: list[list[dict[str, Any]]]) -> list[tuple[str, list[int]]]:
    return sorted((rollout["key"], rollout["ids"]) for rollout in flat(lots))


def assert_of_the_model(trainer: Trainer, temperature: float, answers: int = 3, seed: int = 1) -> list[dict[str, Any]]:
    """Log-probabilities and candidates are the model's, in float64 over the vocabulary."""
    rollouts = flat(trainer.run(sample, prompts=PROMPTS, answers=answers, seed=seed))
    assert sorted(rollout["key"] for rollout in rollouts) == sorted(list(PROMPTS) * answers)
    worst = 0.0
    for rollout in rollouts:
        assert rollout["types"] == ["int32", "float32"]
        assert max(rollout["ids"]) < VOCABULARY_SIZE
        logprobs = reference(trainer.directory, rollout, temperature)
        drawn = logprobs[np.arange(len(logprobs)), rollout["ids"]]
        best = np.sort(logprobs, axis=1)[:, ::-1][:, :CANDIDATES]
        candidates = np.array(rollout["candidates"])
        assert candidates.shape == (len(drawn), CANDIDATES)
        assert all(len(set(row)) == CANDIDATES for row in rollout["candidates"])
        differences = drawn - rollout["logprobs"], best - np.take_along_axis(logprobs, candidates, axis=1)
        worst = max(worst, *(float(np.abs(difference).max()) for difference in differences))
    print(f"max_abs_error={worst:.1e}")
    assert worst <= TOLERANCE
    return rollouts


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_candidates_of_an_untied_padded_head_are_those_of_the_model(
    untied: Trainer, temperature: float
) -> None:
    untied.run(settings, temperature=temperature)
    assert_of_the_model(untied, temperature)
    untied.run(settings, temperature=1.0)


def test_logprobs_and_candidates_of_a_tied_head_are_those_of_the_model(tied: Trainer) -> None:
    assert_of_the_model(tied, 0.7)


def test_draws_follow_the_distribution(untied: Trainer) -> None:
    """First tokens of many answers, against the exact first-token distribution (chi-squared, fixed seed)."""
    untied.run(settings, max_new_tokens=1)
    prompt = {"a": PROMPTS["a"]}
    rollouts = flat(untied.run(sample, prompts=prompt, answers=4000, seed=3))
    untied.run(settings, max_new_tokens=20)
    expected = 4000 * np.exp(reference(untied.directory, rollouts[0], 1.0)[0])
    counts = np.bincount([rollout["ids"][0] for rollout in rollouts], minlength=VOCABULARY_SIZE)
    assert counts.sum() == 4000
    likely = expected >= 5
    statistic = ((counts[likely] - expected[likely]) ** 2 / expected[likely]).sum()
    print(f"chi_squared={statistic:.1f} of {likely.sum()} cells")
    assert likely.sum() >= 15
    assert statistic < likely.sum() + 5 * np.sqrt(2 * likely.sum())


def test_the_same_seed_gives_the_same_rollouts_whatever_runs_beside_them(untied: Trainer) -> None:
    together = untied.run(sample, prompts=PROMPTS, answers=4, seed=1)
    assert tokens(together) == tokens(untied.run(sample, prompts=PROMPTS, answers=4, seed=1))
    assert tokens(together) != tokens(untied.run(sample, prompts=PROMPTS, answers=4, seed=2))
    apart = [
        lot for key in reversed(PROMPTS) for lot in untied.run(sample, prompts={key: PROMPTS[key]}, answers=4, seed=1)
    ]
    assert tokens(together) == tokens(apart)
    assert len({tuple(ids) for key, ids in tokens(together)}) == 16  # the answers to a prompt differ


def test_answers_come_as_they_end_with_their_end_token_or_truncated(untied: Trainer) -> None:
    lots = untied.run(sample, prompts=PROMPTS, answers=60, seed=5)
    assert len(lots) > 1
    rollouts = flat(lots)
    assert len(rollouts) == 240
    for rollout in rollouts:
        ids = rollout["ids"]
        assert EOS not in ids[:-1]
        assert rollout["finished"] == (ids[-1] == EOS)
        assert len(ids) == 20 or rollout["finished"]
        # The end token and the padding token, w0, are the special ones.
        assert rollout["text"].split() == [f"w{token}" for token in ids if token not in (0, EOS)]
    assert {rollout["finished"] for rollout in rollouts} == {True, False}


def test_a_stop_string_ends_an_answer_and_stays_part_of_it(tied: Trainer) -> None:
    rollouts = flat(tied.run(sample, prompts=PROMPTS, answers=60, seed=5))
    endings = set()
    for rollout in rollouts:
        words = [f"w{token}" for token in rollout["ids"]]
        ends = [
            place
            for place in range(1, len(words) + 1)
            if "w4 w" in " ".join(words[:place]) or "w33" in words[:place] or words[place - 1] == f"w{EOS}"
        ]
        assert rollout["finished"] == bool(ends)
        assert len(words) == (ends[0] if ends else 40)
        endings.add("w4 w" if ends and words[-2:-1] == ["w4"] else words[-1] if ends else "cut")
    assert endings == {"w4 w", "w33", f"w{EOS}", "cut"}


@pytest.mark.parametrize("name", ["untied", "tied"])
def test_after_a_load_everything_is_of_the_new_weights(name: str, models: Path, request: pytest.FixtureRequest) -> None:
    """Cached prefixes too: the long prompt has two whole blocks of them."""
    trainer: Trainer = request.getfixturevalue(name)
    family, temperature = ("llama", 1.0) if name == "untied" else ("qwen3", 0.7)
    before = assert_of_the_model(trainer, temperature)
    trainer.load(models / f"{family}-1")
    after = assert_of_the_model(trainer, temperature)
    assert [rollout["ids"] for rollout in before] != [rollout["ids"] for rollout in after]
    trainer.load(models / f"{family}-0")
    assert_of_the_model(trainer, temperature)


def test_weights_that_are_missing_are_named(untied: Trainer) -> None:
    with pytest.raises(RuntimeError, match=r"old weights of model\.norm\.weight; give those too"):
        untied.run(load, directory=str(untied.directory), without="model.norm")


def test_sampling_that_is_stopped_or_given_up_leaves_the_engine_free(untied: Trainer, models: Path) -> None:
    untied.run(settings, eos_ids=[], max_new_tokens=500)
    told = untied.run(interrupt, answers=400)
    assert told["stopped"] < 400
    assert 0 < told["taken"] < 400
    assert "while answers are being sampled" in told["said"]
    untied.run(settings, max_new_tokens=20)
    untied.load(models / "llama-1")  # which it refuses as long as anything runs
    assert_of_the_model(untied, 1.0)


def test_what_vllm_cannot_sample_from_is_refused_before_it_starts(untied: Trainer) -> None:
    directory = str(untied.directory)
    assert untied.run(refusal, directory=directory, top_p=0.9).startswith("rollout.top_p: 0.9, but vLLM's")
    assert untied.run(refusal, directory=directory, temperature=0.005).startswith("rollout.temperature: 0.005, but")


def test_the_terminals_interrupt_reaches_the_trainer_alone(untied: Trainer) -> None:
    group = os.getpgid(untied.process.pid)
    assert all(os.getpgid(process.pid) != group for process in untied.engine())


# The last of each engine


def test_an_engine_that_hangs_is_given_up_in_the_end(untied: Trainer) -> None:
    said = untied.run(stall)
    assert said.startswith("the rollout engine has ended no answer for 1 s (rollout.vllm.stall_s), 4 are missing")
    assert_of_the_model(untied, 1.0)  # this one came back


def test_an_engine_that_is_killed_is_said_to_be_lost(untied: Trainer) -> None:
    untied.run(settings, eos_ids=[], max_new_tokens=500)  # nobody kills it too late
    said = untied.run(lose_engine)
    assert len(said) == 3
    assert all("EngineCore" in words and "was killed by SIGKILL" in words for words in said)
    untied.run(close)


def test_nothing_of_the_engine_outlives_a_killed_trainer(tied: Trainer) -> None:
    home = Path(tied.run(home_of_sampler))
    assert home.exists()
    processes = tied.engine()
    assert len(processes) >= 2
    tied.process.kill()
    assert_gone(processes)
    assert not home.exists()


def test_a_trainer_that_is_killed_while_the_engine_starts_leaves_nothing_either(models: Path, tmp_path: Path) -> None:
    trainer = Trainer(tmp_path / "log")
    trainer.ask(start, directory=str(models / "llama-0"))
    start_s = time.monotonic()
    while not (processes := trainer.engine()):
        assert time.monotonic() < start_s + 60
        time.sleep(0.05)
    trainer.process.kill()
    assert_gone(processes)
    trainer.end()


def assert_gone(processes: list[psutil.Process]) -> None:
    start_s = time.monotonic()
    alive = processes
    try:
        while alive := [process for process in alive if process.is_running() and process.status() != "zombie"]:
            assert time.monotonic() < start_s + 60, alive
            time.sleep(0.05)
    finally:
        for process in alive:
            process.kill()
