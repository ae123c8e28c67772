"""The student's own answers. `Sampler` is the seam; here is the one that uses transformers' `generate`.

Every answer has a stream of random numbers of its own, one number a token, made from the seed, its prompt and its
place among the answers to it. So what is drawn depends neither on the lots in which answers are generated nor on
the number of processes that share them (but for rounding of the logits, which can turn a draw that falls on the edge
between two tokens).
"""

import contextlib
import hashlib
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TopPLogitsWarper,
)

from student_trainer.batch import Rollout
from student_trainer.config import RolloutConfig
from student_trainer.prompts import Prompt
from student_trainer.stopping import Stopping, never


class Sampler(Protocol):
    """Makes answers with the student as it is now."""

    owns_weights: bool
    """True: it has a copy of the weights, so it may work while the trainer changes its own."""

    def sample(
        self, prompts: Sequence[Prompt], answers: int, *, seed: int, stop: Stopping = never
    ) -> Iterator[list[Rollout]]:
        """`answers` rollouts for each prompt, handed over in lots as they end.

        The same seed, prompts and weights give the same rollouts. Lots come in any order; rollouts of one
        prompt are told apart by nothing but their place. Once `stop()` is true no further lot comes.
        """
        ...

    def close(self) -> None:
        """Ends whatever it started."""
        ...


class SamplerLost(RuntimeError):
    """The processes of a sampler that has its own are gone; nothing more can be sampled with it."""


def stream_seed(seed: int, prompt: Prompt, answer: int) -> list[int]:
    """Entropy for the random numbers of one answer: another list for every (seed, prompt, answer)."""
    return [seed, int.from_bytes(hashlib.sha256(prompt.key.encode()).digest()[:8], "big"), answer]


class _Drawer(LogitsProcessor):
    """Draws the next tokens itself, by the inverse of the cumulative distribution, and notes what it drew:
    log-probability of each token and the most likely tokens beside it.

    `generate` gets logits that leave it no choice. Holds one step's [B, V] log-probabilities, never all. Ids
    beyond the vocabulary, which a padded head would let through, are never drawn.
    """

    def __init__(
        self, uniforms: Tensor, vocabulary_size: int, temperature: float, top_p: float, candidates: int
    ) -> None:
        self._uniforms = uniforms  # [B, T] float64 in 0 .. 1
        self._vocabulary_size = vocabulary_size
        self._temperature = temperature
        self._nucleus = TopPLogitsWarper(top_p) if top_p < 1 else None
        self._candidates = candidates
        self.logprobs: list[Tensor] = []  # a step: [B]
        self.candidate_ids: list[Tensor] = []  # a step: [B, M]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        whole = torch.log_softmax(scores[:, : self._vocabulary_size].float() / self._temperature, dim=-1)
        self.candidate_ids.append(whole.topk(self._candidates, dim=-1).indices.to(torch.int32))
        drawn_from = whole if self._nucleus is None else self._nucleus(input_ids, whole)  # pyright: ignore
        # In float64: the distribution function of a large vocabulary has steps that float32 would swallow.
        cumulative = drawn_from.double().exp().cumsum(-1)
        wanted = self._uniforms[:, len(self.logprobs), None] * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, wanted, right=True).clamp_(max=self._vocabulary_size - 1)
        self.logprobs.append(whole.gather(1, drawn).squeeze(1))
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)


class _GiveUp(StoppingCriteria):
    """Ends all answers where they are once somebody asks to stop; they are thrown away."""

    def __init__(self, stop: Stopping) -> None:
        self._stop = stop

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(input_ids),), self._stop(), device=input_ids.device)


class _StopStrings(StoppingCriteria):
    """Ends an answer whose text holds one of `stop`, and notes after how many tokens [B].

    transformers' own stop strings need a tokenizer that can spell them, which not every one can; this looks at
    the decoded text. A token adds at least one byte, so the last tokens, as many as the longest string has
    bytes, hold any string that has just been completed.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...], prompt_width: int, sequences: int) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._prompt_width = prompt_width
        self._window = max(len(text.encode()) for text in stop) + 1
        self.lengths: list[int | None] = [None] * sequences

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        response = input_ids[:, self._prompt_width :]
        texts = self._tokenizer.batch_decode(response[:, -self._window :])
        for index, text in enumerate(texts):
            if self.lengths[index] is None and any(stop in text for stop in self._stop):
                self.lengths[index] = response.shape[1]
        return torch.tensor([length is not None for length in self.lengths], device=input_ids.device)


class TransformersSampler:
    """Samples with `model.generate`, in lots of `config.batch_size`.

    candidates: M, how many of the student's own most likely tokens to note at each position. generating: entered
    around all lots of a `sample`; a sharded model needs it (see `student_trainer.parallel`).
    """

    owns_weights = False

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        config: RolloutConfig,
        *,
        vocabulary_size: int,
        candidates: int,
        generating: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._config = config
        self._vocabulary_size = vocabulary_size
        self._candidates = min(candidates, vocabulary_size)
        self._generating = generating
        self._eos_ids = eos_ids(model, tokenizer)

    def sample(
        self, prompts: Sequence[Prompt], answers: int, *, seed: int, stop: Stopping = never
    ) -> Iterator[list[Rollout]]:
        """See `Sampler`."""
        # Prompts of like length together: less padding. The sort is stable, so the order is deterministic.
        queue = sorted(
            ((prompt, answer) for prompt in prompts for answer in range(answers)), key=lambda e: len(e[0].token_ids)
        )
        size = self._config.batch_size
        with self._generating():
            for start in range(0, len(queue), size):
                if stop():
                    return
                lot = queue[start : start + size]
                seeds = [stream_seed(seed, prompt, answer) for prompt, answer in lot]
                rollouts = self._generate([prompt for prompt, _ in lot], seeds, stop)
                if stop():
                    return
                yield rollouts

    def close(self) -> None:
        """Nothing to end."""

    @torch.no_grad()
    def _generate(self, prompts: list[Prompt], seeds: list[list[int]], stop: Stopping) -> list[Rollout]:
        config = self._config
        width = max(len(prompt.token_ids) for prompt in prompts)
        pad_id = self._pad_id()
        input_ids = torch.full((len(prompts), width), pad_id)
        mask = torch.zeros_like(input_ids)
        for index, prompt in enumerate(prompts):
            input_ids[index, width - len(prompt.token_ids) :] = torch.tensor(prompt.token_ids)
            mask[index, width - len(prompt.token_ids) :] = 1
        device = self._model.device
        drawer = _Drawer(
            torch.from_numpy(_uniforms(seeds, config.max_new_tokens)).to(device),
            self._vocabulary_size,
            config.temperature,
            config.top_p,
            self._candidates,
        )
        generation = GenerationConfig(
            do_sample=False,  # the drawer draws
            max_new_tokens=config.max_new_tokens,
            eos_token_id=sorted(self._eos_ids),
            pad_token_id=pad_id,
        )
        criteria: list[StoppingCriteria] = [_GiveUp(stop)]
        strings = _StopStrings(self._tokenizer, config.stop, width, len(prompts)) if config.stop else None
        with _as_sampler(self._model):
            sequences = self._model.generate(
                input_ids=input_ids.to(device),
                attention_mask=mask.to(device),
                generation_config=generation,
                logits_processor=LogitsProcessorList([drawer]),
                stopping_criteria=StoppingCriteriaList(criteria + ([strings] if strings else [])),
            )
        stops: list[int | None] = strings.lengths if strings else [None] * len(prompts)
        return self._rollouts(prompts, sequences[:, width:].cpu(), drawer, stops)

    def _rollouts(
        self, prompts: list[Prompt], responses: Tensor, drawer: _Drawer, stops: list[int | None]
    ) -> list[Rollout]:
        logprobs = torch.stack(drawer.logprobs, dim=1).cpu().numpy()  # [B, T]
        candidates = torch.stack(drawer.candidate_ids, dim=1).cpu().numpy()  # [B, T, M]
        tokens = responses.numpy().astype(np.int32)  # [B, T]
        rollouts = []
        for index, prompt in enumerate(prompts):
            length, finished = self._length(tokens[index], stops[index])
            rollouts.append(
                Rollout(
                    prompt=prompt,
                    response_ids=tokens[index, :length],
                    sampler_logprobs=logprobs[index, :length],
                    candidate_ids=candidates[index, :length],
                    text=self._tokenizer.decode(tokens[index, :length], skip_special_tokens=True),
                    finished=finished,
                )
            )
        return rollouts

    def _length(self, tokens: np.ndarray, stop: int | None) -> tuple[int, bool]:
        """Tokens up to and with the one that ended the answer, and whether one did."""
        ends = np.flatnonzero(np.isin(tokens, sorted(self._eos_ids)))
        ended = [int(end) + 1 for end in ends[:1]] + ([stop] if stop is not None else [])
        return (min(ended), True) if ended else (len(tokens), False)

    def _pad_id(self) -> int:
        pad_id = self._tokenizer.pad_token_id
        return pad_id if pad_id is not None else min(self._eos_ids)


def _uniforms(seeds: list[list[int]], length: int) -> NDArray[np.float64]:
    """[B, length] in [0, 1): row i from seeds[i] alone."""
    return np.stack([np.random.default_rng(seed).random(length) for seed in seeds])


@contextlib.contextmanager
def _as_sampler(model: Any) -> Generator[None]:
    """Evaluation mode and none of the model's own generation settings.

    `generate` fills what its configuration leaves open from the model's (a repetition penalty, say), which
    would draw from another distribution than the one whose log-probabilities are noted.
    """
    was_training, configured = model.training, model.generation_config
    model.eval()
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = configured
        model.train(was_training)


def eos_ids(model: Any, tokenizer: Any) -> set[int]:
    """Ids that end an answer: the tokenizer's, and those of the model's generation configuration."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    found: set[int] = {configured} if isinstance(configured, int) else set(configured or ())
    if tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    if not found:
        raise ValueError("neither tokenizer nor generation_config has an end-of-sequence token; set eos_token")
    return found
