"""The configuration of a run: YAML, `key=value` overrides, and messages that name field, value and fix."""

import difflib
import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from pydantic import BaseModel, Field, ValidationError, create_model, model_validator

from student_trainer.objective_config import ConfigModel, Importance, ObjectiveConfig, merge
from student_trainer.prompts import PromptsConfig
from student_trainer.schedules import is_always_zero
from student_trainer.yaml_text import read_yaml


class ConfigError(ValueError):
    """The configuration cannot be used; nothing has been started or written. reason: see `student_trainer.failures`."""

    def __init__(self, message: str, *, reason: str = "config") -> None:
        super().__init__(message)
        self.reason = reason


class LoraConfig(ConfigModel):
    """Low-rank adapters (LoRA, 2106.09685) instead of all weights, through peft."""

    rank: int = Field(default=16, ge=1)
    """Width of the adapters."""
    alpha: float = Field(default=32.0, gt=0)
    """The adapters' output is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Of the adapters' input, while training."""
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Names of the layers that get one; all-linear: every linear layer but the head."""


class StudentConfig(ConfigModel):
    """The model that learns."""

    model: Path
    """Directory of a Hugging Face causal LM with its tokenizer."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of weights and optimiser."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """bf16: products in bfloat16 (autocast), weights and optimiser stay in `dtype`, which must be float32."""
    lora: LoraConfig | None = None
    """Train adapters instead of the weights."""
    sharding: Literal["none", "fsdp2"] = "none"
    """With several processes: none keeps the whole model in each (data parallel), fsdp2 a share of it."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:0, ..."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    @model_validator(mode="after")
    def _mixed_from_full(self) -> "StudentConfig":
        if self.mixed_precision != "no" and self.dtype != "float32":
            raise ValueError(
                f"mixed_precision is {self.mixed_precision} and dtype {self.dtype}; mixed precision keeps float32 "
                "weights: set dtype: float32, or mixed_precision: no"
            )
        return self


class ArchiveConfig(ConfigModel):
    """Where the teacher's scores are kept, and looked up before it is asked."""

    url: str = Field(min_length=1)
    """A directory (from the working directory), file:///path, or s3://bucket/prefix."""
    max_bytes: int | None = Field(default=None, ge=1)
    """Size that a directory is kept below, by removing what was not used for longest; null: no limit."""
    mode: Literal["record", "cache"] = "record"
    """`record`: a score is learnt from only once it is durably written. `cache`: writing is not waited for."""
    on_write_failure: Literal["warn", "stop"] = "warn"
    """When a score cannot be written in `record` mode: go on with it and say so, or end the run."""


class OfflineConfig(ConfigModel):
    """Learn from the answers and scores of an archive, without a teacher and without sampling.

    All entries that are used must be of one kind. Where an archive holds several, the keys other than `archive` choose.
    """

    archive: str = Field(min_length=1)
    """A directory (from the working directory), file:///path, or s3://bucket/prefix."""
    teacher_model: str | None = None
    """Name of the model that scored; null: the archive's only one. The same for all that follow."""
    teacher_revision: str | None = None
    """Its revision."""
    compute_dtype: str | None = None
    """The precision that it computed in."""
    temperature: float | None = Field(default=None, gt=0)
    """Temperature of the scores; must be that of the objective too."""
    top_k: int | None = Field(default=None, ge=0)
    """Most likely teacher tokens at each position."""
    candidates: int | None = Field(default=None, ge=0)
    """The student's own tokens at each position, besides the one that is there."""
    wire_dtype: Literal["float32", "float16"] | None = None
    """How log-probabilities travelled."""
    rollout_temperature: float | None = Field(default=None, gt=0)
    """Temperature at which the answers were drawn; must be rollout.temperature too."""


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
    outage_s: float = Field(default=7200.0, gt=0)
    """How long the run waits when no teacher answers any more, before it gives up."""
    max_unscored_share: float = Field(default=0.05, ge=0, le=1)
    """Largest share of a step's answers that may be dropped because the teacher cannot score them."""
    on_new_revision: Literal["stop", "follow"] = "stop"
    """When the pool serves other weights than at the start: end the run by name, or learn from them from then on."""
    hedge_share: float = Field(default=0.0, ge=0, le=0.1)
    """Share of the slowest calls that are also sent to a second server; 0: none."""
    tls: bool = False
    """Encrypt, and check the servers' certificates; the keys below imply it."""
    tls_ca: Path | None = None
    """PEM of the authority whose certificates servers must have; null: the public ones."""
    tls_certificate: Path | None = None
    """PEM of this client's own certificate, for servers that want one."""
    tls_key: Path | None = None
    """PEM of its private key."""
    tls_server_name: str | None = None
    """Name that servers' certificates must have; null: the one in the address."""
    token_file: Path | None = None
    """File with a bearer token; read again when it changes."""
    plaintext_token: bool = False
    """Send the token without TLS: something on this side encrypts."""
    archive: ArchiveConfig | None = None
    """Keep the scores, and do not ask again for those that are kept; null: ask for all."""


class VllmConfig(ConfigModel):
    """The vLLM rollout engine, one for each process."""

    gpu_memory_utilization: float | None = Field(default=None, gt=0, le=1)
    """Share of the GPU's memory it may take; null: vLLM's own default. Leave room for the trainer beside it."""
    kv_cache_bytes: int | None = Field(default=None, ge=1)
    """Memory of its key-value cache; null: what it finds free, on a CPU 2 GiB."""
    max_num_seqs: int | None = Field(default=None, ge=1)
    """Most answers generated at once; null: rollout.batch_size."""
    enforce_eager: bool = False
    """Start without compiling: faster to start, slower to run."""
    stall_s: float = Field(default=3600.0, gt=0)
    """The run ends when no answer has ended for so long: an engine that hangs says nothing."""


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
    """Answers generated at once, in each process. Changes memory and speed, not the answers, but for rounding."""
    batches_ahead: int = Field(default=0, ge=0, le=8)
    """Batches of answers made before it is their turn to be trained on, so that teachers and verifiers work while
    the trainer does. Also the staleness: how many steps older than the student its answers are. 0: on policy."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """What generates. `vllm` keeps a copy of the weights, handed over at every step, and works while the trainer
    trains if batches_ahead is 1 or more."""
    vllm: VllmConfig = VllmConfig()
    """Of the vllm engine."""


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
    packing: bool = False
    """Put the sequences of a pass behind each other instead of padding them to the longest. Worth it with variable
    lengths and an attention that skips other sequences; the result is the same but for rounding."""
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
    """Evaluate during training at every so many steps; 0: only before and after. The best checkpoint by pass@k (the
    first k) is kept besides the newest."""
    patience: int | None = Field(default=None, ge=1)
    """End the run after so many evaluations in a row without a better pass@k; null: never."""

    @model_validator(mode="after")
    def _k_fits(self) -> "EvaluationConfig":
        if not self.k or min(self.k) < 1 or max(self.k) > self.answers_per_prompt:
            raise ValueError(
                f"k is {list(self.k)}; pass@k needs 1 <= k <= answers_per_prompt = {self.answers_per_prompt}"
            )
        return self


class CheckpointConfig(ConfigModel):
    """What is kept of the student, and of the run to go on from."""

    every_steps: int = Field(default=0, ge=0)
    """Save at every so many steps; 0: only after the last, and when the run is asked to stop."""
    keep: int = Field(default=3, ge=1)
    """Newest checkpoints kept."""
    background: bool = True
    """Write while the next steps run. The state is copied first, so this takes memory on the host: optimiser state
    and, in the main process, weights."""
    other_world_size: bool = False
    """Let a run be resumed by another number of processes than saved it. Its curve is then the same only to
    rounding, and dropout draws other numbers."""


class GuardConfig(ConfigModel):
    """What the run watches in its own figures. Ratios are against the mean of the first five steps."""

    kl_ratio: float | None = Field(default=10.0, gt=1)
    """Halt when kl is so many times its start (but at least 1 nat) for kl_steps steps; null: never."""
    max_kl: float | None = Field(default=None, gt=0)
    """Halt when kl is above so many nats for kl_steps steps; null: never."""
    kl_steps: int = Field(default=5, ge=1)
    """Steps in a row that make a runaway."""
    entropy_ratio: tuple[float, float] | None = (0.1, 3.0)
    """Alarm outside of these multiples of the entropy at the start; null: never."""
    length_ratio: float | None = Field(default=3.0, gt=1)
    """Alarm when answers are so many times as long as at the start; null: never."""
    truncated_share: float | None = Field(default=0.5, gt=0, le=1)
    """Alarm when a larger share of answers is cut at max_new_tokens; null: never."""


class RunConfig(ConfigModel):
    """A whole run."""

    run_dir: Path
    """Where everything is written. Must not hold a run already, unless that one is resumed."""
    steps: int = Field(ge=1)
    """Training steps: one batch of rollouts each."""
    student: StudentConfig
    prompts: PromptsConfig | None = None
    """Where they come from; with `offline` from the archive, and this is left out."""
    objective: ObjectiveConfig
    teacher: TeacherConfig | None = None
    offline: OfflineConfig | None = None
    """In place of `teacher` and `prompts`."""
    rollout: RolloutConfig = RolloutConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    evaluation: EvaluationConfig | None = None
    checkpoints: CheckpointConfig = CheckpointConfig()
    guards: GuardConfig = GuardConfig()
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Also log every step there, through accelerate; each needs its own package."""
    seed: int = Field(default=0, ge=0)
    """Of everything random: order of prompts, sampling."""
    samples_per_step: int = Field(default=16, ge=0)
    """Rollouts of each step written to samples.jsonl."""
    metrics_port: int | None = Field(default=None, ge=0, le=65535)
    """Port of the Prometheus endpoint; 0: any free one; null: none."""
    metrics_host: str = Field(default="127.0.0.1", min_length=1)
    """Address that it listens on; 0.0.0.0 for a Prometheus on another machine."""
    metrics_hold_s: float = Field(default=0.0, ge=0)
    """How long a run that failed stays, so that Prometheus reads why. SIGTERM ends it."""

    @model_validator(mode="after")
    def _parts_fit(self) -> "RunConfig":
        gradient, rollout = self.objective.policy_gradient, self.rollout
        if self.offline is not None:
            self._offline_fits()
        elif self.prompts is None:
            raise ValueError("prompts: is missing; add it (only a run with offline.archive has none)")
        elif self.objective.needs_teacher and self.teacher is None:
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
        if rollout.engine == "vllm" and rollout.top_p < 1:
            raise ValueError(
                f"rollout.top_p is {rollout.top_p} with the vllm engine, whose log-probabilities would be those of "
                "the nucleus; set it to 1, or rollout.engine to transformers"
            )
        return self

    def _offline_fits(self) -> None:
        """Refuses what an archive cannot give: it has answers of another student, and nobody's opinion of them."""
        for name in ("teacher", "prompts"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name}: is given with offline, which takes its place; leave one of the two out")
        if self.objective.policy_gradient is not None:
            raise ValueError(
                "objective.policy_gradient: is given with offline; it needs rewards and answers of the student as it "
                "is, and an archive has neither: leave it out (null), for example by recipe: reverse_kl"
            )
        masks = sorted({divergence.mask for divergence in self.objective.divergences} - {"all"})
        if masks or self.objective.prompt_weights is not None:
            what = f"divergences with mask: {masks[0]}" if masks else "prompt_weights"
            raise ValueError(f"objective: has {what}, with offline; that needs rewards, and an archive has none")
        if self.rollout.batches_ahead:
            raise ValueError(
                f"rollout.batches_ahead: {self.rollout.batches_ahead} with offline, where nothing is generated; set "
                "it to 0"
            )

    @property
    def importance(self) -> Importance | None:
        """The correction between sampler and student; none while they are the same model at the same step."""
        rollout = self.rollout
        if self.objective.importance is not None:
            return self.objective.importance
        off_policy = rollout.batches_ahead > 0 or rollout.engine != "transformers"
        return Importance() if off_policy else None

    @property
    def distil_temperature(self) -> float:
        """Temperature of the teacher's scores and of the divergences."""
        return self.objective.temperature or self.rollout.temperature


MAY_CHANGE = (
    "run_dir",
    "steps",
    "student.model",
    "student.device",
    "student.gradient_checkpointing",
    "teacher.addresses",
    "teacher.max_in_flight",
    "teacher.deadline_s",
    "teacher.start_deadline_s",
    "teacher.outage_s",
    "teacher.max_unscored_share",
    "teacher.on_new_revision",
    "teacher.hedge_share",
    "teacher.tls",
    "teacher.tls_ca",
    "teacher.tls_certificate",
    "teacher.tls_key",
    "teacher.tls_server_name",
    "teacher.token_file",
    "teacher.plaintext_token",
    "teacher.archive",
    "offline.archive",
    "prompts.path",
    "evaluation.prompts.path",
    "rollout.batch_size",
    "rollout.vllm",
    "optimizer.micro_batch_tokens",
    "evaluation.every_steps",
    "evaluation.patience",
    "checkpoints",
    "guards",
    "trackers",
    "samples_per_step",
    "metrics_port",
    "metrics_host",
    "metrics_hold_s",
)
"""Keys that a resumed run may have otherwise than the run that it goes on with: where and how fast, not what.
A model, prompts and an offline archive that lie elsewhere are compared with those that the run began with."""


def plain_config(config: RunConfig) -> dict[str, Any]:
    """The configuration as JSON would give it back, to keep it in a checkpoint and compare."""
    return json.loads(json.dumps(_plain(config.model_dump())))


def changed_keys(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """One line for each key that differs and may not: "optimizer.learning_rate: 0.001 then, 0.01 now"."""
    then, today = _flat(before), _flat(now)
    return [
        f"{key}: {then.get(key)!r} then, {today.get(key)!r} now"
        for key in sorted(then.keys() | today.keys())
        if then.get(key) != today.get(key) and not any(key == may or key.startswith(f"{may}.") for may in MAY_CHANGE)
    ]


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


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
    data = _read(path, overrides)
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(detail) for detail in error.errors())) from error


class MetricsPage(NamedTuple):
    """The keys of the Prometheus endpoint."""

    host: str
    port: int
    hold_s: float


def metrics_page(path: Path, overrides: list[str]) -> MetricsPage | None:
    """Where the endpoint of a run is wanted, whatever else is wrong with its configuration; None if nowhere, or if
    that cannot be known."""
    fields = RunConfig.model_fields
    kinds: dict[str, Any] = {name: (fields[name].annotation, fields[name]) for name in fields if "metrics_" in name}
    try:
        data = _read(path, overrides)
        found: Any = create_model("Keys", **kinds).model_validate({name: data[name] for name in kinds if name in data})
    except (ConfigError, ValidationError):
        return None
    if found.metrics_port is None:
        return None
    return MetricsPage(found.metrics_host, found.metrics_port, found.metrics_hold_s)


def _read(path: Path, overrides: list[str]) -> dict[str, Any]:
    """What stands in `path`, with the overrides."""
    try:
        data = read_yaml(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give an existing YAML file") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: holds {type(data).__name__}; it must hold keys and values")
    for override in overrides:
        data = merge(data, _parse_override(override))
    return data


def _parse_override(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"override {text!r}: write key=value, for example optimizer.learning_rate=1e-5")
    try:
        parsed: Any = read_yaml(value)
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
