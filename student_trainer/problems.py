"""Prompts together with whoever judges the answers to them."""

import contextlib
import sys
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from student_trainer.config import ConfigError, EvaluationConfig
from student_trainer.experience import Judge
from student_trainer.prompts import Prompt, PromptsConfig, load_prompts
from student_trainer.verifiers import build_verifier, verify


@dataclass(frozen=True, slots=True)
class Problems:
    """Prompts and who judges the answers."""

    prompts: list[Prompt]
    judge: Judge
    pass_threshold: float


@contextlib.contextmanager
def refusing(field: str = "") -> Generator[None]:
    """Turns a ValueError about the user's input into a ConfigError: nothing has been started yet."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{field}{error}") from error


def load_problems(config: PromptsConfig, tokenizer: Any, folder: Path, within: str = "") -> Problems:
    """The prompts of `config` and their verifier. Raises ConfigError; `within` is put before the key it names."""
    with refusing(within):
        prompts = load_prompts(config, tokenizer, folder=folder)
        verifier = build_verifier(config.verifier, config, prompts, folder=folder)
    on_error = config.verifier.on_error
    return Problems(
        prompts,
        lambda prompt, completion: verify(verifier, prompt, completion, on_error),
        config.verifier.pass_threshold,
    )


def load_held_out(config: EvaluationConfig, tokenizer: Any, folder: Path) -> Problems:
    """The held-out prompts and their verifier. Raises ConfigError."""
    problems = load_problems(config.prompts, tokenizer, folder, "evaluation.")
    if len(problems.prompts) < config.num_prompts:
        raise ConfigError(
            f"evaluation.num_prompts: {config.num_prompts}, but evaluation.prompts gives {len(problems.prompts)}; "
            "lower it or give more prompts"
        )
    return Problems(problems.prompts[: config.num_prompts], problems.judge, problems.pass_threshold)


def longest(prompts: list[Prompt]) -> int:
    """Tokens of the longest prompt."""
    return max(len(prompt.token_ids) for prompt in prompts)


def warn_of_overlap(prompts: list[Prompt], held_out: list[Prompt]) -> None:
    """Held-out problems that are trained on measure memory; whether that is meant is the user's to say."""
    trained = {prompt.text for prompt in prompts}
    shared = sum(prompt.text in trained for prompt in held_out)
    if shared:
        print(
            f"warning: {shared} of the {len(held_out)} held-out prompts are also trained on; give "
            "evaluation.prompts another file, or a seed at least `size` away",
            file=sys.stderr,
        )
