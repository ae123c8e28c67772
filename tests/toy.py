"""A whole run that takes seconds: a tiny random student, the bigram teacher behind a real gRPC server, a verifier.

The teacher's next token depends on the last one only, so a student of one layer can reach it, and how far it is
away can be computed exactly.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

from stillhouse.vocabulary import vocabulary_digest
from student_trainer.config import RunConfig, load_config
from tests.fakes import BigramTeacher
from tests.models import save_tokenizer

VOCABULARY_SIZE = 19
HEAD_ROWS = 32  # padded, as heads are
EOS = 2


class ToyTeacher(BigramTeacher):
    """The bigram teacher under the toy tokenizer's vocabulary, flatter, and with no impossible token.

    A student at its start has mass everywhere, and where the teacher has none a reverse KL is infinite.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__(VOCABULARY_SIZE, seed)
        self.logits /= 2.0
        self.logits[:, 0] = -3.0

    def describe(self) -> Any:
        digest = vocabulary_digest({f"w{index}": index for index in range(VOCABULARY_SIZE)})
        return dataclasses.replace(super().describe(), vocabulary_digest=digest)


def share_of_small_words(completion: str, answer: Any, entry: dict[str, Any]) -> float:
    """The verifier: the share of an answer's words that are below w10."""
    words = completion.split()
    return sum(int(word[1:]) < 10 for word in words) / len(words) if words else 0.0


def broken_verifier(completion: str, answer: Any, entry: dict[str, Any]) -> float:
    """One that raises on some answers."""
    if "w7" in completion.split():
        raise RuntimeError("the sandbox is gone")
    return 1.0


def save_student(directory: Path, seed: int = 0, **shape: Any) -> Path:
    """A llama of one layer with a padded, untied head, unless `shape` says otherwise."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": HEAD_ROWS,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": EOS,
        "tie_word_embeddings": False,
        "initializer_range": 0.2,
    }
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**(settings | shape))).save_pretrained(directory)
    save_tokenizer(directory, VOCABULARY_SIZE)
    return directory


def write_config(folder: Path, address: str | None, **changes: Any) -> Path:
    """A run's YAML under `folder`, with the student and the prompts it names; `changes` replace top-level keys."""
    save_student(folder / "student")
    prompts = [{"prompt": f"w{3 + index} w{4 + index}", "answer": ""} for index in range(12)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    config = {
        "run_dir": str(folder / "run"),
        "steps": 10,
        "student": {"model": str(folder / "student"), "device": "cpu"},
        "teacher": {"addresses": [address], "top_k": 6, "candidates": 3, "start_deadline_s": 60.0, "deadline_s": 10.0},
        "prompts": {
            "source": "jsonl",
            "path": str(folder / "prompts.jsonl"),
            "verifier": {"kind": "python", "function": "tests.toy:share_of_small_words", "pass_threshold": 0.6},
        },
        "rollout": {"prompts_per_step": 6, "answers_per_prompt": 4, "max_new_tokens": 8},
        "objective": {"recipe": "reverse_kl_rewards"},
        "optimizer": {"learning_rate": 3e-3, "micro_batch_tokens": 100},
        "samples_per_step": 3,
    }
    config |= changes
    if address is None:
        del config["teacher"]
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def toy_config(folder: Path, address: str | None, overrides: tuple[str, ...] = (), **changes: Any) -> RunConfig:
    """The same, loaded."""
    return load_config(write_config(folder, address, **changes), list(overrides))
