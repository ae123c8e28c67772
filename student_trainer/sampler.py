"""The student's own answers. `Sampler` is the seam; here is the one that uses transformers' `generate`."""

import contextlib
from collections.abc import Generator, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from student_trainer.batch import Rollout
from student_trainer.config import RolloutConfig
from student_trainer.prompts import Prompt


class Sampler(Protocol):
    """Makes answers with the student as it is now."""

    def sample(self, prompts: Sequence[Prompt], answers: int, *, seed: int) -> Iterator[list[Rollout]]:
        """`answers` rollouts for each prompt, handed over in lots as they end.

        The same seed, prompts and weights give the same rollouts. Lots come in any order; rollouts of one
        prompt are told apart by nothing but their place.
        """
        ...


class _Recorder(LogitsProcessor):
    """Notes what `generate` draws: log-probability of each token and the most likely tokens beside it.

    Sees the bare logits, before temperature and top-p. Holds one step's [B, V] log-probabilities, never all.
    Also takes away the ids beyond the vocabulary, which a padded head would let through.
    """

    def __init__(self, vocabulary_size: int, temperature: float, candidates: int) -> None:
        self._vocabulary_size = vocabulary_size
        self._temperature = temperature
        self._candidates = candidates
        self._last: Tensor | None = None
        self.logprobs: list[Tensor] = []  # a step: [B]
        self.candidate_ids: list[Tensor] = []  # a step: [B, M]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._note_drawn(input_ids)
        usable = scores[:, : self._vocabulary_size].float()
        self._last = torch.log_softmax(usable / self._temperature, dim=-1)
        self.candidate_ids.append(self._last.topk(self._candidates, dim=-1).indices.to(torch.int32))
        if scores.shape[1] > self._vocabulary_size:
            scores = scores.clone()
            scores[:, self._vocabulary_size :] = -torch.inf
        return scores

    def finish(self, sequences: Tensor) -> None:
        """Notes the last token drawn."""
        self._note_drawn(sequences)

    def _note_drawn(self, input_ids: Tensor) -> None:
        if self._last is not None:
            # A sequence that has ended is padded with an id of the vocabulary; those are cut away later.
            self.logprobs.append(self._last.gather(1, input_ids[:, -1:]).squeeze(1))


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

    candidates: M, how many of the student's own most likely tokens to note at each position.
    """

    def __init__(
        self, model: Any, tokenizer: Any, config: RolloutConfig, *, vocabulary_size: int, candidates: int
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._config = config
        self._vocabulary_size = vocabulary_size
        self._candidates = min(candidates, vocabulary_size)
        self._eos_ids = eos_ids(model, tokenizer)

    def sample(self, prompts: Sequence[Prompt], answers: int, *, seed: int) -> Iterator[list[Rollout]]:
        """See `Sampler`."""
        # Prompts of like length together: less padding. The sort is stable, so the order is deterministic.
        queue = sorted((prompt for prompt in prompts for _ in range(answers)), key=lambda p: len(p.token_ids))
        size = self._config.batch_size
        for start in range(0, len(queue), size):
            yield self._generate(queue[start : start + size], seed + start)

    @torch.no_grad()
    def _generate(self, prompts: list[Prompt], seed: int) -> list[Rollout]:
        config = self._config
        width = max(len(prompt.token_ids) for prompt in prompts)
        pad_id = self._pad_id()
        input_ids = torch.full((len(prompts), width), pad_id)
        mask = torch.zeros_like(input_ids)
        for index, prompt in enumerate(prompts):
            input_ids[index, width - len(prompt.token_ids) :] = torch.tensor(prompt.token_ids)
            mask[index, width - len(prompt.token_ids) :] = 1
        recorder = _Recorder(self._vocabulary_size, config.temperature, self._candidates)
        generation = GenerationConfig(
            do_sample=True,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=0,
            max_new_tokens=config.max_new_tokens,
            eos_token_id=sorted(self._eos_ids),
            pad_token_id=pad_id,
        )
        stop = _StopStrings(self._tokenizer, config.stop, width, len(prompts)) if config.stop else None
        with _as_sampler(self._model, seed):
            sequences = self._model.generate(
                input_ids=input_ids.to(self._model.device),
                attention_mask=mask.to(self._model.device),
                generation_config=generation,
                logits_processor=LogitsProcessorList([recorder]),
                stopping_criteria=StoppingCriteriaList([stop] if stop else []),
            )
        recorder.finish(sequences)
        stops: list[int | None] = stop.lengths if stop else [None] * len(prompts)
        return self._rollouts(prompts, sequences[:, width:].cpu(), recorder, stops)

    def _rollouts(
        self, prompts: list[Prompt], responses: Tensor, recorder: _Recorder, stops: list[int | None]
    ) -> list[Rollout]:
        logprobs = torch.stack(recorder.logprobs, dim=1).cpu().numpy()  # [B, T]
        candidates = torch.stack(recorder.candidate_ids, dim=1).cpu().numpy()  # [B, T, M]
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


@contextlib.contextmanager
def _as_sampler(model: Any, seed: int) -> Generator[None]:
    """Evaluation mode, a random state of its own, and none of the model's own generation settings.

    `generate` fills what its configuration leaves open from the model's (a repetition penalty, say), which
    would draw from another distribution than the one whose log-probabilities are noted.
    """
    was_training, configured = model.training, model.generation_config
    model.eval()
    model.generation_config = GenerationConfig()
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
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
