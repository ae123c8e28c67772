"""Prompts, with real reasoning-gym datasets and real tokenizers that are built here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import reasoning_gym
from pydantic import BaseModel, TypeAdapter, ValidationError
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from student_trainer.prompts import JsonlPrompts, Prompt, PromptOrder, PromptsConfig, ReasoningGymPrompts, load_prompts
from student_trainer.verifier_config import (
    ExactVerifier,
    MathVerifier,
    PythonVerifier,
    ReasoningGymVerifier,
    RegexVerifier,
)

SPECIAL = ["<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
BOS, EOS = 0, 1
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{{ opening | default('') }}{% endif %}"
)


def _tokenizer(template: str | None = None, frame: str | None = "<s> $A") -> PreTrainedTokenizerFast:
    """Byte-level, without merges: every text survives it. `frame`: the special tokens it adds by itself."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(SPECIAL + alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    if frame is not None:
        core.post_processor = processors.TemplateProcessing(single=frame, special_tokens=[("<s>", BOS), ("</s>", EOS)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


def _config(**fields) -> PromptsConfig:
    return TypeAdapter(PromptsConfig).validate_python(fields)


def _chain_sum(**fields) -> PromptsConfig:
    return _config(**{"source": "reasoning_gym", "dataset": "chain_sum", "size": 5, "seed": 3, **fields})


def _file(path: Path, *rows, **fields) -> PromptsConfig:
    """A file of rows (bytes are written as they are) and the configuration that reads it."""
    path.write_bytes(b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in rows))
    return _config(**{"source": "jsonl", "path": path, "verifier": {"kind": "exact"}, **fields})


def _says(error: pytest.ExceptionInfo, *parts: str) -> None:
    for part in (*parts, "Fix:"):
        assert part in str(error.value), f"{part!r} is not in: {error.value}"


# Sources


def test_reasoning_gym_prompts_are_the_datasets_own_entries():
    dataset = reasoning_gym.create_dataset("chain_sum", size=5, seed=3)
    prompts = load_prompts(_chain_sum(), _tokenizer())
    assert [p.key for p in prompts] == [f"chain_sum/{i}" for i in range(5)]
    assert [(p.text, p.answer, p.entry) for p in prompts] == [(e["question"], e["answer"], e) for e in dataset]
    assert len({p.text for p in prompts}) == 5


def test_parameters_reach_the_dataset():
    prompts = load_prompts(_chain_sum(parameters={"min_terms": 6, "max_terms": 6}), _tokenizer())
    assert {p.entry["metadata"]["num_terms"] for p in prompts} == {6}


def test_template_formats_every_field_of_the_entry():
    config = _chain_sum(template="{{Q}} {question} ({metadata[num_terms]} terms)")
    for prompt in load_prompts(config, _tokenizer()):
        entry = prompt.entry
        assert prompt.text == f"{{Q}} {entry['question']} ({entry['metadata']['num_terms']} terms)"


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"dataset": "chain_sums"}, ["prompts.dataset", "'chain_sums'", "did you mean chain_sum"]),
        ({"dataset": "zzz"}, ["prompts.dataset", "'zzz'", "choose one of", "chain_sum", "countdown"]),
        ({"parameters": {"min_term": 2}}, ["prompts.parameters", "'min_term'", "did you mean min_terms"]),
        ({"parameters": {"size": 2}}, ["prompts.parameters", "'size'", "prompts.size"]),
        ({"parameters": {"min_terms": -1}}, ["prompts.parameters", "chain_sum", "-1", "min_terms must be positive"]),
        ({"parameters": {"min_terms": "2"}}, ["prompts.parameters", "chain_sum", "'2'"]),
        ({"template": "{query}"}, ["prompts.template", "'{query}'", "'query'", "'question'"]),
        ({"template": "{metadata[terms]}"}, ["prompts.template", "'terms'", "'num_terms'"]),
        ({"template": "{}"}, ["prompts.template", "'{}'", "'question'"]),
        ({"template": "{question"}, ["prompts.template", "'{question'", "literal brace"]),
        ({"template": ""}, ["chain_sum/0", "empty"]),
    ],
)
def test_a_wrong_reasoning_gym_setting_is_named_with_its_fix(fields, parts):
    with pytest.raises(ValueError) as error:
        load_prompts(_chain_sum(**fields), _tokenizer())
    _says(error, *parts)


def test_jsonl_rows_become_prompts_named_by_their_line(tmp_path):
    rows = [{"prompt": "1+1?", "answer": 2, "id": "same"}, b"   ", {"prompt": "2+2?", "answer": "4", "id": "same"}]
    prompts = load_prompts(_file(tmp_path / "train.jsonl", *rows), _tokenizer())
    assert [(p.key, p.text, p.answer) for p in prompts] == [
        ("train.jsonl:1", "1+1?", 2),
        ("train.jsonl:3", "2+2?", "4"),
    ]
    assert [p.entry for p in prompts] == [rows[0], rows[2]]


def test_jsonl_lines_end_at_newlines_only_and_may_be_windows_lines(tmp_path):
    rows = [json.dumps({"prompt": "a\u2028b\u0085c é", "answer": "x"}, ensure_ascii=False).encode() + b"\r"] * 2
    prompts = load_prompts(_file(tmp_path / "t.jsonl", *rows), _tokenizer())
    assert [(p.key, p.text) for p in prompts] == [
        ("t.jsonl:1", "a\u2028b\u0085c é"),
        ("t.jsonl:2", "a\u2028b\u0085c é"),
    ]


def test_jsonl_fields_can_be_renamed_and_answers_left_out(tmp_path):
    config = _file(tmp_path / "t.jsonl", {"q": "why?"}, prompt_field="q", answer_field=None)
    (prompt,) = load_prompts(config, _tokenizer())
    assert (prompt.text, prompt.answer) == ("why?", None)


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        (b'{"prompt": "x", "answer": ', ["not JSON"]),
        (b"\xff\xfe{}", ["not JSON", "UTF-8"]),
        (["prompt"], ["JSON object", "prompt"]),
        ({"question": "x", "answer": "1"}, ["'prompt'", "'question'", "prompts.prompt_field"]),
        ({"prompt": "x", "solution": "1"}, ["'answer'", "'solution'", "prompts.answer_field", "null"]),
        ({"prompt": 3, "answer": "1"}, ["'prompt'", "text or a list of messages", "3"]),
        ({"prompt": [], "answer": "1"}, ["'prompt'", "text or a list of messages", "[]"]),
        ({"prompt": [{"role": "user"}], "answer": "1"}, ["'prompt'", "messages", "{'role': 'user'}"]),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}], "answer": "1"}, ["'prompt'", "image"]),
        (
            {"prompt": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "answer": "1"},
            ["'prompt'", "assistant", "show the student an answer"],
        ),
    ],
)
def test_a_broken_line_is_named_by_file_and_line(tmp_path, row, parts):
    path = tmp_path / "t.jsonl"
    config = _file(path, {"prompt": "fine", "answer": "1"}, row)
    with pytest.raises(ValueError) as error:
        load_prompts(config, _tokenizer(TEMPLATE))
    _says(error, f"{path}:2: ", *parts)


@pytest.mark.parametrize("template", [None, TEMPLATE])
@pytest.mark.parametrize("frame", [None, "<s> $A"])
@pytest.mark.parametrize("content", ["", " \n"])
def test_an_empty_prompt_is_refused_by_name(tmp_path, template, frame, content):
    config = _file(tmp_path / "t.jsonl", {"prompt": content, "answer": "1"})
    with pytest.raises(ValueError) as error:
        load_prompts(config, _tokenizer(template, frame))
    _says(error, "t.jsonl:1", "empty")


@pytest.mark.parametrize("content", [b"", b"\n  \n"])
def test_an_empty_file_is_an_error(tmp_path, content):
    path = tmp_path / "t.jsonl"
    config = _file(path)
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        load_prompts(config, _tokenizer())
    _says(error, "prompts.path", str(path), "empty")


def test_a_relative_path_is_found_from_the_working_directory_and_then_from_the_configuration(tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    monkeypatch.chdir(here)
    config = _config(source="jsonl", path="t.jsonl", verifier={"kind": "exact"})
    with pytest.raises(ValueError) as error:
        load_prompts(config, _tokenizer(), folder=there)
    _says(error, "prompts.path", "t.jsonl", str(there / "t.jsonl"), str(here))
    _file(there / "t.jsonl", {"prompt": "there", "answer": "1"})
    assert load_prompts(config, _tokenizer(), folder=there)[0].text == "there"
    _file(here / "t.jsonl", {"prompt": "here", "answer": "1"})
    assert load_prompts(config, _tokenizer(), folder=there)[0].text == "here"


# Tokens


@pytest.mark.parametrize("frame", [None, "<s> $A", "<s> $A </s>"])
def test_a_chat_template_gives_what_transformers_gives(frame):
    tokenizer = _tokenizer(TEMPLATE, frame)
    for prompt in load_prompts(_chain_sum(system="Be brief."), tokenizer):
        messages = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": prompt.entry["question"]},
        ]
        assert prompt.messages == messages
        assert prompt.text == f"<s><|system|>Be brief.<|user|>{prompt.entry['question']}<|assistant|>"
        expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert list(prompt.token_ids) == expected
        assert prompt.token_ids.count(BOS) == 1 and prompt.token_ids[0] == BOS


@pytest.mark.parametrize("chat_template", ["auto", "never"])
@pytest.mark.parametrize("frame", ["<s> $A", "<s> $A </s>"])
def test_text_without_a_template_gets_bos_once_and_no_eos(chat_template, frame):
    tokenizer = _tokenizer(TEMPLATE if chat_template == "never" else None, frame)
    for prompt in load_prompts(_chain_sum(chat_template=chat_template), tokenizer):
        assert prompt.messages is None
        assert prompt.token_ids[0] == BOS and EOS not in prompt.token_ids
        assert tokenizer.decode(list(prompt.token_ids[1:])) == prompt.text == prompt.entry["question"]


def test_text_that_brings_its_own_bos_does_not_get_another():
    prompts = load_prompts(_chain_sum(template="<s>{question}"), _tokenizer())
    assert all(p.token_ids[0] == BOS and p.token_ids.count(BOS) == 1 for p in prompts)


@pytest.mark.parametrize("frame", [None, "<s> $A", "<s> $A </s>"])
def test_text_that_brings_its_own_eos_keeps_it(frame):
    prompts = load_prompts(_chain_sum(template="{question}</s>"), _tokenizer(frame=frame))
    assert all(p.token_ids[-1] == EOS and p.token_ids.count(EOS) == 1 for p in prompts)


def test_a_tokenizer_without_bos_gets_none():
    for prompt in load_prompts(_chain_sum(), _tokenizer(frame=None)):
        assert len(prompt.token_ids) == len(prompt.text.encode())


def test_messages_of_a_file_go_through_the_template_as_they_are(tmp_path):
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    config = _file(tmp_path / "t.jsonl", {"prompt": messages, "answer": "1"})
    (prompt,) = load_prompts(config, _tokenizer(TEMPLATE))
    assert prompt.messages == messages
    assert prompt.text == "<s><|system|>S<|user|>U<|assistant|>"


def test_chat_template_arguments_reach_the_template():
    prompts = load_prompts(_chain_sum(chat_template_arguments={"opening": "<think>"}), _tokenizer(TEMPLATE))
    assert all(p.text.endswith("<|assistant|><think>") for p in prompts)


@pytest.mark.parametrize(
    ("template", "content", "fields", "parts"),
    [
        (None, "x", {"chat_template": "always"}, ["prompts.chat_template", "always", "no chat template"]),
        (None, "x", {"system": "S"}, ["prompts.system", "auto", "has none"]),
        (TEMPLATE, "x", {"system": "S", "chat_template": "never"}, ["prompts.system", "never", "has one"]),
        (None, [{"role": "user", "content": "x"}], {}, ["t.jsonl:1", "messages", "auto"]),
        (
            TEMPLATE,
            [{"role": "system", "content": "T"}, {"role": "user", "content": "x"}],
            {"system": "S"},
            ["prompts.system", "t.jsonl:1", "system message"],
        ),
        (TEMPLATE, [{"role": "tool", "content": "x"}], {}, ["t.jsonl:1", "no tools here"]),
    ],
)
def test_a_prompt_that_does_not_fit_the_template_is_refused(tmp_path, template, content, fields, parts):
    config = _file(tmp_path / "t.jsonl", {"prompt": content, "answer": "1"}, **fields)
    with pytest.raises(ValueError) as error:
        load_prompts(config, _tokenizer(template))
    _says(error, *parts)


def test_a_prompt_at_the_limit_passes_and_one_above_is_named_with_its_length(tmp_path):
    rows = [{"prompt": "x" * n, "answer": "1"} for n in (3, 9, 11, 10)]  # and one BOS each
    assert len(load_prompts(_file(tmp_path / "t.jsonl", *rows, max_prompt_tokens=12), _tokenizer())) == 4
    with pytest.raises(ValueError) as error:
        load_prompts(_file(tmp_path / "t.jsonl", *rows, max_prompt_tokens=9), _tokenizer())
    _says(error, "prompts.max_prompt_tokens: 9", "t.jsonl:2 has 10 tokens", "3 of 4", "t.jsonl:3, has 12")


# Configuration


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"source": "parquet"}, ["parquet", "reasoning_gym", "jsonl"]),
        ({"source": "reasoning_gym", "dataset": "chain_sum", "sise": 3}, ["sise", "Extra inputs"]),
        ({"source": "reasoning_gym", "dataset": "chain_sum", "size": 0}, ["size", "greater than 0"]),
        ({"source": "jsonl", "path": "t.jsonl"}, ["verifier", "required"]),
    ],
)
def test_a_wrong_configuration_is_refused_with_the_field(fields, parts):
    with pytest.raises(ValidationError) as error:
        _config(**fields)
    assert all(part in str(error.value) for part in parts), error.value


def test_a_reasoning_gym_source_has_its_own_verifier_by_default():
    assert isinstance(_chain_sum().verifier, ReasoningGymVerifier)


@pytest.mark.parametrize(
    "model",
    [
        ReasoningGymPrompts,
        JsonlPrompts,
        ReasoningGymVerifier,
        MathVerifier,
        ExactVerifier,
        RegexVerifier,
        PythonVerifier,
    ],
)
def test_every_field_of_a_configuration_is_frozen_and_described(model: type[BaseModel]):
    assert model.model_config.get("frozen") and model.model_config.get("extra") == "forbid"
    assert [name for name, field in model.model_fields.items() if not field.description] == []


def test_importing_prompts_and_verifiers_loads_no_model_library():
    code = (
        "import sys, student_trainer.prompts, student_trainer.verifiers, student_trainer.passrate;"
        "print(sorted({'torch', 'transformers', 'reasoning_gym', 'math_verify', 'sympy'} & set(sys.modules)))"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Order


def _prompts(count: int) -> list[Prompt]:
    return [Prompt(f"p/{i}", "x", None, (1,), None, {}) for i in range(count)]


@pytest.mark.parametrize(("count", "n"), [(1, 1), (7, 1), (7, 2), (7, 3), (7, 4), (7, 7), (64, 16), (100, 33)])
def test_no_prompt_comes_twice_in_an_epoch_and_every_batch_is_full(count, n):
    order = PromptOrder(_prompts(count), seed=5)
    per_epoch = count // n
    for epoch in range(3):
        drawn = [p.key for s in range(per_epoch) for p in order.batch(epoch * per_epoch + s, n)]
        assert len(drawn) == len(set(drawn)) == per_epoch * n
        assert {order.epoch(epoch * per_epoch + s, n) for s in range(per_epoch)} == {epoch}


def test_a_batch_depends_on_the_step_only_and_not_on_what_was_asked_before():
    first = PromptOrder(_prompts(10), seed=1)
    in_turn = [[p.key for p in first.batch(step, 3)] for step in range(20)]
    for step in reversed(range(20)):
        assert [p.key for p in PromptOrder(_prompts(10), seed=1).batch(step, 3)] == in_turn[step]
        assert [p.key for p in first.batch(step, 3)] == in_turn[step]


def test_epochs_and_seeds_have_orders_of_their_own():
    def keys(seed: int, step: int) -> tuple[str, ...]:
        return tuple(p.key for p in PromptOrder(_prompts(50), seed=seed).batch(step, 50))

    orders = {keys(seed, step) for seed in range(3) for step in range(3)}
    assert len(orders) == 9
    assert tuple(p.key for p in _prompts(50)) not in orders


def test_prompts_left_over_by_one_epoch_come_in_others():
    order = PromptOrder(_prompts(7), seed=0)
    assert {p.key for step in range(30) for p in order.batch(step, 4)} == {p.key for p in _prompts(7)}


@pytest.mark.parametrize("n", [0, 6])
def test_a_step_of_more_prompts_than_there_are_is_refused(n):
    with pytest.raises(ValueError) as error:
        PromptOrder(_prompts(5), seed=0).batch(0, n)
    _says(error, f"prompts_per_step: {n}", "5 prompts", "1 to 5")
