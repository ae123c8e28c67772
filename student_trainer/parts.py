"""What the loop works with, and what changes while it does."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator

from student_trainer.checkpoint import Checkpoints
from student_trainer.config import RunConfig
from student_trainer.experience import Judge
from student_trainer.exporter import Exporter
from student_trainer.guards import BestSoFar, Guards
from student_trainer.passrate import PassRates
from student_trainer.processes import Processes
from student_trainer.prompts import PromptOrder
from student_trainer.run_dir import RunDir
from student_trainer.sampler import Sampler
from student_trainer.scoring import Scorer
from student_trainer.stopping import StopRequest


@dataclass(slots=True)
class RunState:
    """What changes from step to step besides weights and optimiser; all of it is part of a checkpoint."""

    pass_rates: PassRates
    step: int = 0  # steps made
    rollouts: int = 0
    response_tokens: int = 0
    guards: Guards = field(default_factory=Guards)
    best: BestSoFar = field(default_factory=BestSoFar)
    before: dict[str, Any] | None = None  # the evaluation before the first step
    row: dict[str, Any] | None = None  # figures of the last step while they are still to be looked at


@dataclass(frozen=True, slots=True)
class Parts:
    """Everything the loop works with."""

    config: RunConfig
    policy: Any  # a Policy, maybe wrapped for several processes
    model: Any  # the model inside it, as it is saved
    tokenizer: Any
    sampler: Sampler
    hand_over: Callable[[int], dict[str, float]]  # gives a sampler that owns weights those of now, after N steps
    scorer: Scorer | None
    judge: Judge
    pass_threshold: float
    order: PromptOrder
    optimizer: torch.optim.Optimizer
    learning_rate: torch.optim.lr_scheduler.LRScheduler
    accelerator: Accelerator
    processes: Processes
    run_dir: RunDir
    checkpoints: Checkpoints
    identity: dict[str, Any]  # of model, prompts and teacher: what a resumed run has to have again
    exporter: Exporter | None
    evaluate: Callable[[int], dict[str, Any]] | None
    stop: StopRequest
