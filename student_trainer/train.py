"""`student-trainer train` and `eval`: check everything, build the parts, run."""

import contextlib
import importlib.util
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from student_trainer.checkpoint import (
    Checkpoints,
    fingerprint,
    load_moments,
    read_trainer,
    saved_at,
    saved_steps,
    verify,
)
from student_trainer.config import (
    ConfigError,
    EvaluationConfig,
    OptimizerConfig,
    RunConfig,
    plain_config,
)
from student_trainer.evaluate import describe as describe_result
from student_trainer.evaluate import evaluate
from student_trainer.experience import InFlight
from student_trainer.exporter import Exporter
from student_trainer.handover import HandOver
from student_trainer.loop import fit
from student_trainer.notices import Notices
from student_trainer.offline import Offline, OfflineRunDir, open_offline
from student_trainer.parallel import make_accelerator, meeting_timeout_s, whole_for_generation
from student_trainer.parts import Parts, RunState
from student_trainer.passrate import PassRates
from student_trainer.policy import (
    Policy,
    check_packing,
    load_model,
    load_tokenizer,
    plain_model,
    resolve_device,
    student_vocabulary,
)
from student_trainer.problems import Problems, load_held_out, load_problems, longest, refusing, warn_of_overlap
from student_trainer.processes import Processes
from student_trainer.prompts import Prompt, PromptOrder
from student_trainer.resuming import check_identity, check_resumed, finished, prompts_digest, published, restore
from student_trainer.run_dir import Claim, RunDir
from student_trainer.sampler import Sampler, TransformersSampler, eos_ids
from student_trainer.scoring import Scorer, check_lengths, connect
from student_trainer.stopping import Stopped, StopRequest


@dataclass(frozen=True, slots=True)
class _Setting:
    """What a run begins with."""

    config: RunConfig
    folder: Path  # of the configuration file
    accelerator: Accelerator
    processes: Processes
    stop: StopRequest
    exporter: Exporter | None  # of the main process, if there is one
    stack: contextlib.ExitStack  # what is closed at the end, however that comes
    checkpoint: Path | None  # to go on from
    found: dict[str, Any] | None  # its trainer.json


def train(
    config: RunConfig,
    folder: Path,
    *,
    resume: bool = False,
    stop: StopRequest | None = None,
    exporter: Exporter | None = None,
) -> dict[str, Any]:
    """A whole run; returns what summary.json holds. `folder` is that of the configuration file.

    Everything that can be checked is checked before anything is written: prompts, verifiers, the model, the teacher
    and whether they fit each other. resume: go on with the run in run_dir from its newest checkpoint, if it has one.
    stop: listens already; None: listens to SIGTERM and SIGINT from here to the end. exporter: of the main process.

    Raises Stopped after a SIGTERM or SIGINT; the run is saved then and can be resumed.
    """
    with contextlib.ExitStack() as stack:
        stop = stop or stack.enter_context(StopRequest())
        device = resolve_device(config.student.device)
        _check_trackers(config)
        with refusing("student: "):
            accelerator = make_accelerator(config, device, config.run_dir)
        if device.type != accelerator.device.type or device.index not in (None, accelerator.device.index):
            raise ConfigError(
                f"student.device: {device}, but this process has {accelerator.device}; choose the GPU with "
                "CUDA_VISIBLE_DEVICES and set student.device to auto"
            )
        processes = Processes(meeting_timeout_s(config))
        notices = Notices(
            processes, stop, on_failure=lambda failure: exporter.failed(failure.reason) if exporter else None
        )
        stack.callback(notices.close)
        try:
            with processes.together():
                if stop():
                    raise Stopped("asked to stop before it began")
                if processes.is_main:
                    stack.callback(Claim(config.run_dir, resume=resume).release)
            checkpoint = found = None
            with processes.together():
                if resume and (saved := saved_steps(config.run_dir / "checkpoints")):
                    checkpoint = config.run_dir / "checkpoints" / f"step-{saved[-1]}"
                    if processes.is_main:
                        verify(checkpoint)
                    found = read_trainer(checkpoint)
                    check_resumed(config, checkpoint, found, processes)
                    if (summary := finished(config, found)) is not None:
                        return summary
                    if exporter:
                        exporter.set("step", found["step"])
                        exporter.set("last_checkpoint_timestamp_seconds", saved_at(checkpoint))
            return _run(_Setting(config, folder, accelerator, processes, stop, exporter, stack, checkpoint, found))
        except Stopped as stopped:
            raise stop.outcome() from stopped
        except Exception as error:
            explained = notices.explained(error)
            if explained is error:
                raise
            raise explained from error
        finally:
            # Not after an error of this process alone: leaving a group can wait for the others.
            if processes.count > 1 and sys.exception() is None:
                torch.distributed.destroy_process_group()


def _run(setting: _Setting) -> dict[str, Any]:
    """Builds the parts, evaluates, trains, evaluates; writes and returns the summary."""
    config, processes, checkpoint, found = setting.config, setting.processes, setting.checkpoint, setting.found
    with processes.together():
        checked = _check(setting)
        if found is not None and checkpoint is not None:
            check_identity(checkpoint, found["identity"], checked.identity)
    parts = _build(setting, checked)
    state = RunState(PassRates(config.objective.prompt_weights.decay if config.objective.prompt_weights else 0.0))
    restored: list[InFlight] = []
    if checkpoint is not None and found is not None:
        optimizer = getattr(parts.optimizer, "optimizer", parts.optimizer)
        load_moments(checkpoint, parts.policy, optimizer, processes)
        with processes.together():
            restored = restore(state, parts, checkpoint, found, checked.problems.prompts)
        parts.checkpoints.note_best(state.best.step)
    with processes.together():
        parts.run_dir.begin(after_step=published(state))
        if processes.is_main:
            print(f"{'resuming after' if found else 'starting at'} step {state.step}", file=sys.stderr, flush=True)
    if config.trackers:
        with refusing("trackers: "):
            setting.accelerator.init_trackers("stillhouse", config=_numbers(plain_config(config)))
        setting.stack.callback(setting.accelerator.end_training)
    start_s = time.monotonic()
    if parts.evaluate and state.before is None and state.step == 0:
        parts.hand_over(0)
        state.before = parts.evaluate(0)
    ended = fit(parts, state, restored)
    return _summarise(parts, state, ended, start_s)


def _summarise(parts: Parts, state: RunState, ended: str | None, start_s: float) -> dict[str, Any]:
    config = parts.config
    checkpoints = config.run_dir / "checkpoints"
    summary: dict[str, Any] = {"before": state.before} if state.before else {}
    summary |= {"steps": state.step, "rollouts": state.rollouts, "response_tokens": state.response_tokens}
    if parts.evaluate and config.evaluation:
        parts.hand_over(state.step)
        summary["after"] = parts.evaluate(state.step)
        if state.best.step is not None and ended is None:
            state.best.note(state.step, summary["after"][f"pass@{config.evaluation.k[0]}"])
    summary["checkpoint"] = str(checkpoints / f"step-{state.step}")
    if state.best.step is not None:
        best = state.best
        summary["best"] = {"checkpoint": str(checkpoints / f"step-{best.step}"), "step": best.step, "value": best.value}
    if ended is not None:
        summary["ended"] = ended
    if parts.scorer:
        summary["teacher"] = {"model": parts.scorer.teacher.model, "revision": parts.scorer.teacher.model_revision}
    summary["wall_s"] = round(time.monotonic() - start_s, 2)
    parts.run_dir.summary(summary)
    return summary


@dataclass(frozen=True, slots=True)
class _Checked:
    """What is known to fit together before anything is written."""

    tokenizer: Any
    problems: Problems
    held_out: Problems | None
    order: PromptOrder
    scorer: Scorer | None
    offline: Offline | None
    model: Any  # as it is saved
    student: Policy
    identity: dict[str, Any]  # of what a resumed run has to have again


def _check(setting: _Setting) -> _Checked:
    """Loads prompts, verifiers, teacher and model, and refuses what does not fit."""
    config, folder = setting.config, setting.folder
    tokenizer = load_tokenizer(config.student.model)
    offline = None
    if config.offline is not None:
        offline = open_offline(config, tokenizer, tell=setting.processes.is_main, stop=setting.stop)
        setting.stack.callback(offline.close)
        problems = offline.problems
    else:
        assert config.prompts is not None  # the configuration has seen to it
        problems = load_problems(config.prompts, tokenizer, folder)
    held_out = load_held_out(config.evaluation, tokenizer, folder) if config.evaluation else None
    if held_out and setting.processes.is_main:
        warn_of_overlap(problems.prompts, held_out.prompts)
    order = PromptOrder(problems.prompts, config.seed)
    with refusing("rollout."):
        order.batch(0, config.rollout.prompts_per_step)  # more prompts a step than there are
    prompts, processes = config.rollout.prompts_per_step, setting.processes.count
    if prompts < processes:
        raise ConfigError(
            f"rollout.prompts_per_step: {prompts} for {processes} processes; each needs at least one prompt"
        )
    scorer = offline.scorer if offline else None
    if config.teacher and config.objective.needs_teacher:
        exporter = setting.exporter
        tell = (lambda seconds: exporter.set("teacher_outage_now_s", seconds)) if exporter else (lambda seconds: None)
        scorer = connect(config, config.teacher, tokenizer, stop=setting.stop, on_outage=tell)
        setting.stack.callback(scorer.close)
        limit = scorer.teacher.max_sequence_tokens
        check_lengths(longest(problems.prompts), config.rollout.max_new_tokens, limit, "teacher")
    set_seed(config.seed)  # the same in every process: new adapters begin with random numbers
    with refusing("student.model: "):
        model = load_model(config.student, setting.accelerator.device, setting.checkpoint)
        size = student_vocabulary(plain_model(model), tokenizer)
    _check_context(config, model, problems.prompts + (held_out.prompts if held_out else []))
    student = Policy(plain_model(model), size)
    if config.optimizer.packing:
        check_packing(student)
    identity = {
        "model": fingerprint(student.model),
        "prompts": offline.digest if offline else prompts_digest(problems.prompts),
        "teacher": scorer.teacher.model_revision if scorer and not _follows(config) else None,
    }
    return _Checked(tokenizer, problems, held_out, order, scorer, offline, model, student, identity)


def _build(setting: _Setting, checked: _Checked) -> Parts:
    """Everything the loop works with. A meeting; nothing is written yet."""
    config, processes, accelerator, stack = setting.config, setting.processes, setting.accelerator, setting.stack
    student, scorer, held_out = checked.student, checked.scorer, checked.held_out
    optimizer = _optimizer(student, config.optimizer)
    warmup = max(1, config.optimizer.warmup_steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: min(1.0, (done + 1) / warmup))
    policy, optimizer = accelerator.prepare(student, optimizer)
    set_seed(config.seed, device_specific=True)  # what is random while training (dropout) differs by process
    with processes.together():
        sampler = _sampler(setting, checked, policy)
        stack.callback(sampler.close)
        hand_over = _nothing_to_hand_over
        if sampler.owns_weights:
            prompt = checked.problems.prompts[0]
            hand_over = HandOver(sampler, policy, checked.model, prompt, config.rollout.temperature)
        exporter = setting.exporter
        if scorer and exporter:
            model = scorer.teacher.model
            exporter.describe(config, model, scorer.teacher.model_revision)
            scorer.on_revision = lambda revision: exporter.describe(config, model, revision)
        run_dir = (OfflineRunDir if checked.offline else RunDir)(config, writes=processes.is_main)
        stack.callback(run_dir.close)
    assess = None
    if held_out and config.evaluation:
        assess = _evaluator(config, config.evaluation, held_out, sampler, processes, setting.stop)
    return Parts(
        config=config,
        policy=policy,
        model=checked.model,
        tokenizer=checked.tokenizer,
        sampler=checked.offline.sampler if checked.offline else sampler,
        hand_over=hand_over,
        scorer=scorer,
        judge=checked.problems.judge,
        pass_threshold=checked.problems.pass_threshold,
        order=checked.order,
        optimizer=optimizer,
        learning_rate=schedule,
        accelerator=accelerator,
        processes=processes,
        run_dir=run_dir,
        checkpoints=Checkpoints(
            config.run_dir / "checkpoints",
            processes,
            keep=config.checkpoints.keep,
            background=config.checkpoints.background,
            on_saved=lambda: exporter.happened("last_checkpoint") if exporter else None,
        ),
        identity=checked.identity,
        exporter=exporter,
        evaluate=assess,
        stop=setting.stop,
    )


def _follows(config: RunConfig) -> bool:
    return config.teacher is not None and config.teacher.on_new_revision == "follow"


def _nothing_to_hand_over(step: int) -> dict[str, float]:
    return {}


def _check_trackers(config: RunConfig) -> None:
    for name in config.trackers:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"trackers: {name} is not installed; pip install {name}, or leave it out")


def _numbers(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """What every tracker can show: one level, plain values."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            found |= _numbers(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value if isinstance(value, int | float | str | bool) else str(value)
    return found


def _sampler(setting: _Setting, checked: _Checked, policy: Any) -> Sampler:
    """The rollout engine of this process."""
    config, accelerator, checkpoint = setting.config, setting.accelerator, setting.checkpoint
    model, tokenizer, size = checked.student.model, checked.tokenizer, checked.student.vocabulary_size
    candidates = config.teacher.candidates if checked.scorer and config.teacher else 0
    if config.rollout.engine == "vllm":
        try:
            from student_trainer.vllm_sampler import VllmOptions, VllmSampler
        except ImportError as error:
            raise ConfigError(
                f"rollout.engine: vllm cannot be imported here ({error}); pip install 'stillhouse[student,vllm]', or "
                "set it to transformers"
            ) from error
        half = config.student.mixed_precision == "bf16" or config.student.dtype == "bfloat16"
        prompts = checked.problems.prompts + (checked.held_out.prompts if checked.held_out else [])
        return VllmSampler(
            # What it starts with; it is handed the weights of now before it is first used.
            checkpoint if checkpoint and config.student.lora is None else config.student.model,
            tokenizer,
            config.rollout,
            eos_ids=eos_ids(model, tokenizer),
            vocabulary_size=size,
            candidates=candidates,
            dtype="bfloat16" if half else "float32",
            max_sequence_tokens=longest(prompts) + config.rollout.max_new_tokens,
            options=VllmOptions(**config.rollout.vllm.model_dump()),
        )

    @contextlib.contextmanager
    def generating() -> Generator[None]:
        with whole_for_generation(policy), accelerator.autocast():
            yield

    return TransformersSampler(
        model, tokenizer, config.rollout, vocabulary_size=size, candidates=candidates, generating=generating
    )


def evaluate_only(config: RunConfig, folder: Path) -> dict[str, Any]:
    """pass@k of `student.model` on the held-out prompts of `config`."""
    if config.evaluation is None:
        raise ConfigError("evaluation: is missing; add evaluation.prompts to the configuration")
    tokenizer = load_tokenizer(config.student.model)
    held_out = load_held_out(config.evaluation, tokenizer, folder)
    with refusing("student.model: "):
        plain = config.student.model_copy(update={"lora": None})
        model = load_model(plain, resolve_device(config.student.device))
        size = student_vocabulary(model, tokenizer)
    _check_context(config, model, held_out.prompts)
    sampler = TransformersSampler(model, tokenizer, config.rollout, vocabulary_size=size, candidates=0)
    return _evaluator(config, config.evaluation, held_out, sampler, Processes(), StopRequest())(0)


def _check_context(config: RunConfig, model: Any, prompts: list[Prompt]) -> None:
    """Refuses answers that would run past the positions the student knows."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None:
        check_lengths(longest(prompts), config.rollout.max_new_tokens, limit, "student")


def _evaluator(
    config: RunConfig,
    evaluation: EvaluationConfig,
    held_out: Problems,
    sampler: Sampler,
    processes: Processes,
    stop: StopRequest,
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
            processes=processes,
            stop=stop,
        )
        if processes.is_main:
            print(f"evaluation after step {step}: {describe_result(result)}", file=sys.stderr, flush=True)
        return result

    return assess


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
