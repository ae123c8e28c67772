"""The student's own answers. `Sampler` is the seam; here is the one that uses transformers' `generate`.

Every answer has a stream of random numbers of its own, one number a token, made from the seed, its prompt and its
place among the answers to it. So what is drawn depends neither on the lots in which answers are generated nor on
the number of processes that share them (but for rounding of the logits, which can turn a draw that falls on the edge
between two tokens).
"""

import contextlib
import hashlib
import queue
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
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
from student_trainer.memory import DoesNotFit, is_out_of_memory
from student_trainer.prompts import Prompt
from student_trainer.stopping import Stopping, never

_LOOK_EVERY = 16  # tokens


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
        self.drawn = 0  # tokens of each answer so far
        self.logprobs = uniforms.new_empty(uniforms.shape, dtype=torch.float32)  # [B, T]
        self.candidate_ids = uniforms.new_empty((*uniforms.shape, candidates), dtype=torch.int32)  # [B, T, M]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        whole = torch.log_softmax(scores[:, : self._vocabulary_size].float() / self._temperature, dim=-1)
        drawn_from = whole if self._nucleus is None else self._nucleus(input_ids, whole)  # pyright: ignore
        # In float64: the distribution function of a large vocabulary has steps that float32 would swallow.
        cumulative = drawn_from.double().exp().cumsum(-1)
        wanted = self._uniforms[:, self.drawn, None] * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, wanted, right=True).clamp_(max=self._vocabulary_size - 1)
        self.logprobs[:, self.drawn] = whole.gather(1, drawn).squeeze(1)
        self.candidate_ids[:, self.drawn] = whole.topk(self.candidate_ids.shape[2], dim=-1).indices.to(torch.int32)
        self.drawn += 1
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)


class _Ended(StoppingCriteria):
    """Notices answers that have ended while others go on, and ends all of them once somebody asks to stop.

    report(rows, tokens): called with the answers that newly ended and the responses so far [B, t]. Looks every few
    tokens only, because looking makes the host wait for the device.
    """

    def __init__(
        self, eos_ids: set[int], prompt_width: int, stop: Stopping, report: Callable[[list[int], Tensor], None]
    ) -> None:
        self._eos_ids = sorted(eos_ids)
        self._prompt_width = prompt_width
        self._stop = stop
        self._report = report
        self._looked_at = 0
        self._ended: set[int] = set()

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        response = input_ids[:, self._prompt_width :]
        if response.shape[1] - self._looked_at >= _LOOK_EVERY:
            new = response[:, self._looked_at :]
            found = torch.isin(new, torch.tensor(self._eos_ids, device=new.device)).any(1).nonzero()[:, 0].tolist()
            self._looked_at = response.shape[1]
            rows = [row for row in found if row not in self._ended]
            self._ended.update(rows)
            if rows:
                self._report(rows, response)
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

    A thread of its own generates, while the caller deals with the answers that have ended: they are handed over
    while others of their lot go on. (An answer that a stop string ended comes with the end of its lot.) The model
    must not be changed between two answers of one `sample`.

    candidates: M, how many of the student's own most likely tokens to note at each position. generating: entered in
    the thread around all lots of a `sample`; a sharded model needs it (see `student_trainer.parallel`).
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
        self._executor = ThreadPoolExecutor(1, "generate")

    def sample(
        self, prompts: Sequence[Prompt], answers: int, *, seed: int, stop: Stopping = never
    ) -> Iterator[list[Rollout]]:
        """See `Sampler`."""
        # Prompts of like length together: less padding. The sort is stable, so the order is deterministic.
        wanted = sorted(
            ((prompt, answer) for prompt in prompts for answer in range(answers)), key=lambda e: len(e[0].token_ids)
        )
        abandoned = False
        ended: queue.SimpleQueue[list[Rollout] | None] = queue.SimpleQueue()

        def generate() -> None:
            try:
                with self._generating():
                    for start in range(0, len(wanted), self._config.batch_size):
                        if abandoned or stop():
                            return
                        lot = wanted[start : start + self._config.batch_size]
                        seeds = [stream_seed(seed, prompt, answer) for prompt, answer in lot]
                        self._generate([prompt for prompt, _ in lot], seeds, lambda: abandoned or stop(), ended.put)
            finally:
                ended.put(None)

        generation = self._executor.submit(generate)
        try:
            while (rollouts := ended.get()) is not None:
                if stop():
                    return
                yield rollouts
            generation.result()  # raises what ended it
        finally:
            abandoned = True  # the caller may have had enough
            wait([generation])

    def close(self) -> None:
        """Ends the thread."""
        self._executor.shutdown(wait=False)

    @torch.no_grad()
    def _generate(
        self,
        prompts: list[Prompt],
        seeds: list[list[int]],
        stop: Stopping,
        hand_over: Callable[[list[Rollout]], None],
    ) -> None:
        """One lot. Nothing more is handed over once `stop()` is true."""
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
        handed: set[int] = set()
        strings = _StopStrings(self._tokenizer, config.stop, width, len(prompts)) if config.stop else None

        def report(rows: list[int], responses: Tensor) -> None:
            handed.update(rows)
            stops: list[int | None] = [strings.lengths[row] if strings else None for row in rows]
            hand_over(self._rollouts([prompts[row] for row in rows], rows, responses, drawer, stops))

        criteria: list[StoppingCriteria] = [*([strings] if strings else []), _Ended(self._eos_ids, width, stop, report)]
        try:
            with _as_sampler(self._model):
                sequences = self._model.generate(
                    input_ids=input_ids.to(device),
                    attention_mask=mask.to(device),
                    generation_config=generation,
                    logits_processor=LogitsProcessorList([drawer]),
                    stopping_criteria=StoppingCriteriaList(criteria),
                )
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise DoesNotFit(
                f"{len(prompts)} answers of up to {config.max_new_tokens} tokens to prompts of up to {width} did not "
                f"fit into memory; lower rollout.batch_size (now {config.batch_size}). ({str(error).splitlines()[0]})"
            ) from error
        rest = [row for row in range(len(prompts)) if row not in handed]
        if rest and not stop():
            report(rest, sequences[:, width:])

    def _rollouts(
        self, prompts: list[Prompt], rows: list[int], responses: Tensor, drawer: _Drawer, stops: list[int | None]
    ) -> list[Rollout]:
        """The answers at `rows` of `responses` [B, t]."""
        where = torch.tensor(rows, device=responses.device)
        made = responses.shape[1]
        tokens = responses[where].cpu().numpy().astype(np.int32)  # [R, t]
        logprobs = drawer.logprobs[where, :made].cpu().numpy()
        candidates = drawer.candidate_ids[where, :made].cpu().numpy()  # [R, t, M]
        rollouts = []
        for index, prompt in enumerate(prompts):
            length, finished = self._length(tokens[index], stops[index])
            rollouts.append(
                Rollout(
                    prompt=prompt,
                    response_ids=tokens[index, :length].copy(),
                    sampler_logprobs=logprobs[index, :length].copy(),
                    candidate_ids=candidates[index, :length].copy(),
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
