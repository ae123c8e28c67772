"""Every fault of a configuration is one message that names field, value and fix."""

import json
from pathlib import Path

import pytest
import yaml

from student_trainer.config import (
    MAY_CHANGE,
    ConfigError,
    RunConfig,
    _models_in,
    changed_keys,
    dump_config,
    load_config,
    plain_config,
)
from student_trainer.objective_config import RECIPES, ObjectiveConfig

BASE = {
    "run_dir": "runs/x",
    "steps": 3,
    "student": {"model": "models/student"},
    "teacher": {"addresses": ["127.0.0.1:1"]},
    "prompts": {"source": "reasoning_gym", "dataset": "chain_sum"},
    "objective": {"recipe": "reverse_kl"},
}


def _load(tmp_path: Path, changes: dict | None = None, overrides: list[str] | None = None) -> RunConfig:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(BASE | (changes or {})))
    return load_config(path, overrides or [])


def _message(tmp_path: Path, changes: dict | None = None, overrides: list[str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        _load(tmp_path, changes, overrides)
    return str(caught.value)


def test_a_complete_configuration_loads(tmp_path):
    config = _load(tmp_path)
    assert config.steps == 3 and config.objective.divergences[0].kind == "reverse_kl"


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("rollout.temprature=1", ("rollout.temprature", "did you mean 'temperature'?")),
        ("stepz=1", ("stepz", "did you mean 'steps'?")),
        ("objective.reducton=token_mean", ("objective.reducton", "did you mean 'reduction'?")),
        ("steps=many", ("steps", "got 'many'")),
        ("steps=0", ("steps", "greater than or equal to 1", "got 0")),
        ("rollout.top_p=1.5", ("rollout.top_p", "got 1.5")),
        ("teacher.addresses=[]", ("teacher.addresses", "at least 1 item")),
        ("student.dtype=int8", ("student.dtype", "'float32' or 'bfloat16'", "got 'int8'")),
        ("objective.recipe=grpoo", ("recipe is 'grpoo'", "choose one of", "grpo")),
        ("objective.reduction=mean", ("objective.reduction", "got 'mean'")),
        ("rollout", ("override 'rollout'", "write key=value")),
        ("a..b=1", ("override 'a..b=1'", "write key=value")),
        ("steps=[1", ("not YAML",)),
        ("metrics_port=99999", ("metrics_port", "got 99999")),
    ],
)
def test_a_faulty_override_is_named_with_its_value_and_a_fix(tmp_path, override, parts):
    message = _message(tmp_path, overrides=[override])
    for part in parts:
        assert part in message


def test_every_fault_is_reported_at_once(tmp_path):
    message = _message(tmp_path, overrides=["steps=0", "rollout.top_p=2", "stepz=1"])
    assert len(message.splitlines()) == 3


def test_a_missing_key_is_named(tmp_path):
    message = _message(tmp_path, {"student": {}})
    assert "student.model: is missing" in message


def test_an_unknown_key_inside_a_list_and_a_union_is_named(tmp_path):
    message = _message(tmp_path, {"objective": {"divergences": [{"kind": "js", "betta": 0.1}]}})
    assert "objective.divergences.0.betta" in message and "did you mean 'beta'?" in message
    message = _message(tmp_path, {"prompts": BASE["prompts"] | {"datset": "x"}})
    assert "datset" in message and "did you mean 'dataset'?" in message


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"teacher": None}, ("needs a teacher", "teacher.addresses")),
        (
            {"objective": {"recipe": "trrd", "temperature": 2.0}},
            ("objective.temperature is 2.0", "rollout.temperature is 1.0", "must be equal"),
        ),
        (
            {"objective": {"recipe": "grpo"}, "rollout": {"answers_per_prompt": 1}},
            ("answers_per_prompt is 1", "group advantage is zero"),
        ),
        ({"optimizer": {"updates_per_step": 99}}, ("updates_per_step is 99", "prompts_per_step = 32")),
        ({"objective": {}}, ("no term to optimise",)),
        (
            {"objective": {"policy_gradient": {"rlsd": {}, "teacher": 1.0}}},
            ("rlsd and teacher", "set teacher: 0"),
        ),
        ({"objective": {"divergences": [{"kind": "js", "coefficient": {}}]}}, ("empty schedule",)),
        ({"objective": {"divergences": [{"kind": "js", "coefficient": {"a": 1}}]}}, ("steps are whole numbers",)),
        (
            {"evaluation": {"prompts": BASE["prompts"], "answers_per_prompt": 4, "k": [1, 8]}},
            ("k is [1, 8]", "answers_per_prompt = 4"),
        ),
    ],
)
def test_options_that_contradict_each_other_are_refused(tmp_path, changes, parts):
    message = _message(tmp_path, changes)
    for part in parts:
        assert part in message


def test_no_teacher_is_needed_for_rewards_alone(tmp_path):
    assert _load(tmp_path, {"teacher": None, "objective": {"recipe": "grpo"}}).teacher is None


def test_a_file_that_cannot_be_used_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read"):
        load_config(tmp_path / "nowhere.yaml", [])
    for text, reason in (("a: [1", "not YAML"), ("- 1\n", "holds list")):
        path = tmp_path / "broken.yaml"
        path.write_text(text)
        with pytest.raises(ConfigError, match=reason):
            load_config(path, [])


def test_overrides_change_single_keys_and_keep_their_neighbours(tmp_path):
    config = _load(tmp_path, overrides=["rollout.top_p=0.9", "objective.reduction=seq_mean_token_mean"])
    assert config.rollout.top_p == 0.9 and config.rollout.temperature == 1.0
    assert config.objective.recipe == "reverse_kl" and config.objective.reduction == "seq_mean_token_mean"


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_a_valid_objective_and_says_where_it_comes_from(path):
    objective = ObjectiveConfig.model_validate({"recipe": path.stem})
    assert objective.divergences or objective.policy_gradient
    assert path.read_text().startswith("# ")


def test_keys_next_to_a_recipe_override_it():
    objective = ObjectiveConfig.model_validate({"recipe": "kdrl", "policy_gradient": {"teacher": 0.2}})
    assert objective.policy_gradient is not None
    assert objective.policy_gradient.teacher == 0.2 and objective.policy_gradient.reward == 1.0


def test_the_resolved_configuration_loads_again_unchanged(tmp_path):
    config = _load(tmp_path, overrides=["objective.recipe=paced"])
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_config(config))
    assert load_config(path, []) == config


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (
            ["rollout.engine=vllm", "rollout.top_p=0.9"],
            ("rollout.top_p is 0.9 with the vllm engine", "rollout.engine to transformers"),
        ),
        (
            ["student.mixed_precision=bf16", "student.dtype=bfloat16"],
            ("mixed_precision is bf16 and dtype bfloat16", "set dtype: float32"),
        ),
        (["rollout.batches_ahead=9"], ("rollout.batches_ahead", "got 9")),
        (["objective.importance={kind: clip}"], ("objective.importance.kind", "got 'clip'")),
        (["trackers=[mlflow]"], ("trackers.0", "got 'mlflow'")),
        (["student.lora={rank: 0}"], ("student.lora.rank", "got 0")),
        (["guards.kl_ratio=0.5"], ("guards.kl_ratio", "got 0.5")),
    ],
)
def test_what_long_runs_add_is_checked_too(tmp_path, overrides, parts):
    message = _message(tmp_path, overrides=overrides)
    for part in parts:
        assert part in message


def test_changed_keys_are_named_one_by_one_and_those_that_may_change_are_not(tmp_path):
    before = plain_config(_load(tmp_path))
    assert changed_keys(before, before) == []
    now = plain_config(_load(tmp_path, overrides=["seed=5", "rollout.temperature=0.5", "steps=9", "run_dir=elsewhere"]))
    assert changed_keys(before, now) == ["rollout.temperature: 1.0 then, 0.5 now", "seed: 0 then, 5 now"]
    assert changed_keys(before, plain_config(_load(tmp_path, {"evaluation": None}))) == []
    scheduled = {"objective": {"divergences": [{"kind": "reverse_kl", "coefficient": {0: 1.0, 5: 0.5}}]}}
    schedule = plain_config(_load(tmp_path, scheduled))
    assert changed_keys(json.loads(json.dumps(schedule)), schedule) == []


def test_every_key_that_may_change_exists():
    """A renamed key would silently be compared again, or never."""
    for key in MAY_CHANGE:
        models: list = [RunConfig]
        for part in key.split("."):
            found = [model.model_fields[part].annotation for model in models if part in model.model_fields]
            assert found, key
            models = [model for annotation in found for model in _models_in(annotation)]
