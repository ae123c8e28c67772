"""Which verifier, as it stands in a configuration: one model per kind, told apart by `kind`."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, PositiveFloat, field_validator

OnError = Literal["stop", "drop"]


def compiled(field: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"{field}: {pattern!r} is not a regular expression ({error}). "
            "Fix: correct it; in YAML write it in single quotes."
        ) from error


class _Common(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    answer_pattern: str | None = None
    """Regular expression with one group, the answer; its last match in the completion is what gets verified, and no
    match is a wrong answer (reward 0.0). Null: the whole completion is verified."""
    on_error: OnError = "stop"
    """When the verifier breaks: stop the run, or drop the sample (left out of the step, and counted)."""
    pass_threshold: FiniteFloat = 1.0
    """The smallest reward that counts as a correct answer, for pass rates and masks."""

    @field_validator("answer_pattern")
    @classmethod
    def _one_group(cls, pattern: str | None) -> str | None:
        if pattern is not None and (groups := compiled("answer_pattern", pattern).groups) != 1:
            raise ValueError(
                f"answer_pattern: {pattern!r} has {groups} groups, needs one. "
                "Fix: put parentheses around the answer and write the others as (?:...)."
            )
        return pattern


class ReasoningGymVerifier(_Common):
    """The verifier that belongs to the reasoning-gym dataset of the prompts. Many give part of the reward."""

    kind: Literal["reasoning_gym"]
    """Which verifier."""
    strip: bool = True
    """Remove white space around the answer first (most of these datasets take some of the reward off for it)."""
    timeout_s: PositiveFloat = 5.0
    """Seconds one completion may take; longer is a broken verifier, not a wrong answer."""


class MathVerifier(_Common):
    """Mathematical equality with math_verify: 1/2 is 0.5. Needs an answer that is a mathematical expression."""

    kind: Literal["math_verify"]
    """Which verifier."""
    timeout_s: PositiveFloat = 5.0
    """Seconds one completion may take; longer is a broken verifier, not a wrong answer."""


class ExactVerifier(_Common):
    """The completion is the answer, character for character."""

    kind: Literal["exact"]
    """Which verifier."""
    ignore_case: bool = False
    """Take upper and lower case for the same."""
    strip: bool = True
    """Remove white space around both first."""


class RegexVerifier(_Common):
    """A regular expression matches."""

    kind: Literal["regex"]
    """Which verifier."""
    pattern: str | None = None
    """The regular expression for every prompt; null: each prompt's answer is its own."""
    match: Literal["search", "fullmatch"] = "search"
    """Whether it may match anywhere or must match the whole text."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            compiled("pattern", pattern)
        return pattern


class PythonVerifier(_Common):
    """A function of yours, `f(completion, answer, entry) -> float | bool`."""

    kind: Literal["python"]
    """Which verifier."""
    function: str
    """`module:function`; also found in the working directory and in the folder of the configuration file."""

    @field_validator("function")
    @classmethod
    def _is_a_path(cls, function: str) -> str:
        if not re.fullmatch(r"\w+(\.\w+)*:\w+(\.\w+)*", function):
            raise ValueError(f"function: {function!r} is not of the form module:function. Fix: such as rewards:score.")
        return function


VerifierConfig = Annotated[
    ReasoningGymVerifier | MathVerifier | ExactVerifier | RegexVerifier | PythonVerifier,
    Field(discriminator="kind"),
]
