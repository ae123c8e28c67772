"""Verifiers: from what a student wrote to a reward.

A verifier is a function of a prompt and a completion. This module tells three outcomes apart that are easy to mix up:
a wrong answer (a low reward), an answer that is not there (`answer_pattern` matches nothing: reward 0.0), and a
verifier that broke (`VerifierError`: the run stops, or the sample is left out and counted). A broken verifier never
becomes a reward.

The verifiers of math_verify and reasoning-gym run in a child process with a deadline (see `verifier_worker`); a
function of the user's runs in the trainer.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from student_trainer.verifier_config import (
    ExactVerifier,
    MathVerifier,
    OnError,
    PythonVerifier,
    ReasoningGymVerifier,
    RegexVerifier,
    VerifierConfig,
    compiled,
)
from student_trainer.verifier_worker import Worker, WorkerError, serve_math, serve_reasoning_gym

if TYPE_CHECKING:
    from student_trainer.prompts import Prompt, PromptsConfig

logger = logging.getLogger(__name__)

Verifier = Callable[["Prompt", str], float]

# The same, before its result has been looked at: gets the extracted answer instead of the completion.
_Check = Callable[["Prompt", str], Any]


class VerifierError(RuntimeError):
    """A verifier raised, or returned something that is no reward. `__cause__` is what it raised, if it did."""

    def __init__(self, prompt_key: str, completion: str, problem: str) -> None:
        super().__init__(
            f"verifier: prompt {prompt_key}, completion {_excerpt(completion)}: {problem}. "
            "Fix: repair the verifier, or set verifier.on_error: drop to leave such samples out and count them."
        )
        self.prompt_key = prompt_key
        self.completion = completion


def build_verifier(
    config: VerifierConfig,
    source: PromptsConfig,
    prompts: Sequence[Prompt],
    *,
    folder: Path | None = None,
) -> Verifier:
    """The verifier for these prompts; whatever is wrong with either is an error now and not in the middle of a run.

    Args:
        config: which verifier; usually `source.verifier`.
        source: where the prompts come from.
        prompts: every prompt it will see; their answers are checked.
        folder: folder of the configuration file, where a function of the user's may live.

    Raises:
        ValueError: the field, the value (an answer with its file and line) and the fix.
    """
    match config:
        case ReasoningGymVerifier():
            check = _reasoning_gym(config, source)
        case MathVerifier():
            check = _math(config, prompts)
        case ExactVerifier():
            check = _exact(config, prompts)
        case RegexVerifier():
            check = _regex(config, prompts)
        case PythonVerifier():
            check = _python(config, folder)
    extract = None if config.answer_pattern is None else re.compile(config.answer_pattern)

    def verifier(prompt: Prompt, completion: str) -> float:
        answer = completion if extract is None else _last_group(extract, completion)
        if answer is None:
            return 0.0
        return _reward(check, prompt, answer, completion)

    return verifier


def verify(verifier: Verifier, prompt: Prompt, completion: str, on_error: OnError) -> float | None:
    """The reward of one completion, or None where the verifier broke and the sample is to be dropped.

    Raises:
        VerifierError: the verifier broke and `on_error` is "stop".
    """
    try:
        return _reward(verifier, prompt, completion, completion)
    except VerifierError as error:
        if on_error == "stop":
            raise
        logger.warning("sample dropped: %s", error)
        return None


def passed(reward: float, threshold: float = 1.0) -> bool:
    """Whether a reward counts as a correct answer: at least `threshold` (`verifier.pass_threshold`)."""
    return reward >= threshold


def _reward(check: _Check, prompt: Prompt, answer: str, completion: str) -> float:
    try:
        value = check(prompt, answer)
    except VerifierError:
        raise
    except Exception as error:
        # A worker's error already says what was raised over there.
        what = str(error) if isinstance(error, WorkerError) else f"{type(error).__name__}: {error}"
        raise VerifierError(prompt.key, completion, f"it failed with {what}") from error
    reward = _finite(value)
    if reward is None:
        raise VerifierError(prompt.key, completion, f"it returned {value!r}, not a finite number or a bool")
    return reward


def _finite(value: Any) -> float | None:
    if not isinstance(value, bool | int | float | np.bool_ | np.integer | np.floating):
        return None
    try:
        number = float(value)
    except OverflowError:  # a whole number beyond what a float can hold
        return None
    return number if math.isfinite(number) else None


def _last_group(pattern: re.Pattern[str], text: str) -> str | None:
    found = None
    for match in pattern.finditer(text):
        found = match.group(1)
    return found


def _excerpt(text: str) -> str:
    # Both ends: the beginning shows what it is, and the answer is at the end.
    return repr(text) if len(text) <= 240 else f"{text[:100]!r} ... {text[-100:]!r} ({len(text)} characters)"


def _answer_text(prompt: Prompt, kind: str) -> str:
    """The answer as text, for verifiers that compare text."""
    answer = prompt.answer
    if isinstance(answer, bool) or not isinstance(answer, str | int | float) or not str(answer).strip():
        raise ValueError(
            f"{prompt.key}: the answer is {answer!r}, and {kind} needs a text or a number. Fix: correct the line, "
            "set prompts.answer_field, or take a verifier that reads such answers (kind: python)."
        )
    return str(answer)


def _answers(prompts: Iterable[Prompt], kind: str) -> dict[str, str]:
    """Every different answer with the key of the first prompt that has it."""
    first: dict[str, str] = {}
    for prompt in prompts:
        first.setdefault(_answer_text(prompt, kind), prompt.key)
    return first


def _exact(config: ExactVerifier, prompts: Sequence[Prompt]) -> _Check:
    _answers(prompts, "exact")

    def normal(text: str) -> str:
        text = text.strip() if config.strip else text
        return text.casefold() if config.ignore_case else text

    return lambda prompt, answer: normal(answer) == normal(str(prompt.answer))


def _regex(config: RegexVerifier, prompts: Sequence[Prompt]) -> _Check:
    matches = re.fullmatch if config.match == "fullmatch" else re.search
    if config.pattern is not None:
        pattern = config.pattern
        return lambda _, answer: matches(pattern, answer) is not None
    for pattern, key in _answers(prompts, "regex without a pattern").items():
        compiled(f"{key}: answer", pattern)
    return lambda prompt, answer: matches(str(prompt.answer), answer) is not None


def _python(config: PythonVerifier, folder: Path | None) -> _Check:
    # At the end of the path, so that a file of the user's cannot hide an installed package.
    for place in (str(Path.cwd()), *([str(folder.resolve())] if folder is not None else [])):
        if place not in sys.path:
            sys.path.append(place)
    module_name, _, attributes = config.function.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(
            f"verifier.function: {module_name!r} does not import ({type(error).__name__}: {error}). Fix: install it, "
            f"put {module_name.partition('.')[0]}.py next to the configuration file, or repair its import."
        ) from error
    try:
        function = functools.reduce(getattr, attributes.split("."), module)
    except AttributeError as error:
        raise ValueError(
            f"verifier.function: {module_name} ({module.__file__}) has no {attributes!r}. "
            f"Fix: one of {[name for name in vars(module) if not name.startswith('_')]}, or define it there."
        ) from error
    if not callable(function):
        raise ValueError(
            f"verifier.function: {config.function} is a {type(function).__name__}, which cannot be called. "
            "Fix: name a function f(completion, answer, entry) -> float or bool."
        )
    try:
        inspect.signature(function).bind("completion", "answer", {})
    except TypeError as error:
        raise ValueError(
            f"verifier.function: {config.function}{inspect.signature(function)} cannot be called as "
            f"f(completion, answer, entry) ({error}). Fix: take these three."
        ) from error
    return lambda prompt, answer: function(answer, prompt.answer, prompt.entry)


def _reasoning_gym(config: ReasoningGymVerifier, source: PromptsConfig) -> _Check:
    if source.source != "reasoning_gym":
        raise ValueError(
            f"verifier.kind: reasoning_gym verifies its own questions, and the prompts are of source {source.source}. "
            "Fix: take math_verify, exact, regex or python."
        )
    dataset = source.dataset
    options = {**source.parameters, "size": source.size, "seed": source.seed}
    worker = Worker(serve_reasoning_gym, dataset, options, timeout_s=config.timeout_s)
    return lambda prompt, answer: worker(answer.strip() if config.strip else answer, prompt.entry)


def _math(config: MathVerifier, prompts: Sequence[Prompt]) -> _Check:
    worker = Worker(serve_math, timeout_s=config.timeout_s)
    for answer, key in _answers(prompts, "math_verify").items():
        try:
            usable = worker(answer)
        except (TimeoutError, WorkerError) as error:
            raise ValueError(
                f"{key}: math_verify cannot work with the answer {answer!r} ({error}). "
                "Fix: write it more simply, or leave the prompt out."
            ) from error
        if not usable:
            raise ValueError(
                f"{key}: the answer {answer!r} is no mathematical expression to math_verify. "
                r"Fix: write it as LaTeX, such as \frac{1}{2}, or take verifier kind exact or regex."
            )
    extracted = config.answer_pattern is not None
    return lambda prompt, answer: worker(str(prompt.answer), answer, extracted)
