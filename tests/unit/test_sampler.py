"""The sampler draws from the distribution it reports, and reports it exactly."""

import dataclasses
import functools
import itertools
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from lm_head import load_causal_lm
from student_trainer.config import RolloutConfig
from student_trainer.prompts import Prompt
from student_trainer.sampler import TransformersSampler
from tests.models import FAMILIES, VOCABULARY_SIZE, save_model

EOS = 2


def _prompt(key: str, ids: list[int]) -> Prompt:
    return Prompt(key, key, None, tuple(ids), None, {})


PROMPTS = [_prompt("a", [5, 6, 7]), _prompt("b", [9]), _prompt("c", [11, 12, 13, 14, 15, 16])]


def _sampler(directory: Path, candidates: int = 3, **config) -> TransformersSampler:
    model = load_causal_lm(directory, torch.float32).train()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    return TransformersSampler(
        model, tokenizer, RolloutConfig(**config), vocabulary_size=VOCABULARY_SIZE, candidates=candidates
    )


def _sample(sampler: TransformersSampler, answers: int = 4, seed: int = 1):
    return [rollout for lot in sampler.sample(PROMPTS, answers, seed=seed) for rollout in lot]


@functools.cache
def _double(directory: Path):
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    ).eval()


def _reference(directory: Path, rollout, temperature: float) -> np.ndarray:
    """Log-probabilities [N, V] of the whole vocabulary in float64, one unpadded sequence at a time."""
    with torch.no_grad():
        logits = _double(directory)(input_ids=torch.from_numpy(rollout.token_ids.astype(np.int64))[None]).logits[0]
    start = len(rollout.prompt.token_ids)
    return torch.log_softmax(logits[start - 1 : -1, :VOCABULARY_SIZE] / temperature, dim=-1).numpy()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_reported_logprobs_and_candidates_are_those_of_the_model(tmp_path, family, temperature):
    directory = save_model(tmp_path, family)
    rollouts = _sample(_sampler(directory, max_new_tokens=6, temperature=temperature), answers=2)
    assert len(rollouts) == 6
    for rollout in rollouts:
        reference = _reference(directory, rollout, temperature)
        drawn = reference[np.arange(len(reference)), rollout.response_ids]
        np.testing.assert_allclose(rollout.sampler_logprobs, drawn, atol=1e-4)
        assert rollout.candidate_ids.shape == (len(drawn), 3)
        best = np.sort(reference, axis=1)[:, ::-1][:, :3]
        np.testing.assert_allclose(np.take_along_axis(reference, rollout.candidate_ids, axis=1), best, atol=1e-4)


def test_draws_follow_the_distribution(tmp_path):
    """First tokens of many answers, against the exact first-token distribution (chi-squared, fixed seed)."""
    directory = save_model(tmp_path)
    sampler = _sampler(directory, max_new_tokens=1, batch_size=1000)
    prompt = PROMPTS[0]
    drawn = [r.response_ids[0] for lot in sampler.sample([prompt], 4000, seed=3) for r in lot]
    rollout = next(iter(sampler.sample([prompt], 1, seed=0)))[0]
    expected = 4000 * np.exp(_reference(directory, rollout, 1.0)[0])
    counts = np.bincount(drawn, minlength=VOCABULARY_SIZE).astype(float)
    likely = expected >= 5
    assert likely.sum() >= 5
    statistic = ((counts[likely] - expected[likely]) ** 2 / expected[likely]).sum()
    assert statistic < likely.sum() + 5 * np.sqrt(2 * likely.sum())


def test_padding_rows_of_the_head_are_never_drawn(tmp_path):
    directory = save_model(tmp_path, head_rows=192)
    rollouts = _sample(_sampler(directory, max_new_tokens=40), answers=16)
    assert max(rollout.response_ids.max() for rollout in rollouts) < VOCABULARY_SIZE


def test_the_same_seed_gives_the_same_rollouts_and_another_one_others(tmp_path):
    sampler = _sampler(save_model(tmp_path), max_new_tokens=8)
    first, again, other = _sample(sampler, seed=1), _sample(sampler, seed=1), _sample(sampler, seed=2)
    assert [r.response_ids.tolist() for r in first] == [r.response_ids.tolist() for r in again]
    assert [r.response_ids.tolist() for r in first] != [r.response_ids.tolist() for r in other]


def test_sampling_leaves_the_random_state_and_the_mode_of_the_model_alone(tmp_path):
    sampler = _sampler(save_model(tmp_path), max_new_tokens=4)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    _sample(sampler)
    assert torch.equal(torch.rand(3), expected)
    assert sampler._model.training


def test_lots_of_any_size_hold_every_answer_once(tmp_path):
    sampler = _sampler(save_model(tmp_path), max_new_tokens=3, batch_size=5)
    lots = list(sampler.sample(PROMPTS, 4, seed=0))
    keys = [rollout.prompt.key for lot in lots for rollout in lot]
    assert sorted(keys) == ["a"] * 4 + ["b"] * 4 + ["c"] * 4


def test_what_is_drawn_does_not_depend_on_the_lots(tmp_path):
    directory = save_model(tmp_path)
    drawn = []
    for size in (1, 5, 12):
        rollouts = _sample(_sampler(directory, max_new_tokens=6, batch_size=size))
        drawn.append(sorted((r.prompt.key, r.response_ids.tolist()) for r in rollouts))
    assert drawn[0] == drawn[1] == drawn[2]


def test_answers_are_handed_over_when_they_end_while_others_go_on(tmp_path):
    """A consumer that waits: when it gets the first answers, the others are not there yet."""
    directory = _ends_early(tmp_path)
    sampler = _sampler(directory, max_new_tokens=400)
    lots = list(sampler.sample(PROMPTS, 16, seed=1))
    lengths = [[len(rollout.response_ids) for rollout in lot] for lot in lots]
    assert len(lots) > 2 and sum(map(len, lots)) == 48
    # Looked at every 16 tokens: what comes earlier is shorter.
    assert all(max(one) <= max(other) + 16 for one, other in itertools.pairwise(lengths))
    for rollout in itertools.chain.from_iterable(lots):
        reference = _reference(directory, rollout, 1.0)
        drawn = reference[np.arange(len(reference)), rollout.response_ids]
        np.testing.assert_allclose(rollout.sampler_logprobs, drawn, atol=2e-4)


def test_it_gives_up_within_a_token_once_it_is_asked_to(tmp_path):
    sampler = _sampler(save_model(tmp_path), max_new_tokens=400)
    asked = threading.Event()
    threading.Timer(0.3, asked.set).start()
    rollouts = [r for lot in sampler.sample(PROMPTS, 200, seed=0, stop=asked.is_set) for r in lot]
    assert all(rollout.finished for rollout in rollouts) and len(rollouts) < 600


def test_an_error_while_generating_is_the_callers(tmp_path):
    sampler = _sampler(save_model(tmp_path), max_new_tokens=4)
    sampler._model.generate = lambda **_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        _sample(sampler)


def test_a_caller_that_has_had_enough_leaves_no_generation_behind(tmp_path):
    sampler = _sampler(save_model(tmp_path), max_new_tokens=200, batch_size=1)
    for lot in sampler.sample(PROMPTS, 1000, seed=0):
        assert lot
        break
    assert len(_sample(sampler, answers=1)) == 3  # the thread is free again


def _ends_early(folder: Path) -> Path:
    directory = save_model(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        model.lm_head.weight[EOS] += 0.15 * model.lm_head.weight.abs().mean() * torch.sign(model.lm_head.weight[5])
    model.save_pretrained(directory)
    return directory


def test_an_answer_ends_with_its_end_token_or_counts_as_truncated(tmp_path):
    directory = _ends_early(tmp_path)
    rollouts = _sample(_sampler(directory, max_new_tokens=30), answers=64)
    finished = [rollout for rollout in rollouts if rollout.finished]
    truncated = [rollout for rollout in rollouts if not rollout.finished]
    assert finished and truncated
    for rollout in finished:
        assert rollout.response_ids[-1] == EOS and EOS not in rollout.response_ids[:-1]
    for rollout in truncated:
        assert len(rollout.response_ids) == 30 and EOS not in rollout.response_ids


def test_a_stop_string_ends_the_answer_and_stays_in_it(tmp_path):
    sampler = _sampler(save_model(tmp_path), max_new_tokens=40, stop=("w7", "w33"))
    rollouts = _sample(sampler, answers=32)
    stopped = [r for r in rollouts if r.finished and r.response_ids[-1] != EOS]
    assert stopped
    for rollout in stopped:
        words = sampler._tokenizer.decode(rollout.response_ids)
        before = sampler._tokenizer.decode(rollout.response_ids[:-1])
        assert any(stop in words for stop in ("w7", "w33"))
        assert not any(stop in before for stop in ("w7", "w33"))


def test_generation_settings_of_the_model_do_not_change_what_is_drawn(tmp_path):
    directory = save_model(tmp_path)
    plain = _sample(_sampler(directory, max_new_tokens=8))
    sampler = _sampler(directory, max_new_tokens=8)
    sampler._model.generation_config.repetition_penalty = 5.0
    sampler._model.generation_config.top_k = 1
    biased = _sample(sampler)
    assert [r.response_ids.tolist() for r in plain] == [r.response_ids.tolist() for r in biased]
    assert sampler._model.generation_config.repetition_penalty == 5.0


def test_top_p_draws_from_the_nucleus_and_reports_the_whole_distribution(tmp_path):
    directory = save_model(tmp_path)
    for rollout in _sample(_sampler(directory, max_new_tokens=6, top_p=0.5), answers=8):
        reference = _reference(directory, rollout, 1.0)
        drawn = reference[np.arange(len(reference)), rollout.response_ids]
        above = np.where(reference > drawn[:, None], np.exp(reference), 0).sum(axis=1)
        assert (above < 0.5 + 1e-5).all()
        np.testing.assert_allclose(rollout.sampler_logprobs, drawn, atol=1e-4)


def test_no_candidates_are_noted_when_none_are_wanted(tmp_path):
    rollouts = _sample(_sampler(save_model(tmp_path), candidates=0, max_new_tokens=4))
    assert all(rollout.candidate_ids.shape == (len(rollout.response_ids), 0) for rollout in rollouts)
    assert dataclasses.is_dataclass(rollouts[0])
