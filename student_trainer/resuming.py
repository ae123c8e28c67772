"""Going on with a run: what has to be the same as then, and how everything gets back to where it was."""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import stillhouse
from student_trainer.checkpoint import FORMAT, process_files
from student_trainer.config import ConfigError, RunConfig, changed_keys, plain_config
from student_trainer.experience import InFlight
from student_trainer.guards import BestSoFar, Guards
from student_trainer.in_flight import read_batches, restore_random_state
from student_trainer.parts import Parts, RunState
from student_trainer.processes import Processes
from student_trainer.prompts import Prompt


def check_resumed(config: RunConfig, checkpoint: Path, found: dict[str, Any], processes: Processes) -> None:
    """Refuses to go on with something else than what was saved."""
    changed = changed_keys(found["config"], plain_config(config))
    if changed:
        raise ConfigError(
            f"run_dir: {config.run_dir} was begun with another configuration; set these back, or start a new run "
            f"(student.model={checkpoint} begins with its weights):\n  " + "\n  ".join(changed)
        )
    if found["processes"] != processes.count and not config.checkpoints.other_world_size:
        raise ConfigError(
            f"run_dir: {checkpoint} was saved by {found['processes']} processes, this run has {processes.count}; "
            f"start {found['processes']}, or set checkpoints.other_world_size: true (the curve is then the same only "
            "to rounding)"
        )


def check_identity(checkpoint: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuses a checkpoint of another model, other prompts or another teacher behind the same names."""
    meanings = {
        "model": "student.model: has other parameters than the model",
        "prompts": "prompts: are not those (by key and tokens)",
        "teacher": f"teacher: serves revision {now['teacher']}, not the one ({saved['teacher']})",
    }
    for name, what in meanings.items():
        followed = name == "teacher" and now[name] is None  # whatever it serves
        if saved[name] != now[name] and not followed:
            raise ConfigError(
                f"{what} that {checkpoint} was made with; put it back, or start a new run",
                reason="teacher_revision" if name == "teacher" else "config",
            )


def finished(config: RunConfig, found: dict[str, Any]) -> dict[str, Any] | None:
    """The summary of a run that has nothing left to do."""
    path = config.run_dir / "summary.json"
    same_end = _end(found["config"]) == _end(plain_config(config))
    if not path.is_file() or not same_end:
        return None
    print(f"{config.run_dir} is complete: nothing to do", file=sys.stderr)
    return json.loads(path.read_text())


def _end(config: dict[str, Any]) -> tuple[Any, Any]:
    """What decides when a run ends."""
    return config["steps"], (config["evaluation"] or {}).get("patience")


def describe(parts: Parts, state: RunState) -> dict[str, Any]:
    """What trainer.json of a checkpoint holds."""
    schedule = parts.learning_rate.state_dict()
    return {
        "format": FORMAT,
        "stillhouse": stillhouse.__version__,
        "processes": parts.processes.count,
        "config": plain_config(parts.config),
        "identity": parts.identity,
        "schedule": {key: value for key, value in schedule.items() if key != "lr_lambdas"},
        "pass_rates": state.pass_rates.state(),
        "step": state.step,
        "rollouts": state.rollouts,
        "response_tokens": state.response_tokens,
        "guards": state.guards.state(),
        "best": state.best.state(),
        "before": state.before,
        "row": state.row,
    }


def restore(
    state: RunState, parts: Parts, checkpoint: Path, found: dict[str, Any], prompts: list[Prompt]
) -> list[InFlight]:
    """Puts everything but weights and optimiser back where it was; returns the answers in flight, scores asked for."""
    processes, schedule, scorer = parts.processes, parts.learning_rate, parts.scorer
    state.step, state.rollouts, state.response_tokens = found["step"], found["rollouts"], found["response_tokens"]
    state.before, state.row = found["before"], found["row"]
    state.guards, state.best = Guards(**found["guards"]), BestSoFar(**found["best"])
    state.pass_rates.load_state(found["pass_rates"])
    schedule.load_state_dict(schedule.state_dict() | found["schedule"])
    for group, rate in zip(schedule.optimizer.param_groups, schedule.get_last_lr(), strict=True):
        group["lr"] = rate
    files = process_files(checkpoint)
    if len(files) == processes.count:
        restore_random_state(files[processes.rank], parts.accelerator.device)
    restored = read_batches(files, {prompt.key: prompt for prompt in prompts}, processes.rank, processes.count)
    for batch in restored:
        batch.futures = [scorer.submit(judged.rollout) for judged in batch.answers] if scorer else []
    return restored


def published(state: RunState) -> int:
    """The last step whose figures are told; one that is still to be looked at is told later."""
    return state.step - (state.row is not None)


def prompts_digest(prompts: list[Prompt]) -> str:
    text = "\n".join(f"{prompt.key} {prompt.token_ids}" for prompt in prompts)
    return hashlib.sha256(text.encode()).hexdigest()
