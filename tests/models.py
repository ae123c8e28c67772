"""Tiny random models with every kind of head, and what their scores must be.

`reference_scores` is the oracle: the same directory in float64 through transformers' own logits, one sequence
at a time, then NumPy. It shares no code with the server.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

FAMILIES = ("llama", "qwen3", "qwen3_moe", "gemma2", "cohere", "granite", "phi", "gpt2")
VOCABULARY_SIZE = 97
MAX_POSITIONS = 128

_COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def family_config(family: str, head_rows: int) -> Any:
    """Configuration of a tiny model whose head has `head_rows` rows."""
    common = {**_COMMON, "vocab_size": head_rows}
    match family:
        case "llama":
            return transformers.LlamaConfig(**common, tie_word_embeddings=False)
        case "qwen3":
            return transformers.Qwen3Config(**common, head_dim=8, tie_word_embeddings=True)
        case "qwen3_moe":
            return transformers.Qwen3MoeConfig(
                **common, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
            )
        case "gemma2":  # logits and attention logits are capped; every other layer slides
            return transformers.Gemma2Config(
                **common,
                head_dim=8,
                query_pre_attn_scalar=8,
                sliding_window=8,
                final_logit_softcapping=10.0,
                attn_logit_softcapping=2.0,
            )
        case "cohere":
            return transformers.CohereConfig(**common, logit_scale=0.25)
        case "granite":
            return transformers.GraniteConfig(**common, logits_scaling=3.0)
        case "phi":  # its head has a bias
            return transformers.PhiConfig(**common)
        case "gpt2":  # tied, learned positions
            return transformers.GPT2Config(
                vocab_size=head_rows,
                n_positions=MAX_POSITIONS,
                n_embd=32,
                n_layer=2,
                n_head=4,
                n_inner=64,
                bos_token_id=1,
                eos_token_id=2,
            )
    raise ValueError(f"family is {family!r}; choose from {', '.join(FAMILIES)}")


def save_tokenizer(directory: Path, vocabulary_size: int = VOCABULARY_SIZE) -> None:
    """Writes a tokenizer of `vocabulary_size` words."""
    vocabulary = {f"w{index}": index for index in range(vocabulary_size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="w0", pad_token="w0", eos_token="w2"
    ).save_pretrained(directory)


def save_model(
    directory: Path,
    family: str = "llama",
    *,
    head_rows: int = 128,
    vocabulary_size: int | None = VOCABULARY_SIZE,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **config: Any,
) -> Path:
    """Writes a random model, and a tokenizer unless `vocabulary_size` is None; returns the directory.

    Weights are drawn large, so that distributions are far from uniform and differ from place to place.
    """
    torch.manual_seed(seed)
    settings = family_config(family, head_rows)
    for name, value in config.items():
        setattr(settings, name, value)
    model = transformers.AutoModelForCausalLM.from_config(settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
            elif name.endswith("bias"):
                parameter.normal_(std=0.5)
    model.to(dtype).save_pretrained(directory)
    if vocabulary_size is not None:
        save_tokenizer(directory, vocabulary_size)
    return directory


def reference_scores(
    directory: Path,
    token_ids: np.ndarray,
    *,
    score_start: int,
    top_k: int,
    candidate_ids: np.ndarray | None = None,
    temperature: float = 1.0,
    vocabulary_size: int = VOCABULARY_SIZE,
) -> dict[str, np.ndarray]:
    """The fields of `Scores` in float64 over the whole vocabulary."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.as_tensor(np.asarray(token_ids, np.int64))[None]).logits[0].numpy()
    return scores_of_logits(
        logits[score_start - 1 : -1, :vocabulary_size],
        np.asarray(token_ids)[score_start:],
        top_k=top_k,
        candidate_ids=candidate_ids,
        temperature=temperature,
    )


def scores_of_logits(
    logits: np.ndarray,
    targets: np.ndarray,
    *,
    top_k: int,
    candidate_ids: np.ndarray | None,
    temperature: float,
) -> dict[str, np.ndarray]:
    """The same from float64 logits [N, V], row by row, straight from the definitions."""
    rows: list[dict[str, Any]] = []
    for index, row in enumerate(np.asarray(logits, np.float64) / temperature):
        normalizer = np.logaddexp.reduce(row)
        logprobs = row - normalizer
        order = np.argsort(-logprobs, kind="stable")
        candidates = np.array([], int) if candidate_ids is None else candidate_ids[index]
        support = np.union1d(order[:top_k], candidates).astype(int)
        outside = np.delete(logprobs, support)
        likely = logprobs > -np.inf
        rows.append(
            {
                "top_ids": order[:top_k],
                "top_logprobs": logprobs[order[:top_k]],
                "sampled_logprobs": logprobs[targets[index]],
                "candidate_logprobs": logprobs[candidates],
                "log_tail": np.logaddexp.reduce(logprobs[order[top_k:]], initial=-np.inf),
                "log_support_tail": np.logaddexp.reduce(outside, initial=-np.inf),
                "entropy": -np.sum(np.exp(logprobs[likely]) * logprobs[likely]),
                "log_normalizer": normalizer,
            }
        )
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
