"""Which archived answers a step learns from, and which archives a run refuses."""

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from stillhouse.archive import Archive, ArchiveError, ArchiveStats
from stillhouse.archive_stores import LocalStore
from stillhouse.codec import ScoreTask
from stillhouse.vocabulary import vocabulary_digest
from student_trainer.batch import Rollout, candidates_for_teacher
from student_trainer.config import ConfigError, RunConfig, changed_keys, load_config, plain_config
from student_trainer.loop import _archive_figures
from student_trainer.offline import Offline, open_offline
from student_trainer.processes import Processes
from student_trainer.prompts import Prompt
from student_trainer.scoring import answer_facts
from student_trainer.stopping import Stopped
from tests.fakes import BigramTeacher

VOCABULARY = {f"w{index}": index for index in range(19)}
PROMPTS = ((3, 4), (5, 6, 7))


class _Tokenizer:
    def get_vocab(self) -> dict[str, int]:
        return VOCABULARY

    def decode(self, ids: Any, **_: Any) -> str:
        return " ".join(f"w{index}" for index in ids)


def _rollout(prompt: tuple[int, ...], number: int, tokens: int = 3) -> Rollout:
    rng = np.random.default_rng([number, *prompt])
    return Rollout(
        prompt=Prompt("online", "", None, prompt, None, {}),
        response_ids=rng.integers(3, 19, tokens).astype(np.int32),
        sampler_logprobs=rng.normal(-1.0, 0.5, tokens).astype(np.float32),
        candidate_ids=rng.integers(0, 19, (tokens, 2)).astype(np.int32),
        text="",
        finished=number % 2 == 0,
    )


def _record(folder: Path, rollout: Rollout, *, facts: dict[str, Any] | None = None, **asked: Any) -> str:
    """Adds an entry as a run would, but for what `asked` of the request and `facts` say; its key."""
    task = ScoreTask(
        **(
            {
                "model": "bigram",
                "token_ids": rollout.token_ids,
                "score_start": len(rollout.prompt.token_ids),
                "top_k": 4,
                "candidate_ids": candidates_for_teacher(rollout),
                "expected_vocabulary_digest": vocabulary_digest(VOCABULARY),
            }
            | asked
        )
    )
    archive = Archive(LocalStore(folder))
    before = set(archive.keys()) if folder.exists() else set()
    archive.record(task, BigramTeacher().score(task), answer_facts(rollout, 1.0) if facts is None else facts)
    (key,) = set(archive.keys()) - before
    return key


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Five answers to the first prompt, two to the second."""
    for prompt, count in zip(PROMPTS, (5, 2), strict=True):
        for number in range(count):
            _record(tmp_path / "archive", _rollout(prompt, number))
    return tmp_path / "archive"


def _config(archive: Path, **changes: Any) -> RunConfig:
    data = {
        "run_dir": "x",
        "steps": 1,
        "student": {"model": "m"},
        "objective": {"recipe": "reverse_kl"},
        "offline": {"archive": str(archive)} | changes.pop("offline", {}),
    }
    return RunConfig.model_validate(data | changes)


def _open(archive: Path, **changes: Any) -> Offline:
    return open_offline(_config(archive, **changes), _Tokenizer())


def _sampled(offline: Offline, answers: int, seed: int) -> dict[str, list[list[int]]]:
    lots = list(offline.sampler.sample(offline.problems.prompts, answers, seed=seed))
    return {lot[0].prompt.key: [rollout.response_ids.tolist() for rollout in lot] for lot in lots}


def test_entries_with_the_same_prompt_tokens_are_the_answers_to_one_prompt(archive):
    offline = _open(archive)
    prompts = {prompt.token_ids: prompt for prompt in offline.problems.prompts}
    assert set(prompts) == set(PROMPTS)
    assert prompts[3, 4].text == "w3 w4" and prompts[3, 4].key.startswith("archive/")
    sampled = _sampled(offline, 99, seed=0)
    for tokens, count in zip(PROMPTS, (5, 2), strict=True):
        wanted = sorted(_rollout(tokens, number).response_ids.tolist() for number in range(count))
        assert sorted(sampled[prompts[tokens].key]) == wanted


def test_an_archived_answer_is_the_rollout_that_was_recorded(archive):
    offline = _open(archive)
    originals = {
        _rollout(PROMPTS[0], number).response_ids.tobytes(): _rollout(PROMPTS[0], number) for number in range(5)
    }
    prompt = next(prompt for prompt in offline.problems.prompts if prompt.token_ids == PROMPTS[0])
    (lot,) = offline.sampler.sample([prompt], 5, seed=0)
    for rollout in lot:
        original = originals[rollout.response_ids.tobytes()]
        np.testing.assert_array_equal(rollout.sampler_logprobs, original.sampler_logprobs)
        np.testing.assert_array_equal(rollout.candidate_ids, original.candidate_ids)
        assert rollout.finished == original.finished
        assert rollout.text == " ".join(f"w{index}" for index in original.response_ids)
        task = ScoreTask("bigram", original.token_ids, 2, 4, candidates_for_teacher(original))
        scores, right = offline.scorer.submit(rollout).result(), BigramTeacher().score(task)
        np.testing.assert_array_equal(scores.candidate_logprobs, right.candidate_logprobs)
        np.testing.assert_array_equal(scores.top_logprobs, right.top_logprobs)


def test_which_answers_are_drawn_is_the_seeds_to_say(archive):
    offline = _open(archive)
    drawn = [_sampled(offline, 2, seed) for seed in range(12)]
    assert drawn == [_sampled(_open(archive), 2, seed) for seed in range(12)]
    for sampled in drawn:
        assert sorted(len(answers) for answers in sampled.values()) == [2, 2]
    key = next(prompt.key for prompt in offline.problems.prompts if prompt.token_ids == PROMPTS[0])
    seen = {tuple(answer) for sampled in drawn for answer in sampled[key]}
    assert len(seen) == 5  # other steps draw others
    assert all(len({tuple(answer) for answer in sampled[key]}) == 2 for sampled in drawn)  # never one twice


def test_sampling_and_reading_can_be_given_up(archive):
    offline = _open(archive)
    assert list(offline.sampler.sample(offline.problems.prompts, 2, seed=0, stop=lambda: True)) == []
    with pytest.raises(Stopped):
        open_offline(_config(archive), _Tokenizer(), stop=lambda: True)


def test_an_answer_that_was_never_scored_is_an_error_not_a_guess(archive):
    with pytest.raises(ArchiveError, match=r"had the scores of an answer when the run began and does not give it now"):
        _open(archive).scorer.submit(_rollout(PROMPTS[0], 77)).result()


def test_nobody_judged_an_archived_answer(archive):
    problems = _open(archive).problems
    assert np.isnan(problems.judge(problems.prompts[0], "w3"))
    assert not np.nan >= problems.pass_threshold


@pytest.mark.parametrize(
    ("facts", "asked"),
    [
        ({}, {}),
        ({"finished": None}, {}),
        ({"rollout_temperature": "1"}, {}),
        ({"sampler_logprobs": "AAAA"}, {}),
        ({"sampler_logprobs": "no base64!"}, {}),
        ({"sampler_logprobs": 3}, {}),
        ({"sampler_logprobs": base64.b64encode(np.full(3, np.nan, "<f4").tobytes()).decode()}, {}),
        (None, {"candidate_ids": None}),
        (None, {"candidate_ids": np.zeros((3, 3), np.int32)}),
    ],
)
def test_entries_that_no_trainer_recorded_are_left_out_and_told(archive, capsys, facts, asked):
    before = _open(archive).digest
    rollout = _rollout(PROMPTS[0], 50)
    kept = None if facts is None else (answer_facts(rollout, 1.0) | facts if facts else {})
    _record(archive, rollout, facts=kept, **asked)
    capsys.readouterr()
    assert _open(archive).digest == before
    assert "left out 0 corrupt entries and 1 that a trainer did not record" in capsys.readouterr().err


def test_which_entries_there_are_is_what_a_resumed_run_is_compared_by(archive, tmp_path):
    before = _open(archive).digest
    _record(archive, _rollout(PROMPTS[0], 60))
    assert _open(archive).digest != before


OTHER_KINDS = [
    ("temperature", {"temperature": 0.5}, "0.5 (1 entries), 1.0 (7 entries)"),
    ("top_k", {"top_k": 5}, "4 (7 entries), 5 (1 entries)"),
    ("wire_dtype", {"half_precision": True}, "'float16' (1 entries), 'float32' (7 entries)"),
]


@pytest.mark.parametrize(("name", "asked", "counts"), OTHER_KINDS)
def test_a_mix_is_refused_with_what_there_is_and_the_key_that_chooses(archive, name, asked, counts):
    _record(archive, _rollout(PROMPTS[0], 50), **asked)
    with pytest.raises(ConfigError) as caught:
        _open(archive)
    assert str(caught.value).endswith(f"and a run learns from one; set offline.{name} to one of {counts}")
    chosen = {"temperature": 1.0, "top_k": 4, "wire_dtype": "float32"}[name]
    assert len(_sampled(_open(archive, offline={name: chosen}), 99, seed=0)) == 2
    other = {"temperature": 2.0, "top_k": 9}.get(name)
    if other is not None:
        with pytest.raises(ConfigError, match=f"offline.{name}: {other} is of no entry in "):
            _open(archive, offline={name: other})


def test_a_mix_of_several_things_names_all_of_them(archive):
    rollout = _rollout(PROMPTS[0], 50)
    _record(archive, rollout, top_k=5, facts=answer_facts(rollout, 0.5))
    with pytest.raises(
        ConfigError, match=r"set offline.top_k to .*, and offline.rollout_temperature to one of 0.5 \(1"
    ):
        _open(archive)
    _open(archive, offline={"top_k": 4})  # one choice settles both


def test_scores_of_other_ids_are_refused(archive):
    _record(archive, _rollout(PROMPTS[0], 50), expected_vocabulary_digest="other")
    with pytest.raises(ConfigError, match=r"student.model: its token ids do not mean .* against other\)"):
        _open(archive)
    _record(archive, _rollout(PROMPTS[0], 51), expected_vocabulary_digest="")


def test_temperatures_and_lengths_must_be_those_of_the_run(archive):
    with pytest.raises(ConfigError, match=r"objective.temperature: 0.5, but the archived scores were made at 1.0"):
        _open(archive, objective={"recipe": "reverse_kl", "temperature": 0.5})
    with pytest.raises(ConfigError, match=r"rollout.temperature: 0.5, but the archived answers were drawn at 1.0"):
        _open(archive, objective={"recipe": "reverse_kl", "temperature": 1.0}, rollout={"temperature": 0.5})
    with pytest.raises(ConfigError, match=r"rollout.max_new_tokens: 2, but the longest archived answer has 3 tokens"):
        _open(archive, rollout={"max_new_tokens": 2})


def test_in_which_order_a_disk_lists_entries_changes_nothing(archive, monkeypatch):
    before = _open(archive)
    real = LocalStore.keys
    monkeypatch.setattr(LocalStore, "keys", lambda self: iter(sorted(real(self), reverse=True)))
    after = _open(archive)
    assert after.digest == before.digest
    assert _sampled(after, 2, seed=3) == _sampled(before, 2, seed=3)


def test_a_steps_hits_are_the_scores_that_nobody_was_asked_for():
    before = ArchiveStats(hits=1, misses=1, corrupt=1, shared=1, write_failures=1)
    now = ArchiveStats(hits=4, misses=3, corrupt=2, shared=6, write_failures=2)
    assert _archive_figures(Processes(), before, now) == {
        "archive_hits": 8,
        "archive_misses": 2,
        "archive_corrupt": 1,
        "archive_write_failures": 1,
    }


def test_a_run_without_prompts_is_refused_unless_it_is_offline(tmp_path):
    data = plain_config(_config(tmp_path))
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(data | {"offline": None, "teacher": {"addresses": ["a:1"]}}))
    with pytest.raises(ConfigError, match="prompts: is missing; add it"):
        load_config(path, [])
    path.write_text(yaml.safe_dump(data))
    assert load_config(path, []).prompts is None


def test_where_an_archive_lies_may_change_and_what_is_learnt_from_it_may_not(tmp_path):
    then = plain_config(_config(tmp_path))
    assert changed_keys(then, plain_config(_config(tmp_path / "moved"))) == []
    now = plain_config(_config(tmp_path, offline={"top_k": 5}))
    assert changed_keys(then, now) == ["offline.top_k: None then, 5 now"]
    online = {"offline": None, "prompts": {"source": "reasoning_gym", "dataset": "chain_sum"}}
    plain = _config(tmp_path).model_dump() | online | {"teacher": {"addresses": ["a:1"]}}
    kept = plain | {"teacher": {"addresses": ["a:1"], "archive": {"url": "there", "max_bytes": 10**9}}}
    configs = [plain_config(RunConfig.model_validate(data)) for data in (plain, kept)]
    assert changed_keys(*configs) == []
