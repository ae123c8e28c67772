"""The configuration of a run: YAML, `key=value` overrides, and messages that name field, value and fix."""

import difflib
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from student_trainer.objective_config import ConfigModel, ObjectiveConfig, merge
from student_trainer.prompts import PromptsConfig
from student_trainer.schedules import is_always_zero


class ConfigError(ValueError):
    """The configuration cannot be used; nothing has been started or written."""


class StudentConfig(ConfigModel):
    """The model that learns."""

    model: Path
    """Directory of a Hugging Face causal LM with its tokenizer."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of weights and optimiser."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:0, ..."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""


class TeacherConfig(ConfigModel):
    """The pool of teacher servers."""

    addresses: tuple[str, ...] = Field(min_length=1)
    """host:port of every server."""
    model: str = ""
    """Name of the model on the servers; empty: their only one."""
    top_k: int = Field(default=16, ge=0)
    """Most likely teacher tokens asked for at each position."""
    candidates: int = Field(default=8, ge=0)
    """The student's own most likely tokens at which the teacher is asked too. Reverse-type divergences need
    them: without, the student can drain mass to where the teacher was never looked at."""
    wire_dtype: Literal["float32", "float16"] = "float32"
    """How top-k and candidate log-probabilities travel."""
    max_in_flight: int = Field(default=64, ge=1)
    """Scoring calls on the wire at once."""
    deadline_s: float = Field(default=120.0, gt=0)
    """Of one scoring call, retries included."""
    start_deadline_s: float = Field(default=120.0, gt=0)
    """How long to wait for the pool to come up."""


class RolloutConfig(ConfigModel):
    """How the student answers."""

    prompts_per_step: int = Field(default=32, ge=1)
    """Prompts drawn at each step."""
    answers_per_prompt: int = Field(default=8, ge=1)
    """G: answers to each prompt, the group of the group advantage."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Longest answer; longer ones are cut and count as truncated."""
    temperature: float = Field(default=1.0, gt=0)
    """Of sampling. The student's policy is its distribution at this temperature."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus of sampling. Below 1 the sampler's log-probabilities still are those of the whole distribution,
    so importance ratios are biased: prefer 1."""
    stop: tuple[str, ...] = ()
    """Strings that end an answer, next to the tokenizer's end of sequence. They stay part of it."""
    batch_size: int = Field(default=256, ge=1)
    """Answers generated at once."""


class OptimizerConfig(ConfigModel):
    """AdamW and what feeds it."""

    learning_rate: float = Field(default=1e-6, gt=0)
    """Peak learning rate; linear warm-up, then constant."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimiser updates of linear warm-up."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the second moment."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled; matrices only."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this global norm."""
    micro_batch_tokens: int = Field(default=16384, ge=1)
    """Padded tokens of one forward and backward pass. Changes memory and speed, not the result."""
    updates_per_step: int = Field(default=1, ge=1)
    """Optimiser updates each step's rollouts are split into. Above 1 the later updates are off policy."""


class EvaluationConfig(ConfigModel):
    """Held-out problems."""

    prompts: PromptsConfig
    """Where they come from; keep them apart from the training prompts."""
    num_prompts: int = Field(default=128, ge=1)
    """The first so many of them."""
    answers_per_prompt: int = Field(default=8, ge=1)
    """Answers to each, at the rollouts' temperature."""
    k: tuple[int, ...] = (1, 8)
    """pass@k to report; each at most answers_per_prompt."""
    every_steps: int = Field(default=0, ge=0)
    """Evaluate during training at every so many steps; 0: only before and after."""

    @model_validator(mode="after")
    def _k_fits(self) -> "EvaluationConfig":
        if not self.k or min(self.k) < 1 or max(self.k) > self.answers_per_prompt:
            raise ValueError(
                f"k is {list(self.k)}; pass@k needs 1 <= k <= answers_per_prompt = {self.answers_per_prompt}"
            )
        return self


class CheckpointConfig(ConfigModel):
    """What is kept of the student."""

    every_steps: int = Field(default=0, ge=0)
    """Save at every so many steps; 0: only after the last."""
    keep: int = Field(default=3, ge=1)
    """Newest checkpoints kept."""


class RunConfig(ConfigModel):
    """A whole run."""

    run_dir: Path
    """Where everything is written; must not hold a run already."""
    steps: int = Field(ge=1)
    """Training steps: one batch of rollouts each."""
    student: StudentConfig
    prompts: PromptsConfig
    objective: ObjectiveConfig
    teacher: TeacherConfig | None = None
    rollout: RolloutConfig = RolloutConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    evaluation: EvaluationConfig | None = None
    checkpoints: CheckpointConfig = CheckpointConfig()
    seed: int = Field(default=0, ge=0)
    """Of everything random: order of prompts, sampling."""
    samples_per_step: int = Field(default=16, ge=0)
    """Rollouts of each step written to samples.jsonl."""
    metrics_port: int | None = Field(default=None, ge=0, le=65535)
    """Port of the Prometheus endpoint on 127.0.0.1; 0: any free one; null: none."""

    @model_validator(mode="after")
    def _parts_fit(self) -> "RunConfig":
        gradient, rollout = self.objective.policy_gradient, self.rollout
        if self.objective.needs_teacher and self.teacher is None:
            raise ValueError("the objective has a term that needs a teacher; give teacher.addresses")
        if gradient is not None and gradient.surrogate == "trrd" and self.distil_temperature != rollout.temperature:
            raise ValueError(
                f"objective.temperature is {self.distil_temperature}, rollout.temperature is "
                f"{rollout.temperature}; trrd mixes both distributions, so they must be equal"
            )
        if gradient is not None and rollout.answers_per_prompt == 1 and not is_always_zero(gradient.reward):
            raise ValueError(
                "rollout.answers_per_prompt is 1, so every group advantage is zero; set it to 2 or more, or "
                "objective.policy_gradient.reward to 0"
            )
        if self.optimizer.updates_per_step > rollout.prompts_per_step:
            raise ValueError(
                f"optimizer.updates_per_step is {self.optimizer.updates_per_step}, more than "
                f"rollout.prompts_per_step = {rollout.prompts_per_step}; an update needs at least one prompt"
            )
        return self

    @property
    def distil_temperature(self) -> float:
        """Temperature of the teacher's scores and of the divergences."""
        return self.objective.temperature or self.rollout.temperature


def dump_config(config: RunConfig) -> str:
    """YAML that `load_config` turns into the same configuration."""
    return yaml.safe_dump(_plain(config.model_dump()), sort_keys=False)


def _plain(value: Any) -> Any:
    """The same with YAML's own types only. Not JSON's: the steps of a schedule are whole numbers."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def load_config(path: Path, overrides: list[str]) -> RunConfig:
    """The configuration in `path` with `key.sub=value` overrides (values are YAML).

    Raises ConfigError with one line a fault: field, value, fix.
    """
    try:
        data = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give an existing YAML file") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: holds {type(data).__name__}; it must hold keys and values")
    for override in overrides:
        data = merge(data, _parse_override(override))
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(detail) for detail in error.errors())) from error


def _parse_override(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"override {text!r}: write key=value, for example optimizer.learning_rate=1e-5")
    try:
        parsed: Any = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {text!r}: {value!r} is not YAML: {error}") from error
    for part in reversed(key.split(".")):
        parsed = {part: parsed}
    return parsed


def _explain(detail: Any) -> str:
    """One line for one pydantic error."""
    path = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "missing":
        return f"{path}: is missing; add it"
    if detail["type"] == "extra_forbidden":
        known = _known_keys(detail["loc"][:-1])
        close = difflib.get_close_matches(str(detail["loc"][-1]), known, n=1, cutoff=0.5)
        fix = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(sorted(known))}"
        return f"{path}: unknown key (value {detail['input']!r}); {fix}"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error":
        return f"{path}: {message}" if path else message
    return f"{path}: {message} (got {detail['input']!r})"


def _known_keys(location: tuple[Any, ...]) -> list[str]:
    """Keys of the model that sits at `location` in RunConfig."""
    models: list[type[BaseModel]] = [RunConfig]
    for part in location:
        found = [_models_in(model.model_fields[part].annotation) for model in models if part in model.model_fields]
        # Parts that are no field are list indices and tags of a union: they do not change the model.
        models = [model for group in found for model in group] or models
    return [name for model in models for name in model.model_fields]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in getattr(annotation, "__args__", ()) for model in _models_in(argument)]
