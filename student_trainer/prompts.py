"""The prompts of a run: where they come from, how they are tokenised, and in which order they are drawn.

Two sources: a dataset of reasoning-gym, which makes its own questions, and a JSON Lines file. Everything that can
be wrong with them (a name, a line, a template, a length) is an error here, before a model is loaded.

Left out on purpose: streaming. Prompts are short and a run sees each of them several times, so all of them are read
and tokenised at the start, and the order of a run is a pure function of the seed and the step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from student_trainer.prompt_sources import Message, file_rows, generated_rows
from student_trainer.verifier_config import ReasoningGymVerifier, VerifierConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One question, ready to sample from."""

    key: str
    """Stable name: `chain_sum/17` (index in the dataset) or `train.jsonl:12` (line of the file, from 1)."""
    text: str
    """What the student reads, as text: after the chat template where one is used."""
    messages: list[Message] | None
    """The conversation behind `text`; None where no chat template was used."""
    token_ids: tuple[int, ...]
    """[P] What the student reads, as tokens, with the special tokens."""
    answer: Any
    """The reference answer; None where the source has none."""
    entry: dict[str, Any]
    """The whole entry of the dataset or line of the file, for verifiers that need more than the answer."""


class _Source(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    system: str | None = None
    """A system message put before every prompt; needs a chat template."""
    chat_template: Literal["auto", "always", "never"] = "auto"
    """Whether prompts go through the tokenizer's chat template; auto: where the tokenizer has one."""
    chat_template_arguments: dict[str, Any] = {}
    """Further variables of the chat template, such as `enable_thinking: false`."""
    max_prompt_tokens: PositiveInt | None = None
    """The most tokens a prompt may have, template included; a longer one stops the run before it starts."""


class ReasoningGymPrompts(_Source):
    """Prompts from a reasoning-gym dataset, made on the spot."""

    source: Literal["reasoning_gym"]
    """Where the prompts come from."""
    dataset: str
    """Name of the dataset in reasoning-gym, such as `chain_sum`."""
    size: PositiveInt = 1000
    """How many prompts to make."""
    seed: int = 0
    """Which prompts. Most datasets make prompt i from seed + i, so seeds closer than `size` share prompts: for
    evaluation, take a seed that is at least `size` away."""
    parameters: dict[str, Any] = {}
    """The dataset's own parameters, such as `min_terms: 6`."""
    template: str = "{question}"
    """Text of a prompt, a Python format string over the entry: `{question}`, `{metadata[difficulty]}`."""
    verifier: VerifierConfig = ReasoningGymVerifier(kind="reasoning_gym")
    """How a completion becomes a reward; the dataset's own verifier unless another is given."""


class JsonlPrompts(_Source):
    """Prompts from a JSON Lines file: one JSON object per line."""

    source: Literal["jsonl"]
    """Where the prompts come from."""
    path: Path
    """The file: from the working directory, or else from the folder of the configuration file."""
    prompt_field: str = "prompt"
    """Field with the prompt: a text, or a list of messages with `role` and `content`."""
    answer_field: str | None = "answer"
    """Field with the reference answer; null where the file has none."""
    verifier: VerifierConfig
    """How a completion becomes a reward."""


PromptsConfig = Annotated[ReasoningGymPrompts | JsonlPrompts, Field(discriminator="source")]


def load_prompts(
    config: PromptsConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    folder: Path | None = None,
) -> list[Prompt]:
    """Read or make every prompt and tokenise it.

    Args:
        config: which prompts.
        tokenizer: the student's; its chat template and its special tokens are used.
        folder: folder of the configuration file, the second place to look for a relative `path`.

    Raises:
        ValueError: anything that keeps a prompt from being used, with its field, its value and the fix.
    """
    templated = _uses_template(config, tokenizer)
    rows = generated_rows(config) if isinstance(config, ReasoningGymPrompts) else file_rows(config, folder)
    prompts = []
    for key, content, answer, entry in rows:
        if templated:
            messages = _conversation(config, key, content)
            text, ids = _render(config, tokenizer, key, messages)
        else:
            if not isinstance(content, str):
                raise ValueError(
                    f"prompts: {key} is a list of messages, which needs a chat template, and none is used "
                    f"(chat_template: {config.chat_template}). Fix: take a tokenizer with a chat template, or "
                    "give the prompts as text."
                )
            messages, text, ids = None, content, _tokenise_text(tokenizer, content)
        if not ids or not str(content).strip():
            raise ValueError(f"prompts: {key} is empty. Fix: remove it or fill it in.")
        prompts.append(Prompt(key, text, messages, tuple(ids), answer, entry))
    _check_lengths(prompts, config.max_prompt_tokens)
    return prompts


class PromptOrder:
    """An endless shuffled order of prompts: epoch by epoch, each in an order of its own.

    An epoch is cut into whole batches and the prompts that do not fill one are left to the next shuffle, so no prompt
    comes twice in an epoch, nor in a batch. Everything is a function of (seed, step, n): a resumed run needs no
    stored position, only the same prompts.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        self.prompts = prompts
        self.seed = seed
        self._shuffled: tuple[int, np.ndarray] | None = None  # the last epoch's order, kept because steps ask in turn

    def batch(self, step: int, n: int) -> list[Prompt]:
        """The `n` prompts of step `step` (from 0).

        Raises:
            ValueError: there are fewer than `n` prompts.
        """
        epoch, index = divmod(step, self._batches(n))
        return [self.prompts[i] for i in self._order(epoch)[index * n : (index + 1) * n]]

    def epoch(self, step: int, n: int) -> int:
        """Which epoch (from 0) step `step` belongs to."""
        return step // self._batches(n)

    def _batches(self, n: int) -> int:
        if not 1 <= n <= len(self.prompts):
            raise ValueError(
                f"prompts_per_step: {n}, but there are {len(self.prompts)} prompts, and a step takes none twice. "
                f"Fix: 1 to {len(self.prompts)}, or more prompts (reasoning_gym: raise prompts.size)."
            )
        return len(self.prompts) // n

    def _order(self, epoch: int) -> np.ndarray:
        if self._shuffled is None or self._shuffled[0] != epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.prompts))
            self._shuffled = (epoch, order)
        return self._shuffled[1]


def _uses_template(config: _Source, tokenizer: PreTrainedTokenizerBase) -> bool:
    has_template = bool(tokenizer.chat_template)
    if config.chat_template == "always" and not has_template:
        raise ValueError(
            "prompts.chat_template: always, but the tokenizer has no chat template. "
            "Fix: set it to auto or never, or take a tokenizer with one."
        )
    templated = has_template and config.chat_template != "never"
    if config.system is not None and not templated:
        raise ValueError(
            f"prompts.system: a system message needs a chat template, and none is used (chat_template: "
            f"{config.chat_template}; the tokenizer has {'one' if has_template else 'none'}). "
            "Fix: remove prompts.system and write its text into the prompts themselves."
        )
    return templated


def _conversation(config: _Source, key: str, content: str | list[Message]) -> list[Message]:
    messages = [{"role": "user", "content": content}] if isinstance(content, str) else content
    if config.system is None:
        return messages
    if messages[0]["role"] == "system":
        raise ValueError(
            f"prompts.system: {key} already begins with a system message. "
            "Fix: remove prompts.system, or the system messages from the file."
        )
    return [{"role": "system", "content": config.system}, *messages]


def _render(
    config: _Source, tokenizer: PreTrainedTokenizerBase, key: str, messages: list[Message]
) -> tuple[str, list[int]]:
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False, **config.chat_template_arguments
        )
    except TemplateError as error:
        raise ValueError(
            f"prompts: the tokenizer's chat template refuses {key} ({error}). "
            "Fix: change its roles (or prompts.system) to what the template accepts."
        ) from error
    assert isinstance(text, str)
    # A chat template writes every special token itself, so the tokenizer must not add a second BOS.
    return text, tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[return-value]


def _tokenise_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    bos, eos = tokenizer.bos_token, tokenizer.eos_token_id
    bare: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[assignment]
    if not bare or (isinstance(bos, str) and text.startswith(bos)):
        return bare
    ids: list[int] = tokenizer(text)["input_ids"]  # type: ignore[assignment]
    # Tokenizers that close every text with EOS would tell the student that the answer is over before it began.
    closed = ids[-1] == eos and ids[:-1][-len(bare) :] == bare
    return ids[:-1] if closed else ids


def _check_lengths(prompts: list[Prompt], limit: int | None) -> None:
    too_long = [prompt for prompt in prompts if limit is not None and len(prompt.token_ids) > limit]
    if too_long:
        longest = max(too_long, key=lambda prompt: len(prompt.token_ids))
        raise ValueError(
            f"prompts.max_prompt_tokens: {limit}, but {too_long[0].key} has {len(too_long[0].token_ids)} tokens "
            f"({len(too_long)} of {len(prompts)} prompts are too long; the longest, {longest.key}, has "
            f"{len(longest.token_ids)}). Fix: raise the limit if the student's context allows, or remove them."
        )
