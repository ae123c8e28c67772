"""What is optimised: which divergences, which policy gradient, how tokens are weighted and summed.

A published method is a choice of these pieces: see `recipes/`.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from student_trainer.schedules import Schedule, is_always_zero

RECIPES = Path(__file__).parent / "recipes"

Mask = Literal["all", "failed", "group_failed", "passed"]


class ConfigModel(BaseModel):
    """Frozen, and every key must be known."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def _check_schedule(value: Any) -> Any:
    if isinstance(value, dict) and not value:
        raise ValueError("an empty schedule has no value; write a number or {step: value, ...}")
    if isinstance(value, dict) and not all(type(step) is int and step >= 0 for step in value):
        raise ValueError(f"steps are whole numbers from 0, got {sorted(value, key=str)}; write {{step: value}}")
    return value


Coefficient = Annotated[Schedule, BeforeValidator(_check_schedule)]


class Divergence(ConfigModel):
    """A distribution-level term: the student against the teacher on top-k, candidates and tail."""

    kind: Literal["forward_kl", "reverse_kl", "js", "sinkhorn"]
    """Which: KL(teacher||student), KL(student||teacher), generalised Jensen-Shannon, SinKD's transport."""
    coefficient: Coefficient = 1.0
    """Multiplies the term; a number or {step: value}."""
    mask: Mask = "all"
    """Responses it applies to: all, those that failed, those whose whole group failed, those that passed."""
    beta: float = Field(default=0.5, gt=0.0, lt=1.0)
    """js only: weight of the teacher in the mixture M = beta T + (1 - beta) S."""
    epsilon: float = Field(default=0.1, gt=0.0)
    """sinkhorn only: entropic regularisation."""
    iterations: int = Field(default=20, ge=1)
    """sinkhorn only: row-and-column normalisations."""
    rows: Literal["sequence", "micro_batch"] = "sequence"
    """sinkhorn only: the tokens transported among each other. `micro_batch` sees more of them, but then the
    loss depends on how the batch is split."""


class Rlsd(ConfigModel):
    """RLSD: the teacher scales the reward advantage instead of adding to it (arXiv 2604.03128)."""

    mix: Coefficient = 1.0
    """lambda: 0 is plain GRPO, 1 scales fully."""
    epsilon: float = Field(default=0.2, gt=0.0, lt=1.0)
    """The scale stays within 1 - epsilon .. 1 + epsilon."""


class PolicyGradient(ConfigModel):
    """The sampled-token term: advantages under a clipped surrogate."""

    coefficient: Coefficient = 1.0
    """Multiplies the surrogate."""
    surrogate: Literal["ppo_clip", "trrd"] = "ppo_clip"
    """`ppo_clip`: the ratio student / sampler. `trrd`: the sampler mixed with the teacher as the anchor
    (arXiv 2602.22495)."""
    clip_low: float = Field(default=0.2, gt=0.0, lt=1.0)
    """The ratio is clipped below 1 - clip_low."""
    clip_high: float = Field(default=0.28, gt=0.0)
    """The ratio is clipped above 1 + clip_high (clip-higher, DAPO)."""
    alpha: float = Field(default=0.5, ge=0.0, le=1.0)
    """trrd only: weight of the sampler in the anchor; 1 is ppo_clip."""
    log_ratio_clamp: float = Field(default=1.0, gt=0.0)
    """trrd only: bound on |log student - log teacher| before mixing, nats."""
    straight_through: bool = False
    """trrd only: let the gradient pass that bound (the paper does not say whether it does)."""
    reward: Coefficient = 1.0
    """Multiplies the group advantage of the rewards."""
    reward_mask: Mask = "all"
    """Responses that have a reward advantage."""
    normalise_std: bool = True
    """Divide the group advantage by the group's standard deviation (GRPO) or not (Dr.GRPO)."""
    teacher: Coefficient = 0.0
    """Multiplies the teacher's log-ratio log T - log S of the sampled token as an advantage: its gradient is
    that of the reverse KL."""
    teacher_mask: Mask = "all"
    """Responses that have a teacher advantage."""
    teacher_at_eos: bool = True
    """False leaves the teacher's advantage out at the end-of-sequence token: student and teacher may have
    learnt to end differently."""
    rlsd: Rlsd | None = None
    """Scale the reward advantage by the teacher instead of adding (needs teacher: 0)."""

    @model_validator(mode="after")
    def _rlsd_replaces_teacher(self) -> "PolicyGradient":
        if self.rlsd is not None and not is_always_zero(self.teacher):
            raise ValueError("rlsd and teacher both shape the advantage; set teacher: 0 or remove rlsd")
        return self

    @property
    def needs_teacher(self) -> bool:
        return self.surrogate == "trrd" or self.rlsd is not None or not is_always_zero(self.teacher)


class Paced(ConfigModel):
    """Prompt weights p^alpha (1 - p)^beta of the running pass rate p (PACED, arXiv 2603.11178)."""

    alpha: float = Field(default=1.0, ge=0.0)
    """Exponent of the pass rate."""
    beta: float = Field(default=1.0, ge=0.0)
    """Exponent of the failure rate."""
    smoothing: float = Field(default=0.0, ge=0.0)
    """a in p = (c + a) / (K + 2a); 0 gives prompts that always or never pass no weight (proposed)."""
    normalise: Literal["mean", "max", "none"] = "mean"
    """`mean`: weights above zero average to one over the batch (proposed); `max`: divided by the kernel's
    peak; `none`: as they are."""
    decay: float = Field(default=0.5, ge=0.0, lt=1.0)
    """Share of the old pass rate kept at each new group of answers (proposed)."""


class Importance(ConfigModel):
    """Bounds on each token's importance ratio r = student / sampler, which stands for the age of an answer and for
    the difference between rollout engine and trainer.

    The divergences are weighted with the bounded ratio, detached (SDPO has it so); in the policy gradient, whose
    surrogate holds the ratio itself, it is bounded the same way.
    """

    kind: Literal["truncate", "mask", "none"] = "truncate"
    """`truncate`: min(r, high) (TIS). `mask`: r inside low .. high, otherwise the token is left out (IcePop).
    `none`: no correction."""
    low: float = Field(default=0.5, gt=0.0, lt=1.0)
    """mask only: smallest ratio that counts."""
    high: float = Field(default=2.0, gt=1.0)
    """Largest ratio that counts in full."""


class ObjectiveConfig(ConfigModel):
    """The loss: sum over tokens of weight * (divergences + policy gradient)."""

    recipe: str | None = None
    """Name of a file in `student_trainer/recipes/` that the other keys override."""
    divergences: tuple[Divergence, ...] = ()
    """Distribution-level terms, added up."""
    policy_gradient: PolicyGradient | None = None
    """Sampled-token term."""
    prompt_weights: Paced | None = None
    """Weights of the teacher's terms by prompt; the reward advantage is not weighted."""
    reduction: Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum_norm"] = "token_mean"
    """How tokens are averaged: over all tokens of the step (DAPO); per sequence, then over sequences (GRPO);
    sum over max_new_tokens, then over sequences (Dr.GRPO)."""
    importance: Importance | None = None
    """Correction for answers of an older student or of another engine; null: `truncate` where there are such
    (rollout.batches_ahead above 0, rollout.engine other than transformers), otherwise none."""
    temperature: float | None = Field(default=None, gt=0.0)
    """Temperature of both distributions in the divergences and of the teacher's scores; null: the rollouts'."""

    @model_validator(mode="before")
    @classmethod
    def _apply_recipe(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not data.get("recipe"):
            return data
        path = RECIPES / f"{data['recipe']}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(file.stem for file in RECIPES.glob("*.yaml")))
            raise ValueError(f"recipe is {data['recipe']!r}; choose one of {known}")
        return merge(yaml.safe_load(path.read_text()), data)

    @model_validator(mode="after")
    def _has_a_term(self) -> "ObjectiveConfig":
        if not self.divergences and self.policy_gradient is None:
            raise ValueError("no term to optimise; give divergences, policy_gradient or a recipe")
        return self

    @property
    def needs_teacher(self) -> bool:
        return bool(self.divergences) or (self.policy_gradient is not None and self.policy_gradient.needs_teacher)


def merge(base: Any, over: Any) -> Any:
    """`over` laid on `base`: mappings key by key, everything else replaced."""
    if not isinstance(base, dict) or not isinstance(over, dict):
        return over
    merged = dict(base)
    for key, value in over.items():
        merged[key] = merge(base[key], value) if key in base else value
    return merged
