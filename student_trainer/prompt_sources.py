"""Reading prompts: what a reasoning-gym dataset or a JSON Lines file gives, before it becomes tokens.

Every complaint names the place (dataset, or file and line), the value and the fix.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from student_trainer.prompts import JsonlPrompts, ReasoningGymPrompts

Message = dict[str, str]
"""One message of a conversation: `role` and `content`."""

Row = tuple[str, str | list[Message], Any, dict[str, Any]]
"""What a source yields: key, text or messages, answer, entry."""


def generated_rows(config: ReasoningGymPrompts) -> Iterator[Row]:
    dataset = _reasoning_gym_dataset(config)
    for index in range(len(dataset)):
        entry = dataset[index]
        try:
            text = config.template.format(**entry)
        except (KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
            raise ValueError(
                f"prompts.template: {config.template!r} does not fit an entry of {config.dataset} "
                f"({type(error).__name__}: {error}). Fix: use the fields {sorted(entry)} and "
                f"metadata[...] with {sorted(entry['metadata'])}; write a literal brace twice."
            ) from error
        yield f"{config.dataset}/{index}", text, entry["answer"], entry


def _reasoning_gym_dataset(config: ReasoningGymPrompts) -> Any:
    # Imported here because it takes most of a second, and `--help` must not.
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if config.dataset not in DATASETS:
        raise ValueError(
            f"prompts.dataset: reasoning-gym has no dataset {config.dataset!r}. "
            f"Fix: {_did_you_mean(config.dataset, DATASETS)}"
        )
    allowed = {field.name for field in dataclasses.fields(DATASETS[config.dataset][1])} - {"size", "seed"}
    for name in config.parameters:
        if name in ("size", "seed"):
            raise ValueError(f"prompts.parameters: {name!r} does not belong here. Fix: set prompts.{name} instead.")
        if name not in allowed:
            raise ValueError(
                f"prompts.parameters: {config.dataset} has no parameter {name!r}. Fix: {_did_you_mean(name, allowed)}"
            )
    try:
        return reasoning_gym.create_dataset(config.dataset, size=config.size, seed=config.seed, **config.parameters)
    except (AssertionError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"prompts.parameters: {config.dataset} refuses {config.parameters} ({type(error).__name__}: {error}). "
            "Fix: change the value it names."
        ) from error


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"choose one of {', '.join(sorted(known))}."


def file_rows(config: JsonlPrompts, folder: Path | None) -> Iterator[Row]:
    path = _find(config.path, folder)
    found = False
    with path.open("rb") as lines:  # bytes, because text mode also breaks lines at characters JSON allows
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            found = True
            where = f"{path}:{number}"
            try:
                row = json.loads(line)
            except ValueError as error:  # a JSON error or bytes that are no text
                raise ValueError(f"{where}: not JSON: {error}. Fix: one JSON object per line, in UTF-8.") from error
            if not isinstance(row, dict):
                raise ValueError(f"{where}: expected a JSON object, got {line.strip()[:60]!r}. Fix: wrap it in {{}}.")
            content = _field(row, "prompt_field", config.prompt_field, where)
            if not isinstance(content, str):
                _check_messages(content, where, config.prompt_field)
            answer = None
            if config.answer_field is not None:
                answer = _field(row, "answer_field", config.answer_field, where)
            yield f"{path.name}:{number}", content, answer, row
    if not found:
        raise ValueError(f"prompts.path: {path} is empty. Fix: one JSON object per line.")


def _find(path: Path, folder: Path | None) -> Path:
    tried = [path] if folder is None or path.is_absolute() else [path, folder / path]
    for candidate in tried:
        if candidate.is_file():
            return candidate
    raise ValueError(
        f"prompts.path: no file at {' or '.join(map(str, tried))} (working directory: {Path.cwd()}). "
        "Fix: give a path from the working directory, from the configuration file, or an absolute one."
    )


def _field(row: dict[str, Any], setting: str, name: str, where: str) -> Any:
    if name not in row:
        none = " (or null, where the file has no answers)" if setting == "answer_field" else ""
        raise ValueError(
            f"{where}: no field {name!r}; the line has {sorted(row)}. Fix: set prompts.{setting}{none}, "
            "or repair the line."
        )
    return row[name]


def _check_messages(content: Any, where: str, name: str) -> None:
    plain = isinstance(content, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in content
    )
    if not plain or not content:
        raise ValueError(
            f"{where}: field {name!r} must be a text or a list of messages, got {str(content)[:80]!r}. "
            'Fix: [{"role": "user", "content": "..."}], with contents that are text.'
        )
    if content[-1]["role"] == "assistant":
        raise ValueError(
            f"{where}: field {name!r} ends with a message of the assistant, which would show the student an answer. "
            "Fix: remove that message (put what the verifier needs in the answer field)."
        )
