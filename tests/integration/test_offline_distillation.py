"""What a run records is enough to make it again without asking, and to distil from without a teacher."""

import dataclasses
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from stillhouse.archive import Archive
from stillhouse.archive_stores import LocalStore
from student_trainer import train as module
from student_trainer.cli import main
from student_trainer.config import ConfigError, load_config
from student_trainer.train import train
from tests.fakes import ROOT, FakeServer, child_environment
from tests.toy import ToyTeacher, write_config

TIMINGS = ("_s", "_ms", "_share", "tokens_per_s", "retries")
ONLINE = {
    "steps": 6,
    "objective": {"recipe": "reverse_kl"},
    "rollout": {"prompts_per_step": 6, "answers_per_prompt": 4, "max_new_tokens": 8},
}
EVALUATION = {"prompts": {}, "num_prompts": 4, "answers_per_prompt": 2, "k": [1]}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    """A folder with `run`, an online run, and `archive`, what it recorded. Its teacher is gone."""
    folder = tmp_path_factory.mktemp("recorded")
    with FakeServer(ToyTeacher()) as server:
        config = _online(folder, server.address, folder / "archive")
        train(load_config(config, []), folder)
        assert 0 < server.calls["Score"] <= 6 * 24
    return folder


def _online(folder: Path, address: str, archive: Path | None, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    teacher = {"addresses": [address], "top_k": 6, "candidates": 3, "start_deadline_s": 60.0, "deadline_s": 10.0}
    if archive is not None:
        teacher["archive"] = {"url": str(archive)}
    return write_config(folder, address, **(ONLINE | {"teacher": teacher} | changes))


def _offline(folder: Path, archive: Path | str, **changes: Any) -> Path:
    """A run's YAML with `archive` in place of teacher and prompts, under `folder`."""
    folder.mkdir(exist_ok=True)
    evaluated = changes.pop("evaluated", False)
    path = write_config(folder, None, **(ONLINE | {"offline": {"archive": str(archive)}} | changes))
    config = yaml.safe_load(path.read_text())
    prompts = config.pop("prompts")
    if evaluated:
        config["evaluation"] = EVALUATION | {"prompts": prompts}
    path.write_text(yaml.safe_dump(config))
    return path


def _train(path: Path, *overrides: str, resume: bool = False) -> dict[str, Any]:
    return train(load_config(path, list(overrides)), path.parent, resume=resume)


def _figures(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock says and what an archive saved."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in row.items() if not name.endswith(TIMINGS) and not name.startswith("archive_")}
        for row in rows
    ]


def _archive_figures(run: Path, name: str) -> list[int]:
    return [json.loads(line)[f"archive_{name}"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def _assert_same_run(one: Path, other: Path, steps: int = 6) -> None:
    assert _figures(one) == _figures(other)
    assert (one / "samples.jsonl").read_text() == (other / "samples.jsonl").read_text()
    ours, theirs = (
        transformers.AutoModelForCausalLM.from_pretrained(run / "checkpoints" / f"step-{steps}").state_dict()
        for run in (one, other)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def _entries(archive: Path) -> list[Path]:
    return sorted(archive.glob("?/?/*.score"))


# ---- the same run again


def test_an_archive_changes_nothing_of_a_run(recorded, tmp_path):
    with FakeServer(ToyTeacher()) as server:
        config = _online(tmp_path, server.address, None)
        _train(config)
    _assert_same_run(recorded / "run", tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows and not any(name.startswith("archive_") for row in rows for name in row)


def test_the_same_run_again_asks_the_teacher_nothing_and_ends_in_the_same_weights(recorded, tmp_path):
    with FakeServer(ToyTeacher()) as server:
        _train(_online(tmp_path, server.address, recorded / "archive"))
        assert server.calls["Score"] == 0
    _assert_same_run(recorded / "run", tmp_path / "run")
    assert _archive_figures(tmp_path / "run", "hits") == [24] * 6
    assert sum(_archive_figures(tmp_path / "run", "misses")) == 0
    before = recorded / "run"
    assert sum(_archive_figures(before, "misses")) == len(_entries(recorded / "archive"))


def test_of_a_damaged_archive_only_the_damaged_entries_are_scored_again(recorded, tmp_path):
    archive = tmp_path / "archive"
    shutil.copytree(recorded / "archive", archive)
    damaged = _entries(archive)[::10]
    for path in damaged:
        content = bytearray(path.read_bytes())
        content[len(content) // 3] ^= 16
        path.write_bytes(content)
    _entries(archive)[1].unlink()
    with FakeServer(ToyTeacher()) as server:
        _train(_online(tmp_path, server.address, archive))
        assert server.calls["Score"] == len(damaged) + 1
    _assert_same_run(recorded / "run", tmp_path / "run")
    assert sum(_archive_figures(tmp_path / "run", "corrupt")) == len(damaged)
    assert [path.read_bytes()[:8] for path in _entries(archive)] == [b"stillarc"] * len(_entries(recorded / "archive"))
    assert all(Archive.open(str(archive)).read(path.stem) is not None for path in damaged)  # whole again


def test_a_killed_run_that_goes_on_pays_for_no_score_twice(recorded, tmp_path):
    with FakeServer(ToyTeacher()) as server:
        config = _online(tmp_path, server.address, tmp_path / "archive")
        _train(config, "steps=3")
        # As a kill before the first checkpoint would: nothing is left of the run but its record.
        shutil.rmtree(tmp_path / "run")
        asked = server.calls["Score"]
        _train(config, resume=True)
        requests = [(request.token_ids.data, request.candidate_ids.data) for request in server.requests]
        assert len(set(requests)) == len(requests) > asked
    _assert_same_run(recorded / "run", tmp_path / "run")


def test_an_archive_may_be_added_when_a_run_is_resumed(recorded, tmp_path):
    with FakeServer(ToyTeacher()) as server:
        config = _online(tmp_path, server.address, None)
        _train(config, "steps=2")
        asked = server.calls["Score"]
        _train(config, f"teacher.archive.url={recorded / 'archive'}", resume=True)
        assert server.calls["Score"] == asked
    _assert_same_run(recorded / "run", tmp_path / "run")


@pytest.mark.parametrize(
    ("archive", "message"),
    [
        ("{url: ftp://x}", "teacher.archive: the archive's url 'ftp://x' is of no known kind"),
        ("{url: config.yaml/x}", "teacher.archive: config.yaml/x cannot be made: .*config.yaml is no directory"),
        ("{url: s3://b, max_bytes: 5}", "teacher.archive: max_bytes is 5 for s3://b"),
    ],
)
def test_an_archive_that_cannot_be_is_refused_before_anything_starts(tmp_path, monkeypatch, archive, message):
    config = _online(tmp_path, "127.0.0.1:9", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        _train(config, f"teacher.archive={archive}")
    assert not (tmp_path / "run").exists()


def _full(self: LocalStore, key: str, data: bytes, *, durable: bool) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_ends_no_run_and_is_told(recorded, tmp_path, monkeypatch):
    monkeypatch.setattr(LocalStore, "put", _full)
    with FakeServer(ToyTeacher()) as server:
        _train(_online(tmp_path, server.address, tmp_path / "archive"))
        assert sum(_archive_figures(tmp_path / "run", "write_failures")) == server.calls["Score"]
    _assert_same_run(recorded / "run", tmp_path / "run")


def test_a_full_disk_ends_a_run_that_must_be_recorded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(LocalStore, "put", _full)
    with FakeServer(ToyTeacher()) as server:
        config = _online(tmp_path, server.address, tmp_path / "archive")
        assert main(["train", str(config), "teacher.archive.on_write_failure=stop"]) == 1
    assert "student-trainer: an entry could not be written to" in capsys.readouterr().err


def test_a_runs_requests_pin_all_that_a_score_depends_on(tmp_path):
    with FakeServer(ToyTeacher()) as server:
        _train(_online(tmp_path, server.address, None), "steps=1")
        pins = {(r.expected_model_revision, r.expected_compute_dtype) for r in server.requests}
    assert pins == {("r1", "float64")}


# ---- without a teacher


def test_a_student_learns_from_the_archive_alone(recorded, tmp_path, capsys):
    config = _offline(tmp_path, recorded / "archive", steps=30, evaluated=True)
    summary = _train(config)
    rows = _figures(tmp_path / "run")
    for name in ("reverse_kl", "forward_kl"):
        start, end = rows[0][name], sum(row[name] for row in rows[-3:]) / 3
        assert 0 < end < 0.5 * start, (name, start, end)
    assert summary["teacher"] == {"model": "bigram", "revision": "r1"}
    assert summary["after"]["pass@1"] >= 0  # evaluated with answers of its own
    assert not {"reward", "pass_rate", "advantage_p50", "staleness", "sampler_gap"} & rows[0].keys()
    assert "off_policy_gap" in rows[0]
    sample = json.loads((tmp_path / "run" / "samples.jsonl").read_text().splitlines()[0])
    assert not {"reward", "passed", "advantage"} & sample.keys() and sample["teacher_logprobs"]
    assert "NaN" not in (tmp_path / "run" / "samples.jsonl").read_text()
    assert "answers to 12 prompts, scored by bigram r1" in capsys.readouterr().err


def test_the_first_step_learns_what_the_online_run_was_told(recorded, tmp_path):
    """With as many answers as there are, the scores are those that were recorded."""
    config = _offline(tmp_path, recorded / "archive", steps=1, samples_per_step=999)
    _train(config)
    told = {}
    for line in (recorded / "run" / "samples.jsonl").read_text().splitlines():
        row = json.loads(line)
        told[tuple(row["token_ids"]), row["prompt"]] = row["teacher_logprobs"]
    rows = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    shared = [row for row in rows if (tuple(row["token_ids"]), row["prompt"]) in told]
    assert shared
    assert all(row["teacher_logprobs"] == told[tuple(row["token_ids"]), row["prompt"]] for row in shared)


@pytest.fixture(scope="module")
def calm(recorded, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("calm")
    _train(_offline(folder, recorded / "archive"))
    return folder / "run"


def test_offline_the_same_archive_and_seed_give_the_same_weights(recorded, calm, tmp_path):
    # A copy: where it lies, and in which order a disk lists it, changes nothing.
    shutil.copytree(recorded / "archive", tmp_path / "archive")
    _train(_offline(tmp_path, tmp_path / "archive"))
    _assert_same_run(calm, tmp_path / "run")
    assert any(row != other for row, other in zip(_figures(calm)[0].values(), _figures(calm)[3].values(), strict=True))


KILLED_AFTER_STEP_3 = """
import os, signal, sys
from student_trainer import cli, loop

def publish(parts, row):
    published(parts, row)
    if row["step"] == 3:
        os.kill(os.getpid(), signal.SIGKILL)

published, loop._publish = loop._publish, publish
sys.exit(cli.main())
"""


def test_offline_killed_and_resumed_is_as_if_nothing_had_been(recorded, calm, tmp_path):
    config = _offline(tmp_path, recorded / "archive", checkpoints={"every_steps": 2})
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_AFTER_STEP_3, "train", str(config)],
        cwd=ROOT,
        env=child_environment() | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert not (tmp_path / "run" / "summary.json").exists()
    _train(config, resume=True)
    _assert_same_run(calm, tmp_path / "run")


def test_a_resumed_run_needs_the_entries_it_began_with(recorded, tmp_path):
    shutil.copytree(recorded / "archive", tmp_path / "archive")
    config = _offline(tmp_path, tmp_path / "archive")
    _train(config, "steps=2")
    _entries(tmp_path / "archive")[0].unlink()
    with pytest.raises(ConfigError, match="prompts: are not those"):
        _train(config, resume=True)


# ---- what cannot be learnt from


def _copy(recorded: Path, folder: Path) -> Path:
    shutil.copytree(recorded / "archive", folder / "archive")
    return folder / "archive"


def _refused(config: Path, capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    """What the program says; it wrote nothing and its status is 2."""
    capsys.readouterr()
    assert main(["train", str(config), *overrides]) == 2
    assert not (config.parent / "run").exists()
    said = capsys.readouterr().err
    assert "nothing was started" in said
    return said.split("nothing was started:\n")[1]


def test_an_archive_that_is_not_there_or_empty_is_refused(recorded, tmp_path, capsys):
    config = _offline(tmp_path, tmp_path / "nowhere")
    assert _refused(config, capsys).startswith(f"offline.archive: there is no archive at {tmp_path / 'nowhere'}")
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "empty").mkdir()
    said = _refused(config, capsys, f"offline.archive={tmp_path / 'empty'}")
    assert said == f"offline.archive: {tmp_path / 'empty'} holds no entry\n"


def test_corrupt_entries_are_left_out_and_told_and_nothing_but_them_is_refused(recorded, tmp_path, capsys):
    archive = _copy(recorded, tmp_path)
    entries = _entries(archive)
    os.truncate(entries[0], 50)
    config = _offline(tmp_path, archive, steps=1)
    _train(config)
    assert "left out 1 corrupt entries" in (said := capsys.readouterr().err) and entries[0].stem[:12] in said
    shutil.rmtree(tmp_path / "run")
    for path in entries:
        os.truncate(path, 50)
    assert f"holds no answer to learn from, only {len(entries)} corrupt entries" in _refused(config, capsys)


def test_a_student_of_another_vocabulary_is_refused(recorded, tmp_path, capsys):
    config = _offline(tmp_path, recorded / "archive")
    path = tmp_path / "student" / "tokenizer.json"
    path.write_text(path.read_text().replace('"w7"', '"v7"'))
    assert _refused(config, capsys).startswith("student.model: its token ids do not mean what they mean in the archive")


class _SecondRevision(ToyTeacher):
    def score(self, task: Any) -> Any:
        return dataclasses.replace(super().score(task), model_revision="r2")

    def describe(self) -> Any:
        return dataclasses.replace(super().describe(), model_revision="r2")


def test_two_revisions_in_one_archive_are_refused_unless_one_is_chosen(recorded, tmp_path, capsys):
    archive = _copy(recorded, tmp_path)
    first = len(_entries(archive))
    with FakeServer(_SecondRevision()) as server:
        _train(_online(tmp_path / "second", server.address, archive, steps=1))
    second = len(_entries(archive)) - first
    config = _offline(tmp_path / "offline", archive, steps=1)
    assert _refused(config, capsys) == (
        f"offline.archive: {archive} holds entries of several kinds, and a run learns from one; set "
        f"offline.teacher_revision to one of 'r1' ({first} entries), 'r2' ({second} entries)\n"
    )
    said = _refused(config, capsys, "offline.teacher_revision=r3")
    assert said.startswith(f"offline.teacher_revision: 'r3' is of no entry in {archive}; there are 'r1' ({first} ")
    assert _train(config, "offline.teacher_revision=r2")["teacher"]["revision"] == "r2"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective.temperature=0.7", "objective.temperature: 0.7, but the archived scores were made at 1.0"),
        ("rollout.temperature=0.7", "objective.temperature: 0.7, but the archived scores were made at 1.0"),
        ("rollout.max_new_tokens=7", "rollout.max_new_tokens: 7, but the longest archived answer has 8 tokens"),
        ("rollout.prompts_per_step=13", "rollout.prompts_per_step: 13, but there are 12 prompts"),
        ("rollout.batches_ahead=1", "rollout.batches_ahead: 1 with offline"),
        ("objective.recipe=reverse_kl_rewards", "objective.policy_gradient: is given with offline; it needs rewards"),
        ("objective.recipe=paced", "objective: has prompt_weights, with offline"),
        ("objective.divergences=[{kind: js, mask: failed}]", "objective: has divergences with mask: failed"),
        ("teacher.addresses=[a:1]", "teacher: is given with offline"),
        ("prompts={source: reasoning_gym, dataset: chain_sum}", "prompts: is given with offline"),
    ],
)
def test_what_an_archive_cannot_give_is_refused(recorded, tmp_path, capsys, override, message):
    assert message in _refused(_offline(tmp_path, recorded / "archive"), capsys, override)


def test_an_entry_that_goes_away_under_a_run_ends_it_with_its_name(recorded, tmp_path, monkeypatch, capsys):
    archive = _copy(recorded, tmp_path)
    config = _offline(tmp_path, archive)
    real = module.fit

    def fit(*arguments: Any) -> Any:
        for path in _entries(archive):
            path.unlink()
        return real(*arguments)

    monkeypatch.setattr(module, "fit", fit)
    assert main(["train", str(config)]) == 1
    said = capsys.readouterr().err
    assert re.search(r"offline.archive: .* had entry [0-9a-f]{12} when the run began and does not give it now", said)
