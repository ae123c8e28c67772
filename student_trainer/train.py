"""`student-trainer train` and `eval`: check everything, build the parts, run."""

import contextlib
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from student_trainer.config import ConfigError, EvaluationConfig, OptimizerConfig, RunConfig
from student_trainer.evaluate import describe, evaluate
from student_trainer.experience import Judge
from student_trainer.loop import Parts, fit
from student_trainer.metrics import Exporter
from student_trainer.policy import Policy, load_model, load_tokenizer, resolve_device, student_vocabulary
from student_trainer.prompts import Prompt, PromptOrder, PromptsConfig, load_prompts
from student_trainer.run_dir import RunDir, refuse_used
from student_trainer.sampler import TransformersSampler
from student_trainer.scoring import check_lengths, connect
from student_trainer.verifiers import build_verifier, verify


@dataclass(frozen=True, slots=True)
class _Problems:
    """Prompts and who judges the answers."""

    prompts: list[Prompt]
    judge: Judge
    pass_threshold: float


def train(config: RunConfig, folder: Path) -> dict[str, Any]:
    """A whole run; returns what summary.json holds. `folder` is that of the configuration file.

    Everything that can be checked is checked before the run directory is made: prompts, verifiers, the model,
    the teacher and whether they fit each other.
    """
    refuse_used(config.run_dir)
    device = resolve_device(config.student.device)
    tokenizer = load_tokenizer(config.student.model)
    problems = _problems(config.prompts, tokenizer, folder)
    held_out = _held_out(config.evaluation, tokenizer, folder) if config.evaluation else None
    if held_out:
        _warn_of_overlap(problems.prompts, held_out.prompts)
    order = PromptOrder(problems.prompts, config.seed)
    with _refusing("rollout."):
        order.batch(0, config.rollout.prompts_per_step)  # more prompts a step than there are
    scorer = connect(config, config.teacher, tokenizer) if config.teacher and config.objective.needs_teacher else None
    try:
        if scorer:
            limit = scorer.teacher.max_sequence_tokens
            check_lengths(_longest(problems.prompts), config.rollout.max_new_tokens, limit, "teacher")
        set_seed(config.seed)
        with _refusing("student.model: "):
            model = load_model(config.student)
            size = student_vocabulary(model, tokenizer)
        _check_context(config, model, problems.prompts + (held_out.prompts if held_out else []))
        candidates = config.teacher.candidates if scorer and config.teacher else 0
        sampler = TransformersSampler(model, tokenizer, config.rollout, vocabulary_size=size, candidates=candidates)
        # accelerate places and scales; it must not choose another device than the configuration does.
        accelerator = Accelerator(cpu=device.type == "cpu")
        if accelerator.num_processes > 1:
            raise ConfigError(
                f"{accelerator.num_processes} processes were launched; this version trains with one: start it "
                "without a launcher"
            )
        optimizer = _optimizer(model, config.optimizer)
        warmup = max(1, config.optimizer.warmup_steps)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: min(1.0, (done + 1) / warmup))
        policy, optimizer = accelerator.prepare(Policy(model, size), optimizer)
        exporter = _exporter(config.metrics_port) if config.metrics_port is not None else None
        run_dir = RunDir(config)
        assess = None
        if held_out and config.evaluation:
            assess = _evaluator(config, config.evaluation, held_out, sampler)
        parts = Parts(
            config=config,
            policy=policy,
            tokenizer=tokenizer,
            sampler=sampler,
            scorer=scorer,
            judge=problems.judge,
            pass_threshold=problems.pass_threshold,
            order=order,
            optimizer=optimizer,
            learning_rate=schedule,
            accelerator=accelerator,
            run_dir=run_dir,
            exporter=exporter,
            evaluate=assess,
        )
        return _run(parts)
    finally:
        if scorer:
            scorer.close()


def evaluate_only(config: RunConfig, folder: Path) -> dict[str, Any]:
    """pass@k of `student.model` on the held-out prompts of `config`."""
    if config.evaluation is None:
        raise ConfigError("evaluation: is missing; add evaluation.prompts to the configuration")
    tokenizer = load_tokenizer(config.student.model)
    held_out = _held_out(config.evaluation, tokenizer, folder)
    with _refusing("student.model: "):
        model = load_model(config.student)
        size = student_vocabulary(model, tokenizer)
    _check_context(config, model, held_out.prompts)
    sampler = TransformersSampler(model, tokenizer, config.rollout, vocabulary_size=size, candidates=0)
    return _evaluator(config, config.evaluation, held_out, sampler)(0)


def _run(parts: Parts) -> dict[str, Any]:
    """Evaluates, trains, evaluates; writes and returns the summary."""
    start_s = time.monotonic()
    try:
        if parts.exporter:
            print(f"metrics at {parts.exporter.url}", flush=True)
        summary: dict[str, Any] = {"before": parts.evaluate(0)} if parts.evaluate else {}
        summary |= fit(parts)
        if parts.evaluate:
            summary["after"] = parts.evaluate(parts.config.steps)
        summary["checkpoint"] = str(parts.run_dir.path / "checkpoints" / f"step-{parts.config.steps}")
        if parts.scorer:
            teacher = parts.scorer.teacher
            summary["teacher"] = {"model": teacher.model, "revision": teacher.model_revision}
        summary["wall_s"] = round(time.monotonic() - start_s, 2)
        parts.run_dir.summary(summary)
        return summary
    finally:
        parts.run_dir.close()
        if parts.exporter:
            parts.exporter.close()


@contextlib.contextmanager
def _refusing(field: str = "") -> Generator[None]:
    """Turns a ValueError about the user's input into a ConfigError: nothing has been started yet."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{field}{error}") from error


def _problems(config: PromptsConfig, tokenizer: Any, folder: Path, within: str = "") -> _Problems:
    with _refusing(within):
        prompts = load_prompts(config, tokenizer, folder=folder)
        verifier = build_verifier(config.verifier, config, prompts, folder=folder)
    on_error = config.verifier.on_error
    return _Problems(
        prompts,
        lambda prompt, completion: verify(verifier, prompt, completion, on_error),
        config.verifier.pass_threshold,
    )


def _held_out(config: EvaluationConfig, tokenizer: Any, folder: Path) -> _Problems:
    problems = _problems(config.prompts, tokenizer, folder, "evaluation.")
    if len(problems.prompts) < config.num_prompts:
        raise ConfigError(
            f"evaluation.num_prompts: {config.num_prompts}, but evaluation.prompts gives {len(problems.prompts)}; "
            "lower it or give more prompts"
        )
    return _Problems(problems.prompts[: config.num_prompts], problems.judge, problems.pass_threshold)


def _longest(prompts: list[Prompt]) -> int:
    return max(len(prompt.token_ids) for prompt in prompts)


def _check_context(config: RunConfig, model: Any, prompts: list[Prompt]) -> None:
    """Refuses answers that would run past the positions the student knows."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None:
        check_lengths(_longest(prompts), config.rollout.max_new_tokens, limit, "student")


def _warn_of_overlap(prompts: list[Prompt], held_out: list[Prompt]) -> None:
    """Held-out problems that are trained on measure memory; whether that is meant is the user's to say."""
    trained = {prompt.text for prompt in prompts}
    shared = sum(prompt.text in trained for prompt in held_out)
    if shared:
        print(
            f"warning: {shared} of the {len(held_out)} held-out prompts are also trained on; give "
            "evaluation.prompts another file, or a seed at least `size` away",
            file=sys.stderr,
        )


def _evaluator(
    config: RunConfig, evaluation: EvaluationConfig, held_out: _Problems, sampler: TransformersSampler
) -> Callable[[int], dict[str, Any]]:
    def assess(step: int) -> dict[str, Any]:
        # The same seed every time: differences between evaluations are the model's.
        result = evaluate(
            evaluation,
            held_out.prompts,
            sampler=sampler,
            judge=held_out.judge,
            pass_threshold=held_out.pass_threshold,
            seed=config.seed,
        )
        print(f"evaluation after step {step}: {describe(result)}", file=sys.stderr, flush=True)
        return result

    return assess


def _exporter(port: int) -> Exporter:
    try:
        return Exporter(port)
    except OSError as error:
        raise ConfigError(f"metrics_port: {port} cannot be used ({error.strerror}); 0 takes a free one") from error


def _optimizer(model: torch.nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW; vectors (norms, biases) are not decayed."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
    )
